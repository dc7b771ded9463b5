"""What a run is: kernels, memory, odd outputs; its results against the virtual machine's."""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

import hone
from hone import driver, models, parity, pipeline, runtime
from hone.packaging import loaded_code
from hone.plan import Copy, KernelCall, Place, Plan, Region, Shape, plan_of
from hone.targets.target import resolve

FLOAT = TensorProto.FLOAT


def model(nodes, inputs, outputs, constants=()) -> hone.Model:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in dict(constants).items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return hone.load(helper.make_model(graph, opset_imports=opset, ir_version=8))


def load(source: hone.Model, threads: int = 2) -> runtime.Runner:
    package = driver.assemble(source, target=resolve("host"), threads=threads).package
    return runtime.load(package, threads=threads)


def by_machine(runner: runtime.Runner, inputs) -> dict[str, np.ndarray]:
    with runner.instrumented(lambda *_: None):
        return runner.run(inputs)


def planned(source: hone.Model) -> Plan:
    target = resolve("host")
    lowered = pipeline.lower(source.module, target, threads=1)
    scheduled = pipeline.schedule(lowered, target, threads=1)
    calls, memory, _ = pipeline.finalize_stages()
    plan = plan_of(memory.run(calls.run(scheduled.module)))
    assert plan is not None
    return plan


# --- the plan -------------------------------------------------------------------------------


def test_kernels_share_a_workspace_and_write_outputs_in_place() -> None:
    nodes = [
        helper.make_node("Softmax", ["x"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"]),
        helper.make_node("Softmax", ["b"], ["y"]),
    ]
    plan = planned(model(nodes, {"x": [3, 5]}, {"y": [5, 3]}))
    workspace = Place(region=Region.WORKSPACE)
    behind = Place(region=Region.WORKSPACE, offset_bytes=64)
    places = [call.places for call in plan.calls]
    assert places == [
        (Place(region=Region.INPUT), workspace),
        (workspace, behind),
        (behind, Place(region=Region.OUTPUT)),
    ]
    assert plan.workspace_bytes == 128
    assert plan.inputs == (Shape(dtype="float32", extents=(3, 5)),)
    assert plan.outputs == (Shape(dtype="float32", extents=(5, 3)),)
    assert plan.copies == ()


def test_a_tensor_stands_in_the_middle_of_its_storage() -> None:
    """Half of the rows is then the same half of the memory, whatever the tensor."""
    pool = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        helper.make_node("MaxPool", ["x"], ["a"], **pool),
        helper.make_node("Softmax", ["a"], ["b"], axis=3),
        helper.make_node("MaxPool", ["b"], ["c"], **pool),
        helper.make_node("Softmax", ["c"], ["y"], axis=3),
    ]
    plan = planned(model(nodes, {"x": [1, 16, 28, 28]}, {"y": [1, 16, 7, 7]}))
    places = [call.places[-1] for call in plan.calls if call.places[-1].region is Region.WORKSPACE]
    size = 4 * 16 * 14 * 14
    middle = (size - size // 4) // 2 // 64 * 64
    offsets = [place.offset_bytes for place in places]
    assert offsets == [0, size, 0, size + middle, middle]


def test_outputs_that_no_kernel_writes_are_copied() -> None:
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    weight = relax.const(np.ones(4, np.float32))
    with block.function("main", [x]):
        block.emit_func_output(relax.Tuple([x, weight, weight]))
    module = tvm.transform.Sequential([relax.transform.Normalize()])(block.get())
    plan = plan_of(module)
    assert plan is not None
    assert len(plan.constants) == 1
    constant = Place(region=Region.CONSTANT)
    outputs = [Place(region=Region.OUTPUT, index=index) for index in range(3)]
    assert plan.copies == (
        Copy(target=outputs[0], source=Place(region=Region.INPUT), size_bytes=24),
        Copy(target=outputs[1], source=constant, size_bytes=16),
        Copy(target=outputs[2], source=constant, size_bytes=16),
    )
    assert plan.calls == ()


def test_there_is_no_plan_for_a_call_into_the_runtime() -> None:
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    with block.function("main", [x]):
        y = block.emit(relax.op.unique(x))
        block.emit_func_output(y)
    assert plan_of(block.get()) is None


def test_there_is_no_plan_for_symbolic_shapes() -> None:
    block = relax.BlockBuilder()
    n = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((n,), "float32"))
    with block.function("main", [x]):
        block.emit_func_output(x)
    assert plan_of(block.get()) is None


def test_a_kernel_call_is_what_it_says() -> None:
    call = KernelCall(kernel="k", places=(Place(region=Region.INPUT, index=1),))
    assert call.places[0].offset_bytes == 0
    assert Shape(dtype="int8", extents=(3, 5)).size_bytes == 15


# --- against the virtual machine ------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-cnn", "mlp", "bert-mini", "mobilenetv2"])
def test_planned_runs_equal_those_of_the_virtual_machine(name: str) -> None:
    source = hone.load(models.build(name))
    runner = load(source)
    assert runner.planned
    for seed in range(2):
        inputs = parity.random_inputs(source, seed)
        expected = by_machine(runner, inputs)
        for output, array in runner.run(inputs).items():
            np.testing.assert_array_equal(array, expected[output])


def test_odd_outputs_are_right() -> None:
    weight = np.arange(4, dtype=np.float32)
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Identity", ["y"], ["twice"]),
        helper.make_node("Identity", ["w"], ["constant"]),
        helper.make_node("Reshape", ["y", "shape"], ["flat"]),
    ]
    constants = {"w": weight, "shape": np.array([6], np.int64)}
    outputs = {"y": [2, 3], "same": [2, 3], "twice": [2, 3], "constant": [4], "flat": [6]}
    runner = load(model(nodes, {"x": [2, 3]}, outputs, constants))
    assert runner.planned
    x = np.array([[-1, 2, -3], [4, -5, 6]], np.float32)
    found = runner.run({"x": x})
    y = np.maximum(x, 0)
    expected = {"y": y, "same": x, "twice": y, "constant": weight, "flat": y.ravel()}
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
    found["y"][...] = 7
    np.testing.assert_array_equal(found["twice"], y)
    np.testing.assert_array_equal(runner.run({"x": x})["constant"], weight)


def test_sorting_is_planned() -> None:
    graph = helper.make_graph(
        [helper.make_node("TopK", ["x", "k"], ["v", "i"])],
        "g",
        # Of floats it is a kernel like others.
        [helper.make_tensor_value_info("x", TensorProto.INT32, [4, 7])],
        [
            helper.make_tensor_value_info("v", TensorProto.INT32, [4, 2]),
            helper.make_tensor_value_info("i", TensorProto.INT64, [4, 2]),
        ],
        [numpy_helper.from_array(np.array([2], np.int64), "k")],
    )
    opset = [helper.make_opsetid("", 17)]
    runner = load(hone.load(helper.make_model(graph, opset_imports=opset, ir_version=8)))
    assert runner.planned
    x = np.random.default_rng(0).permutation(28).reshape(4, 7).astype(np.int32)
    for _ in range(3):
        np.testing.assert_array_equal(runner.run({"x": x})["i"], np.argsort(-x, axis=1)[:, :2])


# --- where inputs and outputs lie -------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4], ids=["aligned", "anywhere"])
def test_large_inputs_are_read_where_they_lie_and_large_outputs_are_new(offset: int) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("ReduceMax", ["small"], ["z"], keepdims=0),
    ]
    shapes = {"x": [3, 7, 1024], "small": [5]}
    runner = load(model(nodes, shapes, {"y": shapes["x"], "same": shapes["x"], "z": []}))
    assert runner.planned
    memory = loaded_code.aligned_empty((3 * 7 * 1024 + 16,), np.dtype(np.float32))
    x = memory[offset // 4 : offset // 4 + 3 * 7 * 1024].reshape(3, 7, 1024)
    small = np.arange(5, dtype=np.float32)
    kept = []
    for seed in range(3):
        x[...] = np.random.default_rng(seed).standard_normal(x.shape)
        given = x.copy()
        kept.append((given, runner.run({"x": x, "small": small})))
        np.testing.assert_array_equal(x, given)
    x[...] = 7
    for given, found in kept:
        np.testing.assert_array_equal(found["y"], np.maximum(given, 0))
        np.testing.assert_array_equal(found["same"], given)
        assert found["z"] == 4
        found["same"][...] = 5
    # Copies of another layout go to the runner's own memory again, and so do prepared inputs.
    turned = np.asfortranarray(kept[0][0])
    np.testing.assert_array_equal(
        runner.run({"x": turned, "small": small})["y"], np.maximum(turned, 0)
    )
    runner.prepare({"x": x, "small": small})()


def test_inputs_that_a_mapping_makes_when_asked_live_as_long_as_the_run() -> None:
    class Fresh(Mapping[str, np.ndarray]):
        """Makes its arrays anew, as an archive of numpy does."""

        def __getitem__(self, name: str) -> np.ndarray:
            array = loaded_code.aligned_empty((512, 1024), np.dtype(np.float32))
            array[...] = {"x": 3, "y": 5}[name]
            return array

        def __iter__(self) -> Iterator[str]:
            return iter(("x", "y"))

        def __len__(self) -> int:
            return 2

    shape = [512, 1024]
    nodes = [helper.make_node("Sub", ["x", "y"], ["z"])]
    runner = load(model(nodes, {"x": shape, "y": shape}, {"z": shape}))
    for _ in range(3):
        assert (runner.run(Fresh())["z"] == -2).all()


def test_watched_runs_copy_large_inputs() -> None:
    shape = [5, 4096]
    runner = load(model([helper.make_node("Neg", ["x"], ["y"])], {"x": shape}, {"y": shape}))
    for value in (1, 2):
        x = loaded_code.aligned_empty((5, 4096), np.dtype(np.float32))
        x[...] = value
        assert (runner.run({"x": x})["y"] == -value).all()
        with runner.instrumented(lambda *_: None):
            assert (runner.run({"x": x + 1})["y"] == -value - 1).all()


# --- several threads ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def products() -> tuple[hone.Model, runtime.Runner]:
    generator = np.random.default_rng(3)
    constants = {
        name: generator.standard_normal((512, 512), dtype=np.float32) / 16 for name in "abc"
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"]),
        helper.make_node("MatMul", ["p", "b"], ["q"]),
        helper.make_node("MatMul", ["q", "c"], ["y"]),
    ]
    source = model(nodes, {"x": [4, 512]}, {"y": [4, 512]}, constants)
    return source, load(source)


def test_two_threads_get_their_own_answers_from_one_package(products) -> None:
    source, runner = products
    samples = [parity.random_inputs(source, seed) for seed in range(4)]
    expected = [runner.run(sample)["y"] for sample in samples]
    start = threading.Barrier(2)

    def work(first: int) -> None:
        start.wait()
        for step in range(40):
            index = (first + step) % 4
            np.testing.assert_array_equal(runner.run(samples[index])["y"], expected[index])

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(work, range(2)))


def test_two_runs_at_once_need_no_lock_when_their_tables_differ(products) -> None:
    """As from C: a loop that finds the package's threads busy runs on the caller's alone."""
    source, runner = products
    code = runner._code
    sample = parity.random_inputs(source, 0)
    expected = runner.run(sample)["y"]
    bounds = []
    for _ in range(2):
        bound = loaded_code.BoundRun(code)
        workspace = loaded_code.aligned_empty(code.workspace.shape, np.dtype(np.uint8))
        bound._pointers[0] = workspace.ctypes.data
        bound.fill(sample)
        bounds.append((bound, workspace))
    start = threading.Barrier(2)

    def work(item) -> None:
        start.wait()
        for _ in range(100):
            item[0].call()

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(work, bounds))
    for bound, _ in bounds:
        np.testing.assert_array_equal(bound.outputs()["y"], expected)


# --- denormals ------------------------------------------------------------------------------


def control_word() -> int:
    """Return the caller's mode of floating point, as glibc sees it: fegetenv's MXCSR or FPCR."""
    environment = (ctypes.c_uint32 * 8)()
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    return environment[7] if platform.machine() == "x86_64" else environment[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("machine", [False, True], ids=["planned", "machine"])
def test_denormals_are_zeros_in_every_thread_and_the_caller_keeps_its_mode(
    threads: int, machine: bool
) -> None:
    size = 1 << 16
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"]), helper.make_node("Add", ["y", "b"], ["z"])]
    constants = {"w": np.full(1, 0.5, np.float32), "b": np.full(1, 1e-40, np.float32)}
    outputs = {"y": [size], "z": [size]}
    runner = load(model(nodes, {"x": [size]}, outputs, constants), threads)
    x = np.full(size, 1.5e-38, np.float32)  # normal; half of it is not
    x[::2] = 1e-39  # not normal
    before = control_word() & 0xFFC0
    found = by_machine(runner, {"x": x}) if machine else runner.run({"x": x})
    assert control_word() & 0xFFC0 == before
    assert not found["y"].any()
    assert not found["z"].any()
    assert (x * np.float32(0.5)).all()  # and numpy still computes with them
