"""Run packages in this process, without the compiler: neither ``tvm`` nor ``onnx`` is imported.

``tvm_ffi`` and ``libtvm_runtime.so`` suffice. Before any code is mapped the package is checked for
damage and against this machine; then the library is mapped from the very bytes that were checked.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from hone.targets import features

from .errors import PackageError, UsageError
from .package import Package
from .packaging.manifest import Manifest
from .packaging.tvm_runtime import TVMRuntime, tvm_runtime
from .signature import Signature, TensorSpec

# Generated code loads and stores whole vectors at addresses that it takes for multiples of this
# (kAllocAlignment in tvm/runtime/device_api.h).
ALIGNMENT_BYTES = 64

_CPU = 1  # kDLCPU of DLPack
_POOLED = 2  # AllocatorType::kPooled of tvm/runtime/memory/memory_manager.h


def load(source: str | os.PathLike[str] | bytes | Package, threads: int | None = None) -> Runner:
    """Make a package ready to run.

    Parameters
    ----------
    source : path, bytes or Package
        The package.
    threads : int, optional
        Threads that kernels run on, the calling thread included; the manifest's default
        otherwise. More than this process may use are not given: a warning says so, and
        `Runner.threads` tells how many there are.

    Returns
    -------
    Runner
        Call its ``run``.

    Raises
    ------
    UsageError
        If the file cannot be opened, or `threads` is not positive.
    PackageError
        If the package is damaged, or this machine cannot run it; nothing of it was mapped then.
    ToolchainError
        If TVM's runtime library is missing.
    """
    package = source if isinstance(source, Package) else Package.read(source)
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, not {threads}.")
    where = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    _check_machine(package.manifest, where)
    runtime = tvm_runtime()
    _check_version(package.manifest, runtime, where)
    if package.manifest.needs_runtime_extra:
        runtime.require_extra()
    _request_tiles(package.manifest, where)
    return Runner(package, _grant(threads, package.manifest.target.threads), runtime)


class Runner:
    """A package in memory, ready to run from any thread.

    Calls from several threads are taken one after the other; they share the threads that kernels
    run on, which belong to this runner. A process forked after a run can go on running.

    Parameters
    ----------
    package : Package
        Checked against this machine by `load`.
    threads : int
        Threads that kernels run on.
    runtime : TVMRuntime
        The loaded runtime library.

    Raises
    ------
    PackageError
        If the package's code is not what its manifest says.
    """

    def __init__(self, package: Package, threads: int, runtime: TVMRuntime) -> None:
        self._manifest = package.manifest
        self._signature = package.signature
        self._threads = threads
        # Runs share a workspace, and the virtual machine keeps its frames in itself.
        self._lock = threading.Lock()
        self._code = _Code(package, threads, runtime)
        self._bound = _Bound(self._code)

    @property
    def manifest(self) -> Manifest:
        """What the package says about itself."""
        return self._manifest

    @property
    def signature(self) -> Signature:
        """Inputs and outputs."""
        return self._signature

    @property
    def threads(self) -> int:
        """Threads that kernels run on, the calling thread included."""
        return self._threads

    @property
    def planned(self) -> bool:
        """Whether runs do without the virtual machine, since all of their memory is planned."""
        return self._code.planned is not None

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model once.

        Parameters
        ----------
        inputs : mapping of str to ndarray
            By ONNX name, of the signature's dtypes and shapes; any alignment, strides or byte
            order. They are copied.

        Returns
        -------
        dict of str to ndarray
            New arrays by ONNX name, which belong to the caller.

        Raises
        ------
        UsageError
            If the inputs do not fit the signature.
        """
        bound = self._bound
        if not bound.fits(inputs):
            self._signature.check_inputs(inputs)
        with self._lock:
            bound.fill(inputs)
            bound.call()
            return bound.outputs()

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
        """Bind inputs, so that what a call costs is the model alone.

        Parameters
        ----------
        inputs : mapping of str to ndarray
            As for `run`; copied now.

        Returns
        -------
        callable
            Runs the model on these inputs and drops the outputs.

        Raises
        ------
        UsageError
            If the inputs do not fit the signature.
        """
        self._signature.check_inputs(inputs)
        bound = _Bound(self._code)
        bound.fill(inputs)
        lock = self._lock

        def call() -> None:
            with lock:
                bound.call()

        return call

    @contextmanager
    def instrumented(self, instrument: Callable[..., Any]) -> Iterator[None]:
        """Let the virtual machine call a function before and after each call that it makes.

        Parameters
        ----------
        instrument : callable
            Is given ``(function, name, before, result, *arguments)``: before the call ``before``
            is true and ``result`` None.

        Yields
        ------
        None
            Runs within the block are done by the virtual machine and watched.
        """
        with self._lock:
            self._code.watch(instrument)
        try:
            yield
        finally:
            with self._lock:
                self._code.watch(None)


class _Code:
    """The mapped library: its plan, if it has one, and its virtual machine."""

    def __init__(self, package: Package, threads: int, runtime: TVMRuntime) -> None:
        self.signature = package.signature
        self.from_dlpack = runtime.from_dlpack
        library = runtime.load_library(package.library)

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
            workspace_bytes = function("hone_workspace_bytes")()
        self.workspace = aligned_empty((workspace_bytes,), np.dtype(np.uint8))

    def watch(self, instrument: Callable[..., Any] | None) -> None:
        """Let the virtual machine run from now on, and call this; None ends that."""
        self._set_instrument(instrument)
        self.watched = instrument is not None


class _Bound:
    """The memory of a run's inputs and outputs, and a call on it."""

    def __init__(self, code: _Code) -> None:
        signature = code.signature
        self._code = code
        self._inputs = [aligned_empty(s.shape, np.dtype(s.dtype)) for s in signature.inputs]
        self._slots = [(s.name, a) for s, a in zip(signature.inputs, self._inputs, strict=True)]
        self._tensors = [
            code.from_dlpack(array, require_alignment=ALIGNMENT_BYTES) for array in self._inputs
        ]
        self._result: Any = None
        self._outputs: list[np.ndarray] = []
        self._results: list[tuple[str, np.ndarray]] = []
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

    def call(self) -> None:
        """Run."""
        code = self._code
        if code.planned is not None and not code.watched:
            code.planned(self._table)
            self._result = None
        else:
            self._result = code.main(*self._tensors)

    def outputs(self) -> dict[str, np.ndarray]:
        """Copy what the last call returned."""
        if self._result is None:
            return {name: array.copy() for name, array in self._results}
        return _collect(self._result, self._code.signature.outputs)


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


def _check_machine(manifest: Manifest, where: str | None) -> None:
    """Refuse code that this processor or its C library cannot run."""
    target = manifest.target
    rebuild = "rebuild it for this machine: `hone compile --target host`."
    if (machine := features.machine()) != target.arch:
        raise PackageError(
            f"the package was built for {target.arch} (target {target.name}); this machine is "
            f"{machine}.",
            where=where,
            hint=rebuild,
        )
    if missing := features.missing(target.features, target.arch):
        raise PackageError(
            f"the package was built for {', '.join(target.features)} (target {target.name}); "
            f"this CPU lacks {', '.join(missing)}.",
            where=where,
            hint=f"{rebuild[:-1]}, or for a named one: `--target x86-64-v3`."
            if target.arch == "x86_64"
            else rebuild,
        )
    name, version = platform.libc_ver()
    if target.glibc is not None and (name != "glibc" or _release(version) < _release(target.glibc)):
        raise PackageError(
            f"the package needs glibc {target.glibc} or newer; this machine has "
            f"{name or 'another C library'} {version}".rstrip()
            + ".",
            where=where,
            hint=rebuild,
        )


def _request_tiles(manifest: Manifest, where: str | None) -> None:
    """Ask the kernel for AMX tiles where the code uses them: without, it ends the process."""
    if "amx-tile" not in manifest.target.features or features.request_tiles():
        return
    raise PackageError(
        "the package's code uses AMX tiles, and the operating system refuses them to this process "
        "(arch_prctl ARCH_REQ_XCOMP_PERM).",
        where=where,
        hint="allow the call where a seccomp filter forbids it, and give every thread's alternate "
        "signal stack the size that getauxval(AT_MINSIGSTKSZ) asks for; or rebuild the package "
        f"without tiles: `--target {manifest.target.name},-amx-tile`.",
    )


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _check_version(manifest: Manifest, runtime: TVMRuntime, where: str | None) -> None:
    """Require the TVM that wrote the code: its formats change between releases."""
    required = manifest.versions.tvm
    if runtime.version != required:
        raise PackageError(
            f"the package was built with TVM {required}; TVM {runtime.version} is installed.",
            where=where,
            hint=f"pip install apache-tvm=={required} "
            f"apache-tvm-ffi=={manifest.versions.tvm_ffi}, or rebuild the package.",
        )


def _grant(requested: int | None, default: int) -> int:
    """Return how many threads a runner gets, and say so when these are fewer than wanted."""
    wanted = default if requested is None else requested
    usable = len(os.sched_getaffinity(0))
    if wanted <= usable:
        return wanted
    source = "the package's default is" if requested is None else "asked were"
    warnings.warn(
        f"{source} {wanted} threads; this process may use {usable} processors and runs on so "
        "many threads.",
        RuntimeWarning,
        stacklevel=3,
    )
    return usable
