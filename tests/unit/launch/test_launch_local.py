"""Local tasks: their variables, output, failure, signals, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openwafer.errors import LaunchError
from openwafer.launch.local import launch_local
from openwafer.launch.output import LinePrefixer


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code), *arguments]


def is_alive(pid: int) -> bool:
    """Running, that is neither gone nor a zombie that nobody has fetched."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: object, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def read_pid(path: Path) -> int:
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


REPORT = """
    import json, os, stat, sys
    secret = os.environ["OPENWAFER_SECRET_FILE"]
    folder = os.path.dirname(secret)
    report = {k: v for k, v in os.environ.items() if k.startswith(("SLURM", "PMI", "MARK"))}
    report["size"] = os.path.getsize(secret)
    report["modes"] = [stat.S_IMODE(os.stat(p).st_mode) for p in (folder, secret)]
    report["folder"] = folder
    report["group"] = os.getpgid(0)
    with open(os.path.join(sys.argv[1], os.environ["SLURM_PROCID"]), "w") as file:
        json.dump(report, file)
"""


def test_tasks_find_what_srun_gives_and_nothing_of_an_outer_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "77")
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("PMI_RANK", "5")
    monkeypatch.setenv("OPENWAFER_SECRET_FILE", "/elsewhere")
    monkeypatch.setenv("MARK", "kept")
    assert launch_local(python(REPORT, str(tmp_path)), 3) == 0
    reports = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(3)]
    for rank, report in enumerate(reports):
        assert report["SLURM_PROCID"] == report["SLURM_LOCALID"] == str(rank)
        assert report["SLURM_NTASKS"] == report["SLURM_STEP_NUM_TASKS"] == "3"
        assert report["SLURM_JOB_ID"] == f"local-{os.getpid()}"
        assert (report["SLURM_NODEID"], report["SLURM_NODELIST"]) == ("0", "localhost")
        assert not {"SLURM_ARRAY_TASK_ID", "PMI_RANK"} & set(report)
        assert (report["MARK"], report["size"], report["modes"]) == ("kept", 32, [0o700, 0o600])
    assert len({report["group"] for report in reports}) == 3
    assert not os.path.exists(reports[0]["folder"])
    assert os.environ["SLURM_PROCID"] == "5"


def test_the_given_environment_is_the_base(tmp_path: Path) -> None:
    code = "import os, sys; sys.exit(os.environ.get('ONLY') != 'this' or 'HOME' in os.environ)"
    assert launch_local(python(code), 1, env={"ONLY": "this"}) == 0


def test_workers_lines_are_marked_and_the_coordinators_are_not(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    code = """
        import os, sys
        rank = os.environ["SLURM_PROCID"]
        sys.stdout.write(f"a{rank}\\rb{rank}\\nlast{rank}")
        sys.stderr.write(f"error{rank}\\n")
    """
    assert launch_local(python(code), 3) == 0
    out, err = capfdbinary.readouterr()
    assert b"a0\rb0\nlast0" in out
    for rank in (b"1", b"2"):
        for text in (b"a", b"b", b"last"):
            assert b"[%s] %s%s\n" % (rank, text, rank) in out
        assert b"[%s] error%s\n" % (rank, rank) in err
    assert b"error0\n" in err


@given(st.lists(st.binary(max_size=20), max_size=8))
def test_prefixed_lines_do_not_depend_on_how_bytes_arrive(pieces: list[bytes]) -> None:
    prefixer = LinePrefixer(b"> ")
    found = b"".join(map(prefixer.feed, pieces)) + prefixer.finish()
    whole = b"".join(pieces).replace(b"\r", b"\n")
    assert found == b"".join(b"> " + line + b"\n" for line in whole.split(b"\n") if line)


def test_an_endless_line_is_not_kept_in_memory() -> None:
    prefixer = LinePrefixer(b"> ")
    assert len(prefixer.feed(b"x" * 100_000)) > 100_000
    assert prefixer.finish() == b""


@pytest.mark.parametrize("num_tasks", [0, -1])
def test_fewer_than_one_task(num_tasks: int) -> None:
    with pytest.raises(LaunchError, match="cannot start"):
        launch_local(["true"], num_tasks)


def test_commands_that_cannot_be_started(tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.write_text("")
    for command in ([], [""], ["no-such-program-of-ours"], [str(plain)], [str(tmp_path)], ["a\0b"]):
        with pytest.raises(LaunchError):
            launch_local(command, 2)


FAIL = """
    import os, pathlib, subprocess, sys, time
    rank, folder = os.environ["SLURM_PROCID"], pathlib.Path(sys.argv[1])
    if rank == "2":
        time.sleep(0.3)
        ACTION
    child = subprocess.Popen(["sleep", "1000"])
    (folder / rank).write_text(f"{os.getpid()}\\n")
    (folder / f"child{rank}").write_text(f"{child.pid}\\n")
    time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("action", "code", "text"),
    [
        ("sys.exit(7)", 7, "failed with exit code 7"),
        ("os.kill(os.getpid(), 9)", 137, "was ended by SIGKILL"),
    ],
)
def test_a_failing_task_ends_the_others_and_their_children(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], action: str, code: int, text: str
) -> None:
    started = time.monotonic()
    command = python(FAIL.replace("ACTION", action), str(tmp_path))
    assert launch_local(command, 3, max_restarts=0, settle_seconds=0.3, grace_seconds=60) == code
    assert time.monotonic() - started < 50
    assert f"openwafer launch: task 2 (worker) {text}" in capfd.readouterr().err
    pids = [read_pid(tmp_path / name) for name in ("0", "child0", "1", "child1")]
    # All are killed; nobody waits for a child of a task.
    wait_until(lambda: not any(map(is_alive, pids)), seconds=60)


def test_a_task_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, time
        if os.environ["SLURM_PROCID"] == "1":
            time.sleep(0.5)
            sys.exit(3)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    """
    assert launch_local(python(code), 2, settle_seconds=0.1, grace_seconds=0.4) == 3


def test_the_others_have_time_to_say_why(capfd: pytest.CaptureFixture[str]) -> None:
    code = """
        import os, sys, time
        if os.environ["SLURM_PROCID"] == "1":
            sys.exit(3)
        time.sleep(0.5)
        print("worker 1 was lost")
        sys.exit(2)
    """
    assert launch_local(python(code), 2, settle_seconds=10) == 3
    assert "worker 1 was lost" in capfd.readouterr().out


LAUNCHER = """
    import sys
    from openwafer.launch.local import launch_local
    sys.exit(launch_local(sys.argv[1:], 2, grace_seconds=60))
"""
SLEEPER = """
    import os, pathlib, signal, sys, time
    rank, folder = os.environ["SLURM_PROCID"], pathlib.Path(sys.argv[1])
    def note(number, frame):
        (folder / f"signal{rank}").write_text(f"{number}\\n")
        sys.exit(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    (folder / rank).write_text(f"{os.getpid()}\\n")
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_forwarded(tmp_path: Path, number: signal.Signals) -> None:
    command = python(LAUNCHER, *python(SLEEPER, str(tmp_path)))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as launcher:
        pids = [read_pid(tmp_path / rank) for rank in "01"]
        launcher.send_signal(number)
        assert launcher.wait(90) == 128 + number
    assert [read_pid(tmp_path / f"signal{rank}") for rank in "01"] == [number, number]
    assert not any(map(is_alive, pids))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs PR_SET_PDEATHSIG")
def test_tasks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    command = python(LAUNCHER, *python(SLEEPER, str(tmp_path)))
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as launcher:
        pids = [read_pid(tmp_path / rank) for rank in "01"]
        launcher.kill()
    wait_until(lambda: not any(map(is_alive, pids)))


STREAM = """
    import os, sys, torch
    from torch.utils.data import DataLoader, TensorDataset
    from openwafer.errors import OpenWaferError
    from openwafer.streaming import tasks
    from openwafer.streaming.loader import BatchSequence
    from openwafer.streaming.meeting import open_coordinator
    from openwafer.streaming.worker import run_worker, worker_shard

    def losses(source):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for epoch in range(2):
            for x, y in source.epoch(epoch):
                loss = (model(x) - y).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                yield loss.item()

    def sequence(mode, **shard):
        x = torch.linspace(-1, 1, 90).reshape(30, 3)
        loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
        return BatchSequence(loader, seed=3, **shard)

    here, address = tasks.current(), sys.argv[1]
    try:
        if here.role == "worker":
            shard = worker_shard(here)
            if sys.argv[2] == "die" and here.rank == 2 and not os.path.exists(sys.argv[3]):
                class Fatal(BatchSequence):
                    def epoch(self, epoch, start=0):
                        yield from list(super().epoch(epoch, start))[:1]
                        if sys.argv[3] != "always":
                            open(sys.argv[3], "w").close()
                        os.kill(os.getpid(), 9)
                BatchSequence = Fatal
            run_worker(lambda mode: sequence(mode, shard=shard), address, here)
        elif here.role == "coordinator":
            with open_coordinator(address, here) as coordinator:
                print("losses", *losses(coordinator.source("train")))
        else:
            print("losses", *losses(sequence("train")))
    except OpenWaferError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
"""


def free_address() -> str:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("num_tasks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_losses_are_the_same_with_and_without_workers(
    capfd: pytest.CaptureFixture[str], num_tasks: int
) -> None:
    found: list[str] = []
    for count in (1, num_tasks):
        assert launch_local(python(STREAM, free_address(), "live"), count) == 0
        found.append(capfd.readouterr().out)
    assert found[0].startswith("losses ")
    assert len(found[0].split()) == 1 + 16
    assert found[1] == found[0]


def test_a_worker_that_dies_ends_the_run_with_its_name(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(python(STREAM, free_address(), "die", "always"), 3, max_restarts=0) == 137
    errors = capfd.readouterr().err
    assert "task 2 (worker) was ended by SIGKILL" in errors
    assert "worker 2 (host" in errors
    assert "was lost" in errors


def test_a_worker_that_was_killed_goes_on_where_it_stopped(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert launch_local(python(STREAM, free_address(), "live"), 1) == 0
    alone = capfd.readouterr().out
    died = tmp_path / "died"
    assert launch_local(python(STREAM, free_address(), "die", str(died)), 3) == 0
    output, errors = capfd.readouterr()
    assert died.exists()
    assert output == alone
    assert "task 2 (worker) was ended by SIGKILL; it is started again" in errors


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_local(python(STREAM, free_address(), "die", "always"), 3, max_restarts=1) != 0
    errors = capfd.readouterr().err
    assert errors.count("it is started again") == 1
    assert "task 2 (worker) was ended by SIGKILL; ending the others" in errors


def test_the_launcher_does_not_load_torch() -> None:
    code = "import sys, openwafer.launch.local; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
