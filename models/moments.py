"""Mean and variance of every channel, followed through a network with random weights.

A batch normalization is only as good as its statistics: with trivial ones (0 and 1) the
activations of a deep random network explode or die. Running data through the network would need
an inference engine; instead the first two moments of each channel are propagated analytically,
with the assumptions that make it cheap: the taps of a kernel see independent values, and what
enters a nonlinearity is Gaussian. Both hold well for random weights and white-noise inputs
(assumed density filtering; Gast and Roth, "Lightweight Probabilistic Deep Networks", CVPR 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_erf = np.vectorize(math.erf, otypes=[np.float64])


@dataclass(frozen=True, kw_only=True)
class Moments:
    """First two moments of the channels of an activation.

    Parameters
    ----------
    mean, variance : ndarray of float64
        Over samples and positions, shape [C].
    rectified : Moments, optional
        Moments of the Gaussian that this is max(x, 0) of, where it is that.
    """

    mean: Float64
    variance: Float64
    rectified: Moments | None = None

    @staticmethod
    def of(channels: int, mean: float = 0.0, variance: float = 1.0) -> Moments:
        """Give all channels the same moments."""
        return Moments(mean=np.full(channels, mean), variance=np.full(channels, variance))

    def conv(self, weight: NDArray[np.float32], groups: int, inside: Float64) -> Moments:
        """Moments after a convolution without bias.

        A tap that falls on the zero padding for some output positions is a value that is present
        with probability p: mean p m, variance p (v + m²) − p² m².

        Parameters
        ----------
        weight : ndarray
            [M, C // groups, kH, kW].
        groups : int
            Number of groups; C = `mean` has that many channels in all.
        inside : ndarray
            Share of the output positions for which a tap is inside the image, [kH, kW].
        """
        taps = weight.astype(np.float64).reshape(groups, -1, *weight.shape[1:])
        mean = self.mean.reshape(groups, -1)
        variance = self.variance.reshape(groups, -1)
        # einsum, not matmul: its order of summation does not depend on the BLAS or its threads.
        first = np.einsum("gmcrs,rs->gmc", taps, inside)
        square = np.einsum("gmcrs,rs->gmc", taps**2, inside)
        square_twice = np.einsum("gmcrs,rs->gmc", taps**2, inside**2)
        spread = np.einsum("gmc,gc->gm", square, variance + mean**2)
        spread -= np.einsum("gmc,gc->gm", square_twice, mean**2)
        return Moments(mean=np.einsum("gmc,gc->gm", first, mean).ravel(), variance=spread.ravel())

    def clip(self, high: float = math.inf) -> Moments:
        """Moments after ``min(max(x, 0), high)`` of a Gaussian x: ReLU, or ReLU6 with 6.

        With t = (a − m) / s, E[x; x > a] = m Q(t) + s φ(t) and
        E[x²; x > a] = (m² + s²) Q(t) + s (m + a) φ(t). A standard normal x without an upper end
        gives mean 0.3989 and variance 0.3408.
        """
        first, second, _ = self._above(0.0)
        if math.isfinite(high):
            first_above, second_above, above = self._above(high)
            first += high * above - first_above
            second += high**2 * above - second_above
        return Moments(mean=first, variance=np.maximum(second - first**2, 0.0), rectified=self)

    def _above(self, end: float) -> tuple[Float64, Float64, Float64]:
        """E[x; x > end], E[x²; x > end] and P(x > end) of a Gaussian x."""
        scale = np.sqrt(np.maximum(self.variance, 1e-30))
        t = (end - self.mean) / scale
        density = np.exp(-0.5 * t**2) / math.sqrt(2.0 * math.pi)
        above = 0.5 * (1.0 - _erf(t / math.sqrt(2.0)))
        first = self.mean * above + scale * density
        second = (self.mean**2 + self.variance) * above + scale * (self.mean + end) * density
        return first, second, above

    def max_pool(self, taps: int) -> Moments:
        """Moments of the largest of `taps` independent values, Gaussian or rectified Gaussian.

        The largest of n Gaussians has the distribution function Φ(t)ⁿ, integrated numerically;
        max commutes with rectifying. Four standard normal values give mean 1.0294 and
        variance 0.4917 (Teichroew, Ann. Math. Stat. 27, 1956).
        """
        ends = np.linspace(-8.0, 8.0, 1025)
        share = np.diff((0.5 * (1.0 + _erf(ends / math.sqrt(2.0)))) ** taps)
        source = self if self.rectified is None else self.rectified
        middle = 0.5 * (ends[1:] + ends[:-1])
        values = source.mean[:, None] + np.sqrt(source.variance)[:, None] * middle
        if self.rectified is not None:
            values = np.maximum(values, 0.0)
        mean = np.einsum("ct,t->c", values, share)
        return Moments(mean=mean, variance=np.einsum("ct,t->c", values**2, share) - mean**2)

    def average(self, count: int) -> Moments:
        """Moments of the mean of `count` independent values."""
        return Moments(mean=self.mean, variance=self.variance / count)

    def add(self, other: Moments) -> Moments:
        """Moments of the sum of two independent activations."""
        return Moments(mean=self.mean + other.mean, variance=self.variance + other.variance)
