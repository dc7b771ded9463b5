"""Whether a compiled model computes what onnxruntime computes, and if not, since which layer.

TVM's importer gives silently wrong values for some ONNX operators, and a kernel can be wrong too;
so every compile ends with this check on seeded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from .data import draw
from .deviation import allowance, compare, tolerance
from .divergence import first_divergence
from .errors import AccuracyError
from .importer import source_graph
from .importing.ranges import divisors, index_bounds
from .model import Model
from .reference import NotCheckedError, reference

Run = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Runs a compiled model: inputs by name in, outputs by name out."""


class Status(StrEnum):
    """What a parity check found."""

    EQUAL = "equal"
    DIFFERENT = "different"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """How far one output is from onnxruntime's.

    Parameters
    ----------
    name : str
        The output.
    relative_error : float
        ``max|given - reference| / max|reference|``, the worst of all samples; for integers and
        booleans of a model that is not quantized the share of elements that differ.
    tolerance : float
        What was allowed.
    """

    name: str
    relative_error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not."""
        return self.relative_error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What a parity check found.

    Parameters
    ----------
    status : Status
        Never `DIFFERENT` from `check`, which raises.
    outputs : tuple of OutputError
        Empty when it was not checked.
    reason : str
        Why it was not checked, else empty.
    seed, samples : int
        Of the inputs.
    """

    status: Status
    outputs: tuple[OutputError, ...]
    reason: str
    seed: int
    samples: int

    @property
    def worst(self) -> float | None:
        """The largest relative error, None when it was not checked."""
        return max((o.relative_error for o in self.outputs), default=None)

    def __str__(self) -> str:
        if self.status == Status.NOT_CHECKED:
            return f"parity with onnxruntime: not checked: {self.reason}"
        return (
            f"parity with onnxruntime: {self.status}, largest relative error {self.worst:.1e} of "
            f"{self.outputs[0].tolerance:.0e} allowed, {self.samples} samples"
        )


def random_inputs(model: Model, seed: int = 0) -> dict[str, np.ndarray]:
    """Return seeded inputs of one run.

    Floats are standard normal. Integers stay within the tables that they index (token ids of an
    embedding), else unsigned bytes take their whole range (images) and others are 0 or 1 (masks).
    What is divided by is not 0.

    Parameters
    ----------
    model : Model
        With its source, which is searched for the tables.
    seed : int
        The same seed gives the same inputs.

    Returns
    -------
    dict of str to ndarray
        By input name, of exactly the signature's dtypes and shapes.
    """
    rng = np.random.default_rng(seed)
    integers = any(np.dtype(s.dtype).kind in "iu" for s in model.signature.inputs)
    graph = source_graph(model.source) if integers and model.source is not None else None
    bounds = {} if graph is None else index_bounds(graph)
    nonzero = frozenset() if graph is None else divisors(graph)
    inputs = {}
    for spec in model.signature.inputs:
        high = bounds.get(spec.name, 256 if spec.dtype == "uint8" else 2)
        inputs[spec.name] = draw(spec, 1, rng, high, low=int(spec.name in nonzero))[0, ...]
    return inputs


def check(
    model: Model,
    run: Run,
    *,
    seed: int = 0,
    samples: int = 2,
    rtol: float | None = None,
    threads: int = 2,
) -> ParityReport:
    """Compare a compiled model with onnxruntime on seeded inputs.

    Parameters
    ----------
    model : Model
        As it was imported: with its source and its un-fused module.
    run : callable
        Runs what was compiled: inputs by name in, outputs by name out.
    seed : int
        Of the first sample; the next one has the next seed.
    samples : int
        How many.
    rtol : float, optional
        Largest relative error of float outputs, by default `hone.deviation.tolerance`. Integers
        must be equal. A quantized model is allowed what its own rounding explains, see
        `hone.rounding`.
    threads : int
        Of onnxruntime.

    Returns
    -------
    ParityReport
        `Status.EQUAL`, or `Status.NOT_CHECKED` with the reason where onnxruntime cannot run it.

    Raises
    ------
    AccuracyError
        Outputs differ. The message names the first layer that does.
    """
    rtol = tolerance(model) if rtol is None else rtol
    worst: dict[str, OutputError] = {}
    try:
        session = reference(model, threads=threads)
        explained = allowance(model, (), threads)
        for number in range(seed, seed + samples):
            inputs = random_inputs(model, number)
            expected = session.run(inputs)
            given = run(dict(inputs))
            allowed = {} if explained is None else explained.of(inputs, expected)
            errors = []
            for name in (s.name for s in model.signature.outputs):
                found, limit = compare(given[name], expected[name], rtol, allowed.get(name))
                errors.append(OutputError(name=name, relative_error=found, tolerance=limit))
            if not all(e.ok for e in errors):
                raise _failed(model, inputs, errors, seed=number, rtol=rtol, threads=threads)
            for error in errors:
                if (
                    error.name not in worst
                    or worst[error.name].relative_error < error.relative_error
                ):
                    worst[error.name] = error
    except NotCheckedError as error:
        return ParityReport(
            status=Status.NOT_CHECKED, outputs=(), reason=str(error), seed=seed, samples=0
        )
    return ParityReport(
        status=Status.EQUAL, outputs=tuple(worst.values()), reason="", seed=seed, samples=samples
    )


def _failed(
    model: Model,
    inputs: Mapping[str, np.ndarray],
    errors: Sequence[OutputError],
    *,
    seed: int,
    rtol: float,
    threads: int,
) -> AccuracyError:
    lines = [
        f"output {e.name!r} has relative error {e.relative_error:.1e}, {e.tolerance:.0e} is allowed"
        for e in errors
        if not e.ok
    ]
    divergence = first_divergence(model, inputs, rtol=rtol, threads=threads)
    if divergence is not None:
        lines.append(str(divergence))
        hint = "the import of this operator is wrong: report it with the model"
    else:
        lines.append(
            "no layer of the un-fused module differs: the error comes from lowering (layout, "
            "fusion, schedule or code generation), not from the import"
        )
        hint = "compile for --target host without tuning records, to see whether a record is wrong"
    return AccuracyError(
        f"the compiled model differs from onnxruntime on the inputs of seed {seed}: "
        + "; ".join(lines),
        where=model.origin.path,
        hint=hint,
    )
