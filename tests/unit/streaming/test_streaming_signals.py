"""Processes that load data outlive the first SIGTERM or Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from openwafer.streaming.signals import OutlivedSignal


def signal_and_wait(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    threading.Event().wait(10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with OutlivedSignal(grace_seconds=60):
        os.kill(os.getpid(), number)
        with pytest.raises(SystemExit) as ending:
            signal_and_wait(signal.SIGTERM)
    assert ending.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(number) == before


def test_the_grace_time_ends() -> None:
    began = time.monotonic()
    with OutlivedSignal(grace_seconds=0.1), pytest.raises(SystemExit) as ending:
        signal_and_wait(signal.SIGTERM)
    assert ending.value.code == 128 + signal.SIGTERM
    assert time.monotonic() - began < 9


def test_no_timer_is_left() -> None:
    with OutlivedSignal(grace_seconds=1):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.2)  # a timer that is left would end the tests here


def test_interrupt_reaches_the_main_thread() -> None:
    with OutlivedSignal() as signals:
        threading.Timer(0.1, signals.interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
        assert signals.interrupted


def test_a_handler_of_the_user_is_respected() -> None:
    seen: list[int] = []
    with OutlivedSignal() as signals:
        previous = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
        thread = threading.Thread(target=signals.interrupt)
        thread.start()
        thread.join()
        signal.signal(signal.SIGINT, previous)
    assert not signals.interrupted
    assert seen == []


def test_a_loading_process_ends_at_the_second_signal() -> None:
    code = """
import time
from openwafer.streaming.signals import outlive_first_signal
outlive_first_signal()
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
