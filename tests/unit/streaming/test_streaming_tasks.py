"""Roles from SLURM's variables, addresses, and the documented cluster questions."""

from __future__ import annotations

from pathlib import Path

import pytest

from openwafer.errors import ConfigError, LaunchError
from openwafer.streaming import tasks
from openwafer.streaming.address import format_address, parse_address


def environment(**variables: str) -> tasks.TaskEnvironment:
    return tasks.TaskEnvironment.from_variables(variables)


def test_without_slurm_it_is_a_single_process() -> None:
    for single in (environment(), environment(SLURM_PROCID="0", SLURM_NTASKS="1")):
        assert (single.role, single.rank, single.num_workers) == ("single", 0, 0)
        assert single.secret_file is None


def test_roles() -> None:
    seven = {"SLURM_NTASKS": "7", "SLURM_JOB_ID": "42"}
    first = environment(SLURM_PROCID="0", **seven)
    last = environment(SLURM_PROCID="6", **seven)
    assert (first.role, first.num_workers, first.job_id) == ("coordinator", 6, "42")
    assert (last.role, last.rank) == ("worker", 6)


def test_the_step_counts_not_the_job() -> None:
    step = environment(SLURM_PROCID="0", SLURM_NTASKS="7", SLURM_STEP_NUM_TASKS="1")
    assert step.role == "single"


def test_the_secrets_file() -> None:
    two = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "a/../b"}
    given = environment(OPENWAFER_SECRET_FILE="/tmp/x", **two)
    assert (str(given.secret_file), given.secret_is_given) == ("/tmp/x", True)
    own = environment(**two)
    assert own.secret_file is not None
    assert own.secret_file.parent.name == ".openwafer"
    assert not own.secret_is_given
    assert not set(own.secret_file.name) & set("/ ")


SRUN = {
    "SLURM_JOB_ID": "42",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_CLUSTER_NAME": "north",
    "SLURM_JOB_START_TIME": "1790000000",
    "SLURM_STEP_LAUNCHER_PORT": "40067",
}
"""What srun of SLURM 23.02 and later gives all tasks of a step alike."""


def secret_names(shared: dict[str, str]) -> set[Path | None]:
    """As the two tasks of one run call it, on two nodes."""
    own = (
        {"SLURMD_NODENAME": "n1", "SLURM_SRUN_COMM_PORT": "40067", "SLURM_TASK_PID": "811"},
        {"SLURMD_NODENAME": "n2", "SLURM_SRUN_COMM_PORT": "40068", "SLURM_TASK_PID": "97"},
    )
    places = [environment(SLURM_PROCID=str(i), **shared, **own[i]) for i in range(2)]
    return {place.secret_file for place in places}


@pytest.mark.parametrize(
    "later",
    [
        {"SLURM_JOB_ID": "43"},
        {"SLURM_STEP_ID": "1"},
        {"SLURM_RESTART_COUNT": "1", "SLURM_JOB_START_TIME": "1790000000"},
        {"SLURM_CLUSTER_NAME": "south"},
        {"SLURM_JOB_START_TIME": "1790000999"},
        {"SLURM_STEP_LAUNCHER_PORT": "35441"},
    ],
)
@pytest.mark.parametrize("missing", [None, "SLURM_JOB_START_TIME", "SLURM_CLUSTER_NAME"])
def test_no_run_finds_what_an_earlier_one_left(later: dict[str, str], missing: str | None) -> None:
    """A recurring job number, another cluster, a requeued job: each has a name of its own, on which
    its own tasks agree, also where SLURM does not set all of the variables."""
    first = {name: value for name, value in SRUN.items() if name != missing}
    second = {name: value for name, value in (SRUN | later).items() if name != missing}
    names = secret_names(first), secret_names(second)
    assert [len(name) for name in names] == [1, 1]
    assert (names[0] == names[1]) == (first == second)


def test_the_components_of_a_heterogeneous_job_are_one_run() -> None:
    """Each has an srun port of its own, and a start time that may be another second."""
    one = environment(SLURM_PROCID="0", SLURM_HET_SIZE="2", **SRUN)
    two = {"SLURM_JOB_START_TIME": "1790000001", "SLURM_STEP_LAUNCHER_PORT": "40069"}
    other = environment(SLURM_PROCID="1", SLURM_HET_SIZE="2", **(SRUN | two))
    assert one.secret_file == other.secret_file
    again = SRUN | {"SLURM_RESTART_COUNT": "1"}
    assert environment(SLURM_PROCID="0", SLURM_HET_SIZE="2", **again).secret_file != one.secret_file


@pytest.mark.parametrize(
    ("rank", "count"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "two"), ("0", "0")]
)
def test_nonsense_is_an_error(rank: str, count: str) -> None:
    with pytest.raises(LaunchError, match="SLURM_"):
        environment(SLURM_PROCID=rank, SLURM_NTASKS=count)


@pytest.mark.parametrize(
    ("rank", "count", "expected"),
    [
        # master, streamer, tasks, streamers, streaming rank
        ("", "", (True, True, 1, 1, 0)),
        ("0", "4", (True, False, 4, 3, 0)),
        ("1", "4", (False, True, 4, 3, 0)),
        ("3", "4", (False, True, 4, 3, 2)),
    ],
)
def test_what_user_code_asks(
    monkeypatch: pytest.MonkeyPatch, rank: str, count: str, expected: tuple[object, ...]
) -> None:
    monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", count)
    tasks.forget_consulted()
    asked = (
        tasks.is_master_ordinal(),
        tasks.is_streamer(),
        tasks.num_tasks(),
        tasks.num_streamers(),
    )
    assert not tasks.was_consulted()
    assert (*asked, tasks.get_streaming_rank()) == expected
    assert tasks.was_consulted()
    assert tasks.get_ordinal() == int(rank or 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9001", ("127.0.0.1", 9001)),
        ("node-1", ("node-1", 9000)),
        ("[::1]:0", ("::1", 0)),
        ("[::1]", ("::1", 9000)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected
    assert parse_address(format_address(*expected)) == expected


@pytest.mark.parametrize(
    "text", ["", ":9000", "::1", "a:b", "a:", "a:70000", "[::1", "[::1]x", "a:-1", "a:1:2"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        parse_address(text)
