"""Decides what of a network's sites is computed in integers, by who stands beside whom.

Changes nothing; see `survey`, which finds the sites.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

from tvm import relax
from tvm.ir import Op

from hone.passes.graph.dataflow import Dataflow, layer_of

from .level_moves import picks_elements
from .site import WEIGHTED, Kind, Site


def keeps_levels(call: relax.Call) -> bool:
    """Tell whether an operator works on levels as they are, first argument to result."""
    if call.op == _MAX_POOL2D:
        return str(call.attrs.layout) == "NHWC" and str(call.attrs.out_layout or "NHWC") == "NHWC"
    if call.op == _RESIZE:
        return picks_elements(call)
    return call.op in _MOVES or call.op == _RELU


def capable_of(
    graph: Dataflow, sites: dict[relax.Var, Site], keep_float: Collection[str]
) -> tuple[set[relax.Var], set[relax.Var]]:
    """Return the variables that can be integers, and those that pass levels on."""
    capable: set[relax.Var] = set()
    passing: set[relax.Var] = set()
    for binding in graph.bindings:
        var, value = binding.var, binding.value
        site = sites.get(var)
        if site is not None:
            if site.kind in WEIGHTED or all(x in capable for x in site.inputs):
                capable.add(var)
        elif (
            isinstance(value, relax.Call)
            and keeps_levels(value)
            and value.args[0] in capable
            and layer_of(var) not in keep_float
        ):
            capable.add(var)
            passing.add(var)
    return capable, passing


def between_integers(
    graph: Dataflow,
    sites: dict[relax.Var, Site],
    capable: set[relax.Var],
    passing: set[relax.Var],
) -> tuple[dict[relax.Var, Site], set[relax.Var], set[relax.Var]]:
    """Drop what is not between integers; return what is left, and who is read as integers."""
    wanted: set[relax.Var] = set()
    kept: dict[relax.Var, Site] = {}
    kept_passing: set[relax.Var] = set()
    for binding in reversed(graph.bindings):
        var = binding.var
        site = sites.get(var)
        taken = site is not None and (
            site.kind in WEIGHTED
            or (var in capable and (var in wanted or site.kind is Kind.CONV2D_TRANSPOSE))
        )
        if site is not None and taken:
            if var not in wanted:
                # Only float reads it: the activation stays a float operator, nothing is rounded.
                site = replace(
                    site,
                    chain=site.chain[: site.linear],
                    low=-math.inf,
                    high=math.inf,
                    levels=False,
                )
            kept[site.output] = site
            wanted.update(site.inputs)
        elif var in passing and var in wanted:
            kept_passing.add(var)
            wanted.add(binding.value.args[0])
    return dict(reversed(kept.items())), kept_passing, wanted


def merge_residuals(graph: Dataflow, sites: dict[relax.Var, Site]) -> dict[relax.Var, Site]:
    """Let the convolution or product just before an integer addition compute the addition."""
    position = {binding.var: i for i, binding in enumerate(graph.bindings)}
    merged = dict(sites)
    for output, addition in sites.items():
        if addition.kind is not Kind.ADD:
            continue
        mergeable = [
            x
            for x in addition.inputs
            if x in merged
            and merged[x].kind in WEIGHTED
            and not merged[x].residual
            and len(merged[x].chain) == merged[x].linear
            and graph.used_once(x)
        ]
        if not mergeable:
            continue
        last = max(mergeable, key=lambda x: position[x])
        other = next(x for x in addition.inputs if not x.same_as(last))
        before = merged.pop(last)
        merged[output] = replace(
            before,
            chain=(*before.chain, *addition.chain),
            inputs=(*before.inputs, other),
            residual=True,
            linear=before.linear + 1,
            low=addition.low,
            high=addition.high,
        )
    return merged


_MAX_POOL2D = Op.get("relax.nn.max_pool2d")
_RESIZE = Op.get("relax.image.resize2d")
_RELU = Op.get("relax.nn.relu")
_MOVES = tuple(
    Op.get(f"relax.{name}")
    for name in ("reshape", "permute_dims", "flatten", "squeeze", "expand_dims", "strided_slice")
)
