"""Run packages in this process, without the compiler: neither ``tvm`` nor ``onnx`` is imported.

``tvm_ffi`` and ``libtvm_runtime.so`` suffice. Before any code is mapped the package is checked for
damage and against this machine; then the library is mapped from the very bytes that were checked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from .errors import UsageError
from .package import Package
from .packaging.loaded_code import BoundRun, LoadedCode
from .packaging.manifest import Manifest
from .packaging.requirements import check_machine, check_version, grant_threads, request_tiles
from .packaging.tvm_runtime import TVMRuntime, tvm_runtime
from .signature import Signature


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
    check_machine(package.manifest, where)
    runtime = tvm_runtime()
    check_version(package.manifest, runtime, where)
    if package.manifest.needs_runtime_extra:
        runtime.require_extra()
    request_tiles(package.manifest, where)
    return Runner(package, grant_threads(threads, package.manifest.target.threads), runtime)


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
        self._code = LoadedCode(package.signature, package.library, threads, runtime)
        self._bound = BoundRun(self._code)

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

    @property
    def slices(self) -> int:
        """Slices of a batch in a run; 1 where threads share every kernel."""
        return self._code.slices

    @property
    def abreast(self) -> int:
        """Slices that are on their way at once, each on a thread of its own."""
        return self._code.parts

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the model once.

        Parameters
        ----------
        inputs : mapping of str to ndarray
            By ONNX name, of the signature's dtypes and shapes; any alignment, strides or byte
            order. They are copied, but for those of 64 KiB and more that lie in C order at a
            multiple of 64 bytes.

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
            bound.take(inputs)
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
        bound = BoundRun(self._code)
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
