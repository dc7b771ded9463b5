"""The quantization error of each layer that a step changed, for the report."""

from __future__ import annotations

from collections.abc import Sequence

from hone.data import Dataset
from hone.model import Model
from hone.quantization_error import Compared, layer_errors

from .candidate import Context


def sqnr(
    ready: Model, changed: Model, pairs: Sequence[Compared], data: Dataset | None, context: Context
) -> tuple[tuple[str, float | None], ...]:
    """Return each layer's id and SQNR in dB on a few samples; none where not asked or no data.

    Parameters
    ----------
    ready : Model
        In float, the very module that was changed.
    changed : Model
        What became of it.
    pairs : sequence of Compared
        What is compared.
    data : Dataset or None
        Where the samples come from.
    context : Context
        Says on how many of them.
    """
    if data is None or not context.error_samples:
        return ()
    ids = {layer.binding: layer.id for layer in ready.layers}
    found = layer_errors(
        ready, changed, pairs, data, samples=context.error_samples, threads=context.threads
    )
    return tuple((ids.get(error.layer, error.layer), error.sqnr_db) for error in found)
