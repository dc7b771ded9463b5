"""Recovery of a network whose weights, and activations, will be integers.

While the student learns to answer like its teacher, it computes with weights that integers can
hold; the gradient passes straight through the rounding. Progressive recovery makes it easier: the
bits of the weights fall step by step, or weights are frozen group by group while the others make up
for them. The result is a float module that the quantizers turn into just what was trained.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import tvm

from hone.passes.distill.lift_constants import trainable_constants
from hone.passes.distill.weight_grid import FixedGrid, freeze_more, project
from hone.passes.graph.dataflow import layer_of
from hone.passes.quantize.quantize_int8 import QuantizedRead
from hone.passes.quantize.weight_schemes import Scheme, WeightOptions

from .distillation import MIX, Distillation, RecoverResult
from .errors import ModelError, UsageError
from .progress import Progress, silent

_WEIGHT_AXES = (2, 4)


def distill_quantized(
    student: tvm.IRModule,
    teacher: tvm.IRModule,
    inputs: Mapping[str, np.ndarray],
    *,
    layers: Collection[str],
    weights: WeightOptions,
    reads: Sequence[QuantizedRead] = (),
    progressive: Sequence[int] = (),
    freeze: Sequence[float] = (),
    epochs: int = 100,
    batch: int = 32,
    learning_rate: float = 0.001,
    temperature: float = 2.0,
    seed: int = 0,
    threads: int = 1,
    mix: float = MIX,
    progress: Progress | None = None,
    time_limit_s: float | None = None,
) -> RecoverResult:
    """Train a student to repeat its teacher's outputs with quantized weights.

    The network computes with ``W~ = quantize(W)``; ``dL/dW~`` is applied to W (straight-through
    estimator). ``progressive`` trains with each number of bits in turn, from the weights of the one
    before. ``freeze`` is incremental quantization: at each fraction, that many weights of
    every layer, the outermost first, are put on the grid and stay there, and the free ones train in
    float. Every stage has the same share of the epochs and its own learning rate schedule.

    Sources: Bengio, Léonard and Courville 2013 (the estimator); Zhuang et al., "Towards Effective
    Low-bitwidth Convolutional Neural Networks" (CVPR 2018), section 3.3 (falling bits); Zhou et
    al., "Incremental Network Quantization" (ICLR 2017), algorithm 1, here with evenly spaced levels
    instead of powers of two.

    Parameters
    ----------
    student, teacher, inputs, epochs, batch, learning_rate, temperature, seed, threads, mix
        As for `hone.recover.distill`.
    layers : collection of str
        Binding names of the layers whose weights are quantized.
    weights : WeightOptions
        How they are quantized in the end.
    reads : sequence of QuantizedRead
        Activations that are quantized too.
    progressive : sequence of int
        Falling bits, the last ones those of `weights`.
    freeze : sequence of float
        Rising fractions, the last one 1.
    progress : Progress, optional
        Is told epochs and losses.
    time_limit_s : float, optional
        Wall seconds for all stages, compiling included.

    Returns
    -------
    RecoverResult
        Losses are those with quantized weights.

    Raises
    ------
    UsageError
        An option, a stage or the samples do not fit.
    ModelError
        Nothing can be trained, or no layer has a weight that is quantized.
    """
    started = time.monotonic()
    check_stages(weights, progressive, freeze)
    count = max(len(progressive), len(freeze), 1)
    if epochs < count:
        raise UsageError(f"{count} stages need at least {count} epochs, not {epochs}")
    progress = progress or silent()
    run = Distillation(
        student,
        teacher,
        inputs,
        batch=batch,
        temperature=temperature,
        threads=threads,
        mix=mix,
        reads=reads,
        progress=progress,
    )
    initial = run.trainer.weights()
    names = _quantized(student, layers).intersection(initial)
    if not names:
        raise ModelError("no layer has a weight that is both quantized and trained")
    stages = _Stages(run, names, weights)
    stages.use(weights)
    loss_before = run.loss()
    losses: list[float] = []
    for stage in range(count):
        if freeze:
            stages.freeze(freeze[stage])
        else:
            bits = progressive[stage] if progressive else weights.bits
            stages.use(replace(weights, bits=bits))
        limit = None
        if time_limit_s is not None:
            left = time_limit_s - (time.monotonic() - started)
            limit = max(left / (count - stage), 1e-9)
        share = epochs * (stage + 1) // count - epochs * stage // count
        taken = run.train(
            epochs=share,
            learning_rate=learning_rate,
            seed=seed + stage,
            time_limit_s=limit,
            name=stages.title,
        )
        losses += taken
        if freeze:
            stages.settle()
    stages.use(weights)
    return run.conclude(
        losses,
        epochs=epochs,
        loss_before=loss_before,
        initial=initial,
        started=started,
        time_limit_s=time_limit_s,
    )


def check_stages(
    weights: WeightOptions, progressive: Sequence[int], freeze: Sequence[float]
) -> None:
    """Refuse stages that do not lead to the wanted weights.

    Raises
    ------
    UsageError
        Both kinds of stages are given, or their numbers do not end where they must.
    """
    if progressive and freeze:
        raise UsageError("progressive and freeze are two ways to one end: give one of them")
    if progressive:
        if weights.scheme is not Scheme.INTEGER:
            raise UsageError(f"progressive lowers the bits of integers, {weights.scheme} has none")
        falling = all(a > b for a, b in pairwise(progressive))
        if not falling or progressive[-1] != weights.bits:
            raise UsageError(
                f"progressive needs falling bits that end with {weights.bits}, "
                f"not {list(progressive)}"
            )
    if freeze:
        rising = all(a < b for a, b in pairwise(freeze))
        if not rising or freeze[0] <= 0.0 or freeze[-1] != 1.0:
            raise UsageError(
                f"freeze needs rising fractions above 0 that end with 1, not {list(freeze)}"
            )


class _Stages:
    """Sets a distillation's trainer up for one stage after the other."""

    def __init__(self, run: Distillation, names: Collection[str], weights: WeightOptions) -> None:
        self._trainer = run.trainer
        initial = run.trainer.weights()
        self._grids = {name: FixedGrid.of(initial[name], weights) for name in names}
        self._frozen = {name: np.zeros(initial[name].shape, bool) for name in names}
        self._names = frozenset(names)
        self.title = "recover"

    def use(self, options: WeightOptions) -> None:
        """Let the network compute with weights quantized like this."""

        def quantized(name: str, value: np.ndarray) -> np.ndarray:
            # Weights that diverged have no levels; their loss says so.
            if name not in self._names or not np.isfinite(value).all():
                return value
            return project(value, options)

        self.title = f"recover with {options.bits}-bit weights"
        self._trainer.frozen = {}
        self._trainer.project = quantized
        self._trainer.restart(self._trainer.weights())

    def freeze(self, fraction: float) -> None:
        """Put a fraction of each weight on its grid for good; the rest trains in float."""
        weights = self._trainer.weights()
        for name, grid in self._grids.items():
            value = grid.within(weights[name])
            frozen = freeze_more(grid.reach(value), self._frozen[name], fraction)
            weights[name] = np.where(frozen, grid.nearest(value), value)
            self._frozen[name] = frozen
        self.title = f"recover with {100 * fraction:g}% of the weights frozen"
        self._trainer.project = None
        self._trainer.frozen = self._frozen
        self._trainer.restart(weights)

    def settle(self) -> None:
        """Bring free weights that left the grid back to its ends."""
        weights = self._trainer.weights()
        for name, grid in self._grids.items():
            weights[name] = np.where(self._frozen[name], weights[name], grid.within(weights[name]))
        self._trainer.restart(weights)


def _quantized(student: tvm.IRModule, layers: Collection[str]) -> set[str]:
    """Return the names of the weights of layers."""
    return {
        constant.name
        for constant in trainable_constants(student)
        if constant.argument == 1
        and constant.name.endswith(".weight")
        and constant.value.ndim in _WEIGHT_AXES
        and layer_of(constant.var) in layers
    }
