from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hone.errors import ToolchainError, UsageError
from hone.tuning import journal


def test_read_returns_every_value_when_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"[1]\n[2]\n")
    assert journal.read(path) == journal.Contents(values=([1], [2]), warnings=(), torn=False)


def test_read_is_empty_when_the_file_is_missing(tmp_path: Path) -> None:
    assert journal.read(tmp_path / "log").values == ()


def test_read_drops_the_last_line_when_it_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'[1]\n[2, "hal')
    assert journal.read(path) == journal.Contents(
        values=([1],),
        warnings=(f"{path}: the last line was cut short, and its 8 bytes are dropped.",),
        torn=True,
    )
    assert path.read_bytes() == b'[1]\n[2, "hal'


def test_read_keeps_the_last_line_when_only_its_newline_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"[1]\n[2]")
    assert journal.read(path) == journal.Contents(values=([1], [2]), warnings=(), torn=True)


def test_read_keeps_positions_when_a_line_in_the_middle_is_garbage(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"[1]\n\xff\x00\n[3]\n")
    contents = journal.read(path)
    assert contents.values == ([1], None, [3])
    assert contents.warnings == (f"{path}: line 2 is not readable and is ignored.",)


@pytest.mark.parametrize("cut", range(1, 22))
def test_read_never_invents_a_value_when_the_file_ends_anywhere(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'[1, "a"]\n[20, {"b": 2.5}]\n'[:-cut])
    assert journal.read(path).values in ((), ([1, "a"],), ([1, "a"], [20, {"b": 2.5}]))


def test_append_adds_one_line_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "log"
    appender = journal.Appender(path)
    appender.append([1])
    assert path.read_bytes() == b"[1]\n"
    appender.append({"b": 1, "a": 2})
    appender.close()
    assert path.read_bytes() == b'[1]\n{"a":2,"b":1}\n'


def test_append_leaves_the_file_as_it_was_when_the_disk_is_full(tmp_path: Path) -> None:
    path = tmp_path / "log"
    appender = journal.Appender(path)
    appender.append([1])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # a full disk: the write is cut short
    try:
        with pytest.raises(ToolchainError) as caught:
            appender.append(["a long line"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        appender.close()
    assert str(caught.value) == (
        f"{path}: a tuning record could not be written: No space left on device.\n"
        "  hint: make room, and run the same command again: what was written is kept."
    )
    assert path.read_bytes() == b"[1]\n"


def test_rewrite_replaces_the_file_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"[1]\n[2")
    with path.open("rb") as reader:
        journal.rewrite(path, [[1]])
        assert reader.read() == b"[1]\n[2"  # who had it open reads the old one to its end
    assert path.read_bytes() == b"[1]\n"
    assert os.listdir(tmp_path) == ["log"]


def test_lock_says_who_holds_it_and_is_free_again_when_that_process_is_killed(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys, pathlib; from hone.tuning import journal\n"
        "with journal.lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError) as caught, journal.lock(path):
            pass
        assert str(caught.value) == (
            f"{tmp_path}: another process is writing this tuning database: "
            f"process {holder.pid} (-c {path}).\n"
            "  hint: wait for it, stop it, or tune into another folder."
        )
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with journal.lock(path):
        assert path.read_text().startswith(f"process {os.getpid()} (")
