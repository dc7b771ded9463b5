"""Integer kernels of ARM's small matrices (usmmla) under an emulator, equal to numpy exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from integer_oracle import conv_sums, requantized
from tvm import relax

from hone import pipeline
from hone.passes.apply import apply
from hone.passes.quantize import operators
from hone.passes.quantize.arithmetic import GUARD_BITS
from hone.targets.integer_dot import IntegerDot
from hone.targets.schedule.machine import Machine
from hone.targets.target import resolve

GUARD = np.float32(2**GUARD_BITS)


@dataclass(frozen=True, kw_only=True)
class Conv:
    id: str
    shape: tuple[int, int, int, int]
    filters: tuple[int, int, int]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    residual: bool = False
    out: str = "uint8"
    extreme: bool = False
    offsets: bool = False


CONVS = [
    Conv(id="whole groups", shape=(1, 6, 8, 16), filters=(32, 3, 3), padding=(1,) * 4),
    Conv(id="odd width", shape=(1, 5, 7, 8), filters=(12, 3, 3), padding=(1,) * 4),
    Conv(id="batch of three", shape=(3, 4, 5, 24), filters=(20, 3, 3), padding=(1,) * 4,
         residual=True),
    Conv(id="prime channels", shape=(1, 7, 6, 13), filters=(19, 3, 3), padding=(1,) * 4),
    Conv(id="stem", shape=(1, 15, 13, 3), filters=(17, 7, 7), strides=(2, 2), padding=(3,) * 4),
    Conv(id="strided", shape=(1, 9, 9, 16), filters=(8, 3, 3), strides=(2, 2), padding=(1,) * 4),
    Conv(id="dilated", shape=(1, 9, 8, 12), filters=(6, 3, 3), dilation=(2, 2), padding=(2,) * 4),
    Conv(id="one pixel", shape=(1, 1, 1, 8), filters=(5, 3, 3), padding=(1,) * 4),
    Conv(id="lopsided", shape=(2, 5, 6, 5), filters=(7, 3, 2), padding=(0, 1, 2, 3)),
    Conv(id="pointwise", shape=(1, 4, 6, 32), filters=(24, 1, 1), residual=True),
    Conv(id="pointwise of odd pixels", shape=(3, 7, 5, 16), filters=(10, 1, 1)),
    Conv(id="pointwise prime", shape=(1, 3, 5, 37), filters=(19, 1, 1)),
    Conv(id="float output", shape=(1, 5, 6, 8), filters=(6, 3, 3), out="float32"),
    Conv(id="weights with zero points", shape=(2, 5, 7, 8), filters=(14, 3, 3), padding=(1,) * 4,
         offsets=True),
    Conv(id="pointwise with zero points", shape=(2, 3, 5, 16), filters=(10, 1, 1), residual=True,
         offsets=True),
    Conv(id="extreme", shape=(1, 4, 4, 16), filters=(16, 3, 3), extreme=True),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Dense:
    id: str
    shape: tuple[int, int]
    channels: int
    residual: bool = False
    offsets: bool = False


DENSES = [
    Dense(id="two rows", shape=(2, 64), channels=40),
    Dense(id="prime rows", shape=(31, 12), channels=33),
    Dense(id="odd depth", shape=(4, 7), channels=5),
    Dense(id="residual", shape=(6, 16), channels=17, residual=True),
    Dense(id="zero points", shape=(5, 24), channels=14, offsets=True),
]


class Network:
    """Operators side by side, whose inputs are parameters, and what they should return."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(7)
        self.arrays: list[np.ndarray] = []
        self.params: list[relax.Var] = []
        self.results: list[relax.Call] = []
        self.wanted: list[np.ndarray] = []

    def parameter(self, array: np.ndarray) -> relax.Var:
        self.arrays.append(array)
        type_ = relax.TensorType(array.shape, str(array.dtype))
        self.params.append(relax.Var(f"p{len(self.params)}", type_))
        return self.params[-1]

    def finish(self, case: Conv | Dense, acc: np.ndarray, out: str) -> tuple[list[relax.Var], list]:
        """Return the parameters behind the weights, and note what the operator should return."""
        rng = self.rng
        bias = rng.integers(-5000, 5000, acc.shape[-1]).astype(np.int32)
        acc = acc + bias
        scale = rng.uniform(0.5, 1.5, acc.shape[-1]) * 60 / np.abs(acc).max()
        multiplier, levels, rest = scale.astype(np.float32), [3], []
        if out != "float32":
            levels += [119, 5, 250]
        if case.residual:
            multiplier = multiplier * GUARD
            levels.append(77)
            residual = rng.integers(0, 256, acc.shape).astype(np.uint8)
            rest = [residual, np.array([0.37], np.float32) * GUARD]
        levels_array = np.array(levels, np.int32)
        self.wanted.append(requantized(acc, multiplier, levels_array, out, *rest))
        values = [bias, multiplier, levels_array, *rest]
        return [self.parameter(value) for value in values]

    def offsets(self, case: Conv | Dense, acc: np.ndarray, sums: np.ndarray) -> dict:
        """Return the offsets of weights and the sums under windows; ``acc`` gets their product."""
        if not case.offsets:
            return {}
        offsets = self.rng.integers(-100, 100, acc.shape[-1]).astype(np.int32)
        acc += offsets * sums
        return {
            "weight_offsets": self.parameter(offsets),
            "window_sums": self.parameter(sums.astype(np.int32)),
        }

    def conv(self, case: Conv) -> None:
        depth = case.shape[3]
        data = self.rng.integers(0, 256, case.shape).astype(np.uint8)
        weight = self.rng.integers(-127, 128, (*case.filters, depth)).astype(np.int8)
        if case.extreme:
            data[:] = 255
            weight[:] = np.where(np.arange(len(weight)) % 2, -127, 127)[:, None, None, None]
        first = self.parameter(data)
        acc = conv_sums(case, data, weight, 3)
        offsets = self.offsets(case, acc, conv_sums(case, data, np.ones_like(weight[:1]), 3))
        others = self.finish(case, acc, case.out)
        self.results.append(
            operators.conv2d_int8(
                first,
                relax.const(weight),
                *others,
                strides=case.strides,
                padding=case.padding,
                dilation=case.dilation,
                out_dtype=case.out,
                **offsets,
            )
        )

    def dense(self, case: Dense) -> None:
        data = self.rng.integers(0, 256, case.shape).astype(np.uint8)
        weight = self.rng.integers(-127, 128, (case.channels, case.shape[1])).astype(np.int8)
        first = self.parameter(data)
        acc = data.astype(np.int64) @ weight.astype(np.int64).T
        offsets = self.offsets(case, acc, data.astype(np.int64).sum(1, keepdims=True))
        others = self.finish(case, acc, "uint8")
        self.results.append(operators.dense_int8(first, relax.const(weight), *others, **offsets))

    def module(self):
        bb = relax.BlockBuilder()
        with bb.function("main", self.params):
            with bb.dataflow():
                out = bb.emit_output(relax.Tuple([bb.emit(result) for result in self.results]))
            bb.emit_func_output(out)
        return bb.get()


def test_kernels_of_matrices_equal_the_oracle_when_emulated(arm_emulator, tmp_path) -> None:
    network = Network()
    for conv in CONVS:
        network.conv(conv)
    for dense in DENSES:
        network.dense(dense)
    target = resolve("graviton3")
    asked: dict[str, tuple[str, ...]] = {}
    machine = replace(Machine.of(target, 2), asked=asked)
    apply(network.module(), *(stage.run for stage in pipeline.lower_stages_of(machine)))
    points = [point for point in asked if point.startswith("matrices")]
    assert len(points) == len(network.results)
    # Every layer in matrices, those too that the model would give to vectors.
    decided = dict.fromkeys(points, str(IntegerDot.USMMLA))
    lowered = pipeline.lower(network.module(), target, threads=2, decided=decided)
    scheduled = pipeline.schedule(lowered, target, threads=2)
    assert not [decision for decision in scheduled.decisions if decision.reason]
    rules = [decision.rule for decision in scheduled.decisions]
    assert rules.count("matrices") == len(network.results)
    library = tmp_path / "lib.so"
    library.write_bytes(pipeline.link(scheduled.module, target, threads=2))
    outputs = arm_emulator.run(library, network.arrays, cpu="max", threads=2)
    cases = [case.id for case in (*CONVS, *DENSES)]
    for case, got, want in zip(cases, outputs, network.wanted, strict=True):
        np.testing.assert_array_equal(got, want, err_msg=case)
        assert len(np.unique(got)) > 1
