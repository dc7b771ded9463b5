"""Convolutions joined with the depthwise ones behind them: which, into what, and when."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm_ffi import structural_walk

from hone import pipeline
from hone.passes.lower.fuse_operators import kernel_layers
from hone.passes.lower.fuse_rows import FuseRows
from hone.targets.schedule.bands import Chain, joins
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.schedule.projection import projects
from hone.targets.target import resolve

MACHINE = Machine.of(resolve("x86-64-v4"), 2)


@dataclass(frozen=True, kw_only=True)
class Block:
    """An expansion and a depthwise convolution of an image ``[1, 8, H, W]``."""

    id: str
    height: int = 5
    width: int = 7
    channels: int = 16
    taps: int = 1
    act: str = "relu"
    reuse: bool = False
    dtype: str = "float32"

    @property
    def decided(self) -> dict[str, str]:
        depth = 8 * self.taps**2
        return {f"rows {self.height}x{self.width}x{self.channels} of {depth}, 3x3": "joined"}

    def module(self) -> tvm.IRModule:
        rng = np.random.default_rng(0)

        def weight(*shape: int) -> relax.Expr:
            return relax.const(rng.standard_normal(shape).astype(self.dtype))

        builder, op = relax.BlockBuilder(), relax.op
        x = relax.Var("x", relax.TensorType((1, 8, self.height, self.width), self.dtype))
        with builder.function("main", [x]):
            with builder.dataflow():
                # What reads a network's input changes its layout as well.
                first = builder.emit(op.nn.conv2d(x, weight(8, 8, 1, 1)), name_hint="first")
                first = builder.emit(op.nn.relu(first), name_hint="first_act")
                wide = builder.emit(
                    op.nn.conv2d(
                        first,
                        weight(self.channels, 8, self.taps, self.taps),
                        padding=self.taps // 2,
                    ),
                    name_hint="expand",
                )
                if self.act == "relu":
                    wide = builder.emit(op.nn.relu(wide), name_hint="act")
                result = builder.emit(
                    op.nn.conv2d(
                        wide, weight(self.channels, 1, 3, 3), padding=1, groups=self.channels
                    ),
                    name_hint="dw",
                )
                result = builder.emit(op.nn.relu(result), name_hint="last")
                if self.reuse:
                    result = builder.emit(op.add(result, wide), name_hint="sum")
                output = builder.emit_output(result)
            builder.emit_func_output(output)
        return builder.get()


def rules(block: Block) -> tuple[list[str], tvm.IRModule]:
    target = resolve("x86-64-v4")
    lowered = pipeline.lower(block.module(), target, threads=2, decided=block.decided)
    scheduled = pipeline.schedule(lowered, target, threads=2)
    return [decision.rule for decision in scheduled.decisions], lowered


def grouped(block: Block) -> tvm.IRModule:
    """Return a module of groups, none of them joined."""
    module = block.module()
    for stage in (*pipeline.graph_stages(), *pipeline.lower_stages_of(MACHINE)):
        if stage.name == "fuse":
            break
        module = stage.run(module)
    return module


def expected(before: tvm.IRModule) -> tvm.IRModule:
    """Write down what joining makes of the groups: one function with the operators of both."""
    builder = relax.BlockBuilder(tvm.IRModule(dict(before.functions.items())))
    wide, narrow = relax.TensorType((1, 5, 7, 16), "float32"), (1, 5, 7, 8)
    params = [
        relax.Var(name, relax.TensorType(shape, "float32"))
        for name, shape in (("x", narrow), ("w", (1, 1, 1, 8, 16)), ("v", (3, 3, 16)))
    ]
    x, w, v = params

    def call(name: str, *arguments: relax.Expr) -> relax.Call:
        return relax.call_tir(before.get_global_var(name), arguments, out_ty=wide)

    with builder.function("joined", params, attrs={"Primitive": True}, private=True):
        with builder.dataflow():
            between = builder.emit(call("relu1", builder.emit(call("conv2d1", x, w))))
            result = call("relu1", builder.emit(call("depthwise_conv2d", between, v)))
            output = builder.emit_output(result)
        builder.emit_func_output(output)
    return builder.get()


def test_two_groups_become_one_with_the_operators_of_both() -> None:
    block = Block(id="plain")
    before = grouped(block)
    machine = replace(MACHINE, decided=tuple(block.decided.items()))
    after = FuseRows(machine)(before)
    joined = after["fused_conv2d1_relu1_depthwise_conv2d_relu1"]
    tvm.ir.assert_structural_equal(joined, expected(before)["joined"])
    _, first, second, _ = before["main"].body.blocks[0].bindings
    _, both, _ = after["main"].body.blocks[0].bindings
    for argument, constant in zip(
        both.value.args[1:], [first.value.args[1], second.value.args[1]], strict=True
    ):
        tvm.ir.assert_structural_equal(argument, constant)
    assert FuseRows(MACHINE)(before).same_as(before)


def test_the_kernel_lists_the_layers_of_both() -> None:
    found, lowered = rules(Block(id="plain"))
    assert found.count("bands") == 1
    assert "window" not in found
    assert ("expand", "act", "dw", "last") in kernel_layers(lowered).values()


REJECTED = [
    Block(id="read by another operator too", reuse=True),
    Block(id="columns that no register tile divides", width=29),
    Block(id="channels that no vector divides", channels=19),
    Block(id="Winograd", height=28, width=28, channels=64, taps=3),
    Block(id="no epilogue, hence no group", act=""),
    Block(id="no 1x1 convolution", taps=5),
    Block(id="16-bit floats", dtype="float16"),
]


@pytest.mark.parametrize("block", REJECTED, ids=lambda block: block.id)
def test_others_stay_apart_even_where_joining_was_decided(block: Block) -> None:
    found, lowered = rules(block)
    assert "bands" not in found
    assert ("expand", "act", "dw", "last") not in kernel_layers(lowered).values()
    if block.reuse:
        assert "window" in found


def chain(height: int, channels: int, depth: int, *, batch: int = 1) -> Chain:
    return Chain(
        shape=(batch, height, height, channels),
        depth=depth,
        pack=48 if channels % 48 == 0 else 32,
        taps=(3, 3),
        output=(height, height),
    )


@pytest.mark.parametrize(
    ("geometry", "expected"),
    [
        (chain(112, 96, 16), True),
        (chain(56, 144, 24), True),
        # A core's half lies in its own L2 anyway.
        (chain(28, 192, 32), False),
        (chain(28, 192, 32, batch=8), True),
        # One row of so wide an image leaves no room for three.
        (chain(4096, 32, 16), False),
    ],
    ids=str,
)
def test_what_exceeds_the_cores_caches_is_joined(geometry: Chain, expected: bool) -> None:
    machine = replace(MACHINE, l2_bytes=1 << 20)
    assert joins(machine, geometry) is expected


def test_tuning_is_offered_the_other_choice() -> None:
    asked: dict[str, tuple[str, ...]] = {}
    joins(replace(MACHINE, l2_bytes=1 << 20, asked=asked), chain(56, 144, 24))
    assert asked == {"rows 56x56x144 of 24, 3x3": ("joined", "apart")}


# --- a depthwise convolution and the 1x1 one behind it ----------------------------------------


def projection(*, channels: int = 32, width: int = 14, reuse: bool = False) -> tvm.IRModule:
    """Return groups of a 3x3 depthwise convolution of 16 channels and a 1x1 one behind it."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> relax.Expr:
        return relax.const(rng.standard_normal(shape).astype("float32"))

    builder, op = relax.BlockBuilder(), relax.op
    x = relax.Var("x", relax.TensorType((1, 16, 6, width), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            # Not 1x1, which would be joined with the depthwise one itself.
            first = builder.emit(op.nn.relu(op.nn.conv2d(x, weight(16, 16, 3, 3), padding=1)))
            window = builder.emit(op.nn.conv2d(first, weight(16, 1, 3, 3), padding=1, groups=16))
            window = builder.emit(op.nn.relu(window))
            result = builder.emit(op.nn.relu(op.nn.conv2d(window, weight(channels, 16, 1, 1))))
            if reuse:
                result = builder.emit(op.concat([result, window], axis=1))
            output = builder.emit_output(result)
        builder.emit_func_output(output)
    module = builder.get()
    for stage in (*pipeline.graph_stages(), *pipeline.lower_stages_of(MACHINE)):
        if stage.name == "fuse":
            break
        module = stage.run(module)
    return module


def decided(*channels: int) -> Machine:
    return replace(MACHINE, decided=tuple((f"rows 6x14x16 to {k}", "joined") for k in channels))


def test_a_depthwise_group_and_a_projection_become_one() -> None:
    before = projection()
    assert FuseRows(MACHINE)(before).same_as(before)
    after = FuseRows(decided(32))(before)
    builder = relax.BlockBuilder(tvm.IRModule(dict(before.functions.items())))
    shapes = {"x": (1, 6, 14, 16), "w": (3, 3, 16), "v": (1, 1, 1, 16, 32)}
    x, w, v = (relax.Var(n, relax.TensorType(shape, "float32")) for n, shape in shapes.items())

    def call(name: str, channels: int, *arguments: relax.Expr) -> relax.Call:
        ty = relax.TensorType((1, 6, 14, channels), "float32")
        return relax.call_tir(before.get_global_var(name), arguments, out_ty=ty)

    with builder.function("joined", [x, w, v], attrs={"Primitive": True}, private=True):
        with builder.dataflow():
            between = builder.emit(call("depthwise_conv2d", 16, x, w))
            between = builder.emit(call("relu", 16, between))
            output = builder.emit_output(
                call("relu1", 32, builder.emit(call("conv2d", 32, between, v)))
            )
        builder.emit_func_output(output)
    joined = after["fused_depthwise_conv2d_relu_conv2d_relu1"]
    tvm.ir.assert_structural_equal(joined, builder.get()["joined"])


@pytest.mark.parametrize("width", [14, 182])
def test_the_code_of_a_joined_kernel_does_not_grow_with_the_width(width: int) -> None:
    machine = replace(MACHINE, decided=((f"rows 6x{width}x16 to 32", "joined"),))
    names = [stage.name for stage in pipeline.lower_stages_of(machine)]
    module = FuseRows(machine)(projection(width=width))
    for stage in pipeline.lower_stages_of(machine)[names.index("fuse") :]:
        module = stage.run(module)
    scheduled = ScheduleModule(machine)(module)
    unrolled: list[int] = []

    def note(loop: tirx.For) -> None:
        if loop.kind == tirx.ForKind.UNROLLED:
            unrolled.append(int(loop.extent))

    (joined,) = (v for v in scheduled.functions if "depthwise" in v.name_hint)
    structural_walk(scheduled[joined].body, ((tirx.For, note),))
    # Pixels and vectors of a register tile, taps and channels of a step; never a row of tiles.
    assert max(unrolled) <= 16
    assert 13 not in unrolled


@pytest.mark.parametrize(
    "before",
    [projection(reuse=True), projection(channels=19)],
    ids=["read by another operator too", "channels that no vector divides"],
)
def test_others_keep_their_projection_apart(before: tvm.IRModule) -> None:
    assert FuseRows(decided(32, 19))(before).same_as(before)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 112, 112, 32), True),
        # A core's half lies in its own L2 anyway.
        ((1, 28, 28, 192), False),
        ((8, 28, 28, 192), True),
        # Eight rows of so wide an image leave no room in L2.
        ((1, 1024, 1024, 32), False),
    ],
)
def test_windows_beyond_the_cores_caches_are_joined_with_their_projection(
    shape: tuple[int, int, int, int], expected: bool
) -> None:
    assert projects(replace(MACHINE, l2_bytes=1 << 20), shape, 32) is expected
