"""The compression steps of a recipe: each proposes a changed model and does not judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tvm
from tvm import relax

from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.dataflow import Dataflow, layer_of
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.graph.split_operator import SplitOperator
from hone.passes.prune.prune_channels import PruneChannels
from hone.passes.quantize.calibrator import Calibrator, Method
from hone.passes.quantize.equalize import By, equalize, equalized_tensors
from hone.passes.quantize.quantize_int8 import Quantization, quantize_int8, weighted_inputs

from . import calibrate
from .calibration_cache import CalibrationCache
from .data import Dataset
from .errors import UsageError
from .model import Layer, Model
from .progress import Progress
from .quantization_error import layer_errors
from .recipe import Int8Step, PruneStep, SplitStep
from .selectors import WEIGHTED, select


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
    errors : tuple of (str, float or None)
        Quantized layers, each with its SQNR in dB; None where there is no noise.
    """

    model: Model
    precision: str = "fp32"
    skipped: tuple[tuple[str, str], ...] = ()
    note: str = ""
    errors: tuple[tuple[str, float | None], ...] = ()


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
    step: Int8Step,
    calibration: Dataset,
    *,
    threads: int,
    progress: Progress,
    allow_random: bool = False,
    cache: CalibrationCache | None = None,
    error_samples: int = 0,
) -> Candidate:
    """Quantize convolutions and matrix products to 8-bit integers.

    Parameters
    ----------
    model : Model
        What was kept so far.
    step : Int8Step
        From the recipe.
    calibration : Dataset
        Gives the ranges of activations.
    threads : int
        Of the calibration runs.
    progress : Progress
        Where to report.
    allow_random : bool
        Whether ``random:N`` data will do.
    cache : CalibrationCache, optional
        Where calibration results are kept.
    error_samples : int
        Samples on which each layer's quantization error is measured; 0 does not measure it.

    Raises
    ------
    UsageError
        A selector of ``skip`` names no layer, or the data do not calibrate.
    """
    calibrate.check_calibration_data(calibration, allow_random=allow_random)
    prepared = model.with_module(apply(_prepared(model), ToNHWC()))
    keep_float = _keep_float(prepared, selected(model, step))
    note = ""
    if step.equalize is not None:
        ranges = calibrate.channel_ranges(
            prepared,
            calibration,
            equalized_tensors(prepared.module),
            threads=threads,
            cache=cache,
            progress=progress,
        )
        equalized = equalize(prepared.module, ranges, by=By(step.equalize))
        prepared = prepared.with_module(equalized.module)
        note = f", {len(equalized.pairs)} pairs of layers equalized"
    tensors = calibrate.calibrate(
        prepared,
        calibration,
        threads=threads,
        keep_float=keep_float,
        calibrator=_calibrator(step),
        allow_random=allow_random,
        cache=cache,
        progress=progress,
    )
    means = None
    if step.bias_correction:
        inputs = weighted_inputs(prepared.module, tensors, keep_float=keep_float)
        means = calibrate.input_means(
            prepared, calibration, inputs, threads=threads, progress=progress
        )
    result = quantize_int8(prepared.module, tensors, keep_float=keep_float, means=means)
    if not result.quantized:
        return Candidate(model=model, skipped=_skipped(result), note="no layer fits int8")
    return Candidate(
        model=model.with_module(result.module),
        precision="int8",
        skipped=_skipped(result),
        note=f"{len(result.quantized)} kernels in int8, "
        f"conversions from or to float: {len(result.conversions)}{note}",
        errors=_errors(prepared, result, calibration, samples=error_samples, threads=threads),
    )


def _calibrator(step: Int8Step) -> Calibrator:
    if step.percentile is None:
        return Calibrator(method=Method(step.observer))
    return Calibrator(method=Method(step.observer), percentile=step.percentile)


def _errors(
    prepared: Model, result: Quantization, data: Dataset, *, samples: int, threads: int
) -> tuple[tuple[str, float | None], ...]:
    if not samples:
        return ()
    ids = {layer.binding: layer.id for layer in prepared.layers}
    found = layer_errors(prepared, result, data, samples=samples, threads=threads)
    return tuple((ids.get(error.layer, error.layer), error.sqnr_db) for error in found)


def selected(model: Model, step: Int8Step | SplitStep) -> tuple[Layer, ...]:
    """Return the layers that a step's selectors name.

    Raises
    ------
    UsageError
        A selector names no layer.
    """
    if isinstance(step, Int8Step):
        return select(model.layers, step.skip, where="skip")
    return select(model.layers, step.layers, among=WEIGHTED, where="layers")


def _keep_float(prepared: Model, layers: Sequence[Layer]) -> list[str]:
    """Return the bindings of layers that are still there once batch norm is folded."""
    present = {layer_of(binding.var) for binding in Dataflow(prepared.module["main"]).bindings}
    bindings = [layer.binding for layer in layers if layer.binding in present]
    if layers and not bindings:
        raise UsageError(
            "these layers become part of others before quantization: "
            + ", ".join(layer.id for layer in layers),
            where="skip",
            hint="skip the convolution or matrix product that they are folded into",
        )
    return bindings


def _skipped(result: Quantization) -> tuple[tuple[str, str], ...]:
    return tuple((entry.layer, entry.reason) for entry in result.skipped)


def split(model: Model, step: SplitStep) -> Candidate:
    """Split operators into parts with a concatenation behind them."""
    bindings = [layer.binding for layer in selected(model, step)]
    splitting = SplitOperator(layers=bindings, parts=step.parts, axis=step.axis)
    module = apply(_prepared(model), splitting)
    return Candidate(model=model.with_module(module))


def _prepared(model: Model) -> tvm.IRModule:
    """Return a model's module with constants evaluated and batch norm folded."""
    return apply(model.module, relax.transform.FoldConstant(), FoldBatchNorm())
