"""Versions of one model in this process, ready to be timed in turns.

They run as a package runs them (`planned.py`) where the model has a plan, else in the virtual
machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tvm
from tvm import relax, tirx

from hone.measure import Rounds
from hone.passes.lower.promote_accumulators import CODEGEN_CONFIG, TIR_PIPELINE
from hone.pipeline import Stage, finalize_stages
from hone.plan import Plan, plan_of
from hone.profiling.kernel_timer import BUILTIN, clock_reader

from .builder import numpy_dtype
from .pinning import pin_all
from .planned import Memory, Planned, Walker, is_walkable

LONGEST_BLOCK_S = 0.05
"""Length at which a block of runs ends early: on a busy machine, a kernel whose threads wait for
one that does not run takes a thousand times as long."""


class Version(Protocol):
    """A model with some kernels, loaded.

    Attributes
    ----------
    calls : list of str
        The kernel of each call of a run; equal names are equal code within a module.
    codes : list of object
        What tells the code of the calls apart between versions.
    """

    calls: list[str]
    codes: list[object]

    def run(self) -> None:
        """Run it once."""
        ...

    def outputs(self) -> list[np.ndarray]:
        """Run it once, and return what came out."""
        ...

    def watch(self, rounds: Rounds) -> np.ndarray:
        """Return ``[runs, calls]`` of one block: seconds of every call."""
        ...

    def clock(self, rounds: Rounds) -> np.ndarray:
        """Return ``[runs]`` of one block: seconds of every run."""
        ...


class Versions(Protocol):
    """Compiles kernels, and loads versions of a model over them."""

    def program(self, scheduled: tvm.IRModule) -> Program | None:
        """Return what a run of a scheduled module is; None where these versions cannot run it."""
        ...

    def compile(self, functions: Mapping[str, tirx.PrimFunc]) -> Kernels:
        """Compile scheduled functions under their names."""
        ...

    def load(self, program: Program, kernels: Sequence[Kernels]) -> Version:
        """Load a program; of several kernels with one name the first is taken."""
        ...

    def move(self, versions: Sequence[Version]) -> None:
        """Give versions that are compared other memory, where that is possible."""
        ...

    def keep(self, versions: Iterable[Version]) -> None:
        """Forget what no other version will need."""
        ...

    def pin(self) -> None:
        """Pin the threads of the runs; a first run has started them."""
        ...


Kernels = Any
"""What `Versions.compile` returns: for the same object only."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """What a run of a model is.

    Parameters
    ----------
    module : IRModule
        Storage planned; ready for the virtual machine where there is no plan.
    plan : Plan or None
        The same as a list of calls.
    """

    module: tvm.IRModule
    plan: Plan | None

    @property
    def functions(self) -> dict[str, tirx.PrimFunc]:
        """The kernels, by name."""
        return {
            variable.name_hint: func
            for variable, func in self.module.functions.items()
            if isinstance(func, tirx.PrimFunc)
        }


def versions(
    module: tvm.IRModule,
    target: tvm.target.Target,
    threads: int,
    inputs: Sequence[tvm.runtime.Tensor],
) -> Versions:
    """Return what loads versions of a model: planned ones where the model has a plan.

    Parameters
    ----------
    module : IRModule
        The model, scheduled.
    target : Target
        What to generate code for.
    threads : int
        Threads of one run.
    inputs : sequence of Tensor
        What the model is run on.
    """
    arrays = [tensor.numpy() for tensor in inputs]
    planned = PlannedVersions(target, threads, arrays)
    if planned.program(module) is not None:
        return planned
    return MachineVersions(target, inputs)


def _run(stages: Sequence[Stage], module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    with target:
        for stage in stages:
            module = stage.run(module)
    return module


class PlannedVersion:
    """A version that runs as a package does; see `Version`."""

    def __init__(self, walker: Walker, memory: Memory, version: Planned) -> None:
        self._walker = walker
        self._memory = memory
        self.planned = version
        self.calls = version.names
        self.codes: list[object] = list(version.addresses)
        self._steps: np.ndarray | None = None

    def moved(self) -> None:
        """Read anew where tensors are."""
        self._steps = self._memory.steps(self.planned)

    def _walk(self, runs: int) -> np.ndarray:
        if self._steps is None:
            self._memory.move([self.planned])
            self.moved()
        assert self._steps is not None
        return self._walker.walk(self._steps, len(self.calls), runs)

    def run(self) -> None:
        """Run it once."""
        self._walk(1)

    def outputs(self) -> list[np.ndarray]:
        """Run it once, and return what came out; what no kernel writes is 0."""
        self._memory.move([self.planned])
        self.moved()
        self.run()
        return [
            self._memory.output(i).view(numpy_dtype(shape.dtype)).reshape(shape.extents).copy()
            for i, shape in enumerate(self.planned.plan.outputs)
        ]

    def _block(self, rounds: Rounds) -> np.ndarray:
        """Return the ticks of the runs of a block that count."""
        rows = []
        started = time.perf_counter()
        for number in range(rounds.runs):
            ticks = self._walk(1)
            if number >= rounds.warmup or not number:
                rows.append(ticks)
            if number and time.perf_counter() - started > LONGEST_BLOCK_S:
                break
        return np.concatenate(rows[1:] or rows)

    def watch(self, rounds: Rounds) -> np.ndarray:
        """Return ``[runs, calls]`` of one block: seconds of every call."""
        return np.diff(self._block(rounds), axis=1) * 1e-9

    def clock(self, rounds: Rounds) -> np.ndarray:
        """Return ``[runs]`` of one block: seconds of every run."""
        ticks = self._block(rounds)
        return np.asarray((ticks[:, -1] - ticks[:, 0]) * 1e-9)


class PlannedVersions:
    """Versions that run as packages do; see `Versions`."""

    def __init__(
        self, target: tvm.target.Target, threads: int, inputs: Sequence[np.ndarray]
    ) -> None:
        self._target = target
        self._walker = Walker(target, threads)
        self._memory = Memory(inputs)

    def program(self, scheduled: tvm.IRModule) -> Program | None:
        """Return what a run is; None where it has no plan."""
        calls, memory, _ = finalize_stages()
        module = _run((calls, memory), scheduled, self._target)
        found = Program(module=module, plan=plan_of(module))
        fits = found.plan is not None and is_walkable(found.plan, found.functions)
        return found if fits else None

    def compile(self, functions: Mapping[str, tirx.PrimFunc]) -> Kernels:
        """Compile scheduled functions under their names."""
        return self._walker.load(functions)

    def load(self, program: Program, kernels: Sequence[Kernels]) -> PlannedVersion:
        """Load a program; of several kernels with one name the first is taken."""
        addresses: dict[str, int] = {}
        for found in reversed(kernels):
            addresses.update(found)
        if program.plan is None:
            raise ValueError("a program without a plan")
        version = self._memory.version(program.plan, addresses)
        return PlannedVersion(self._walker, self._memory, version)

    def move(self, versions: Sequence[Version]) -> None:
        """Give versions that are compared other memory."""
        chosen = [version for version in versions if isinstance(version, PlannedVersion)]
        self._memory.move([version.planned for version in chosen])
        for version in chosen:
            version.moved()

    def keep(self, versions: Iterable[Version]) -> None:
        """Forget the weights of all other versions."""
        self._memory.keep(
            version.planned for version in versions if isinstance(version, PlannedVersion)
        )

    def pin(self) -> None:
        """Pin the threads of the runs."""
        self._walker.pin()


class MachineVersion:
    """A version in TVM's virtual machine; see `Version`."""

    def __init__(
        self,
        program: relax.VMExecutable,
        inputs: Sequence[tvm.runtime.Tensor],
        kernels: Mapping[str, object],
    ) -> None:
        self._machine = relax.VirtualMachine(program, tvm.cpu())
        self._main = self._machine["main"]
        self._inputs = inputs
        self._ticks: list[int] = []
        self._clock = clock_reader(self._ticks)
        names = self._names()
        self._counted = [i for i, name in enumerate(names) if not name.startswith(BUILTIN)]
        self.calls = [names[i] for i in self._counted]
        self.codes: list[object] = [kernels.get(name, name) for name in self.calls]

    def run(self) -> None:
        """Run it once."""
        self._main(*self._inputs)

    def outputs(self) -> list[np.ndarray]:
        """Run it once, and return what came out."""
        result = self._main(*self._inputs)
        tensors = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
        return [tensor.numpy() for tensor in tensors]

    def _names(self) -> list[str]:
        names: list[str] = []

        def note(_function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> None:
            if before:
                names.append(name)

        self._machine.set_instrument(note)
        self.run()
        self._machine.set_instrument(None)
        return names

    def watch(self, rounds: Rounds) -> np.ndarray:
        """Return ``[runs, calls]`` of one block: seconds of every call, less the instrument's."""
        rows: list[tuple[int, ...]] = []

        def run() -> None:
            self._ticks.clear()
            self.run()
            rows.append(tuple(self._ticks))

        self._machine.set_instrument(self._clock)
        kept = len(_block(run, rounds))
        self._machine.set_instrument(None)
        seconds = np.diff(np.array(rows[-kept:], np.int64), axis=1)[:, ::2] * 1e-9
        own_s = np.median(seconds, axis=0).min()
        return np.asarray(np.maximum(seconds[:, self._counted] - own_s, 1e-9))

    def clock(self, rounds: Rounds) -> np.ndarray:
        """Return ``[runs]`` of one block: seconds of every run."""
        return _block(self.run, rounds)


class MachineVersions:
    """Versions in TVM's virtual machine; see `Versions`."""

    def __init__(self, target: tvm.target.Target, inputs: Sequence[tvm.runtime.Tensor]) -> None:
        self._target = target
        self._inputs = inputs

    def program(self, scheduled: tvm.IRModule) -> Program | None:
        """Return what a run is."""
        return Program(module=_run(finalize_stages(), scheduled, self._target), plan=None)

    def compile(self, functions: Mapping[str, tirx.PrimFunc]) -> Kernels:
        """Compile scheduled functions under their names."""
        named = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
        with tvm.transform.PassContext(opt_level=3, config=CODEGEN_CONFIG):
            built = tvm.tirx.build(tvm.IRModule(named), self._target, pipeline=TIR_PIPELINE)
        return tuple(functions), built

    def load(self, program: Program, kernels: Sequence[Kernels]) -> MachineVersion:
        """Load a program; the virtual machine takes the first function of a name."""
        builder = relax.ExecBuilder()
        relax.vm_build._vmcodegen(builder, program.module)
        executable = builder.get()
        codes: dict[str, object] = {}
        for names, library in kernels:
            executable.mod.import_module(library)
            for name in names:
                codes.setdefault(name, (name, id(library)))
        return MachineVersion(executable, self._inputs, codes)

    def move(self, versions: Sequence[Version]) -> None:
        """Do nothing: the virtual machine owns its memory."""

    def keep(self, versions: Iterable[Version]) -> None:
        """Do nothing."""

    def pin(self) -> None:
        """Pin all threads: they are the virtual machine's."""
        pin_all()


def _block(run: Any, rounds: Rounds) -> np.ndarray:
    """Return the seconds of the runs of one block after its warm-up; at least one."""
    seconds: list[float] = []
    started = time.perf_counter()
    for number in range(rounds.runs):
        before = time.perf_counter()
        run()
        after = time.perf_counter()
        if number >= rounds.warmup or not number:
            seconds.append(after - before)
        if after - started > LONGEST_BLOCK_S and number:
            break
    return np.array(seconds[1:] or seconds)
