"""Samples with the answers that a package must give, as ``.npy`` members of its archive.

Inputs and outputs are numbered in the order of the signature, so that a member's name never holds
a model's own names: ``golden/<sample>/input_<i>.npy``, ``golden/<sample>/output_<i>.npy``.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hone.errors import PackageError, UsageError
from hone.signature import Signature, TensorSpec

FOLDER = "golden/"


@dataclass(frozen=True, kw_only=True)
class Golden:
    """One sample with the answer that the package must give.

    Parameters
    ----------
    inputs, outputs : mapping of str to ndarray
        By ONNX name, in the dtypes and shapes of the signature.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


def member_names(signature: Signature, samples: int) -> frozenset[str]:
    """Return the names that the arrays of so many samples have."""
    return frozenset(name for sample in range(samples) for name, _ in _places(signature, sample))


def to_members(signature: Signature, samples: Sequence[Golden]) -> dict[str, bytes]:
    """Serialize samples: ``.npy`` version 1.0, little-endian, C order.

    Raises
    ------
    UsageError
        If an array is missing or does not fit the signature.
    """
    members: dict[str, bytes] = {}
    for index, sample in enumerate(samples):
        arrays = [sample.inputs.get(spec.name) for spec in signature.inputs]
        arrays += [sample.outputs.get(spec.name) for spec in signature.outputs]
        for (name, spec), array in zip(_places(signature, index), arrays, strict=True):
            members[name] = _write(array, spec, where=f"golden sample {index}")
    return members


def from_members(
    signature: Signature, samples: int, members: Mapping[str, bytes]
) -> tuple[Golden, ...]:
    """Read what `to_members` wrote.

    Raises
    ------
    PackageError
        If an array does not fit the signature.
    """
    result = []
    for index in range(samples):
        arrays = [_read(members[name], name, spec) for name, spec in _places(signature, index)]
        border = len(signature.inputs)
        result.append(
            Golden(
                inputs=_by_name(signature.inputs, arrays[:border]),
                outputs=_by_name(signature.outputs, arrays[border:]),
            )
        )
    return tuple(result)


def _places(signature: Signature, sample: int) -> Iterator[tuple[str, TensorSpec]]:
    for kind, specs in (("input", signature.inputs), ("output", signature.outputs)):
        for position, spec in enumerate(specs):
            yield f"{FOLDER}{sample}/{kind}_{position}.npy", spec


def _by_name(specs: Sequence[TensorSpec], arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return {spec.name: array for spec, array in zip(specs, arrays, strict=True)}


def _write(array: np.ndarray | None, spec: TensorSpec, *, where: str) -> bytes:
    if array is None:
        raise UsageError(f"{spec} is required, but it is missing.", where=where)
    if array.shape != spec.shape or array.dtype.newbyteorder("=") != np.dtype(spec.dtype):
        raise UsageError(
            f"{spec} is required, given is {array.dtype}{list(array.shape)}.", where=where
        )
    canonical = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, canonical, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _read(content: bytes, name: str, spec: TensorSpec) -> np.ndarray:
    try:
        array = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise PackageError(f"the array cannot be read: {error}.", where=name) from error
    if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
        raise PackageError(
            f"{spec} is required, the array is {array.dtype}{list(array.shape)}.", where=name
        )
    return np.ascontiguousarray(array).reshape(spec.shape)
