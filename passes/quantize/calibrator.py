"""The calibration methods by name."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .histogram_observers import (
    DEFAULT_PERCENTILE,
    EntropyObserver,
    MseObserver,
    PercentileObserver,
)
from .observer import MinMaxObserver, MovingAverageObserver, Observer


class Method(StrEnum):
    """How the range of a tensor is chosen from what calibration data show of it."""

    MINMAX = "minmax"
    MOVING_AVERAGE = "moving_average"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"


@dataclass(frozen=True, kw_only=True)
class Calibrator:
    """A calibration method with its setting.

    Parameters
    ----------
    method : Method
        See the observers.
    percentile : float
        Of `PercentileObserver`; the others have no setting.
    """

    method: Method = Method.MINMAX
    percentile: float = DEFAULT_PERCENTILE

    @property
    def needs_values(self) -> bool:
        """Whether the observers read every value, and not only extremes of each sample."""
        return self.method not in (Method.MINMAX, Method.MOVING_AVERAGE)

    @property
    def settings(self) -> dict[str, str | float]:
        """What decides the ranges, for a cache's key."""
        if self.method is Method.PERCENTILE:
            return {"method": str(self.method), "percentile": self.percentile}
        return {"method": str(self.method)}

    def observer(self, layer: str) -> Observer:
        """Return a new observer of one tensor.

        Parameters
        ----------
        layer : str
            The tensor's name, for errors.

        Raises
        ------
        UsageError
            The percentile is outside of its bounds.
        """
        match self.method:
            case Method.MINMAX:
                return MinMaxObserver(layer=layer)
            case Method.MOVING_AVERAGE:
                return MovingAverageObserver(layer=layer)
            case Method.PERCENTILE:
                return PercentileObserver(layer=layer, percentile=self.percentile)
            case Method.ENTROPY:
                return EntropyObserver(layer=layer)
            case Method.MSE:
                return MseObserver(layer=layer)
