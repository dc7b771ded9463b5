"""Lowers top-k to a search for the k-th value by its bits, and a sort of what is left by counting.

Rewrites ``relax.topk`` of float32 with k up to 1024; others keep TVM's sort of whole rows by its
runtime library. Runs before ``DispatchSortScan``; the loops are written out here, a row a task.
Numerics: exact. Of equal values (0 and -0 are) the first ones are taken, in their order; NaN counts
as larger than everything.

A row is cut into ``W >= 4 k`` columns. The k-th largest of the columns' maxima is no more than that
of the row, and few elements reach it: of 1000 numbers in no order some six, if k is 5. Those are
gathered; where many reach it (equal or sorted values) the k-th largest is searched among them. An
element's place in the result is the count of those before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import tvm
from tvm import relax, te, tirx
from tvm.ir import Op
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as ib

from hone.targets.schedule.blocks import MIN_PARALLEL_CYCLES

from .elementary import is_number

# Places are counted for each pair of candidates.
MOST = 1024
# Columns for each of the k, and how many rows of them make them pay.
COLUMNS, LEAST_ROWS = 4, 3
# Elements that are tested together: several vectors of each target.
CHUNK = 32
# More candidates than twice k and this many are searched once more.
SPARE = 64
# Bits of the least maximum that are determined: sign, exponent and 7 bits of the mantissa.
BOUND_BITS, ALL_BITS = 16, 32
# Vector operations for each element, over all.
OPERATIONS = 24


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k largest or smallest of each row.

    Parameters
    ----------
    rows, size, k : int
        Rows, elements of one, and how many are taken.
    largest : bool
        Or smallest.
    """

    rows: int
    size: int
    k: int
    largest: bool

    @property
    def columns(self) -> int:
        """Into how many columns a row is cut; 0 where it is too short."""
        columns = -(-COLUMNS * self.k // CHUNK) * CHUNK
        return columns if self.size >= LEAST_ROWS * columns else 0

    def key(self, value: tirx.Expr) -> tirx.Expr:
        """Return an int32 that is ordered as float32 values are, or as their opposites."""
        bits = tirx.reinterpret("int32", value)
        ordered = bits ^ ((bits >> _int(31)) & _int(0x7FFFFFFF))
        ordered = tirx.Select(value.equal(tirx.const(0, "float32")), _int(0), ordered)
        ordered = tirx.Select(is_number(value), ordered, _int(0x7FFFFFFF))
        return ordered if self.largest else ordered ^ _int(-1)


def _int(value: int) -> tirx.Expr:
    return tirx.const(value, "int32")


_LEAST = -(2**31)


def _count(into: tirx.Buffer, keys: tirx.Buffer, size: tirx.Expr, bound: tirx.Expr) -> None:
    """Count the keys that reach a bound."""
    ib.buffer_store(into, _int(0), [0])
    with ib.serial(0, size) as j:
        ib.buffer_store(into, into[0] + tirx.Cast("int32", keys[j] >= bound), [0])


def _search(
    found: tirx.Buffer, count: tirx.Buffer, keys: tirx.Buffer, size: tirx.Expr, k: int, bits: int
) -> None:
    """Find the largest number of so many leading bits that k keys reach, bit by bit."""
    ib.buffer_store(found, _int(_LEAST), [0])
    with ib.serial(0, bits) as step:
        # The sign of int32 is the other way round: the first step turns it from 1 to 0. (LLVM takes
        # a shift of int32 into the sign for undefined.)
        bit = tirx.const(1 << 31, "uint32") >> tirx.Cast("uint32", step)
        bound = found[0] ^ tirx.reinterpret("int32", bit)
        _count(count, keys, size, bound)
        with ib.If(count[0] >= k), ib.Then():
            ib.buffer_store(found, bound, [0])


def _write(spec: TopK, x: tirx.Buffer, outputs: list[tirx.Buffer], kinds: str) -> tirx.Stmt:
    """Return the loops over all rows."""
    data = ib.buffer_proxy(x)
    results = [ib.buffer_proxy(output) for output in outputs]
    parallel = spec.rows * spec.size * OPERATIONS // CHUNK >= MIN_PARALLEL_CYCLES
    with IRBuilder() as builder:
        with (ib.parallel if parallel and spec.rows > 1 else ib.serial)(0, spec.rows) as row:
            found, count, total, hit, need = (
                ib.decl_buffer([1], "int32", scope="global") for _ in range(5)
            )
            keys = ib.decl_buffer([spec.size], "int32", scope="global")
            places = ib.decl_buffer([spec.size], "int32", scope="global")

            def key(at: tirx.Expr) -> tirx.Expr:
                return spec.key(data[row * spec.size + at])

            ib.buffer_store(found, _int(_LEAST), [0])
            if spec.columns:
                maxima = ib.decl_buffer([spec.columns], "int32", scope="global")
                with ib.serial(0, spec.columns) as j:
                    ib.buffer_store(maxima, key(j), [j])
                with ib.serial(1, spec.size // spec.columns) as i, ib.serial(0, spec.columns) as j:
                    ib.buffer_store(maxima, tirx.max(maxima[j], key(i * spec.columns + j)), [j])
                _search(found, count, maxima, _int(spec.columns), spec.k, BOUND_BITS)
            ib.buffer_store(total, _int(0), [0])
            with ib.serial(0, -(-spec.size // CHUNK)) as chunk:
                first = chunk * CHUNK
                size = tirx.min(spec.size - first, CHUNK) if spec.size % CHUNK else CHUNK
                ib.buffer_store(hit, _int(0), [0])
                with ib.serial(0, size) as j:
                    reaches = tirx.Cast("int32", key(first + j) >= found[0])
                    ib.buffer_store(hit, hit[0] | reaches, [0])
                with ib.If(hit[0] > 0), ib.Then(), ib.serial(0, size) as j:
                    own = key(first + j)
                    # Stored in any case, and kept if the next one goes behind it: no branch.
                    ib.buffer_store(keys, own, [total[0]])
                    ib.buffer_store(places, first + j, [total[0]])
                    reaches = tirx.Cast("int32", own >= found[0])
                    ib.buffer_store(total, total[0] + reaches, [0])
            if spec.size > 2 * spec.k + SPARE:
                with ib.If(total[0] > 2 * spec.k + SPARE), ib.Then():
                    _search(found, count, keys, total[0], spec.k, ALL_BITS)
                    _keep(spec, found[0], keys, places, total=total, count=count, need=need)
            with ib.serial(0, total[0]) as i:
                ib.buffer_store(count, _int(0), [0])
                with ib.serial(0, i) as j:
                    before = tirx.Cast("int32", keys[j] >= keys[i])
                    ib.buffer_store(count, count[0] + before, [0])
                with ib.serial(0, total[0] - i) as j:
                    before = tirx.Cast("int32", keys[i + j] > keys[i])
                    ib.buffer_store(count, count[0] + before, [0])
                with ib.If(count[0] < spec.k), ib.Then():
                    for result, kind in zip(results, kinds, strict=True):
                        at = places[i]
                        value = data[row * spec.size + at]
                        if kind != "v":
                            value = tirx.Cast(str(outputs[kinds.index(kind)].dtype), at)
                        result[row * spec.k + count[0]] = value
        return builder.get()


def _keep(
    spec: TopK,
    bound: tirx.Expr,
    keys: tirx.Buffer,
    places: tirx.Buffer,
    *,
    total: tirx.Buffer,
    count: tirx.Buffer,
    need: tirx.Buffer,
) -> None:
    """Keep the keys above the k-th one, and as many that equal it as are wanted, the first ones."""
    ib.buffer_store(count, _int(0), [0])
    with ib.serial(0, total[0]) as j:
        ib.buffer_store(count, count[0] + tirx.Cast("int32", keys[j] > bound), [0])
    ib.buffer_store(need, spec.k - count[0], [0])
    ib.buffer_store(count, _int(0), [0])
    with ib.serial(0, total[0]) as j:
        own, at = keys[j], places[j]
        equal = tirx.Cast("int32", own.equal(bound))
        wanted = equal & tirx.Cast("int32", need[0] > 0)
        kept = tirx.Cast("int32", own > bound) | wanted
        moved = ib.decl_buffer([1], "int32", scope="global")
        ib.buffer_store(moved, kept, [0])
        ib.buffer_store(need, need[0] - equal, [0])
        ib.buffer_store(keys, own, [count[0]])
        ib.buffer_store(places, at, [count[0]])
        ib.buffer_store(count, count[0] + moved[0], [0])
    ib.buffer_store(total, count[0], [0])


def _top_k(data: te.Tensor, *, spec: TopK, kinds: str, index: str) -> list[te.Tensor]:
    """Return values ("v"), indices ("i") or both of the last axis's k first."""
    shape = (*data.shape[:-1], spec.k)
    dtypes = [str(data.dtype) if kind == "v" else index for kind in kinds]
    results = te.extern(
        [shape] * len(kinds),
        [data],
        lambda ins, outs: _write(spec, ins[0], list(outs), kinds),
        dtype=dtypes,
        name="top_k",
    )
    return results if isinstance(results, list) else [results]


def _spec(call: relax.Call, axis: int) -> TopK | None:
    """Return what is taken of each row, None where it is left to the runtime's sort."""
    shape, k = [int(extent) for extent in call.args[0].ty.shape], int(call.attrs.k)
    if (
        str(call.args[0].ty.dtype) != "float32"
        or 0 in shape
        or not 1 <= k <= min(MOST, shape[axis])
    ):
        return None
    rows, size = math.prod(shape) // shape[axis], shape[axis]
    return TopK(rows=rows, size=size, k=k, largest=bool(call.attrs.largest))


@relax.expr_functor.mutator
class _Mutator(relax.PyExprMutator):  # type: ignore[misc]
    """Replaces the calls, and remembers whether there were any."""

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__(module)
        self.changed = False

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if not isinstance(call, relax.Call) or not call.op.same_as(_TOP_K):
            return call
        rank = len(call.args[0].ty.shape)
        axis = int(call.attrs.axis) % max(rank, 1)
        spec = _spec(call, axis)
        if spec is None:
            return call
        self.changed = True
        emit = self.builder_.emit
        kinds = {"both": "vi", "values": "v", "indices": "i"}[str(call.attrs.ret_type)]
        make = partial(_top_k, spec=spec, kinds=kinds, index=str(call.attrs.dtype))
        order = [a for a in range(rank) if a != axis] + [axis]
        data, turned = call.args[0], axis != rank - 1
        if turned:
            data = emit(relax.op.permute_dims(data, order))
        found = emit(self.builder_.call_te(make, data, primfunc_name_hint="top_k"))
        if not turned:
            return found
        back = [order.index(a) for a in range(rank)]
        if len(kinds) == 1:
            return relax.op.permute_dims(found, back)
        fields = [emit(relax.TupleGetItem(found, index)) for index in range(len(kinds))]
        return relax.Tuple([emit(relax.op.permute_dims(field, back)) for field in fields])


@tvm.transform.module_pass(opt_level=0)
class LowerTopK:
    """Lower every top-k that the module describes."""

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with its top-k as kernels; the same one where there is none."""
        mutator = _Mutator(module)
        for variable, function in module.functions.items():
            if isinstance(function, relax.Function):
                mutator.builder_.update_func(variable, mutator.visit_expr(function))
        return mutator.builder_.get() if mutator.changed else module


_TOP_K = Op.get("relax.topk")
