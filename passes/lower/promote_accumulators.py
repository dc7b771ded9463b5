"""Keeps small local buffers on the stack, so that LLVM turns accumulators into registers.

Rewrites ``AllocBuffer`` statements of at most 16 KiB. Runs on host functions just before
``LowerTVMBuiltin``, which otherwise sends every buffer of 1024 bytes or more to the heap
workspace, out of LLVM's sight. Numerics: exact.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline

from .configure_tiles import ConfigureTiles
from .import_intrinsics import ImportIntrinsics
from .prefetch_epilogue import PrefetchEpilogue
from .prefetch_slabs import PrefetchSlabs
from .prefetch_weights import PrefetchWeights
from .round_to_int import RoundToInt
from .skip_hidden_keys import SkipHiddenKeys

# A thread's stack is 8 MiB by default, and 64 KiB is the least a POSIX thread may have on Linux
# targets of ours; a register tile needs 2 KiB and a padded row patch rarely more than 16.
MAX_STACK_BYTES = 16 * 1024


def _is_small(buffer: tirx.Buffer) -> bool:
    if buffer.scope() != "global":
        return False
    elements = 1
    for extent in buffer.shape:
        if not isinstance(extent, tirx.IntImm):
            return False
        elements *= int(extent)
    return bool(elements * tvm.runtime.DataType(str(buffer.dtype)).itemsize <= MAX_STACK_BYTES)


def _rewrite(statement: tirx.Stmt) -> tirx.Stmt:
    if isinstance(statement, tirx.AllocBuffer):
        if not _is_small(statement.buffer):
            return statement
        return tirx.AllocBuffer(
            statement.buffer, {"disable_lower_builtin": tirx.IntImm("int32", 1)}
        )
    if isinstance(statement, tirx.SeqStmt):
        return tirx.SeqStmt([_rewrite(part) for part in statement.seq])
    if isinstance(statement, tirx.For):
        return tirx.For(
            statement.loop_var,
            statement.min,
            statement.extent,
            statement.kind,
            _rewrite(statement.body),
            statement.thread_binding,
            statement.annotations,
        )
    if isinstance(statement, tirx.AttrStmt):
        return tirx.AttrStmt(
            statement.node, statement.attr_key, statement.value, _rewrite(statement.body)
        )
    if isinstance(statement, tirx.IfThenElse):
        return tirx.IfThenElse(
            statement.condition,
            _rewrite(statement.then_case),
            None if statement.else_case is None else _rewrite(statement.else_case),
        )
    return statement


@tirx.transform.prim_func_pass(opt_level=0)
class PromoteAccumulators:
    """Annotate every small global buffer so that it stays an alloca."""

    def transform_function(
        self,
        func: tirx.PrimFunc,
        _module: tvm.IRModule,
        _context: tvm.transform.PassContext,
    ) -> tirx.PrimFunc:
        """Return the function with its small buffers on the stack."""
        return func.with_body(_rewrite(func.body))


def tir_pipeline() -> tvm.transform.Pass:
    """Return TVM's lowering of scheduled TIR, with accumulators kept in registers.

    Returns
    -------
    tuple
        Module pass, host finalization, device finalization: what ``tvm.tirx.build`` asks for.
    """
    lower, finalize_host, finalize_device = default_s_tir_pipeline()
    lower = tvm.transform.Sequential([PrefetchEpilogue(), lower])

    def finalize() -> tvm.transform.Pass:
        return tvm.transform.Sequential(
            [
                ConfigureTiles(),
                PrefetchWeights(),
                PrefetchSlabs(),
                SkipHiddenKeys(),
                PromoteAccumulators(),
                RoundToInt(),
                ImportIntrinsics(),
                finalize_host(),
            ]
        )

    return lower, finalize, finalize_device


# Constant loops are partitioned so that the bounds of padding leave the inner tiles.
CODEGEN_CONFIG = {"s_tir.LoopPartition": {"partition_const_loop": True}}

# ``tvm.tirx.build`` takes a pipeline by name only.
TIR_PIPELINE = "hone"
tirx.compilation_pipeline.register_tir_pipeline(TIR_PIPELINE, tir_pipeline)
