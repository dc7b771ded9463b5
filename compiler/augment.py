"""Makes more of a few unlabelled samples, for recovery training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to a batch of samples before teacher and student both see it.

    No label has to stay true: the teacher answers for the changed sample too (Beyer et al. 2022,
    "Knowledge distillation: A good teacher is patient and consistent"). Inputs that are not
    floating point stay as they are, and so do the others' when any input is one.

    Parameters
    ----------
    shift : int
        Images [N, C, H, W] of at least 4 × 4 pixels move by up to this many pixels along each
        axis; what comes in is zero.
    mix : float
        Fraction of the samples, in [0, 1], that are mixed with another one of the batch:
        ``λ a + (1 − λ) b`` with λ uniform in [0, 1].
    """

    shift: int = 0
    mix: float = 0.0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise UsageError(f"shift must be at least 0 pixels, not {self.shift}")
        if not 0.0 <= self.mix <= 1.0:
            raise UsageError(f"mix must be in [0, 1], not {self.mix}")

    def applies_to(self, inputs: list[np.ndarray]) -> bool:
        """Tell whether `apply` could change these inputs."""
        return all(array.dtype.kind == "f" for array in inputs) and (
            self.mix > 0.0 or (self.shift > 0 and any(map(_is_image, inputs)))
        )

    def apply(self, inputs: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
        """Return changed copies of the inputs of one batch, each [N, ...]."""
        samples = len(inputs[0])
        if self.shift:
            moves = rng.integers(0, 2 * self.shift + 1, (samples, 2))
            inputs = [
                _moved(array, moves, self.shift) if _is_image(array) else array for array in inputs
            ]
        if self.mix:
            partner = rng.permutation(samples)
            share = np.where(rng.random(samples) < self.mix, rng.random(samples), 1.0).astype(
                np.float32
            )
            inputs = [_mixed(array, array[partner], share) for array in inputs]
        return inputs


def _is_image(array: np.ndarray) -> bool:
    return array.ndim == 4 and min(array.shape[2:]) >= 4


def _moved(array: np.ndarray, moves: np.ndarray, shift: int) -> np.ndarray:
    height, width = array.shape[2:]
    padded = np.pad(array, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    return np.stack(
        [
            image[:, top : top + height, left : left + width]
            for image, (top, left) in zip(padded, moves, strict=True)
        ]
    )


def _mixed(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    share = share.astype(a.dtype).reshape(-1, *[1] * (a.ndim - 1))
    return a * share + b * (1 - share)
