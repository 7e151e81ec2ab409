"""A real SLURM for the tests of this folder, or a reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator

import local_slurm
import pytest
from slurm_client import Cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        local_slurm.check_machine()
    except local_slurm.MissingSlurmError as error:
        pytest.skip(f"no SLURM here: {error}")
    folder = tmp_path_factory.mktemp("slurm")
    for parent in (folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)  # munge wants its socket's path to be open to everybody
    local_slurm.start(folder)
    yield Cluster(folder)
    local_slurm.stop(folder)
