"""What a step is given, and what it proposes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tvm
from tvm import relax

from hone.data import Dataset
from hone.errors import UsageError
from hone.model import Layer, Model
from hone.passes.apply import apply
from hone.passes.graph.dataflow import Dataflow, layer_of
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.progress import Progress, silent
from hone.selectors import WEIGHTED, select
from hone.steps.options.section import StepSection
from hone.targets.target import Target

if TYPE_CHECKING:
    from hone.mixed.layer_precision import ConversionCost, LayerPrecision
    from hone.steps.options.tune import TuneStep
    from hone.tune import TuneResult

    from .trials import Trials


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all steps of a build share.

    Parameters
    ----------
    target : Target
        What the model is compiled for.
    threads : int
        Of one run, of calibration and of training.
    teacher : Model, optional
        The unchanged model; recovery needs it.
    calibration : Dataset, optional
        Samples for ranges and recovery; labels are not used.
    allow_random : bool
        Whether ``random:N`` data calibrates.
    cache : Path, optional
        Folder where calibration results are kept.
    error_samples : int
        Samples on which each layer's quantization error is measured; 0 does not measure it.
    seed : int
        Of training.
    search : callable, optional
        Tunes a model and returns what was found, or why there is nothing.
    trials : Trials, optional
        Tries candidates, for steps that search; only a build has it.
    progress : Progress
        Where to report.
    """

    target: Target
    threads: int
    teacher: Model | None = None
    calibration: Dataset | None = None
    allow_random: bool = False
    cache: Path | None = None
    error_samples: int = 0
    seed: int = 0
    search: Callable[[Model, TuneStep], TuneResult | str] | None = None
    trials: Trials | None = None
    progress: Progress = field(default_factory=silent)

    def calibration_for(self, step: StepSection) -> Dataset:
        """Return the calibration data.

        Raises
        ------
        UsageError
            There are none.
        """
        if self.calibration is None:
            raise UsageError(f"{step.kind} needs calibration data", where="data.calibration")
        return self.calibration


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """What a step proposes.

    Parameters
    ----------
    model : Model
        Changed; the same module when there was nothing to change.
    precision : str or None
        Lowest precision of its kernels; None where the step leaves it as it was.
    skipped : tuple of (str, str)
        Layers that the step left alone, each with the reason.
    note : str
        What it did, in a few words.
    errors : tuple of (str, float or None)
        Quantized layers, each with its SQNR in dB; None where there is no noise.
    merged : mapping of str to str
        Binding name of a layer that is gone → binding name of the layer that computes it now.
    precisions : tuple of LayerPrecision
        What each layer has, where layers have different precisions.
    conversions : tuple of ConversionCost
        At the borders between them.
    """

    model: Model
    precision: str | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    note: str = ""
    errors: tuple[tuple[str, float | None], ...] = ()
    merged: Mapping[str, str] = field(default_factory=dict)
    precisions: tuple[LayerPrecision, ...] = ()
    conversions: tuple[ConversionCost, ...] = ()


def selected(model: Model, step: StepSection) -> tuple[Layer, ...]:
    """Return the layers that a step's selectors name; none for a step without selectors.

    Raises
    ------
    UsageError
        A selector names no layer.
    """
    key = step.selector_key
    if key is None or not step.selects:
        return ()
    among = WEIGHTED if step.weighted_only else None
    return select(model.layers, getattr(step, key), among=among, where=key)


def prepared(model: Model) -> tvm.IRModule:
    """Return a model's module with constants evaluated and batch norm folded."""
    return apply(model.module, relax.transform.FoldConstant(), FoldBatchNorm())


def bindings_left(ready: Model, layers: tuple[Layer, ...], *, where: str) -> list[str]:
    """Return the bindings of selected layers that are still there once a module is prepared.

    Parameters
    ----------
    ready : Model
        With a prepared module.
    layers : tuple of Layer
        That selectors named.
    where : str
        The selectors' key, for errors.

    Raises
    ------
    UsageError
        All of them became part of other layers.
    """
    present = {layer_of(binding.var) for binding in Dataflow(ready.module["main"]).bindings}
    bindings = [layer.binding for layer in layers if layer.binding in present]
    if layers and not bindings:
        raise UsageError(
            "these layers become part of others before quantization: "
            + ", ".join(layer.id for layer in layers),
            where=where,
            hint=f"{where} the convolution or matrix product that they are folded into",
        )
    return bindings
