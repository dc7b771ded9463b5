"""TVM's runtime library without its compiler: loading it, mapping code, sizing thread pools.

``libtvm_runtime.so`` (3 MB) is taken from the installed wheel without importing ``tvm``, which
would map the compiler's 259 MB as well.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

from hone.errors import ToolchainError

_DISTRIBUTION = "apache-tvm"
_EXTRA_FUNCTION = "tvm.contrib.sort.argsort"  # one that only the extra library registers
_SHARE_ALL_CORES = -3  # ThreadGroup::kSpecifyThreadShareAllCore, tvm/src/runtime/thread_pool.cc
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class TVMRuntime:
    """The loaded runtime library.

    TVM keeps one pool of worker threads per calling thread. A pool has as many workers as were
    configured when the thread first used it and cannot grow; how many of them are used can be
    configured at any time.

    Parameters
    ----------
    library_folder : Path
        Where ``libtvm_runtime.so`` and ``libtvm_runtime_extra.so`` are.
    version : str
        Of TVM.
    loaded : bool
        Whether an imported ``tvm`` has loaded the library already.
    """

    def __init__(self, library_folder: Path, version: str, *, loaded: bool) -> None:
        import tvm_ffi

        self.version = version
        self.from_dlpack: Callable[..., Any] = tvm_ffi.from_dlpack
        self._folder = library_folder
        # Pinned workers would pile up on the first cores as soon as two threads run models, and
        # TVM pins the calling thread too. Only TVM reads this, whenever it sets affinities.
        os.environ.setdefault("TVM_BIND_THREADS", "0")
        if not loaded:
            _open_global(library_folder / "libtvm_runtime.so")
        find = tvm_ffi.get_global_func
        self._find: Callable[..., Any] = find
        self._load: Callable[[str, str], Any] = find("ffi.Module.load_from_file.so")
        self._configure: Callable[[int, int, list[str]], None] = find("runtime.config_threadpool")
        self._pool_threads: Callable[[], int] = find("runtime.NumThreads")
        self._pools = threading.local()
        self._largest = 1

    def require_extra(self) -> None:
        """Load ``libtvm_runtime_extra.so`` (sorting, top-k) unless it is there already.

        Raises
        ------
        ToolchainError
            If it is missing.
        """
        if self._find(_EXTRA_FUNCTION, allow_missing=True) is None:
            _open_global(self._folder / "libtvm_runtime_extra.so")

    def load_library(self, code: bytes) -> Any:
        """Map a library from memory.

        The bytes go to an anonymous, sealed file, so that what runs is what was checked.

        Parameters
        ----------
        code : bytes
            A shared library that TVM's ``export_library`` wrote.

        Returns
        -------
        tvm_ffi.Module
            The library's root module.

        Raises
        ------
        ToolchainError
            If the kernel refuses anonymous files or their mapping.
        """
        descriptors: list[int] = []
        try:
            descriptors.append(_sealed_file(code))
            # The loader knows a library by its path and would return another one that is still
            # mapped under the same number: take numbers until one names no library.
            while _is_mapped(path := f"/proc/self/fd/{descriptors[-1]}"):
                descriptors.append(os.dup(descriptors[0]))
            return self._load(path, "so")
        except (OSError, RuntimeError) as error:
            raise ToolchainError(
                f"the package's code cannot be mapped from memory: {error}.",
                hint="hone's runtime needs Linux with memfd_create and /proc.",
            ) from error
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    @staticmethod
    def function(library: Any, name: str) -> Callable[..., Any] | None:
        """Return a function of a library, None where it has none of that name."""
        try:
            function: Callable[..., Any] = library.get_function(name, query_imports=True)
        except AttributeError:
            return None
        return function

    def expect(self, threads: int) -> None:
        """Let pools that are created from now on have room for so many threads."""
        self._largest = max(self._largest, threads)

    def use_threads(self, count: int) -> bool:
        """Make parallel loops that the calling thread starts run on `count` threads.

        The calling thread is one of them, and keeps its affinity.

        Returns
        -------
        bool
            False if its pool is too small for that, or did not survive a fork.
        """
        process = os.getpid()
        configured = getattr(self._pools, "configured", None)
        if configured == (process, count) and self._pool_threads() == count:
            return True
        if configured is not None and configured[0] != process and count > 1:
            return False
        affinity = os.sched_getaffinity(0)
        room = count if configured is not None else max(self._largest, count)
        cores = sorted(affinity)
        self._configure(_SHARE_ALL_CORES, count, [str(cores[i % len(cores)]) for i in range(room)])
        if os.sched_getaffinity(0) != affinity:
            os.sched_setaffinity(0, affinity)
        if self._pool_threads() != count:
            return False
        self._pools.configured = (process, count)
        return True


class Threads:
    """Calls functions so that their parallel loops run on a given number of threads.

    Parameters
    ----------
    count : int
        Threads, the calling one included.
    runtime : TVMRuntime
        Whose pools are used.
    """

    def __init__(self, count: int, runtime: TVMRuntime) -> None:
        self.count = count
        self._runtime = runtime
        self._lane: tuple[int, ThreadPoolExecutor] | None = None
        runtime.expect(count)

    def call(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        """Call the function: here if this thread's pool allows, else on a thread of its own.

        Not safe to be called from two threads at once.
        """
        if self._runtime.use_threads(self.count):
            return function(*arguments)
        future = self._executor().submit(self._call_in_lane, function, arguments)
        try:
            return future.result()
        finally:
            wait([future])  # an interrupt must not leave the function running unobserved

    def _executor(self) -> ThreadPoolExecutor:
        if self._lane is None or self._lane[0] != os.getpid():
            self._lane = (os.getpid(), ThreadPoolExecutor(1, thread_name_prefix="hone"))
        return self._lane[1]

    def _call_in_lane(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        if not self._runtime.use_threads(self.count):
            raise ToolchainError(f"TVM's runtime does not provide {self.count} threads.")
        return function(*arguments)


@cache
def tvm_runtime() -> TVMRuntime:
    """Load the runtime library, once per process.

    Raises
    ------
    ToolchainError
        If TVM is not installed.
    """
    if (tvm := sys.modules.get("tvm")) is not None:
        return TVMRuntime(Path(tvm.__file__ or "").parent / "lib", tvm.__version__, loaded=True)
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError as error:
        raise ToolchainError(
            "TVM's runtime library is required, but it is not installed.",
            hint="pip install hone-compiler",
        ) from error
    folder = Path(str(distribution.locate_file("tvm/lib")))
    return TVMRuntime(folder, distribution.version, loaded=False)


def _open_global(path: Path) -> None:
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ToolchainError(
            f"TVM's runtime library cannot be loaded: {error}.",
            hint=f"reinstall it: pip install --force-reinstall {_DISTRIBUTION}",
        ) from error


def _sealed_file(content: bytes) -> int:
    descriptor = os.memfd_create("hone", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_mapped(path: str) -> bool:
    """Whether the dynamic loader has a library under exactly this name."""
    loader = ctypes.CDLL(None)
    loader.dlopen.restype = ctypes.c_void_p
    loader.dlopen.argtypes = [ctypes.c_char_p, ctypes.c_int]
    loader.dlclose.argtypes = [ctypes.c_void_p]
    handle = loader.dlopen(path.encode(), os.RTLD_LAZY | os.RTLD_NOLOAD)
    if handle is None:
        return False
    loader.dlclose(handle)
    return True
