"""Proof that a package gives the answers it was built with: its golden samples, run again."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from .errors import AccuracyError, PackageError
from .package import Package
from .runtime import load


@dataclass(frozen=True, kw_only=True)
class OutputCheck:
    """How far one output was from its golden answer, over all samples.

    Parameters
    ----------
    name : str
        ONNX name.
    error : float
        Largest `relative_error` of a sample; for integers the fraction of elements that differ.
    tolerance : float
        What is accepted; 0 for integers and booleans.
    """

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The result of `verify`.

    Parameters
    ----------
    samples : int
        Golden samples that were run.
    threads : int
        Threads that they ran on.
    outputs : tuple of OutputCheck
        In the order of the signature.
    """

    samples: int
    threads: int
    outputs: tuple[OutputCheck, ...]


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest absolute difference, as a fraction of the largest expected magnitude.

    ``max |actual - expected| / max |expected|``, over the finite elements, computed in float64:
    expected ``[0, 4]``, actual ``[0.1, 4]`` gives 0.025. Where `expected` is all zero the
    denominator is 1. Infinities and NaNs must be the same at the same places.

    Parameters
    ----------
    actual, expected : ndarray of float
        Of the same shape.

    Returns
    -------
    float
        Infinity where the non-finite elements differ.
    """
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True):
        return float("inf")
    reference = expected[finite].astype(np.float64)
    computed = actual[finite].astype(np.float64)
    if not np.isfinite(computed).all():
        return float("inf")
    if not reference.size:
        return 0.0
    scale = np.abs(reference).max()
    return float(np.abs(computed - reference).max() / (scale if scale > 0 else 1.0))


def verify(
    source: str | os.PathLike[str] | bytes | Package, threads: int | None = None
) -> VerifyReport:
    """Run a package's golden samples and compare.

    Parameters
    ----------
    source : path, bytes or Package
        The package.
    threads : int, optional
        As for :func:`hone.runtime.load`.

    Returns
    -------
    VerifyReport
        Every output is within its tolerance.

    Raises
    ------
    AccuracyError
        If an output is not within the tolerance of the manifest; lists all of them.
    PackageError
        If the package is damaged, carries no golden samples, or cannot run here.
    """
    package = source if isinstance(source, Package) else Package.read(source)
    golden = package.golden()
    where = None if isinstance(source, Package | bytes) else os.fspath(source)
    if not golden:
        raise PackageError(
            "golden samples are required, but the package carries none.",
            where=where,
            hint="rebuild it with `hone compile`.",
        )
    try:
        runner = load(package, threads)
    except PackageError as error:
        raise PackageError(error.message, where=error.where or where, hint=error.hint) from error
    results = [runner.run(sample.inputs) for sample in golden]
    checks = []
    for spec in package.signature.outputs:
        errors = [
            _error(result[spec.name], sample.outputs[spec.name])
            for result, sample in zip(results, golden, strict=True)
        ]
        tolerance = package.manifest.golden.tolerance.get(spec.name, 0.0)
        checks.append(OutputCheck(name=spec.name, error=max(errors), tolerance=tolerance))
    failed = [check for check in checks if not check.passed]
    if failed:
        raise AccuracyError(
            "golden outputs are not reproduced: "
            + "; ".join(
                f"output {check.name!r} has error {check.error:.3g}, accepted is "
                f"{check.tolerance:.3g}"
                for check in failed
            )
            + ".",
            where=where,
            hint="this machine computes something else than the one that built the package, or "
            "the golden outputs were changed; rebuild it with `hone compile`.",
        )
    return VerifyReport(samples=len(golden), threads=runner.threads, outputs=tuple(checks))


def _error(actual: np.ndarray, expected: np.ndarray) -> float:
    if expected.dtype.kind == "f":
        return relative_error(actual, expected)
    return float(np.mean(actual != expected)) if expected.size else 0.0
