from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms

from hone.database import Database
from hone.errors import UsageError
from hone.targets.target import resolve
from hone.tuning import files as database_module
from hone.tuning import records
from hone.tuning.records import Verdict, choose, contenders, kernels, trace_key, workload_module

THREADS = 2
HOST = resolve("host")


def lowered(rows: int = 24) -> tvm.IRModule:
    """Two equal kernels, ``relu(x @ w)``, and one that differs."""
    rng = np.random.default_rng(7)
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((rows, 40), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            value = x
            for columns in (40, 40, 56):
                weight = relax.const(rng.standard_normal((40, columns)).astype("float32"))
                value = block.emit(relax.op.nn.relu(relax.op.matmul(value, weight)))
            result = block.emit_output(value)
        block.emit_func_output(result)
    return relax.get_pipeline("zero")(block.get())


@pytest.fixture(scope="module")
def module() -> tvm.IRModule:
    return lowered()


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "records", HOST, threads=THREADS)


def record_of(func: tvm.tirx.PrimFunc, seconds: float, tile: int = 8) -> tuple[list, list]:
    """JSON of a workload, and of a record that tiles its matmul."""
    module = workload_module(func)
    workload = ms.database.Workload(module)
    schedule = Schedule(module)
    row, column, depth = schedule.get_loops(schedule.get_sblock("matmul"))
    outer, inner = schedule.split(column, [None, tile])
    schedule.reorder(row, outer, depth, inner)
    schedule.parallel(row)
    schedule.decompose_reduction(schedule.get_sblock("matmul"), depth)
    record = ms.database.TuningRecord(
        schedule.trace,
        workload,
        [seconds] * 3,
        HOST.tvm_target(THREADS),
        ms.arg_info.ArgInfo.from_entry_func(module),
    )
    return workload.as_json(), record.as_json()


def fill(database: Database, module: tvm.IRModule, *records: tuple[str, float, int]) -> None:
    with database.writing():
        for name, seconds, tile in records:
            database.add_record(*record_of(kernels(module)[name], seconds, tile))


FIRST, OTHER = "fused_matmul_relu", "fused_matmul1_relu1"


def test_the_test_network_has_two_kernels(module: tvm.IRModule) -> None:
    assert list(kernels(module)) == [OTHER, FIRST]


def test_database_is_empty_and_writes_nothing_when_it_is_only_opened(database: Database) -> None:
    assert len(database) == 0
    assert database.warnings == ()
    assert not database.folder.exists()


def test_lookup_returns_the_fastest_record(database: Database, module: tvm.IRModule) -> None:
    fill(database, module, (FIRST, 3e-3, 8), (FIRST, 1e-3, 4), (FIRST, 2e-3, 10))
    match = database.lookup(kernels(module)[FIRST])
    assert match is not None
    assert match.record[1] == [1e-3] * 3
    assert match.seconds == pytest.approx(1e-3)
    assert database.lookup(kernels(module)[OTHER]) is None


def test_lookup_ignores_failures_and_attributes(database: Database, module: tvm.IRModule) -> None:
    fill(database, module, (FIRST, 1e10, 8))
    func = kernels(module)[FIRST]
    assert database.lookup(func) is None
    fill(database, module, (FIRST, 1e-3, 4))
    renamed = func.with_attr("layer", "conv_7").with_attr("global_symbol", "another")
    assert database.lookup(renamed) is not None


def test_lookup_finds_the_record_in_a_fresh_process(
    database: Database, module: tvm.IRModule, tmp_path: Path
) -> None:
    fill(database, module, (FIRST, 1e-3, 8))
    (tmp_path / "module.json").write_text(tvm.ir.save_json(module))
    code = (
        "import sys, pathlib, tvm\n"
        "from hone.database import Database\n"
        "from hone.tuning.records import kernels\n"
        "from hone.targets.target import resolve\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "module = tvm.ir.load_json((root / 'module.json').read_text())\n"
        "database = Database(root / 'records', resolve('host'), threads=2)\n"
        "print(list(database.hit_rate(module)))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[1, 2, ('fused_matmul1_relu1',)]\n"


def test_hit_rate_counts_kernels_and_names_the_missing(
    database: Database, module: tvm.IRModule
) -> None:
    assert database.hit_rate(module) == (0, 2, (OTHER, FIRST))
    fill(database, module, (OTHER, 1e-3, 8))
    assert database.hit_rate(module) == (1, 2, (FIRST,))
    assert database.hit_rate(lowered(rows=20)).hits == 0


def test_records_are_those_of_their_target_threads_and_tvm_only(
    tmp_path: Path, module: tvm.IRModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(Database(tmp_path, HOST, threads=2), module, (FIRST, 1e-3, 8))
    plainer = dataclasses.replace(HOST, features=HOST.features[:-1])
    assert len(Database(tmp_path, HOST, threads=2)) == 1
    assert len(Database(tmp_path, HOST, threads=1)) == 0
    assert len(Database(tmp_path, plainer, threads=2)) == 0
    bigger = dataclasses.replace(HOST, cores=HOST.cores + 6, l3_bytes=1, sources=())
    assert len(Database(tmp_path, bigger, threads=2)) == 1
    monkeypatch.setattr(records, "version", lambda _: "9.9")
    assert len(Database(tmp_path, HOST, threads=2)) == 0


def test_a_cut_last_line_is_dropped_with_a_warning_and_repaired_by_the_next_writer(
    database: Database, module: tvm.IRModule, tmp_path: Path
) -> None:
    fill(database, module, (FIRST, 2e-3, 8), (FIRST, 1e-3, 4))
    path = database.folder / database_module.RECORDS
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])

    again = Database(tmp_path / "records", HOST, threads=THREADS)
    assert len(again) == 1
    (warning,) = again.warnings
    assert warning.startswith(f"{path}: the last line was cut short, and its ")
    assert path.read_bytes() == whole[:-40]  # a reader repairs nothing

    fill(again, module, (FIRST, 3e-3, 10))
    third = Database(tmp_path / "records", HOST, threads=THREADS)
    assert third.warnings == ()
    assert len(third) == 2
    assert all(isinstance(json.loads(line), list) for line in path.read_bytes().splitlines())


def test_records_of_a_lost_kernel_are_dropped_and_its_place_is_not_reused(
    database: Database, module: tvm.IRModule, tmp_path: Path
) -> None:
    fill(database, module, (FIRST, 1e-3, 8), (OTHER, 1e-3, 8))
    path = database.folder / database_module.WORKLOADS
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"garbage" + first + b"\n" + second + b"\n")
    again = Database(tmp_path / "records", HOST, threads=THREADS)
    assert [text.rpartition(": ")[2] for text in again.warnings] == [
        "line 1 is not readable and is ignored.",
        "ignored.",
    ]
    assert again.hit_rate(module) == (1, 2, (FIRST,))
    fill(again, module, (FIRST, 2e-3, 8))
    final = Database(tmp_path / "records", HOST, threads=THREADS)
    assert final.warnings == ()
    assert final.hit_rate(module) == (2, 2, ())


def test_writing_fails_when_another_writer_is_at_work(database: Database) -> None:
    with (
        database.writing(),
        pytest.raises(UsageError, match="another process is writing this tuning database"),
        Database(database.folder.parents[1], HOST, threads=THREADS).writing(),
    ):
        pass


def test_scratch_folder_is_emptied_of_what_a_killed_writer_left(database: Database) -> None:
    with (
        pytest.raises(RuntimeError, match="only a writer has a scratch folder"),
        database.scratch(),
    ):
        pass
    with database.writing():
        left = database.folder / database_module.SCRATCH
        left.mkdir()
        (left / "0.npz").write_bytes(b"left")
        with database.scratch() as folder:
            assert list(folder.iterdir()) == []
            (folder / "1.npz").write_bytes(b"new")
        assert not left.exists()


def test_adding_outside_of_writing_is_refused(database: Database, module: tvm.IRModule) -> None:
    with pytest.raises(RuntimeError, match="open for reading"):
        database.add_record(*record_of(kernels(module)[FIRST], 1e-3))


def test_a_reader_sees_what_was_written_before_it_opened(
    database: Database, module: tvm.IRModule, tmp_path: Path
) -> None:
    with database.writing():
        database.add_record(*record_of(kernels(module)[FIRST], 1e-3))
        assert len(Database(tmp_path / "records", HOST, threads=THREADS)) == 1


def test_files_are_readable_by_tvm(database: Database, module: tvm.IRModule) -> None:
    fill(database, module, (FIRST, 1e-3, 8), (OTHER, 2e-3, 8))
    theirs = ms.database.JSONDatabase(work_dir=str(database.folder))
    assert len(theirs) == 2
    workload = workload_module(kernels(module)[FIRST])
    assert theirs.query_tuning_record(workload, HOST.tvm_target(2), "main") is not None


def test_as_tvm_answers_queries(database: Database, module: tvm.IRModule) -> None:
    fill(database, module, (FIRST, 2e-3, 8), (FIRST, 1e-3, 4))
    theirs = database.as_tvm()
    workload = workload_module(kernels(module)[FIRST])
    record = theirs.query_tuning_record(workload, HOST.tvm_target(2), "main")
    assert float(record.run_secs[0]) == 1e-3


def test_fingerprint_depends_on_the_records_and_not_on_their_order(
    tmp_path: Path, module: tvm.IRModule
) -> None:
    there = Database(tmp_path / "there", HOST, threads=2)
    back = Database(tmp_path / "back", HOST, threads=2)
    assert there.fingerprint() == back.fingerprint()
    fill(there, module, (FIRST, 1e-3, 8))
    assert there.fingerprint() != back.fingerprint()
    fill(there, module, (OTHER, 2e-3, 4))
    fill(back, module, (OTHER, 2e-3, 4), (FIRST, 1e-3, 8))
    assert there.fingerprint() == back.fingerprint()
    with back.writing():
        back.add_task("123", name="conv", untuned_s=1e-3)
    assert there.fingerprint() != back.fingerprint()


def test_stats_and_show_describe_the_records_without_loading_tvm(
    database: Database, module: tvm.IRModule, tmp_path: Path
) -> None:
    fill(database, module, (FIRST, 2e-3, 8), (FIRST, 1e-3, 4))
    key = record_of(kernels(module)[FIRST], 1.0)[0][0]
    with database.writing():
        database.add_task(key, name=FIRST, untuned_s=4e-3)
        database.add_task(key, name=FIRST, untuned_s=5e-3)
    code = (
        "import dataclasses, json, sys, pathlib\n"
        "from hone.database import Database\n"
        "from hone.targets.target import resolve\n"
        "database = Database(pathlib.Path(sys.argv[1]), resolve('host'), threads=2)\n"
        "rows = [dataclasses.asdict(row) for row in database.show()]\n"
        "print(json.dumps([database.stats(), rows, 'tvm' in sys.modules]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "records")],
        capture_output=True,
        text=True,
        check=True,
    )
    stats, rows, loaded = json.loads(run.stdout)
    assert not loaded
    assert rows == [
        {"workload": key, "name": FIRST, "records": 2}
        | {"best_ms": 1.0, "untuned_ms": 4.0, "verdict": None}
    ]
    assert {name: stats[name] for name in ("target", "threads", "kernels", "records")} == {
        "target": "host",
        "threads": 2,
        "kernels": 1,
        "records": 2,
    }
    assert stats["fingerprint"] == database.fingerprint()


def test_apply_schedules_hits_and_leaves_misses(database: Database, module: tvm.IRModule) -> None:
    fill(database, module, (FIRST, 1e-3, 8))
    before = tvm.ir.save_json(module)
    applied = database.apply(module)
    assert tvm.ir.save_json(module) == before
    assert (applied.hits, applied.misses, applied.kept, applied.failed) == (
        (FIRST,),
        (OTHER,),
        (),
        (),
    )
    func = applied.module[FIRST]
    assert func.attrs["tirx.is_scheduled"]
    assert "T.parallel" in func.script()
    assert dict(func.attrs.items()).keys() - dict(module[FIRST].attrs.items()).keys() == {
        "tirx.is_scheduled"
    }
    tvm.ir.assert_structural_equal(applied.module[OTHER], module[OTHER])
    assert kernels(applied.module).keys() == {OTHER}


def test_applied_records_compute_the_same(database: Database, module: tvm.IRModule) -> None:
    fill(database, module, (FIRST, 1e-3, 8), (OTHER, 1e-3, 4))
    x = np.random.default_rng(3).standard_normal((24, 40)).astype("float32")

    def run(compiled: tvm.IRModule) -> np.ndarray:
        machine = relax.VirtualMachine(tvm.compile(compiled, HOST.tvm_target(2)), tvm.cpu())
        return machine["main"](tvm.runtime.tensor(x)).numpy()

    # Only the order of a sum of 40 products may differ.
    np.testing.assert_allclose(
        run(database.apply(module).module), run(module), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("untuned_s", "used"), [(2e-3, True), (1.03e-3, True), (1.01e-3, False), (0.5e-3, False)]
)
def test_apply_keeps_the_untuned_kernel_unless_the_record_is_better(
    database: Database, module: tvm.IRModule, untuned_s: float, used: bool
) -> None:
    fill(database, module, (FIRST, 1e-3, 8))
    key = record_of(kernels(module)[FIRST], 1.0)[0][0]
    with database.writing():
        database.add_task(key, name=FIRST, untuned_s=untuned_s)
    applied = database.apply(module)
    assert (applied.hits, applied.kept) == (((FIRST,), ()) if used else ((), (FIRST,)))
    assert applied.misses == (OTHER,)


def test_apply_reports_a_record_that_does_not_fit_any_more_and_goes_on(
    database: Database, module: tvm.IRModule
) -> None:
    workload, record = record_of(kernels(module)[FIRST], 1e-3)
    text = json.dumps(record).replace('["matmul", "main"]', '["nowhere", "main"]')
    with database.writing():
        database.add_record(workload, json.loads(text))
        database.add_record(*record_of(kernels(module)[OTHER], 1e-3))
    applied = database.apply(module)
    assert applied.hits == (OTHER,)
    ((name, reason),) = applied.failed
    assert name == FIRST
    assert len(database.as_tvm()) == 1
    assert database.warnings[-1].endswith("1 records do not apply any more: left out.")
    assert reason.startswith("the record does not apply: ")
    tvm.ir.assert_structural_equal(applied.module[FIRST], module[FIRST])


def verdict(database: Database, record: list, kind: Verdict, *, workload: list) -> None:
    with database.writing():
        database.add_verdict(
            workload[0],
            name=FIRST,
            record=trace_key(record),
            verdict=kind,
            model_s=2e-3,
            model_untuned_s=1e-3,
        )


def test_a_rejected_record_is_not_used_any_more_in_this_process_and_in_a_fresh_one(
    database: Database, module: tvm.IRModule, tmp_path: Path
) -> None:
    fill(database, module, (FIRST, 1e-3, 8), (FIRST, 2e-3, 20))
    workload, best = record_of(kernels(module)[FIRST], 1e-3, 8)
    with database.writing():
        database.add_task(workload[0], name=FIRST, untuned_s=4e-3)
    assert database.apply(module).hits == (FIRST,)
    before = database.fingerprint()

    verdict(database, best, Verdict.REJECTED, workload=workload)
    applied = database.apply(module)
    # The second best is worthwhile in isolation too, but not one that nobody tried in its stead.
    assert (applied.hits, applied.kept, applied.rejected) == ((), (FIRST,), (FIRST,))
    assert database.fingerprint() != before

    (tmp_path / "module.json").write_text(tvm.ir.save_json(module))
    code = (
        "import sys, pathlib, tvm\n"
        "from hone.database import Database\n"
        "from hone.targets.target import resolve\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "module = tvm.ir.load_json((root / 'module.json').read_text())\n"
        f"database = Database(root / 'records', resolve('host'), threads={THREADS})\n"
        "print(database.apply(module).rejected, database.fingerprint())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"({FIRST!r},) {database.fingerprint()}\n"

    verdict(database, best, Verdict.CONFIRMED, workload=workload)
    assert database.apply(module).hits == (FIRST,)
    again = Database(tmp_path / "records", HOST, threads=THREADS)
    assert again.apply(module).hits == (FIRST,)
    assert again.fingerprint() == database.fingerprint() != before


def test_a_confirmed_record_is_preferred_to_a_rejected_faster_one(
    database: Database, module: tvm.IRModule
) -> None:
    fill(database, module, (FIRST, 1e-3, 8), (FIRST, 2e-3, 20))
    workload, best = record_of(kernels(module)[FIRST], 1e-3, 8)
    _, second = record_of(kernels(module)[FIRST], 2e-3, 20)
    verdict(database, best, Verdict.REJECTED, workload=workload)
    verdict(database, second, Verdict.CONFIRMED, workload=workload)
    match = database.lookup(kernels(module)[FIRST])
    assert match is not None
    assert (match.seconds, match.verdict) == (pytest.approx(2e-3), Verdict.CONFIRMED)
    assert database.apply(module).hits == (FIRST,)
    assert [entry.verdict for entry in database.show()] == [Verdict.REJECTED]


def timed(name: str, seconds: float) -> list:
    return [[[name], []], [seconds], {}, []]


A, B, C, D = timed("a", 1.0), timed("b", 2.0), timed("c", 3.0), timed("d", 4.0)
YES, NO = Verdict.CONFIRMED, Verdict.REJECTED


@pytest.mark.parametrize(
    ("verdicts", "untuned_s", "chosen", "tried"),
    [
        ({}, None, A, [A, B, C, D]),
        ({}, 3.1, A, [A, B, C]),
        ({}, 1.015, None, [A]),
        ({}, 1.005, None, [A]),
        ({}, 0.96, None, []),
        ({}, 0.9, None, []),
        ({"a": NO}, 4.1, None, [B, C, D]),
        ({"a": NO, "c": YES}, 4.1, C, [C, B, D]),
        ({"c": YES}, 4.1, A, [C, A, B, D]),
        ({"b": YES, "c": YES}, 1.015, B, [A]),
        ({"a": YES, "b": NO}, 9.0, A, [A, C, D]),
    ],
)
def test_the_record_to_use_and_those_to_try_follow_verdicts_before_times(
    verdicts: dict[str, Verdict], untuned_s: float | None, chosen: list | None, tried: list
) -> None:
    given = [A, B, C, D]
    keyed = {trace_key(r): verdicts[r[0][0][0]] for r in given if r[0][0][0] in verdicts}
    assert choose(given, keyed, untuned_s) is chosen
    assert contenders(given, keyed, untuned_s) == tried


def test_no_record_is_chosen_when_there_is_none() -> None:
    assert choose([], {}, 1.0) is None
    assert contenders([], {}, 1.0) == []
