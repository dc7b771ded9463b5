"""The way from a Relax module to a library, as flat lists of stages that read top to bottom.

Each stage takes a module and returns a new one; each can be printed as TVMScript.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import tvm
from tvm import relax, tirx

from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.graph.flatten_conv3d import FlattenConv3d
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.graph.fold_channel_moves import FoldChannelMoves
from hone.passes.lower.export_kernels import RAW_PIPELINE
from hone.passes.lower.fuse_operators import FuseOperators
from hone.passes.lower.legalize import LegalizeForCPU
from hone.passes.lower.promote_accumulators import CODEGEN_CONFIG, TIR_PIPELINE
from hone.passes.lower.raw_kernels import RAW, RawKernels
from hone.passes.lower.request_ahead import RequestAhead, turns_of
from hone.passes.lower.top_k import LowerTopK
from hone.passes.lower.unify_convolutions import UnifyConvolutions
from hone.passes.quantize.match_qdq import MatchQdq
from hone.passes.quantize.pack_weights import PackWeights
from hone.targets import features
from hone.targets.schedule.cpu import Decision, ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target
from hone.targets.toolchain import find_linker

from .ahead import Ahead, requests_ahead
from .host_code import CONSTANTS, host_source
from .plan import Plan, plan_of

if TYPE_CHECKING:
    from .database import Database


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the pipeline.

    Parameters
    ----------
    name : str
        What it is called in dumps and in ``hone passes``.
    summary : str
        One line.
    run : Pass
        Module in, new module out.
    """

    name: str
    summary: str
    run: tvm.transform.Pass


def graph_stages() -> tuple[Stage, ...]:
    """Return the stages that clean up an imported graph; no target is needed."""
    transform = relax.transform
    return (
        Stage(
            name="match-qdq",
            summary="layers of an imported quantized model become integer operators",
            run=MatchQdq(),
        ),
        Stage(
            name="pack-weights",
            summary="imported weights of few bits stay packed where only weights are quantized",
            run=PackWeights(),
        ),
        Stage(
            name="fold-constants", summary="evaluate constant nodes", run=transform.FoldConstant()
        ),
        Stage(
            name="fold-batch-norm",
            summary="merge batch normalization into the layer before it",
            run=FoldBatchNorm(),
        ),
        Stage(
            name="fold-channel-moves",
            summary="shuffles and slices of channels become orders of weights",
            run=FoldChannelMoves(),
        ),
        Stage(
            name="flatten-conv3d",
            summary="3-D convolutions as 2-D ones over the channels of all taps of a depth",
            run=FlattenConv3d(),
        ),
        Stage(
            name="unify-convolutions",
            summary="1-D and transposed convolutions as plain 2-D ones",
            run=UnifyConvolutions(),
        ),
        Stage(
            name="decompose",
            summary="write composite operators as simple ones",
            run=transform.DecomposeOpsForInference(),
        ),
        Stage(
            name="layout",
            summary="convolutions from NCHW to NHWC, layout changes only at the borders",
            run=ToNHWC(),
        ),
    )


def lower_stages(target: Target, *, threads: int, compact: bool = False) -> tuple[Stage, ...]:
    """Return the stages from operators to fused TIR functions, not yet scheduled."""
    return lower_stages_of(Machine.of(target, threads), compact=compact)


def lower_stages_of(machine: Machine, *, compact: bool = False) -> tuple[Stage, ...]:
    """Return the same stages for a machine, which may have decisions of its own."""
    transform = relax.transform
    return (
        Stage(
            name="dispatch",
            summary="top-k becomes a kernel; sorting and sampling are the runtime's own routines",
            run=tvm.transform.Sequential(
                [
                    LowerTopK(),
                    relax.backend.DispatchSampling(),
                    relax.backend.DispatchSortScan(),
                ]
            ),
        ),
        Stage(
            name="legalize",
            summary="operators become TIR functions, weights are packed for the target",
            run=LegalizeForCPU(machine, compact=compact),
        ),
        Stage(
            name="group",
            summary="elementwise operators join the kernel before, depthwise ones an expansion",
            run=FuseOperators(machine),
        ),
        Stage(
            name="fuse",
            summary="each group becomes one TIR function",
            run=tvm.transform.Sequential([transform.FuseTIR(), transform.DeadCodeElimination()]),
        ),
    )


def passes(target: Target, *, threads: int) -> list[tuple[str, str, str]]:
    """Return ``(phase, stage, summary)`` of every stage, in order, for ``hone passes``."""
    rows = [("graph", stage.name, stage.summary) for stage in graph_stages()]
    rows += [
        ("lower", stage.name, stage.summary) for stage in lower_stages(target, threads=threads)
    ]
    rows.append(("schedule", "records", "tuning records of the database, where one fits"))
    rows.append(("schedule", "rules", "one deterministic rule for every other function"))
    rows += [("finalize", stage.name, stage.summary) for stage in finalize_stages()]
    rows.append(("link", "codegen", "machine code by LLVM, accumulators in registers"))
    return rows


def _run(stages: Sequence[Stage], module: tvm.IRModule) -> tvm.IRModule:
    for stage in stages:
        module = stage.run(module)
    return module


def lower(
    module: tvm.IRModule,
    target: Target,
    *,
    threads: int,
    compact: bool = False,
    decided: Mapping[str, str] | None = None,
) -> tvm.IRModule:
    """Lower a Relax module to fused TIR functions before scheduling.

    Parameters
    ----------
    module : IRModule
        One Relax function ``main`` with constant weights.
    target : Target
        What to compile for.
    threads : int
        Threads that will share each kernel.
    compact : bool
        Prefer small weights to speed, where a kernel has the choice.
    decided : mapping of str to str, optional
        How layers are lowered where tuning found better than the model's first choice; see
        `hone.tuning.lowering`.

    Returns
    -------
    IRModule
        ``main`` calls TIR functions; what tuning extracts its tasks from.
    """
    machine = Machine.of(target, threads).holding(constant_bytes(module))
    machine = replace(machine, decided=tuple(sorted((decided or {}).items())))
    stages = (*graph_stages(), *lower_stages_of(machine, compact=compact))
    with target.tvm_target(threads):
        return _run(stages, module)


def constant_bytes(module: tvm.IRModule) -> int:
    """Return the bytes of all constants, equal ones counted each time."""
    sizes: list[int] = []

    def visit(node: object) -> None:
        if isinstance(node, tvm.ir.GenericConst) and isinstance(node.ty, relax.TensorType):
            sizes.append(node.value.numpy().nbytes)

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return sum(sizes)


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """A module whose functions are all scheduled.

    Parameters
    ----------
    module : IRModule
        Ready to be linked.
    decisions : tuple of Decision
        The rule of each kernel.
    untuned : tuple of str
        Kernels that the database knows nothing about; all of them without a database.
    failed : tuple of str
        Kernels whose tuning record could not be applied, with the reason.
    rejected : tuple of str
        Kernels that stay untuned because no record was faster inside a running model.
    """

    module: tvm.IRModule
    decisions: tuple[Decision, ...]
    untuned: tuple[str, ...]
    failed: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()

    @property
    def hits(self) -> int:
        """Kernels that the database covers."""
        return len(self.decisions) - len(self.untuned)


def schedule(
    lowered: tvm.IRModule, target: Target, *, threads: int, database: Database | None = None
) -> Scheduled:
    """Schedule every function: by its tuning record where there is one, else by rule."""
    decisions: list[Decision] = []
    failed: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    untuned: tuple[str, ...] | None = None
    if database is not None:
        applied = database.apply(lowered)
        lowered = applied.module
        untuned = applied.misses
        failed = tuple(f"{kernel}: {reason}" for kernel, reason in applied.failed)
        rejected = applied.rejected
    rule = ScheduleModule(Machine.of(target, threads), on_decision=decisions.append)
    module = rule(lowered)
    if untuned is None:
        untuned = tuple(decision.kernel for decision in decisions)
    return Scheduled(
        module=module,
        decisions=tuple(decisions),
        untuned=untuned,
        failed=failed,
        rejected=rejected,
    )


def finalize_stages() -> tuple[Stage, ...]:
    """Return the stages that turn the graph around the kernels into virtual machine code."""
    transform = relax.transform
    return (
        Stage(
            name="calls",
            summary="tensors are passed by destination",
            run=tvm.transform.Sequential(
                [
                    transform.RewriteDataflowReshape(),
                    transform.ToNonDataflow(),
                    transform.RemovePurityChecking(),
                    transform.CallTIRRewrite(),
                ]
            ),
        ),
        Stage(
            name="memory",
            summary="activations share storage planned ahead of time",
            run=tvm.transform.Sequential(
                [transform.StaticPlanBlockMemory(), transform.LowerAllocTensor()]
            ),
        ),
        Stage(
            name="machine",
            summary="the graph becomes code of TVM's virtual machine",
            run=tvm.transform.Sequential(
                [
                    transform.KillAfterLastUse(),
                    transform.LowerRuntimeBuiltin(),
                    transform.ComputePrimValue(),
                    transform.VMShapeLower(),
                    transform.AttachGlobalSymbol(),
                ]
            ),
        ),
    )


def build_executable(
    scheduled: tvm.IRModule, target: Target, *, threads: int
) -> relax.VMExecutable:
    """Generate machine code for a scheduled module, to be run by TVM in this process."""
    features.request_tiles()
    tvm_target = target.tvm_target(threads)
    with tvm_target:
        module = _run(finalize_stages(), scheduled)
    with tvm.transform.PassContext(opt_level=3, config=CODEGEN_CONFIG):
        return relax.build(module, tvm_target, relax_pipeline=None, tir_pipeline=TIR_PIPELINE)


def link(
    scheduled: tvm.IRModule, target: Target, *, threads: int, slices: int = 1, parts: int = 1
) -> bytes:
    """Return the shared library of a scheduled module, for packages.

    It holds the kernels as plain functions, the code around them (`host_code`) and, for what has
    no plan and for profiling, the graph as code of TVM's virtual machine with the weights.

    Parameters
    ----------
    scheduled : IRModule
        Every function scheduled.
    target : Target
        What to generate code for.
    threads : int
        That the kernels were scheduled for.
    slices, parts : int
        How often a run calls ``main``, and how many threads do so side by side; see
        `hone.slicing.Slicing`.

    Raises
    ------
    ToolchainError
        There is no linker for the target (exit 6).
    """
    linker = find_linker(target)
    tvm_target = target.tvm_target(threads)
    calls, memory, machine = finalize_stages()
    with tvm_target:
        planned = _run((calls, memory), scheduled)
        plan = plan_of(planned, slices=slices, parts=parts)
        if plan is not None:
            planned.update_func(relax.GlobalVar(CONSTANTS), _constants(plan))
        module = apply(_run((machine,), planned), RawKernels())
    ahead = _requests(module, plan, Machine.of(target, threads))
    kernels = {
        variable.name_hint: len(func.params)
        for variable, func in module.functions.items()
        if isinstance(func, tirx.PrimFunc) and RAW in func.attrs
    }
    if plan is not None and ahead:
        asking = {plan.calls[number].kernel for number in ahead}
        module = apply(module, RequestAhead(asking))
    with tvm.transform.PassContext(opt_level=3, config=CODEGEN_CONFIG):
        executable = relax.build(module, tvm_target, relax_pipeline=None, tir_pipeline=RAW_PIPELINE)
    with TemporaryDirectory(prefix="hone-") as folder:
        source, library = Path(folder, "host.c"), Path(folder, "lib.so")
        text = host_source(kernels, plan, slices=slices, parts=parts, ahead=ahead)
        source.write_text(text, encoding="utf-8")
        executable.export_library(str(library), fcompile=linker.fcompile_with(source))
        return library.read_bytes()


def _constants(plan: Plan) -> relax.Function:
    """Return the function that gives the constants of a plan to whoever runs it."""
    types = relax.TupleType([constant.ty for constant in plan.constants])
    return relax.Function([], relax.Tuple(plan.constants), types, is_pure=True)


def _requests(module: tvm.IRModule, plan: Plan | None, machine: Machine) -> dict[int, Ahead]:
    """Return what calls of a plan request of the weights of later ones; nothing without a plan."""
    if plan is None:
        return {}
    turns = {
        variable.name_hint: found
        for variable, func in module.functions.items()
        if isinstance(func, tirx.PrimFunc) and RAW in func.attrs
        if (found := turns_of(func)) is not None
    }
    return requests_ahead(plan, turns, machine)
