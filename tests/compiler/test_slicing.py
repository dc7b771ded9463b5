"""A batch in slices: when there are some, and that nobody can tell from the results."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

import hone
from hone import models, parity, pipeline, profile, runtime, slicing, tune
from hone.assembling import Assembled, assemble
from hone.database import Database
from hone.driver import compile as compile_model
from hone.driver import search
from hone.measure import Measurement
from hone.packaging import loaded_code
from hone.passes.apply import apply
from hone.passes.graph.rebatch import Rebatch
from hone.plan import Copy, Place, Region, plan_of
from hone.profiling.call_times import call_times
from hone.progress import Progress, silent
from hone.slicing import slice_batch
from hone.steps.split_parallel import idle_layers
from hone.targets.target import resolve
from hone.tuning import slices as tuning_slices

HOST = resolve("host")
RNG = np.random.default_rng(0)


@pytest.fixture
def images(monkeypatch):
    """Fix how many samples a slice has; 0 for the whole batch."""

    def fix(count: int) -> None:
        monkeypatch.setattr(slicing, "choose_slice", lambda *_, **__: count)

    return fix


def digits(batch: int) -> hone.Model:
    model = models.build("digits-cnn")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    return hone.load(model)


def built(model: hone.Model, *, threads: int = 2, precision: str = "fp32") -> Assembled:
    return assemble(model, target=HOST, threads=threads, precision=precision)


def module(shape, body) -> tvm.IRModule:
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(body(builder.emit, x), "gv")
        builder.emit_func_output(result)
    return builder.get()


def product(emit, x: relax.Var) -> relax.Expr:
    return emit(relax.op.matmul(x, relax.const(np.ones((3, 5), np.float32))))


# --- when ------------------------------------------------------------------------------------


def test_a_batch_is_cut_when_its_samples_keep_apart() -> None:
    before = module((4, 3), product)
    found = slice_batch(before, HOST, threads=2)
    (param,) = found.module["main"].params
    assert (found.count * int(param.ty.shape[0]), found.parts, found.threads) == (4, 2, 1)


WHOLE = {
    "one sample": ((1, 3), lambda emit, x: emit(relax.op.nn.relu(x))),
    "fewer than threads": ((2, 3), lambda emit, x: emit(relax.op.nn.relu(x))),
    "no batch": ((), lambda emit, x: emit(relax.op.nn.relu(x))),
    "samples mix": ((8, 3), lambda emit, x: emit(relax.op.nn.softmax(x, axis=0))),
    "no rule": ((8, 3), lambda emit, x: emit(relax.op.flip(x, 1))),
    "samples along another axis": ((8, 3), lambda emit, x: emit(relax.op.permute_dims(x))),
    "an output without samples": ((8, 3), lambda emit, x: relax.Tuple([x, relax.const(1.0)])),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_module_stays_as_it_is(name: str, images) -> None:
    images(1)
    before = module(*WHOLE[name])
    found = slice_batch(before, HOST, threads=3)
    assert found.module.same_as(before)
    assert (found.count, found.parts, found.threads) == (1, 1, 3)


def test_a_module_stays_as_it_is_when_inputs_have_different_batches(images) -> None:
    images(1)
    block = relax.BlockBuilder()
    params = [
        relax.Var(name, relax.TensorType(shape, "float32"))
        for name, shape in (("x", (4, 3)), ("y", (1, 3)))
    ]
    with block.function("main", params):
        with block.dataflow():
            result = block.emit_output(relax.op.add(*params))
        block.emit_func_output(result)
    before = block.get()
    assert slice_batch(before, HOST, threads=2).module.same_as(before)


def test_what_was_measured_decides() -> None:
    before = module((4, 3), product)
    found = slicing.options_of(before, HOST, threads=2)
    assert found is not None
    name, options = found
    assert sorted(options) == ["1", "2", "whole"]
    for option, count in (("whole", 1), ("1", 4), ("2", 2)):
        assert slice_batch(before, HOST, threads=2, decided={name: option}).count == count
    assert slicing.options_of(module(*WHOLE["samples mix"]), HOST, threads=2) is None


# --- the plan --------------------------------------------------------------------------------


def test_slices_that_do_not_begin_where_kernels_want_them_are_copied() -> None:
    """48 bytes of each slice: only the first one is aligned."""
    source = module((1, 12), lambda emit, x: emit(relax.op.nn.softmax(x)))
    scheduled = pipeline.schedule(pipeline.lower(source, HOST, threads=1), HOST, threads=1)
    calls, memory, _ = pipeline.finalize_stages()
    plan = plan_of(memory.run(calls.run(scheduled.module)), slices=4, parts=2)
    assert plan is not None
    first, behind = (Place(region=Region.WORKSPACE, offset_bytes=at) for at in (0, 64))
    assert plan.loads == (Copy(target=behind, source=Place(region=Region.INPUT), size_bytes=48),)
    assert [call.places for call in plan.calls] == [(behind, first)]
    assert plan.copies == (Copy(target=Place(region=Region.OUTPUT), source=first, size_bytes=48),)
    assert (plan.workspace_bytes, plan.slices, plan.parts) == (128, 4, 2)


# --- the results -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single() -> runtime.Runner:
    return runtime.load(built(digits(1), threads=1).package)


def one_by_one(runner: runtime.Runner, sample) -> dict[str, np.ndarray]:
    """Run a package of one sample on all samples in turn."""
    batch = len(next(iter(sample.values())))
    runs = [runner.run({k: v[i : i + 1] for k, v in sample.items()}) for i in range(batch)]
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


def watched(runner: runtime.Runner, inputs) -> dict[str, np.ndarray]:
    with runner.instrumented(lambda *_: None):
        return runner.run(inputs)


@pytest.mark.parametrize(("batch", "threads"), [(4, 2), (3, 2), (5, 1), (2, 2)])
def test_slices_of_one_sample_equal_its_own_runs_bit_for_bit(
    batch: int, threads: int, images, single
) -> None:
    images(1)
    model = digits(batch)
    assembled = built(model, threads=threads)
    runner = runtime.load(assembled.package)
    assert runner.planned
    assert (runner.slices, runner.abreast) == (batch, threads)
    for seed in range(2):
        sample = parity.random_inputs(model, seed)
        found, expected = runner.run(sample), one_by_one(single, sample)
        by_machine = watched(runner, sample)
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)
            np.testing.assert_array_equal(by_machine[name], array)


def test_slices_of_several_samples_equal_runs_of_so_many(images) -> None:
    images(2)
    model = digits(6)
    sample = parity.random_inputs(model, 0)
    runner = runtime.load(built(model).package)
    images(0)
    pair = runtime.load(built(digits(2), threads=1).package)
    ((name, whole),) = sample.items()
    expected = np.concatenate(
        [next(iter(pair.run({name: whole[i : i + 2]}).values())) for i in range(0, 6, 2)]
    )
    assert runner.slices == 3
    np.testing.assert_array_equal(next(iter(runner.run(sample).values())), expected)


def test_inputs_and_outputs_of_odd_sizes_are_right(images) -> None:
    """An input that is an output too, one of 12 bytes, one that is a view of another."""
    images(1)
    floats = TensorProto.FLOAT
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Add", ["y", "z"], ["s"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Reshape", ["s", "shape"], ["flat"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, floats, [5, 1, 3]) for name in "xz"],
        [
            helper.make_tensor_value_info("y", floats, [5, 1, 3]),
            helper.make_tensor_value_info("same", floats, [5, 1, 3]),
            helper.make_tensor_value_info("flat", floats, [5, 3]),
        ],
        [numpy_helper.from_array(np.array([5, 3], np.int64), "shape")],
    )
    opset = [helper.make_opsetid("", 17)]
    model = hone.load(helper.make_model(graph, opset_imports=opset, ir_version=8))
    runner = runtime.load(built(model).package)
    assert runner.slices == 5
    x, z = (RNG.standard_normal((5, 1, 3), np.float32) for _ in range(2))
    for found in (runner.run({"x": x, "z": z}), watched(runner, {"x": x, "z": z})):
        y = np.maximum(x, 0)
        np.testing.assert_array_equal(found["y"], y)
        np.testing.assert_array_equal(found["same"], x)
        np.testing.assert_array_equal(found["flat"], (y + z)[:, 0])


def test_two_runs_at_once_need_no_lock_when_their_tables_differ(images, single) -> None:
    """The second one finds the threads busy, and takes all slices on its own."""
    images(1)
    model = digits(4)
    code = runtime.load(built(model).package)._code
    samples = [parity.random_inputs(model, seed) for seed in range(2)]
    bounds, kept = [], []
    for sample in samples:
        bound = loaded_code.BoundRun(code)
        kept.append(loaded_code.aligned_empty(code.workspace.shape, np.dtype(np.uint8)))
        bound._pointers[0] = kept[-1].ctypes.data
        bound.fill(sample)
        bounds.append(bound)
    start = threading.Barrier(2)

    def work(bound: loaded_code.BoundRun) -> None:
        start.wait()
        for _ in range(100):
            bound.call()

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(work, bounds))
    for bound, sample in zip(bounds, samples, strict=True):
        for name, array in one_by_one(single, sample).items():
            np.testing.assert_array_equal(bound.outputs()[name], array)


def test_a_package_runs_on_fewer_and_on_more_threads(images, single) -> None:
    images(1)
    model = digits(4)
    package = built(model).package
    sample = parity.random_inputs(model, 0)
    expected = one_by_one(single, sample)
    for threads, abreast in ((1, 1), (2, 2)):
        runner = runtime.load(package, threads=threads)
        assert runner.abreast == abreast
        for name, array in expected.items():
            np.testing.assert_array_equal(runner.run(sample)[name], array)


INT8 = {"precision": "int8", "calibration": "random:8", "allow_random_calibration": True}


@pytest.mark.parametrize("options", [{"precision": "bf16"}, INT8], ids=["bf16", "int8"])
def test_other_precisions_run_in_slices(options: dict[str, Any], images) -> None:
    model = digits(4)
    packages = {}
    for count in (0, 1):
        images(count)
        packages[count] = compile_model(model, threads=2, **options)
    assert packages[1].manifest.slices is not None
    assert packages[0].manifest.slices is None
    sample = parity.random_inputs(model, 0)
    whole, cut = (runtime.load(packages[count]).run(sample) for count in (0, 1))
    for name, array in whole.items():
        largest = float(np.abs(array).max())
        np.testing.assert_allclose(cut[name], array, rtol=0, atol=0.02 * largest)


# --- what is said of it ----------------------------------------------------------------------


def test_the_manifest_says_how_the_batch_is_cut_and_memory_is_that_of_the_parts(images) -> None:
    images(0)
    whole = built(digits(8)).package.manifest
    images(1)
    cut = built(digits(8)).package.manifest
    assert whole.slices is None
    assert cut.slices is not None
    assert cut.slices.model_dump() == {"count": 8, "samples": 1, "parts": 2}
    assert cut.memory is not None
    assert whole.memory is not None
    assert cut.memory.activations_bytes < whole.memory.activations_bytes / 2


def test_a_profile_counts_the_calls_of_all_slices(images) -> None:
    images(1)
    model = digits(4)
    assembled = built(model)
    runner = runtime.load(assembled.package)
    sample = parity.random_inputs(model, 0)
    found = profile.profile(runner, sample, seconds=0.0)
    images(0)
    alone = runtime.load(built(digits(1), threads=1).package)
    once = profile.profile(alone, parity.random_inputs(digits(1), 0), seconds=0.0)
    assert [kernel.calls for kernel in found.kernels] == [4 * k.calls for k in once.kernels]
    assert found.storage_bytes == 2 * once.storage_bytes
    assert [k.operations for k in found.kernels] == [4 * (k.operations or 0) for k in once.kernels]
    calls = call_times(runner, sample, assembled.lowered, seconds=0.0)
    quarter = len(calls) // 4
    assert [call.names for call in calls] == [call.names for call in calls[:quarter]] * 4
    assert any(call.names for call in calls)


def test_no_layer_leaves_threads_idle_when_each_has_a_slice(images) -> None:
    images(1)
    model = digits(4)
    version = SimpleNamespace(assembled=built(model))
    assert idle_layers(model, version, threads=2, sample={}) == []


def test_rebatched_module_is_that_of_a_slice(images) -> None:
    images(2)
    model = digits(6)
    want = apply(model.module, Rebatch(2))
    tvm.ir.assert_structural_equal(built(model).slicing.module, want)


# --- records ---------------------------------------------------------------------------------


def test_records_of_slices_are_those_of_one_thread(tmp_path, images, monkeypatch) -> None:
    images(1)
    asked = []

    def searched(module, _target, *, threads, database, **_):
        asked.append((module, threads, database.threads))
        return tune.TuneResult(
            trials=0, records=0, kernels=(), elapsed_s=0.0, first_record_s=None, quarantined=(),
            exhausted=True,
        )  # fmt: skip

    monkeypatch.setattr(tune, "tune", searched)
    database = Database(tmp_path, HOST, threads=2)
    before = database.fingerprint()
    search(digits(4), HOST, threads=2, seconds=1.0, database=database, progress=silent())
    ((module, threads, of_threads),) = asked
    assert (threads, of_threads) == (1, 1)
    tvm.ir.assert_structural_equal(module, built(digits(4)).lowered)
    alone = database.of_threads(1)
    with alone.writing():
        alone.add_lowering("point", "option", tried=["option"])
    assert database.fingerprint() != before
    assert database.of_threads(2) is database


class Told(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @contextmanager
    def task(self, label: str, total: float | None = None) -> Iterator[Told]:
        yield self

    def update(self, completed: float | None = None, detail: str | None = None) -> None:
        pass

    def log(self, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def clocked(monkeypatch):
    """Measure what is asked for: seconds by the number of slices of a run."""

    def clocked(seconds: dict[int, float]) -> None:
        def measured(contenders, rounds):
            timed = {
                name: np.full((rounds.rounds, 2), seconds[contender.run])
                for name, contender in contenders.items()
            }
            return Measurement(seconds=timed)

        def loaded(package):
            count = 1 if package.manifest.slices is None else package.manifest.slices.count
            return SimpleNamespace(prepare=lambda _: count)

        monkeypatch.setattr(tuning_slices, "measure", measured)
        monkeypatch.setattr(tuning_slices, "load", loaded)

    return clocked


def tuned(database: Database, told: Told, budget_s: float = 1e3):
    return tuning_slices.tune_slices(
        digits(4), HOST, threads=2, budget_s=budget_s, database=database, compact=False,
        progress=told,
    )  # fmt: skip


def test_tuning_keeps_the_slice_that_is_faster_and_does_not_ask_twice(tmp_path, clocked) -> None:
    found = slicing.options_of(digits(4).module, HOST, threads=2)
    assert found is not None
    point, (first, *others) = found
    counts = {"whole": 1, "1": 4, "2": 2}
    clocked({counts[first]: 1.0, counts[others[0]]: 1.1, counts[others[1]]: 0.5})
    database, told = Database(tmp_path, HOST, threads=2), Told()
    result = tuned(database, told)
    assert result is not None
    assert (result.option, result.tried) == (others[1], tuple(others))
    (line,) = told.lines
    assert line.endswith("are 2.00 times as fast")
    assert database.lowerings() == {point: others[1]}
    assert (
        assemble(
            digits(4), target=HOST, threads=2, database=Database(tmp_path, HOST, threads=2)
        ).slicing.count
        == counts[others[1]]
    )
    assert tuned(Database(tmp_path, HOST, threads=2), told) is None


def test_tuning_keeps_the_models_own_slice_when_no_other_is_faster(tmp_path, clocked) -> None:
    clocked({1: 1.0, 2: 1.0, 4: 1.0})
    database, told = Database(tmp_path, HOST, threads=2), Told()
    result = tuned(database, told)
    assert result is not None
    assert told.lines == []
    assert database.lowerings() == {}


def test_tuning_tries_one_way_only_when_there_is_no_time_for_more(tmp_path, clocked) -> None:
    clocked({1: 1.0, 2: 1.0, 4: 1.0})
    result = tuned(Database(tmp_path, HOST, threads=2), Told(), budget_s=1e-3)
    assert result is not None
    assert len(result.tried) == 1


def test_there_is_nothing_to_tune_when_there_is_one_sample(tmp_path) -> None:
    result = tuning_slices.tune_slices(
        digits(1), HOST, threads=2, budget_s=1.0, database=Database(tmp_path, HOST, threads=2),
        compact=False, progress=Told(),
    )  # fmt: skip
    assert result is None
