"""What a mixed precision search found for each layer, and what its conversions cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a layer costs in one precision.

    Parameters
    ----------
    error : float or None
        Of the outputs where only this layer has the precision; None where it cannot.
    us : float or None
        Microseconds, with what follows until the next layer, where the whole network has the
        precision; None where that was not measured.
    """

    error: float | None = None
    us: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerPrecision:
    """One layer.

    Parameters
    ----------
    layer : str
        Its id.
    precision : str
        What it has.
    reason : str
        Why not a faster one; empty for the first of the candidates.
    us : float or None
        Microseconds in the network that was chosen, with what follows until the next layer.
    costs : mapping of str to Cost
        Of every candidate and of float.
    sqnr_db : float or None
        Signal to quantization noise of its result; None without noise or not measured.
    """

    layer: str
    precision: str
    reason: str = ""
    us: float | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    sqnr_db: float | None = None


@dataclass(frozen=True, kw_only=True)
class ConversionCost:
    """One conversion at a border of precisions.

    Parameters
    ----------
    tensor : str
        Id of the layer whose result is converted, or name of an input.
    direction : str
        ``quantize``, ``dequantize`` or ``cast``.
    kernel : str
        That does it.
    us : float or None
        Microseconds; None where the kernel computes layers as well.
    layers : tuple of str
        Ids of the layers that the kernel computes beside it.
    """

    tensor: str
    direction: str
    kernel: str
    us: float | None
    layers: tuple[str, ...] = ()
