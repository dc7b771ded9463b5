"""The compression steps of a recipe: each proposes a changed model and does not judge it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import relax

from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.graph.split_operator import SplitOperator
from hone.passes.prune.prune_channels import PruneChannels
from hone.passes.quantize.quantize_int8 import Quantization, quantize_int8

from . import calibrate
from .data import Dataset
from .errors import UsageError
from .model import Model
from .progress import Progress
from .recipe import PruneStep, SplitStep


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a step proposes.

    Parameters
    ----------
    model : Model
        Changed.
    precision : {"fp32", "int8"}
        Lowest precision of its kernels.
    skipped : tuple of (str, str)
        Layers that the step left alone, each with the reason.
    note : str
        What it did, in a few words.
    """

    model: Model
    precision: str = "fp32"
    skipped: tuple[tuple[str, str], ...] = ()
    note: str = ""


def prune(
    model: Model,
    step: PruneStep,
    *,
    teacher: Model,
    calibration: Dataset | None,
    threads: int,
    seed: int,
    progress: Progress,
) -> Candidate:
    """Remove channels, and recover by distillation from the unpruned model where asked for.

    Parameters
    ----------
    model : Model
        What was kept so far.
    step : PruneStep
        From the recipe.
    teacher : Model
        The unchanged model.
    calibration : Dataset or None
        For recovery; labels are not used.
    threads, seed : int
        Of the training.
    progress : Progress
        Where to report.
    """
    pruning = PruneChannels(
        amount=step.amount, norm=step.norm, scope=step.scope, round_to=step.round_to
    )
    student = _prepared(model)
    plan = pruning.plan(student)
    skipped = tuple((layer, group.reason) for group in plan.skipped for layer in group.layers)
    if not plan.removed:
        return Candidate(model=model, skipped=skipped, note="no channel can be removed")
    total = sum(group.size for group in plan.pruned)
    note = f"removed {plan.removed} of {total} channels"
    module = apply(student, pruning)
    if step.recover is not None and calibration is not None:
        from . import recover

        options = step.recover
        result = recover.distill(
            module,
            _prepared(teacher),
            calibration.inputs,
            epochs=options.epochs,
            batch=options.batch,
            learning_rate=options.learning_rate,
            temperature=options.temperature,
            seed=seed,
            threads=threads,
            time_limit_s=options.seconds,
            progress=progress,
        )
        module = result.module
        note += (
            f", recovered in {result.steps} steps of {options.batch}, loss {result.loss_before:.3g}"
        )
        note += f" → {result.loss_after:.3g}"
        note += "".join(f"; {text}" for text in result.notes)
    return Candidate(model=model.with_module(module), skipped=skipped, note=note)


def int8(
    model: Model,
    calibration: Dataset,
    *,
    skip: Sequence[str] = (),
    threads: int,
    progress: Progress,
) -> Candidate:
    """Quantize convolutions and matrix products to 8-bit integers.

    Parameters
    ----------
    model : Model
        What was kept so far.
    calibration : Dataset
        Gives the ranges of activations.
    skip : sequence of str
        Ids of layers that stay in float.
    threads : int
        Of the calibration runs.
    progress : Progress
        Where to report.

    Raises
    ------
    UsageError
        A layer of ``skip`` does not exist.
    """
    bindings = [binding(model, layer) for layer in skip]
    prepared = model.with_module(apply(_prepared(model), ToNHWC()))
    ranges = calibrate.calibrate(
        prepared, calibration, threads=threads, keep_float=bindings, progress=progress
    )
    result = quantize_int8(prepared.module, ranges, keep_float=bindings)
    if not result.quantized:
        return Candidate(model=model, skipped=_skipped(result), note="no layer fits int8")
    return Candidate(
        model=model.with_module(result.module),
        precision="int8",
        skipped=_skipped(result),
        note=f"{len(result.quantized)} kernels in int8, {len(result.conversions)} conversions",
    )


def _skipped(result: Quantization) -> tuple[tuple[str, str], ...]:
    return tuple((entry.layer, entry.reason) for entry in result.skipped)


def split(model: Model, step: SplitStep) -> Candidate:
    """Split operators into parts with a concatenation behind them."""
    bindings = [binding(model, layer) for layer in step.layers]
    splitting = SplitOperator(layers=bindings, parts=step.parts, axis=step.axis)
    module = apply(_prepared(model), splitting)
    return Candidate(model=model.with_module(module))


def _prepared(model: Model) -> tvm.IRModule:
    """Return a model's module with constants evaluated and batch norm folded."""
    return apply(model.module, relax.transform.FoldConstant(), FoldBatchNorm())


def binding(model: Model, layer: str) -> str:
    """Return the binding of a layer id.

    Raises
    ------
    UsageError
        There is no such layer.
    """
    bindings = {entry.id: entry.binding for entry in model.layers}
    if layer in bindings:
        return bindings[layer]
    near = difflib.get_close_matches(layer, bindings, n=1)
    raise UsageError(
        f"there is no layer {layer!r}",
        hint=f"did you mean {near[0]!r}?" if near else "`hone inspect MODEL` lists the layers",
    )
