from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import tvm
from tvm import relax

from hone.database import Database
from hone.errors import HoneError, InterruptError, OutOfTimeError, UsageError
from hone.targets.target import resolve
from hone.tune import tune
from hone.tuning import files as database_module
from hone.tuning.records import Verdict, kernels

HOST = resolve("host")
LONG_S = 240.0
"""A budget that no test reaches: their searches end by exhaustion or by what the test does."""


def matmuls() -> tvm.IRModule:
    """``relu(x @ w)`` twice with the same shapes, then another one: two distinct kernels."""
    rng = np.random.default_rng(7)
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((64, 48), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            value = x
            for columns in (48, 48, 56):
                weight = relax.const(rng.standard_normal((48, columns)).astype("float32"))
                value = block.emit(relax.op.nn.relu(relax.op.matmul(value, weight)))
            result = block.emit_output(value)
        block.emit_func_output(result)
    return relax.get_pipeline("zero")(block.get())


def tiny() -> tvm.IRModule:
    """Two elementwise kernels whose search spaces are small enough to exhaust."""
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, 5), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            value = block.emit(relax.op.nn.relu(x))
            result = block.emit_output(relax.op.exp(value))
        block.emit_func_output(result)
    module = relax.transform.LegalizeOps()(block.get())
    return relax.transform.DeadCodeElimination()(module)


class Watcher:
    """A progress that calls a function at each step of the parent's loop."""

    def __init__(self, step: Callable[[], None] = lambda: None) -> None:
        self._step = step
        self.details: list[str] = []
        self.messages: list[str] = []

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Watcher]:
        yield self

    def update(self, completed: float | None = None, detail: str | None = None) -> None:
        self.details.append(detail or "")
        self._step()

    def log(self, message: str) -> None:
        self.messages.append(message)


def searchers(parent: int) -> list[psutil.Process]:
    """Search processes that a process started."""
    return [
        child
        for child in psutil.Process(parent).children()
        if any("tuning.worker" in part for part in child.cmdline())
    ]


def count(database: Database) -> int:
    path = database.folder / database_module.RECORDS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def traces(database: Database) -> list[str]:
    lines = (database.folder / database_module.RECORDS).read_bytes().splitlines()
    return [json.dumps([owner, record[0]]) for owner, record in map(json.loads, lines)]


def open_database(root: Path) -> Database:
    return Database(root, HOST, threads=1)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)


SCRIPT = """
import pathlib, sys, tvm
from hone.database import Database
from hone.errors import HoneError
from hone.targets.target import resolve
from hone.tune import tune
if __name__ == "__main__":
    root = pathlib.Path(sys.argv[1])
    module = tvm.ir.load_json((root / "module.json").read_text())
    target = resolve("host")
    try:
        tune(module, target, threads=1, budget_s=240.0, database=Database(root, target, threads=1))
    except HoneError as error:
        sys.exit(print(error, file=sys.stderr) or error.exit_code)
"""


@contextmanager
def tuning(root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that tunes until something ends it."""
    (root / "module.json").write_text(tvm.ir.save_json(matmuls()))
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(root)], stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_tuning_ends_with_records_that_are_found_when_the_spaces_are_exhausted(
    tmp_path: Path,
) -> None:
    watcher = Watcher()
    database = open_database(tmp_path)
    result = tune(tiny(), HOST, threads=1, budget_s=LONG_S, database=database, progress=watcher)
    assert result.exhausted
    assert result.quarantined == ()
    assert result.records == len(database) == len(open_database(tmp_path)) > 0
    assert result.trials >= result.records
    assert result.first_record_s is not None
    assert 0 < result.first_record_s < result.elapsed_s < LONG_S
    module = tiny()
    assert database.hit_rate(module).missing == ()
    names = {kernel.name for kernel in result.kernels}
    assert names == set(kernels(module))
    for kernel in result.kernels:
        assert kernel.calls == 1
        assert kernel.before_ms is None
        assert kernel.untuned_ms is not None
        assert kernel.after_ms is not None
    applied = database.apply(module)
    assert applied.misses == applied.failed == ()
    assert set(applied.hits) | set(applied.kept) == names
    # There was time for the model: whatever is used was confirmed inside it.
    fresh = open_database(tmp_path)
    assert fresh.apply(module).hits == applied.hits
    for name, func in kernels(module).items():
        match = fresh.lookup(func)
        assert match is not None
        assert (name in applied.hits) == (match.verdict is Verdict.CONFIRMED)
        assert (name in applied.rejected) == (match.verdict is Verdict.REJECTED)
    assert all(kernel.model_ms is not None for kernel in result.kernels)
    assert (result.model_speedup is not None) == bool(applied.hits)
    assert any("best so far" in detail and "s left" in detail for detail in watcher.details)
    # A second session starts from what the first one knows, and measures nothing twice.
    again = tune(module, HOST, threads=1, budget_s=LONG_S, database=database)
    assert again.exhausted
    for before, after in zip(result.kernels, again.kernels, strict=True):
        assert after.before_ms == before.after_ms
    assert len(traces(database)) == len(set(traces(database)))


def test_sigint_keeps_every_record_and_exits_130(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    with tuning(tmp_path) as process:
        wait_until(lambda: count(database) >= 3, process)
        (child,) = searchers(process.pid)
        family = [child, *child.children(recursive=True)]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == InterruptError.exit_code == 130
    after = open_database(tmp_path)
    assert len(after) >= 3
    assert after.warnings == ()
    assert f"the {len(after)} records of this session are kept" in errors
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []


def test_database_survives_when_the_parent_is_killed_and_a_rerun_resumes(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    with tuning(tmp_path) as process:
        wait_until(lambda: count(database) >= 3, process)
        (child,) = searchers(process.pid)
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs([child], timeout=30)
    assert alive == []
    kept = open_database(tmp_path)
    before = len(kept)
    assert before >= 3

    def stop() -> None:
        if count(kept) > before:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptError):
        tune(matmuls(), HOST, threads=1, budget_s=LONG_S, database=kept, progress=Watcher(stop))
    assert len(open_database(tmp_path)) > before
    assert len(traces(kept)) == len(set(traces(kept)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_killed_search_is_replaced_and_its_kernel_quarantined(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    killed: list[int] = []

    def kill_once() -> None:
        if not killed and count(database):
            (child,) = searchers(os.getpid())
            killed.append(child.pid)
            child.kill()

    watcher = Watcher(kill_once)
    result = tune(tiny(), HOST, threads=1, budget_s=LONG_S, database=database, progress=watcher)
    assert len(killed) == 1
    (quarantined,) = result.quarantined
    reason = "the search died by SIGKILL while it worked on this kernel"
    assert quarantined.reason == reason
    assert f"quarantined {quarantined.kernel}: {reason}" in watcher.messages
    assert {kernel.name for kernel in result.kernels if kernel.trials} == set(kernels(tiny()))
    assert result.records == len(open_database(tmp_path))


def test_a_search_that_hangs_is_replaced_and_its_kernel_quarantined(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    stopped: list[int] = []

    def stop_once() -> None:
        if not stopped and count(database):
            (child,) = searchers(os.getpid())
            stopped.append(child.pid)
            child.send_signal(signal.SIGSTOP)

    result = tune(
        tiny(),
        HOST,
        threads=1,
        budget_s=LONG_S,
        database=database,
        progress=Watcher(stop_once),
        watchdog_s=12.0,
    )
    (quarantined,) = result.quarantined
    assert quarantined.reason == ("the search was silent for 12 s while it worked on this kernel")
    assert not psutil.pid_exists(stopped[0])
    assert result.exhausted


def test_tuning_works_when_the_temporary_folder_has_a_long_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fork server listens on a socket, whose path the system limits to 108 bytes.
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    database = open_database(tmp_path)

    def stop() -> None:
        if count(database):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptError):
        tune(tiny(), HOST, threads=1, budget_s=LONG_S, database=database, progress=Watcher(stop))
    assert len(database) > 0


def test_a_session_without_a_record_says_so_and_is_exit_11(tmp_path: Path) -> None:
    with pytest.raises(OutOfTimeError) as caught:
        tune(matmuls(), HOST, threads=1, budget_s=0.01, database=open_database(tmp_path))
    assert caught.value.exit_code == 11
    assert "without a valid record (0 candidates tried, budget 0.01 s)." in str(caught.value)
    assert len(open_database(tmp_path)) == 0


def test_a_session_without_a_new_record_is_no_error_when_the_database_has_one(
    tmp_path: Path,
) -> None:
    database = open_database(tmp_path)

    def stop() -> None:
        if count(database):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptError):
        tune(tiny(), HOST, threads=1, budget_s=LONG_S, database=database, progress=Watcher(stop))
    before = len(database)
    result = tune(tiny(), HOST, threads=1, budget_s=0.01, database=database)
    assert result.records == 0
    assert len(open_database(tmp_path)) == before
    assert any(kernel.after_ms is not None for kernel in result.kernels)
    assert result.model_speedup is None


def test_a_session_goes_on_when_the_whole_model_cannot_be_run(tmp_path: Path) -> None:
    shape = relax.TensorType((3, 5), "float32")
    block = relax.BlockBuilder()
    x = relax.Var("x", shape)
    with block.function("main", [x]):
        with block.dataflow():
            value = block.emit(relax.op.nn.relu(x))
            missing = relax.op.call_dps_packed("hone.test.missing", value, shape)
            result = block.emit_output(missing)
        block.emit_func_output(result)
    module = relax.transform.LegalizeOps()(block.get())
    watcher = Watcher()
    result = tune(
        module, HOST, threads=1, budget_s=LONG_S, database=open_database(tmp_path), progress=watcher
    )
    assert result.exhausted
    assert result.model_speedup is None
    assert all(kernel.model_ms is None for kernel in result.kernels)
    assert any("the whole model could not be timed: " in text for text in watcher.messages)


def test_a_search_that_cannot_start_is_an_error_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no such library' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(HoneError) as caught:
        tune(tiny(), HOST, threads=1, budget_s=LONG_S, database=open_database(tmp_path))
    assert str(caught.value) == (
        "the search exited with 3 before it reached the first kernel: no such library\n"
        "  hint: this is a bug in hone; records found before are kept."
    )


def test_a_candidate_must_compute_what_the_untuned_kernel_does(tmp_path: Path) -> None:
    def wrong(workload: tvm.IRModule) -> tvm.IRModule:
        text = workload.script()
        assert "T.max" in text or "T.exp" in text
        return tvm.script.from_source(text.replace("T.max", "T.min").replace("T.exp", "T.log"))

    with pytest.raises(OutOfTimeError, match=r"relu: all \d+ candidates failed, .* differs"):
        tune(
            tiny(),
            HOST,
            threads=1,
            budget_s=LONG_S,
            database=open_database(tmp_path),
            untuned=wrong,
            tasks=["relu"],
        )


def test_nothing_is_started_when_every_kernel_is_scheduled(tmp_path: Path) -> None:
    module = tiny()
    for name in kernels(module):
        module[name] = module[name].with_attr("tirx.is_scheduled", True)
    result = tune(module, HOST, threads=1, budget_s=LONG_S, database=open_database(tmp_path))
    assert result.exhausted
    assert result.kernels == ()


def test_equal_kernels_are_one_task_whose_calls_add_up(tmp_path: Path) -> None:
    def stop() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    watcher = Watcher(stop)
    with pytest.raises(InterruptError, match="the 0 records of this session are kept"):
        tune(
            matmuls(),
            HOST,
            threads=1,
            budget_s=LONG_S,
            database=open_database(tmp_path),
            progress=watcher,
        )
    assert "0 of 2 kernels" in watcher.details[0]


def test_tune_refuses_what_cannot_work_before_any_work(tmp_path: Path) -> None:
    database = open_database(tmp_path)
    module = tiny()
    with pytest.raises(UsageError, match=r"the tuning budget must be positive, not 0 s\."):
        tune(module, HOST, threads=1, budget_s=0, database=database)
    with pytest.raises(UsageError) as caught:
        tune(module, HOST, threads=1, budget_s=9, database=database, tasks=["relu", "conv"])
    assert str(caught.value) == (
        "there is no kernel 'conv' to tune.\n  hint: the module has relu, tir_exp."
    )
    other = dataclasses.replace(HOST, name="board", features=(*HOST.features, "zzz"))
    with pytest.raises(UsageError) as caught:
        tune(module, other, threads=1, budget_s=9, database=database)
    assert str(caught.value) == (
        "target 'board' cannot be tuned on this machine, which lacks zzz: candidates are "
        "measured where they run.\n"
        "  hint: tune on the target itself and compile here with the database of that session."
    )
