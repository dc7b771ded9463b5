"""Which weights kernels request for later ones, and that results stay what they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import hone
from hone import assembling, driver, pipeline, runtime
from hone.ahead import Ahead, requests_ahead
from hone.passes.lower.request_ahead import Turns
from hone.plan import KernelCall, Place, Plan, Region
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target

FLOAT = TensorProto.FLOAT
# A machine on which the weights of the dense layer below exceed every cache.
CACHES = {"l2_bytes": 1 << 16, "l3_bytes": 1 << 16}


def waiting() -> hone.Model:
    """Return a layer of 16 x 16 pixels, their mean, and a dense layer of few products."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.standard_normal((64, 32, 1, 1), dtype=np.float32),
        "v": random.standard_normal((64, 1000), dtype=np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("GlobalAveragePool", ["b"], ["c"]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [1, 32, 32, 32])],
        [helper.make_tensor_value_info("y", FLOAT, [1, 1000])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [helper.make_opsetid("", 17)]
    return hone.load(helper.make_model(graph, opset_imports=opset, ir_version=8))


def machine(**facts: int) -> Machine:
    given = {"lanes": 16, "accumulators": 28, "l1_bytes": 48 << 10, "l2_bytes": 1 << 20}
    return Machine(**{**given, "l3_bytes": 32 << 20, "threads": 2, **facts})


def constant(megabytes: int):
    class Constant:
        ty = type(
            "Type", (), {"shape": type("S", (), {"values": [megabytes << 18]}), "dtype": "float32"}
        )

    return Constant()


def plan(*calls: tuple[str, int | None], constants: list[int]) -> Plan:
    return Plan(
        inputs=(),
        outputs=(),
        constants=tuple(constant(size) for size in constants),
        workspace_bytes=0,
        calls=tuple(
            KernelCall(
                kernel=kernel,
                places=() if index is None else (Place(region=Region.CONSTANT, index=index),),
            )
            for kernel, index in calls
        ),
        copies=(),
    )


BUSY = Turns(number=1 << 17, operations=448, steps=256)


def test_the_kernel_before_requests_what_memory_could_give_it() -> None:
    found = requests_ahead(
        plan(("busy", 0), ("late", 1), constants=[1, 20]), {"busy": BUSY}, machine()
    )
    # 2**17 turns of 448 at 64 in a cycle, 12 bytes each, less its own MB: 9.96 MB, but one line of
    # 64 bytes in a turn is 8.4.
    place = Place(region=Region.CONSTANT, index=1)
    assert found == {0: Ahead(place=place, step_bytes=64)}


def test_two_kernels_share_what_one_cannot_request_the_earlier_one_the_first_part() -> None:
    found = requests_ahead(
        plan(("busy", 0), ("busy", 0), ("late", 1), constants=[1, 16]), {"busy": BUSY}, machine()
    )
    assert [found[0].place.offset_bytes, found[1].place.offset_bytes] == [
        0,
        found[0].step_bytes << 17,
    ]
    assert found[1].step_bytes == 64


@pytest.mark.parametrize(
    ("turns", "facts", "sizes"),
    [
        pytest.param(BUSY, {"threads": 1}, [1, 20], id="one thread"),
        pytest.param(BUSY, {}, [1, 15], id="all weights stay in the last cache"),
        pytest.param(replace(BUSY, steps=1024), {}, [1, 20], id="data beyond the first level"),
        pytest.param(replace(BUSY, number=1 << 10), {}, [1, 20], id="too short"),
        pytest.param(BUSY, {"l2_bytes": 32 << 20}, [1, 20], id="weights that fit the second level"),
    ],
)
def test_nothing_is_requested(turns: Turns, facts: dict[str, int], sizes: list[int]) -> None:
    given = plan(("busy", 0), ("late", 1), constants=sizes)
    assert requests_ahead(given, {"busy": turns}, machine(**facts)) == {}


def test_products_that_take_as_long_as_their_weights_wait_for_nothing() -> None:
    given = plan(("busy", 0), ("late", 1), constants=[1, 20])
    turns = {"busy": BUSY, "late": Turns(number=1 << 20, operations=256, steps=256)}
    assert requests_ahead(given, turns, machine()) == {}


@pytest.mark.parametrize("target", ["host", "x86-64-v3"], indirect=True)
def test_a_package_that_requests_computes_the_same(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = waiting()
    chosen = []

    def spy(*given):
        chosen.append(requests_ahead(*given))
        return chosen[-1]

    monkeypatch.setattr(pipeline, "requests_ahead", spy)
    asking = assembling.assemble(source, target=replace(target, **CACHES), threads=2).package
    assert len(chosen) == 1
    assert chosen[0]
    inputs = {"x": np.random.default_rng(1).standard_normal((1, 32, 32, 32), dtype=np.float32)}
    runner = runtime.load(asking)
    expected = runtime.load(driver.assemble(source, target=target, threads=2).package).run(inputs)
    for _ in range(3):
        np.testing.assert_allclose(runner.run(inputs)["y"], expected["y"], rtol=1e-5, atol=1e-5)
    with runner.instrumented(lambda *_: None):
        by_machine = runner.run(inputs)
    np.testing.assert_array_equal(by_machine["y"], runner.run(inputs)["y"])
