"""Splits for parallelism: which layers are looked at, and that the clock alone decides."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from hone import driver, parity, runtime
from hone.importer import load
from hone.measure import Measurement
from hone.model import Model
from hone.profiling.balance import busy_share, busy_shares
from hone.steps import split_parallel
from hone.steps.candidate import Candidate, Context
from hone.steps.options.split import SplitStep
from hone.steps.split import propose
from hone.steps.trials import Trials
from hone.targets.target import resolve

HOST = resolve("host")
STEP = SplitStep(kind="split", layers=["auto"], axis="channels")


@pytest.mark.parametrize(
    ("tasks", "threads", "share"), [(1, 2, 0.5), (3, 2, 0.75), (4, 2, 1.0), (5, 4, 0.625)]
)
def test_tasks_that_threads_do_not_divide_leave_some_idle(
    tasks: int, threads: int, share: float
) -> None:
    assert busy_share(tasks, threads) == share


@pytest.fixture(scope="module")
def model() -> Model:
    """Two matrix products, the second too small to be cut for threads."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)

    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], name="wide"),
            helper.make_node("MatMul", ["h", "v"], ["y"], name="small"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 512])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 3])],
        [weight("w", 512, 512), weight("v", 512, 3)],
    )
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


def test_shares_are_read_off_the_parallel_loops(model: Model) -> None:
    scheduled = driver.assemble(model, target=HOST, threads=2).scheduled
    shares = busy_shares(scheduled.module, 2)
    assert set(shares) == {decision.kernel for decision in scheduled.decisions}
    assert max(shares.values()) == 1.0
    assert all(0.5 <= share <= 1.0 for share in shares.values())


class Clock:
    """Stands for a build whose split versions are faster by scripted ratios."""

    def __init__(self, model: Model, ratios: list[float]) -> None:
        self.built: list[str] = []
        self._ratios = ratios
        self.trials = Trials(
            build=self._build,
            lost=lambda _: 0.0,
            measure=self._measure,
            sample=parity.random_inputs(model),
            metric="relative_error",
            budget=0.0,
            folder=Path(),
            key=dict,
        )

    def _build(self, name: str, model: Model, _precision: str) -> Any:
        self.built.append(name)
        return SimpleNamespace(model=model)

    def _measure(self, versions: Any) -> Measurement:
        ratio = self._ratios.pop(0)
        assert list(versions) == ["kept", "split"]
        return Measurement(
            seconds={"kept": np.full((10, 3), ratio), "split": np.full((10, 3), 1.0)}
        )


def proposed(
    model: Model, monkeypatch: pytest.MonkeyPatch, idle: list[str], ratios: list[float]
) -> tuple[Candidate | str, Clock]:
    layers = [layer for layer in model.layers if layer.id in idle]
    monkeypatch.setattr(split_parallel, "idle_layers", lambda *_, **__: layers)
    clock = Clock(model, ratios)
    context = Context(target=HOST, threads=2, trials=clock.trials)
    return propose(model, STEP, context), clock


def test_layer_that_is_faster_in_parts_stays_so(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, clock = proposed(model, monkeypatch, ["wide", "small"], [1.5, 0.5])
    assert isinstance(found, Candidate)
    assert clock.built == ["unsplit", "split wide", "split small"]
    assert found.note == "1 of 2 layers that leave threads idle are faster in parts"
    assert found.skipped == (("small", "in parts it is 0.50 times as fast (95% 0.50 to 0.50)"),)
    package = driver.assemble(found.model, target=HOST, threads=1).package
    parity.check(model, runtime.load(package).run, threads=1)
    names = [str(b.var.name) for b in found.model.module["main"].body.blocks[0].bindings]
    assert [name for name in names if "@part" in name] == ["wide@part0", "wide@part1"]


def test_nothing_is_proposed_when_no_split_is_faster(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = proposed(model, monkeypatch, ["small"], [1.0])
    assert found == (
        "none of the layers that leave threads idle is faster in parts: "
        "small: in parts it is 1.00 times as fast (95% 1.00 to 1.00)"
    )
    found, _ = proposed(model, monkeypatch, [], [])
    assert found == "every kernel that counts keeps 80% of the threads busy"


def test_layers_of_idle_kernels_are_found_by_time(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assembled = driver.assemble(model, target=HOST, threads=2)
    version: Any = SimpleNamespace(assembled=assembled, runner=runtime.load(assembled.package))
    monkeypatch.setattr(split_parallel, "TIMING_S", 0.0)
    monkeypatch.setattr(split_parallel, "LEAST_SHARE", 0.0)
    monkeypatch.setattr(split_parallel, "busy_shares", lambda *_: dict.fromkeys(kernels, 0.5))
    kernels = assembled.package.manifest.kernels
    sample = parity.random_inputs(model)
    found = split_parallel.idle_layers(model, version, threads=2, sample=sample)
    assert sorted(layer.id for layer in found) == ["small", "wide"]
    monkeypatch.setattr(split_parallel, "busy_shares", lambda *_: dict.fromkeys(kernels, 0.8))
    assert split_parallel.idle_layers(model, version, threads=2, sample=sample) == []


def test_without_a_clock_nothing_is_chosen(model: Model) -> None:
    said = propose(model, STEP, Context(target=HOST, threads=2))
    assert said == 'only the clock chooses layers to split: on the target, with goal = "latency"'


def test_parts_may_be_left_out_only_where_the_step_chooses() -> None:
    with pytest.raises(ValueError, match="parts is required, unless"):
        SplitStep(kind="split", layers=["wide"])
    assert STEP.title == "split layers with idle threads by channels"
