"""Runs versions of a model as a package runs it, with a clock around each kernel.

The virtual machine gives tensors other memory than the plan of a package does, and its clocks
mislead about what a package gains. Here every version is a plan (`hone.plan`) over kernels that are
linked one by one; all versions share one workspace, the threads, and the weights in which they do
not differ, so that what differs between two of them is what was changed.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tvm
from tvm import tirx

from hone.host_code import MOST_ARGUMENTS, walker_source
from hone.passes.apply import apply
from hone.passes.lower.export_kernels import ALIGNMENT_BYTES, PREFIX, RAW_PIPELINE
from hone.passes.lower.promote_accumulators import CODEGEN_CONFIG
from hone.passes.lower.raw_kernels import RawKernels, is_static
from hone.plan import Place, Plan, Region
from hone.targets.target import resolve
from hone.targets.toolchain import find_linker

from .pinning import pin, workers

PAGE_BYTES = 4096
HEADER_BYTES = 16
MAPPED_BYTES = 128 * 1024
HUGE_BYTES = 4 * 1024 * 1024
"""Of the C library and NumPy: a page, what stands before an allocation, the size from which on it
has pages of its own, and that from which on NumPy asks for huge ones."""

LAUNCH = "__TVMBackendParallelLaunch"
"""Where generated code looks for what runs its parallel loops."""


class Walker:
    """Compiles kernels into this process, and runs them in a given order on threads of its own.

    Parameters
    ----------
    target : Target
        What to generate code for; it runs on this machine.
    threads : int
        Threads of one run, the calling one included.
    """

    def __init__(self, target: tvm.target.Target, threads: int) -> None:
        self._target = target
        self._linker = find_linker(resolve("host"))
        self._folder = TemporaryDirectory(prefix="hone-walker-", ignore_cleanup_errors=True)
        self._count = 0
        source = Path(self._folder.name, "walker.c")
        source.write_text(walker_source(), encoding="utf-8")
        library = Path(self._folder.name, "walker.so")
        self._linker.fcompile_with(source)(str(library), [])
        self._module = tvm.runtime.load_module(str(library))
        self._module["hone_threads"](threads)
        functions = ctypes.CDLL(str(library))
        functions.hone_launch.restype = ctypes.c_void_p
        self._launch = functions.hone_launch()
        self._walk = functions.hone_walk
        self._walk.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
        self._loaded: list[tuple[tvm.runtime.Module, ctypes.CDLL]] = []

    def load(self, functions: Mapping[str, tirx.PrimFunc]) -> dict[str, int]:
        """Compile scheduled functions of static tensors, and return the address of each.

        Parameters
        ----------
        functions : mapping of str to PrimFunc
            By name.
        """
        module = apply(
            tvm.IRModule(
                {
                    name: func.without_attr("global_symbol")
                    if "global_symbol" in (func.attrs or {})
                    else func
                    for name, func in functions.items()
                }
            ),
            RawKernels(),
        )
        with tvm.transform.PassContext(opt_level=3, config=CODEGEN_CONFIG):
            built = tvm.tirx.build(module, self._target, pipeline=RAW_PIPELINE)
        self._count += 1
        compiled = Path(self._folder.name, f"{self._count}.o")
        library = compiled.with_suffix(".so")
        built.write_to_file(str(compiled), "o")
        self._linker.link([compiled], library)
        # The runtime fills in what kernels call of it; our threads take the place of its own.
        loaded = tvm.runtime.load_module(str(library))
        symbols = ctypes.CDLL(str(library))
        with suppress(ValueError):  # no kernel has a parallel loop
            ctypes.c_void_p.in_dll(symbols, LAUNCH).value = self._launch
        compiled.unlink()
        self._loaded.append((loaded, symbols))
        return {name: _address(symbols, PREFIX + name) for name in functions}

    def pin(self) -> None:
        """Put the calling thread and those of the runs, which a first run starts, on processors."""
        pin(workers("hone"))

    def walk(self, steps: np.ndarray, number: int, runs: int) -> np.ndarray:
        """Return ``[runs, number + 1]``: nanoseconds when each run began and each call ended.

        Parameters
        ----------
        steps : ndarray
            int64, as ``hone_walk`` takes them.
        number : int
            Calls of one run.
        runs : int
            How often.

        Raises
        ------
        RuntimeError
            A kernel failed.
        """
        ticks = np.empty((runs, number + 1), np.int64)
        if self._walk(steps.ctypes.data, number, runs, ticks.ctypes.data):
            raise RuntimeError("a kernel reported an error")
        return ticks


def _address(symbols: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(symbols, name), ctypes.c_void_p).value
    if address is None:
        raise RuntimeError(f"the function {name} has no address")
    return address


def is_walkable(plan: Plan, functions: Mapping[str, tirx.PrimFunc]) -> bool:
    """Say whether `Walker` can run a plan over some kernels."""
    return all(
        len(call.places) <= MOST_ARGUMENTS and is_static(functions[call.kernel])
        for call in plan.calls
    )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A version of a model: what is called in a run, on what.

    Parameters
    ----------
    plan : Plan
        Calls and their places.
    addresses : tuple of int
        Of the kernel of each call.
    weights : tuple of str
        Digest of each constant.
    """

    plan: Plan
    addresses: tuple[int, ...]
    weights: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The kernel of each call."""
        return [call.kernel for call in self.plan.calls]


class _Region:
    """Fresh pages, and places in them as a package's allocators give them.

    Pages that a process used before may be huge or not; a package's weights lie in small ones, and
    a workspace of some megabytes in huge ones, which NumPy asks for. The difference is up to 5% of
    a kernel.

    Parameters
    ----------
    sizes : sequence of int
        Bytes of what is to have a place.
    array : bool
        Whether it is one array of NumPy.
    """

    def __init__(self, sizes: Sequence[int], *, array: bool = False) -> None:
        self.offsets = []
        end = 0
        for size in sizes:
            start = -(-end // PAGE_BYTES) * PAGE_BYTES if size >= MAPPED_BYTES else end
            start = -(-(start + HEADER_BYTES) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            self.offsets.append(start)
            end = start + size
        self._map = mmap.mmap(-1, max(end, 1))
        if array and end >= HUGE_BYTES:
            with suppress(OSError):  # a system without large pages
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._map, np.uint8)

    def address(self, index: int) -> int:
        """Return where a tensor begins."""
        return int(self.bytes.ctypes.data) + self.offsets[index]

    def view(self, index: int, size: int) -> np.ndarray:
        """Return the bytes of a tensor."""
        return self.bytes[self.offsets[index] : self.offsets[index] + size]


class Memory:
    """The memory that versions of a model share: inputs, outputs, weights and one workspace.

    Where pages lie decides a few percent of a run's time, so that a comparison has to `move`
    everything between its rounds.

    Parameters
    ----------
    inputs : sequence of array
        What the model is run on.
    """

    def __init__(self, inputs: Sequence[np.ndarray]) -> None:
        self._given = [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in inputs]
        self._values: dict[str, np.ndarray] = {}
        self._places: dict[str, int] = {}
        self._sizes: list[int] = []
        self._weights = self._ends = self._workspace = _Region([])

    def version(self, plan: Plan, addresses: Mapping[str, int]) -> Planned:
        """Return a version of the model, whose weights are remembered.

        Parameters
        ----------
        plan : Plan
            What a run is.
        addresses : mapping of str to int
            Of each kernel by name.
        """
        digests = []
        for constant in plan.constants:
            value = constant.value.numpy()
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            digest = hashlib.sha256(data.data).hexdigest()
            self._values.setdefault(digest, data)
            digests.append(digest)
        return Planned(
            plan=plan,
            addresses=tuple(addresses[call.kernel] for call in plan.calls),
            weights=tuple(digests),
        )

    def keep(self, versions: Iterable[Planned]) -> None:
        """Forget the weights that none of some versions has."""
        kept = {digest for version in versions for digest in version.weights}
        self._values = {k: v for k, v in self._values.items() if k in kept}

    def move(self, versions: Sequence[Planned]) -> None:
        """Take new memory for everything that some versions of one model need."""
        wanted = dict.fromkeys(digest for version in versions for digest in version.weights)
        self._places = {digest: place for place, digest in enumerate(wanted)}
        values = [self._values[digest] for digest in wanted]
        self._weights = _Region([value.nbytes for value in values])
        for place, value in enumerate(values):
            self._weights.view(place, value.nbytes)[...] = value
        size = max(version.plan.workspace_bytes for version in versions)
        self._workspace = _Region([size], array=True)
        outputs = [shape.size_bytes for shape in versions[0].plan.outputs]
        self._sizes = [*(array.nbytes for array in self._given), *outputs]
        self._ends = _Region(self._sizes)
        for place, array in enumerate(self._given):
            self._ends.view(place, array.nbytes)[...] = array

    def steps(self, version: Planned) -> np.ndarray:
        """Return what `Walker.walk` runs for a version, in the memory of now."""
        numbers: list[int] = []
        for call, address in zip(version.plan.calls, version.addresses, strict=True):
            numbers += [address, len(call.places)]
            numbers += [self._at(place, version) for place in call.places]
        return np.array(numbers, np.uint64).view(np.int64)

    def output(self, index: int) -> np.ndarray:
        """Return the bytes of an output after a run."""
        place = len(self._given) + index
        return self._ends.view(place, self._sizes[place])

    def _at(self, place: Place, version: Planned) -> int:
        if place.region is Region.CONSTANT:
            start = self._weights.address(self._places[version.weights[place.index]])
        elif place.region is Region.WORKSPACE:
            start = self._workspace.address(0)
        else:
            behind = len(self._given) if place.region is Region.OUTPUT else 0
            start = self._ends.address(behind + place.index)
        return start + place.offset_bytes
