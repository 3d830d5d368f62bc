"""Processes and servers of ours end with us, also when we are killed, and not before."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import redis

from tests.fakes.processes import all_processes, is_alive, wait_until_gone
from tests.fakes.waiting import wait_until
from worker import kept_process
from worker.embedded_redis import EmbeddedRedis
from worker.kept_process import KeptProcess
from worker.started_process import StartedProcess, running

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
STUBBORN = [sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"]
START_SLEEPER = f"""
from worker.started_process import StartedProcess
started = [StartedProcess({SLEEPER!r}, start_new_session=True)]
"""
START_REDIS = """
from worker import kept_process
from worker.embedded_redis import EmbeddedRedis
from worker.kept_process import KeptProcess
started = [EmbeddedRedis().start()]
"""
START_WITH_HEIR = f"""
import subprocess
from worker.started_process import StartedProcess
first = StartedProcess({SLEEPER!r}, start_new_session=True)
heir = StartedProcess({STUBBORN!r}, start_new_session=True, pass_fds=[first.lifeline], stdout=subprocess.PIPE)
heir.stdout.readline()
started = [first, heir]
"""


@contextmanager
def parent_of(code: str) -> Iterator[tuple["subprocess.Popen[bytes]", list[int]]]:
    """A process that runs the code and then waits, and the pids of what it has started."""
    code += "\nimport signal; print(*(process.pid for process in started), flush=True); signal.pause()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield process, [int(pid) for pid in process.stdout.readline().split()]
        finally:
            process.kill()


def has_guard(pid: int) -> bool:
    """Whether anybody else lives in a process's group."""
    return any(entry.group == pid and entry.pid != pid and entry.state != "Z" for entry in all_processes())


def wait_until_guarded(pid: int, expected: bool = True) -> None:
    wait_until(lambda: has_guard(pid) == expected, "the guard")


@pytest.mark.parametrize("signal_before", [None, signal.SIGSTOP])
@pytest.mark.parametrize("code", [START_SLEEPER, START_REDIS], ids=["process", "Redis"])
def test_what_a_killed_process_has_started_ends(code: str, signal_before: signal.Signals | None) -> None:
    with parent_of(code) as (parent, [pid]):
        wait_until_guarded(pid)
        assert is_alive(pid)
        if signal_before is not None:
            os.kill(pid, signal_before)
        parent.kill()
        wait_until_gone(pid)
        wait_until_guarded(pid, False)


def test_who_inherits_its_lifeline_keeps_a_process_alive() -> None:
    with parent_of(START_WITH_HEIR) as (parent, [first, heir]):
        wait_until_guarded(heir)
        parent.kill()
        wait_until_guarded(heir, False)  # it was told to end, and does not
        assert is_alive(first) and has_guard(first)
        os.kill(heir, signal.SIGKILL)
        wait_until_gone(first)


def test_a_server_lives_on_when_the_thread_that_started_it_has_ended() -> None:
    server = EmbeddedRedis()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
    finally:
        server.stop()


@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_a_process_that_has_ended_leaves_no_guard(ends_by_itself: bool) -> None:
    command = ["true"] if ends_by_itself else SLEEPER
    with running(command, start_new_session=True) as process:
        if ends_by_itself:
            assert process.wait() == 0
    assert process.poll() == (0 if ends_by_itself else -signal.SIGTERM)
    wait_until_guarded(process.pid, False)


def test_output_ends_with_the_process_and_not_with_its_guard() -> None:
    process = StartedProcess(["sh", "-c", 'echo "$1"; cat', "sh", "a  b'$"], stdout=subprocess.PIPE)
    output, errors = process.communicate()
    assert output == b"a  b'$\n" and errors is None  # there is no input to echo


def test_a_descriptor_is_passed_on_whatever_its_number() -> None:
    code = (
        "import os; from worker.started_process import StartedProcess; numbers = [3, 4, 5]; "
        "[os.dup2(1, number) for number in numbers]; "
        "StartedProcess(['sh', '-c', 'for fd in 3 4 5; do echo $fd >&$fd; done'], pass_fds=numbers).wait()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "3\n4\n5\n"


def test_what_is_killed_is_started_again_unless_it_was_killed_early_twice_in_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part = KeptProcess("part", ["/bin/sh", "-c", "kill -KILL $$"], dict(os.environ), [])
    with ExitStack() as stack:
        for can_restart in (True, False):
            part.start(stack)
            part.process.wait(20)
            assert part.was_killed and part.can_restart is can_restart
        monkeypatch.setattr(kept_process, "MIN_LIFE_SECONDS", 0.0)
        assert part.can_restart
