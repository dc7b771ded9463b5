"""Data for calibration, evaluation and inputs: one syntax, checked against the signature first.

``x.npz`` (keys are input names, the leading axis is samples, labels under ``labels``), ``x.npy``
for a model with one input, a folder of either, ONNX ``test_data_set_*`` folders,
``file.py:function`` (returns or yields dicts of arrays) and ``random:N``.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from .data_sources import LABELS, Chunk, chunks
from .errors import UsageError
from .signature import Signature, TensorSpec

RANDOM_HINT: Final = (
    "give real samples; to calibrate with random ones all the same, ask for it by name: "
    "--allow-random-calibration, allow_random_calibration = true under [data], or from Python "
    "allow_random=True"
)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Samples that fit a model.

    Parameters
    ----------
    inputs : mapping of str to ndarray
        ``[samples, *shape]`` with the signature's shape, batch dimension included.
    labels : ndarray or None
        Class indices, int64 ``[samples, batch]``.
    outputs : mapping of str to ndarray
        Reference outputs ``[samples, *shape]``, from ONNX test data sets only.
    source : str
        The data argument.
    """

    inputs: Mapping[str, np.ndarray]
    labels: np.ndarray | None
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    source: str

    def __len__(self) -> int:
        return min((len(a) for a in self.inputs.values()), default=0)

    def sample(self, index: int) -> dict[str, np.ndarray]:
        """Return the inputs of one run."""
        return {name: array[index, ...] for name, array in self.inputs.items()}


def load(
    spec: str, signature: Signature, *, allow_random: bool = False, limit: int | None = None
) -> Dataset:
    """Read data and check them against a model's signature.

    Parameters
    ----------
    spec : str
        ``x.npz``, ``x.npy``, a folder, ``file.py:function`` or ``random:N``. With a batch size of
        ``B``, ``B`` consecutive rows make one sample; a remainder is dropped with a warning.
        Arrays of shape ``[samples, *signature shape]`` are taken as they are.
    signature : Signature
        Of the model.
    allow_random : bool
        Whether ``random:N`` (seeded, normal floats, integers 0 and 1) will do. Never for
        calibration, unless the user asked for it by name.
    limit : int, optional
        Samples to read at most; a generator is not asked for more.

    Returns
    -------
    Dataset

    Raises
    ------
    UsageError
        Lists every difference, with what is required and what was given: names, dtypes, shapes,
        counts, NaN and infinity, labels out of range.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"the limit is {limit} samples, 1 is the least", where=spec)
    if spec.startswith("random:"):
        dataset = _random(spec, signature, allow_random)
        count = len(dataset) if limit is None else min(limit, len(dataset))
        return _cut(dataset, count)
    parts: list[Dataset] = []
    total = 0
    for chunk in chunks(spec, signature):
        part = _fit(chunk, signature)
        parts.append(part)
        total += len(part)
        if limit is not None and total >= limit:
            break
    if not total:
        raise UsageError("there are no samples", where=spec)
    whole = _join(parts, spec)
    return whole if limit is None else _cut(whole, min(limit, total))


def _random(spec: str, signature: Signature, allowed: bool) -> Dataset:
    if not allowed:
        raise UsageError(
            "random data say nothing about the model's real value ranges and are refused here",
            where=spec,
            hint=RANDOM_HINT,
        )
    text = spec.removeprefix("random:")
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UsageError(f"random:N needs a number of samples from 1, this is {text!r}", where=spec)
    rng = np.random.default_rng(0)
    count = int(text)
    inputs = {s.name: draw(s, count, rng) for s in signature.inputs}
    return Dataset(inputs=inputs, labels=None, source=spec)


def draw(
    spec: TensorSpec, samples: int, rng: np.random.Generator, high: int = 2, *, low: int = 0
) -> np.ndarray:
    """Draw samples of one tensor: normal floats, integers from `low` to `high` - 1, booleans.

    Parameters
    ----------
    spec : TensorSpec
        What to draw.
    samples : int
        The leading axis of the result.
    rng : numpy.random.Generator
        Its state decides the values.
    high : int
        Exclusive upper bound of integers.
    low : int
        Least integer.

    Returns
    -------
    ndarray
        ``[samples, *spec.shape]`` of ``spec.dtype``.
    """
    shape = (samples, *spec.shape)
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu":
        return rng.integers(low, min(high, np.iinfo(dtype).max), shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    return rng.standard_normal(shape, np.float32).astype(dtype)


def _fit(chunk: Chunk, signature: Signature) -> Dataset:
    """Bring a chunk into the shape of the signature, or list everything that does not fit."""
    specs = {s.name: s for s in signature.inputs}
    problems: list[str] = []
    for key in chunk.arrays:
        if key not in specs and key != LABELS:
            near = difflib.get_close_matches(key, list(specs), n=1)
            did = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"{key!r} is no input of the model{did}")
    inputs = {}
    for name, spec in specs.items():
        if name not in chunk.arrays:
            problems.append(f"{name!r} is missing; required is {spec.dtype}{_samples(spec)}")
            continue
        array, wrong = _fit_input(chunk.arrays[name], spec, chunk.exact)
        if wrong:
            problems.extend(f"{name!r} {w}" for w in wrong)
        else:
            inputs[name] = array
    counts = {name: len(array) for name, array in inputs.items()}
    if len(set(counts.values())) > 1:
        shown = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        problems.append(f"the inputs have different numbers of samples: {shown}")
    labels = None
    if LABELS in chunk.arrays and LABELS not in specs and not problems:
        labels, wrong = _fit_labels(chunk, signature, min(counts.values()))
        problems.extend(f"{LABELS!r} {w}" for w in wrong)
    outputs = {}
    for spec in signature.outputs:
        if spec.name in chunk.outputs:
            array = chunk.outputs[spec.name]
            if array.shape != spec.shape:
                problems.append(
                    f"reference output {spec.name!r} is {list(array.shape)}, the model's is "
                    f"{list(spec.shape)}"
                )
            outputs[spec.name] = array[None]
    if problems:
        raise UsageError(
            "the data do not fit the model: " + "; ".join(problems),
            where=chunk.where,
            hint="the model takes " + ", ".join(map(str, signature.inputs)),
        )
    return Dataset(inputs=inputs, labels=labels, outputs=outputs, source=chunk.where)


def _fit_input(array: np.ndarray, spec: TensorSpec, exact: bool) -> tuple[np.ndarray, list[str]]:
    wrong = []
    if array.dtype.newbyteorder("=") != np.dtype(spec.dtype):
        wrong.append(f"is {array.dtype}, required is {spec.dtype}")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    given = array.shape
    if exact and given == spec.shape:
        array = array[None]
    elif not exact and given[1:] == spec.shape and array.ndim == len(spec.shape) + 1:
        pass
    elif not exact and spec.shape and array.ndim == len(spec.shape) and given[1:] == spec.shape[1:]:
        array = _group(array, spec)
        if given[0] and not len(array):
            wrong.append(f"has {given[0]} rows, one batch of the model takes {spec.shape[0]}")
    else:
        required = list(spec.shape) if exact else _samples(spec)
        wrong.append(f"is {list(given)}, required is {required}")
    if array.dtype.kind == "f" and not wrong:
        finite = np.isfinite(array)
        if not finite.all():
            count = array.size - int(finite.sum())
            sample, *at = (int(i) for i in np.argwhere(~finite)[0])
            has = "one value that is" if count == 1 else f"{count} values that are"
            where = f"{'' if count == 1 else 'the first '}in sample {sample} at {at}"
            wrong.append(f"has {has} NaN or infinite, {where}")
    return array, wrong


def _samples(spec: TensorSpec) -> str:
    """Return the shape that data for an input are stored in."""
    if not spec.shape:
        return "[samples]"
    inner = "".join(f", {d}" for d in spec.shape[1:])
    batch = spec.shape[0]
    return f"[samples{inner}]" if batch == 1 else f"[samples * {batch}{inner}]"


def _group(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    batch = spec.shape[0]
    count, rest = divmod(len(array), batch)
    if rest and count:
        warnings.warn(
            f"{spec.name!r}: the last {rest} of {len(array)} rows do not fill a batch of {batch} "
            "and are dropped",
            stacklevel=2,
        )
    return array[: count * batch].reshape(count, *spec.shape)


def _fit_labels(
    chunk: Chunk, signature: Signature, samples: int
) -> tuple[np.ndarray | None, list[str]]:
    labels = np.asarray(chunk.arrays[LABELS])
    first = signature.inputs[0]
    rows = math.prod(chunk.arrays[first.name].shape[: 1 if first.shape else 0])
    stacked = chunk.arrays[first.name].ndim == len(first.shape) + 1
    batch = first.shape[0] if first.shape else 1
    if labels.dtype.kind not in "iu":
        return None, [
            f"are {labels.dtype}{list(labels.shape)}, required are class indices of an integer "
            "type; for one-hot rows take labels.argmax(axis=1)"
        ]
    wanted: list[tuple[int, ...]] = [(samples, batch)]
    wanted += [(samples * batch,), (samples,)] if stacked and batch == 1 else []
    wanted += [(rows,), (rows, 1)] if not stacked else [(samples * batch,)]
    if labels.shape not in wanted:
        rows_wanted = samples * batch if stacked else rows
        return None, [f"are {list(labels.shape)}, required is [{rows_wanted}]"]
    labels = labels.reshape(-1)[: samples * batch].reshape(samples, batch).astype(np.int64)
    output = signature.outputs[0].shape if signature.outputs else ()
    classes = output[-1] if output else 0
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if low < 0 or (classes and high >= classes):
        return None, [f"lie in {low} to {high}, the model's classes are 0 to {classes - 1}"]
    return labels, []


def _join(parts: list[Dataset], spec: str) -> Dataset:
    labelled = [p for p in parts if p.labels is not None]
    if labelled and len(labelled) != len(parts):
        without = next(p.source for p in parts if p.labels is None)
        raise UsageError(
            f"{len(labelled)} of {len(parts)} parts have labels; all or none must, {without} "
            "has none",
            where=spec,
        )
    names = parts[0].inputs
    outputs = [n for n in parts[0].outputs if all(n in p.outputs for p in parts)]
    return Dataset(
        inputs={n: np.concatenate([p.inputs[n] for p in parts]) for n in names},
        labels=np.concatenate([p.labels for p in parts if p.labels is not None])
        if labelled
        else None,
        outputs={n: np.concatenate([p.outputs[n] for p in parts]) for n in outputs},
        source=spec,
    )


def _cut(dataset: Dataset, count: int) -> Dataset:
    return Dataset(
        inputs={n: a[:count] for n, a in dataset.inputs.items()},
        labels=None if dataset.labels is None else dataset.labels[:count],
        outputs={n: a[:count] for n, a in dataset.outputs.items()},
        source=dataset.source,
    )
