"""The code of a package in memory: its plan, its virtual machine, and the tensors of a run."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hone.errors import PackageError
from hone.signature import Signature, TensorSpec

from .huge_pages import use_huge_pages
from .tvm_runtime import TVMRuntime

# Generated code loads and stores whole vectors at addresses that it takes for multiples of this
# (kAllocAlignment in tvm/runtime/device_api.h).
ALIGNMENT_BYTES = 64

# Tensors of this size and more are read and written where the caller has them; to find out where a
# smaller one lies takes as long as to copy it.
LEAST_IN_PLACE_BYTES = 1 << 16

_CPU = 1  # kDLCPU of DLPack
_POOLED = 2  # AllocatorType::kPooled of tvm/runtime/memory/memory_manager.h


class LoadedCode:
    """The mapped library: its plan, if it has one, and its virtual machine.

    A run is ``slices`` calls of the virtual machine's ``main``, each with its part of the inputs;
    the plan makes ``parts`` of them at once.

    Parameters
    ----------
    signature : Signature
        Of the package.
    code : bytes
        The library.
    threads : int
        Threads that kernels run on.
    runtime : TVMRuntime
        Maps the library.

    Raises
    ------
    PackageError
        The code is not what the signature says, or of another version of hone.
    """

    def __init__(
        self, signature: Signature, code: bytes, threads: int, runtime: TVMRuntime
    ) -> None:
        self.signature = signature
        self.from_dlpack = runtime.from_dlpack
        library = runtime.load_library(code)

        def function(name: str) -> Callable[..., Any]:
            if (found := runtime.function(library, name)) is None:
                raise PackageError(
                    f"the package's code lacks the function {name}: it was not built by this "
                    "version of hone.",
                    hint="rebuild it with `hone compile`.",
                )
            return found

        function("hone_threads")(threads)
        machine = library["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED)
        self.main: Callable[..., Any] = machine["main"]
        self._set_instrument: Callable[[Any], None] = machine["set_instrument"]
        self.watched = False
        self.planned: Callable[[int], None] | None = runtime.function(library, "hone_run")
        self.weights: tuple[Any, ...] = ()
        workspace_bytes = 0
        if self.planned is not None:
            text = ctypes.string_at(function("hone_signature")())
            _check_signature(self.signature, json.loads(text))
            self.weights = tuple(machine["hone_constants"]())
            use_huge_pages(map(_range, self.weights))
            workspace_bytes = function("hone_workspace_bytes")()
        self.workspace = aligned_empty((workspace_bytes,), np.dtype(np.uint8))
        count, parts = (runtime.function(library, f"hone_{name}") for name in ("slices", "parts"))
        # Packages of an older hone have neither function, and no slices.
        self.slices: int = 1 if count is None else count()
        self.parts: int = 1 if parts is None else min(parts(), threads)

    def watch(self, instrument: Callable[..., Any] | None) -> None:
        """Let the virtual machine run from now on, and call this; None ends that."""
        self._set_instrument(instrument)
        self.watched = instrument is not None


class BoundRun:
    """The memory of a run's inputs and outputs, and a call on it.

    Parameters
    ----------
    code : LoadedCode
        What is called.
    """

    def __init__(self, code: LoadedCode) -> None:
        signature = code.signature
        self._code = code
        self._inputs = [aligned_empty(s.shape, np.dtype(s.dtype)) for s in signature.inputs]
        self._slots = [(s.name, a) for s, a in zip(signature.inputs, self._inputs, strict=True)]
        # What the virtual machine is given: the inputs, or a copy of one slice of them.
        self._given = self._inputs
        if code.slices > 1:
            self._given = [aligned_empty(a[: _rows(a, code)].shape, a.dtype) for a in self._inputs]
        self._tensors = [
            code.from_dlpack(array, require_alignment=ALIGNMENT_BYTES) for array in self._given
        ]
        self._result: Any = None
        self._outputs: list[np.ndarray] = []
        self._results: list[tuple[str, np.ndarray]] = []
        self._large: list[tuple[int, np.ndarray]] = []
        self._fresh: dict[int, np.ndarray] = {}
        self._held: list[np.ndarray] = []
        self._table = 0
        if code.planned is not None:
            self._outputs = [aligned_empty(s.shape, np.dtype(s.dtype)) for s in signature.outputs]
            names = [s.name for s in signature.outputs]
            self._results = list(zip(names, self._outputs, strict=True))
            arrays = [code.workspace, *self._inputs, *self._outputs]
            addresses = [array.ctypes.data for array in arrays]
            addresses += [weight.data_ptr() for weight in code.weights]
            self._pointers = np.array(addresses, np.uint64)
            self._table = int(self._pointers.ctypes.data)
            self._large = [
                (number, array)
                for number, array in enumerate(arrays[1:], 1)
                if array.nbytes >= LEAST_IN_PLACE_BYTES
            ]

    def fits(self, inputs: Mapping[str, np.ndarray]) -> bool:
        """Say whether inputs are as the signature lists them, in native byte order.

        Quick, since most are. For others `Signature.check_inputs` decides, and says what is wrong.
        """
        if len(inputs) != len(self._slots):
            return False
        for name, slot in self._slots:
            array = inputs.get(name)
            if type(array) is not np.ndarray or array.shape != slot.shape:
                return False
            if array.dtype is not slot.dtype:
                return False
        return True

    def fill(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Copy inputs that were checked, whatever their strides and byte order."""
        for name, slot in self._slots:
            slot[...] = inputs[name]

    def take(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Let the next call read large inputs where they lie, and write large outputs anew.

        The inputs were checked. One that does not lie at a multiple of 64 bytes, or not in order,
        is copied as by `fill`, and so is every one for the virtual machine.
        """
        if self._code.watched or not self._large:
            self.fill(inputs)
            return
        large = {number for number, _ in self._large}
        self._held.clear()
        for number, (name, slot) in enumerate(self._slots, 1):
            array = inputs[name]
            if number in large:
                place = _in_place(array, slot)
                self._pointers[number] = place or slot.ctypes.data
                if place:
                    # A mapping may make its arrays when asked: nobody else would hold this one.
                    self._held.append(array)
                    continue
            slot[...] = array
        for number, array in self._large:
            if number > len(self._slots):
                fresh = aligned_empty(array.shape, array.dtype)
                self._fresh[number] = fresh
                self._pointers[number] = fresh.ctypes.data

    def call(self) -> None:
        """Run."""
        code = self._code
        if code.planned is not None and not code.watched:
            code.planned(self._table)
            self._result = None
        elif code.slices == 1:
            self._result = code.main(*self._tensors)
        else:
            self._result = [self._slice(number) for number in range(code.slices)]

    def outputs(self) -> dict[str, np.ndarray]:
        """Return what the last call did, as arrays of the caller's own."""
        if self._result is None:
            fresh, self._fresh = self._fresh, {}
            self._held.clear()
            first = len(self._slots) + 1
            return {
                name: fresh[number] if number in fresh else array.copy()
                for number, (name, array) in enumerate(self._results, first)
            }
        specs = self._code.signature.outputs
        if self._code.slices == 1:
            return _collect(self._result, specs)
        return {
            spec.name: np.concatenate([outputs[spec.name] for outputs in self._result])
            for spec in specs
        }

    def _slice(self, number: int) -> dict[str, np.ndarray]:
        """Let the virtual machine run one slice, and copy what it returns."""
        code = self._code
        for given, whole in zip(self._given, self._inputs, strict=True):
            rows = _rows(whole, code)
            given[...] = whole[number * rows : (number + 1) * rows]
        specs = [
            replace(spec, shape=(spec.shape[0] // code.slices, *spec.shape[1:]))
            for spec in code.signature.outputs
        ]
        return _collect(code.main(*self._tensors), specs)


def _rows(array: np.ndarray, code: LoadedCode) -> int:
    return int(array.shape[0]) // code.slices


def _in_place(array: np.ndarray, slot: np.ndarray) -> int:
    """Return the address at which code can read an input, 0 where it has to be copied."""
    if type(array) is not np.ndarray or array.dtype != slot.dtype or not array.flags.c_contiguous:
        return 0
    address = int(array.ctypes.data)
    return 0 if address % ALIGNMENT_BYTES else address


def _check_signature(signature: Signature, code: Mapping[str, Sequence[Any]]) -> None:
    """Require that the planned code takes and returns what the manifest says."""
    for what, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        found = [(dtype, tuple(shape)) for dtype, shape in code[what]]
        if found != [(spec.dtype, spec.shape) for spec in specs]:
            raise PackageError(
                f"the package's manifest lists the {what} {', '.join(map(str, specs))}; its code "
                f"has {', '.join(f'{dtype}{list(shape)}' for dtype, shape in found)}.",
                hint="rebuild it with `hone compile`.",
            )


def _collect(result: Any, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    """Copy the virtual machine's results, which may be views of weights or of one another."""
    tensors: Sequence[Any] = [result] if hasattr(result, "__dlpack__") else list(result)
    if len(tensors) != len(specs):
        raise PackageError(
            f"the package's manifest lists {len(specs)} outputs, its code returned {len(tensors)}.",
            hint="rebuild it with `hone compile`.",
        )
    outputs = {}
    for spec, tensor in zip(specs, tensors, strict=True):
        array = np.array(np.from_dlpack(tensor), copy=True)
        if array.dtype != np.dtype(spec.dtype) or array.shape != spec.shape:
            raise PackageError(
                f"the package's manifest lists output {spec}, its code returned "
                f"{array.dtype}{list(array.shape)}.",
                hint="rebuild it with `hone compile`.",
            )
        outputs[spec.name] = array
    return outputs


def _range(tensor: Any) -> tuple[int, int]:
    """Return the address of a tensor's first byte and of the one behind its last."""
    start = int(tensor.data_ptr())
    return start, start + int(tensor.numel()) * int(tensor.dtype.itemsize)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return an uninitialized C-ordered array that begins at a multiple of 64 bytes.

    Parameters
    ----------
    shape : tuple of int
        Dimensions.
    dtype : numpy.dtype
        Native byte order.
    """
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return np.ndarray(shape, dtype, buffer=memory.data, offset=start)
