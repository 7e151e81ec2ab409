"""Imported by the server that the integration tests fork their processes from: one step of
training in each form, so that every process begins with torch imported and used once."""

import tempfile
from pathlib import Path

from fc_mnist_runs import SMALL, run_here, write_params

with tempfile.TemporaryDirectory() as _folder:
    _params = write_params(Path(_folder, "p.yaml"), {**SMALL, "runconfig.max_steps": 1})
    run_here("train", _params, Path(_folder, "plain")).succeeded()
    run_here("train", _params, Path(_folder, "compiled"), "--cs_ip", "local").succeeded()
