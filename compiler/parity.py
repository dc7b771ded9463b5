"""Whether a compiled model computes what onnxruntime computes, and if not, since which layer.

TVM's importer gives silently wrong values for some ONNX operators, and a kernel can be wrong too;
so every compile ends with this check on seeded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import numpy as np

from .data import draw
from .errors import AccuracyError
from .importing.graph import Graph
from .importing.inlining import inline
from .importing.layer_names import node_ids, part
from .importing.onnx_file import read
from .importing.qdq import rewrite
from .importing.ranges import divisors, float_types, index_bounds
from .importing.reader import read_graph
from .model import Layer, Model
from .reference import NotCheckedError, reference
from .rounding import Allowance, is_quantized

if TYPE_CHECKING:
    import onnx

Run = Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray]]
"""Runs a compiled model: inputs by name in, outputs by name out."""

TOLERANCE: Final[Mapping[str, float]] = {
    "float64": 1e-4,
    "float32": 1e-4,
    "float16": 2e-2,
    "bfloat16": 1e-1,
}
"""Largest relative error of an output, by the narrowest float type inside the model.

fp32: another order of a sum of n terms moves it by about 2**-24 * sqrt(n) of its largest term
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 4.2): 4e-6 for the 4608
terms of ResNet's widest convolution. The worst of the seven reference networks, by kernels that
nothing optimized, is ResNet-50 with 5.7e-6; another order of sums in each of its 50 layers leaves
it below 1e-4.
A wrong attribute or weight moves an output by 1e-2 and more. fp16 and bf16 have 13 and 16 bits
less; errors grow through the layers, which the factor to 2**-11 and 2**-8 leaves room for.
"""


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
class Divergence:
    """The first layer that differs from onnxruntime's.

    Parameters
    ----------
    layer, op_type, binding : str
        The layer's id, ONNX operator and Relax binding.
    relative_error, tolerance : float
        As in `OutputError`.
    index : tuple of int
        Where it differs most.
    given, expected : float
        The values there.
    layers_equal : int
        How many layers before it were compared and agree.
    """

    layer: str
    op_type: str
    binding: str
    relative_error: float
    tolerance: float
    index: tuple[int, ...]
    given: float
    expected: float
    layers_equal: int

    def __str__(self) -> str:
        return (
            f"the first layer that differs is {self.op_type} {self.layer!r}: relative error "
            f"{self.relative_error:.1e}, at {list(self.index)} it is {self.given:.6g}, "
            f"onnxruntime's is {self.expected:.6g}; {self.layers_equal} layers before it agree"
        )


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
    graph = _graph(model.source) if integers and model.source is not None else None
    bounds = {} if graph is None else index_bounds(graph)
    nonzero = frozenset() if graph is None else divisors(graph)
    inputs = {}
    for spec in model.signature.inputs:
        high = bounds.get(spec.name, 256 if spec.dtype == "uint8" else 2)
        inputs[spec.name] = draw(spec, 1, rng, high, low=int(spec.name in nonzero))[0, ...]
    return inputs


def tolerance(model: Model) -> float:
    """Return the relative error that a model's float types allow, see `TOLERANCE`."""
    if model.source is None:
        return TOLERANCE["float32"]
    return max(TOLERANCE[d] for d in {"float32"} | float_types(_graph(model.source)))


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
        Largest relative error of float outputs, by default `tolerance`. Integers must be equal.
        A quantized model is allowed what its own rounding explains, see `hone.rounding`.
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
        allowance = _allowance(model, (), threads)
        for number in range(seed, seed + samples):
            inputs = random_inputs(model, number)
            expected = session.run(inputs)
            given = run(dict(inputs))
            allowed = {} if allowance is None else allowance.of(inputs, expected)
            errors = []
            for name in (s.name for s in model.signature.outputs):
                found, limit = _compare(given[name], expected[name], rtol, allowed.get(name))
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


def first_divergence(
    model: Model,
    inputs: Mapping[str, np.ndarray],
    *,
    rtol: float | None = None,
    threads: int = 2,
) -> Divergence | None:
    """Return the first layer of a model's un-fused module that differs from onnxruntime's.

    Parameters
    ----------
    model : Model
        With its source.
    inputs : mapping of str to ndarray
        Of one run.
    rtol : float, optional
        As in `check`.
    threads : int
        Of onnxruntime.

    Returns
    -------
    Divergence or None
        None when every layer agrees.

    Raises
    ------
    NotCheckedError
        onnxruntime cannot run the model.
    """
    from .shadow import evaluate

    rtol = tolerance(model) if rtol is None else rtol
    tensors = _tensors(model)
    names = [name for _, name, _ in tensors]
    expected = reference(model, extra=names, threads=threads).run(inputs)
    allowance = _allowance(model, names, threads)
    slack = {} if allowance is None else allowance.of(inputs, expected)
    _, given = evaluate(model.module, inputs, [binding for _, _, binding in tensors])
    equal = 0
    for layer, name, binding in tensors:
        if binding not in given or given[binding].shape != expected[name].shape:
            continue  # folded, or a pass gave it another shape: its consumers are compared
        error, allowed = _compare(given[binding], expected[name], rtol, slack.get(name))
        if error <= allowed:
            equal += 1
            continue
        index = _worst_index(given[binding], expected[name])
        return Divergence(
            layer=layer.id,
            op_type=layer.op_type,
            binding=binding,
            relative_error=error,
            tolerance=allowed,
            index=index,
            given=float(given[binding][index]),
            expected=float(expected[name][index]),
            layers_equal=equal,
        )
    return None


def relative_error(given: np.ndarray, expected: np.ndarray) -> float:
    """Return how far an array is from a reference.

    Floats: ``max|given - expected| / max|expected|`` over the finite elements, the absolute error
    where the reference is all zero, and infinity where NaN or infinities are in other places.
    Integers and booleans: the share of elements that differ. Another shape is infinitely far.
    With ``given = [1.0, 2.1]`` and ``expected = [1.0, 2.0]`` it is 0.05.
    """
    if given.shape != expected.shape or not expected.size:
        return 0.0 if given.shape == expected.shape else float("inf")
    if not _is_float(expected):
        return float(np.mean(given != expected))
    a, b = given.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    error = float(np.max(np.abs(a[finite] - b[finite])))
    scale = float(np.max(np.abs(b[finite])))
    if not np.isfinite(error):
        return float("inf")
    return error / scale if scale else error


def _compare(
    given: np.ndarray, expected: np.ndarray, rtol: float, slack: float | None
) -> tuple[float, float]:
    """Return the relative error of a tensor, and what is allowed.

    ``slack`` is the absolute error that a quantized model's rounding explains; None for another.
    """
    limit = rtol if _is_float(expected) else 0.0
    if slack is None:
        return relative_error(given, expected), limit
    error = relative_error(given.astype(np.float64), expected.astype(np.float64))
    finite = np.abs(expected.astype(np.float64))
    scale = float(np.max(finite, where=np.isfinite(finite), initial=0.0))
    return error, max(limit, slack / scale if scale else slack)


def _allowance(model: Model, extra: Sequence[str], threads: int) -> Allowance | None:
    if model.source is None or not is_quantized(model.source):
        return None
    return Allowance(model.source, extra=extra, threads=threads)


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name == "bfloat16"


def _worst_index(given: np.ndarray, expected: np.ndarray) -> tuple[int, ...]:
    a, b = given.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        distance = np.abs(a - b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    distance = np.where(same, 0.0, np.where(np.isnan(distance), np.inf, distance))
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(distance)), distance.shape))


def _tensors(model: Model) -> list[tuple[Layer, str, str]]:
    """Layer, ONNX tensor and binding of every result of every layer."""
    if model.source is None:
        return []
    layers = {layer.id: layer for layer in model.layers}
    computed = {name for node in model.source.graph.node for name in node.output}
    nodes = rewrite(model.source).graph.node
    ids = node_ids((n.name, n.op_type, next(iter(n.output), "")) for n in nodes)
    return [
        (layers[i], name, part(layers[i].binding, str(k)) if k else layers[i].binding)
        for i, node in zip(ids, nodes, strict=True)
        if i in layers
        for k, name in enumerate(o for o in node.output if o)
        if name in computed  # what a quantized operator was rewritten to has tensors of its own
    ]


def _graph(source: onnx.ModelProto) -> Graph:
    file = read(source)
    return read_graph(replace(file, proto=rewrite(inline(file))), {})


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
