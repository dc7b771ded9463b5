from __future__ import annotations

import io
import re
import sys

import pytest

from hone import progress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def heartbeat(stream, clock):
    return progress._Heartbeat(stream, clock)


def test_heartbeat_writes_start_and_end_of_a_task(heartbeat, stream, clock):
    with heartbeat.task("tune", total=8) as task:
        clock.now += 2
        task.update(completed=8, detail="best 0.4 ms")
    assert stream.getvalue().splitlines() == [
        "tune ...",
        "tune: done after 2.0 s (8/8, best 0.4 ms)",
    ]


def test_heartbeat_writes_one_line_each_5_s_however_often_a_task_reports(heartbeat, stream, clock):
    with heartbeat.task("recover") as task:
        for step in range(24):
            clock.now += 0.5
            task.update(completed=step)
    assert stream.getvalue().splitlines()[1:-1] == ["recover: 5 s, 9", "recover: 10 s, 19"]


def test_heartbeat_names_the_outer_tasks(heartbeat, stream, clock):
    with heartbeat.task("int8"), heartbeat.task("measure", total=10) as task:
        clock.now += 6
        task.update(completed=3)
    assert stream.getvalue().splitlines() == [
        "int8 ...",
        "int8 > measure ...",
        "int8 > measure: 6 s, 3/10",
        "int8 > measure: done after 6.0 s (3/10)",
        "int8: done after 6.0 s",
    ]


def test_heartbeat_says_stopped_when_a_task_raises(heartbeat, stream):
    with pytest.raises(ZeroDivisionError), heartbeat.task("compile"):
        raise ZeroDivisionError
    assert stream.getvalue().splitlines()[-1] == "compile: stopped after 0.0 s"


def test_heartbeat_beats_by_itself_when_a_task_does_not_report(heartbeat, stream, clock):
    with heartbeat.task("compile"):
        clock.now += 7
        heartbeat.beat()  # what the timer thread calls
    assert "compile: 7 s" in stream.getvalue().splitlines()


def test_heartbeat_thread_ends_with_the_last_task(heartbeat):
    with heartbeat.task("compile"):
        stop = heartbeat._stop
        assert stop is not None
        assert not stop.is_set()
    assert stop.is_set()


def test_heartbeat_goes_on_when_its_reader_left():
    shown = progress.console(ClosedPipe())
    with shown.task("compile") as task:
        task.update(completed=1)
    shown.log("text")


def test_console_writes_lines_to_stderr_when_it_is_no_terminal(capsys):
    shown = progress.console()
    with shown.task("compile"):
        shown.log("3 of 4 kernels from the database")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[:2] == ["compile ...", "3 of 4 kernels from the database"]


def test_console_draws_nested_bars_on_a_terminal(capsys):
    terminal = Terminal()
    shown = progress.console(terminal)
    with shown.task("build", total=2) as outer:
        with shown.task("measure [x]", total=10) as inner:
            inner.update(completed=10, detail="median [red] 0.4 ms")
            shown.log("kept [int8]")
        outer.update(completed=2)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "kept [int8]" in text
    assert "build" in text
    assert capsys.readouterr() == ("", "")


def test_console_leaves_the_terminal_usable_when_a_task_raises():
    terminal = Terminal()
    shown = progress.console(terminal)
    with pytest.raises(KeyboardInterrupt), shown.task("a"), shown.task("b"):
        raise KeyboardInterrupt
    assert terminal.getvalue().rstrip().endswith(("\x1b[?25h", "\x1b[2K"))
    with shown.task("again"):
        pass


def test_silent_writes_nothing(capsys):
    shown = progress.silent()
    with shown.task("build", total=1) as task:
        task.update(completed=1, detail="x")
    shown.log("text")
    assert capsys.readouterr() == ("", "")


def test_module_is_light():
    import subprocess

    code = "import sys, hone.progress; print('rich' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
