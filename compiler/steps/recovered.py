"""Recovery of the weights that a step quantizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hone.data import Dataset
from hone.errors import UsageError
from hone.model import Model
from hone.passes.quantize.quantize_int8 import QuantizedRead
from hone.passes.quantize.weight_schemes import WeightOptions
from hone.recover_quantized import distill_quantized

from .candidate import Context, prepared
from .options.recover import QuantizedRecover, WeightRecover


def recovered(
    model: Model,
    options: QuantizedRecover,
    data: Dataset,
    context: Context,
    *,
    layers: Collection[str],
    weights: WeightOptions,
    reads: Sequence[QuantizedRead] = (),
) -> tuple[Model, str]:
    """Return a float model whose weights are trained for what they will become, and what was done.

    Parameters
    ----------
    model : Model
        In NHWC, batch norm folded.
    options : QuantizedRecover
        From the recipe.
    data : Dataset
        Samples; labels are not used.
    context : Context
        What all steps share.
    layers : collection of str
        Binding names of the layers whose weights are quantized.
    weights : WeightOptions
        How.
    reads : sequence of QuantizedRead
        Activations that are quantized too.

    Raises
    ------
    UsageError
        There is no unchanged model to learn from, or a stage does not fit.
    """
    if context.teacher is None:
        raise UsageError("recovery needs the unchanged model", where="recover")
    result = distill_quantized(
        model.module,
        prepared(context.teacher),
        data.inputs,
        layers=layers,
        weights=weights,
        reads=reads,
        progressive=options.progressive if isinstance(options, WeightRecover) else (),
        freeze=options.freeze,
        epochs=options.epochs,
        batch=options.batch,
        learning_rate=options.learning_rate,
        temperature=options.temperature,
        seed=context.seed,
        threads=context.threads,
        time_limit_s=options.seconds,
        progress=context.progress,
    )
    note = (
        f", recovered in {result.steps} steps of {options.batch}, "
        f"loss {result.loss_before:.3g} → {result.loss_after:.3g}"
    )
    note += "".join(f"; {text}" for text in result.notes)
    return model.with_module(result.module), note
