"""What unsigned levels mean, as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .qparams import UINT8, QParams


@dataclass(frozen=True, kw_only=True)
class Levels:
    """How a level tensor is read: ``real = scale × (level - zero_point)``, levels in [0, 255].

    Parameters
    ----------
    scale : float
        A float32 number.
    zero_point : int
        Of the unsigned levels.
    """

    scale: float
    zero_point: int

    @classmethod
    def of(cls, qparams: QParams) -> Levels:
        """Return the levels of a tensor that is quantized per tensor to uint8."""
        if qparams.type != UINT8:
            raise ValueError(f"unsigned levels of 8 bits are required, not {qparams.type}")
        return cls(scale=float(qparams.scale), zero_point=int(qparams.zero_point))

    def bound(self, value: float, *, default: int) -> int:
        """Return the level of a bound of an activation, the default for an infinite one."""
        if math.isinf(value):
            return default
        steps = float(np.clip(np.rint(value / self.scale), -1e6, 1e6))
        return int(np.clip(self.zero_point + steps, 0, 255))

    def bounds(self, low: float, high: float) -> list[int]:
        """Return zero point, lowest and highest level of a result with an activation's bounds."""
        return [self.zero_point, self.bound(low, default=0), self.bound(high, default=255)]
