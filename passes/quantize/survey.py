"""Finds what of a network can be computed in integers, before any range is known.

Reads a function with NHWC convolutions and folded batch norm, and changes nothing. A *site* is a
chain of bindings that becomes one integer operator::

    convolution or matrix product → bias additions → [residual addition] → [ReLU, ReLU6, clip]
    transposed convolution → bias additions → [ReLU, ReLU6, clip]
    addition | product | concatenation | mean | average pooling → [ReLU, ReLU6, clip]
    any function of one tensor, element by element (see `level_tables`)

Convolutions and matrix products are taken wherever they fit, transposed convolutions where their
input already is an integer tensor. The others, and the operators that keep their input's levels
(max pooling, reshape, transposition, ReLU), are taken only between integers: where all operands are
integer tensors and somebody wants the result as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, Op

from hone.passes.graph.dataflow import Dataflow, layer_of, shape_of

from .between_integers import between_integers, capable_of, keeps_levels, merge_residuals
from .convolution_form import form_of
from .level_tables import level_function
from .site import Int8Scheme, Kind, Site, Skipped, Survey


def survey(
    function: relax.Function,
    *,
    keep_float: Collection[str] = (),
    scheme: Int8Scheme | None = None,
) -> Survey:
    """Find the sites of a function.

    Parameters
    ----------
    function : relax.Function
        One dataflow block, NHWC, batch norm folded.
    keep_float : collection of str
        Binding names of layers that must stay in float.
    scheme : Int8Scheme, optional
        Of their sites.

    Raises
    ------
    ModelError
        The function is not one dataflow block.
    """
    scheme = scheme or Int8Scheme()
    graph = Dataflow(function)
    sites: dict[relax.Var, Site] = {}
    skipped: list[Skipped] = []
    absorbed: set[relax.Var] = set()
    for binding in graph.bindings:
        var, call = binding.var, binding.value
        if var in absorbed or not isinstance(call, relax.Call):
            continue
        found = _start(graph, var, call)
        if isinstance(found, str):
            skipped.append(Skipped(layer=layer_of(var), reason=found))
        elif found is not None:
            site = _extend(graph, found)
            if not set(site.layers).isdisjoint(keep_float):
                if call.op in _KINDS:
                    skipped.append(Skipped(layer=site.layer, reason="kept in float by request"))
                continue
            absorbed.update(site.chain)
            sites[site.output] = site
    _add_elementwise(graph, sites, absorbed, keep_float)
    capable, passing = capable_of(graph, sites, keep_float)
    skipped += [
        Skipped(layer=site.layer, reason="its input stays in float")
        for var, site in sites.items()
        if site.kind is Kind.CONV2D_TRANSPOSE and var not in capable
    ]
    sites, passing, wanted = between_integers(graph, sites, capable, passing)
    sites = merge_residuals(graph, sites)
    return Survey(
        sites=tuple(replace(site, scheme=scheme) for site in sites.values()),
        skipped=tuple(skipped),
        passing=frozenset(passing),
        wanted=tuple(v for v in (*function.params, *graph.definition) if v in wanted),
    )


def _start(graph: Dataflow, var: relax.Var, call: relax.Call) -> Site | str | None:
    """Return the site that a binding starts, the reason why it does not fit, or None."""
    if call.op in _KINDS:
        kind = _KINDS[call.op]
        reason = _unfit_matmul(call) if kind is Kind.DENSE else _unfit_conv2d(call)
        if reason is not None:
            return reason
        inputs: tuple[relax.Expr, ...] = (call.args[0],)
    elif not _is_float32(call):
        return None
    elif call.op == _CONCAT:
        fields = graph.resolve(call.args[0])
        if not isinstance(fields, relax.Tuple) or not all(_is_float32(x) for x in fields.fields):
            return None
        kind, inputs = Kind.CONCAT, tuple(fields.fields)
    elif call.op == _MEAN and call.attrs.axis is not None and len(call.attrs.axis):
        kind, inputs = Kind.MEAN, (call.args[0],)
    elif call.op == _AVG_POOL2D and _fits_avg_pool2d(call):
        kind, inputs = Kind.AVG_POOL2D, (call.args[0],)
    else:
        return None
    if not all(isinstance(x, relax.Var) for x in inputs):
        return "its input is a constant" if call.op in _KINDS else None
    return Site(kind=kind, layer=layer_of(var), call=call, chain=(var,), inputs=inputs)


def _add_elementwise(
    graph: Dataflow,
    sites: dict[relax.Var, Site],
    absorbed: set[relax.Var],
    keep_float: Collection[str],
) -> None:
    """Add functions of one tensor, as long as they are, and products of two."""

    def is_taken(expr: relax.Expr) -> bool:
        return expr in absorbed

    def add(site: Site | None) -> None:
        if site is not None and set(site.layers).isdisjoint(keep_float):
            absorbed.update(site.chain)
            sites[site.output] = site

    bounds: list[relax.Var] = []
    for binding in reversed(graph.bindings):
        var, call = binding.var, binding.value
        if var in absorbed or not isinstance(call, relax.Call) or not _is_float32(call):
            continue
        if _bounds_of(var, call) is not None:
            bounds.append(var)  # of what comes before it, as long as that takes it
        else:
            add(_function(graph, var, is_taken) or _two_operands(graph, var, call))
    for var in bounds:
        if var not in absorbed and not keeps_levels(graph.definition[var]):
            add(_function(graph, var, is_taken))


def _function(
    graph: Dataflow, var: relax.Var, is_source: Callable[[relax.Expr], bool]
) -> Site | None:
    """Return the longest function of one tensor that ends in a binding, if there is one."""
    call = graph.definition[var]
    for source in (is_source, lambda _x: True):
        found = level_function(graph, var, source)
        if found is None or not isinstance(found.source, relax.Var):
            continue
        if len(found.inner) == 1 and sum(isinstance(x, relax.Var) for x in call.args) > 1:
            return None  # x + x and x × x have kernels that need no table
        inner = set(found.inner)
        if all(inner.issuperset(graph.users[each]) for each in found.inner[:-1]):
            return Site(
                kind=Kind.TABLE,
                layer=layer_of(var),
                call=call,
                chain=found.inner,
                inputs=(found.source,),
                function=found.apply,
            )
    return None


def _two_operands(graph: Dataflow, var: relax.Var, call: relax.Call) -> Site | None:
    """Return the addition or product of two tensors that a binding is, if it is one."""
    if call.op not in (_ADD, _MULTIPLY):
        return None
    if not all(isinstance(x, relax.Var) and _is_float32(x) for x in call.args):
        return None
    shapes = [shape_of(x) for x in call.args]
    if call.op == _ADD and any(shape != shape_of(call) for shape in shapes):
        return None
    if len(shapes[0]) != len(shapes[1]):
        return None
    kind = Kind.ADD if call.op == _ADD else Kind.MULTIPLY
    inputs = tuple(call.args)
    site = Site(kind=kind, layer=layer_of(var), call=call, chain=(var,), inputs=inputs)
    return _absorb_activation(graph, site)


def _is_float32(expr: relax.Expr) -> bool:
    type_ = expr.ty
    return (
        isinstance(type_, relax.TensorType)
        and str(type_.dtype) == "float32"
        and type_.shape is not None
        and all(isinstance(extent, tvm.tirx.IntImm) for extent in type_.shape)
    )


def _unfit_weights(call: relax.Call) -> str | None:
    weight = call.args[1]
    if not isinstance(weight, GenericConst):
        return "the weights are not constant"
    if not (_is_float32(call.args[0]) and _is_float32(weight) and _is_float32(call)):
        return f"{call.args[0].ty} is not float32 of a static shape"
    values = weight.value.numpy()
    if values.size == 0 or 0 in shape_of(call):
        return "a tensor is empty"
    return None if np.isfinite(values).all() else "the weights hold NaN or infinity"


def _unfit_conv2d(call: relax.Call) -> str | None:
    attrs = call.attrs
    layout = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout or "NHWC"))
    kernel = "IOHW" if call.op == _CONV2D_TRANSPOSE else "OHWI"
    if layout != ("NHWC", kernel, "NHWC"):
        return f"the layout is {' '.join(layout)}, not NHWC {kernel} NHWC"
    reason = _unfit_weights(call)
    if reason is not None:
        return reason
    form = form_of(call)
    return form if isinstance(form, str) else None


def _unfit_matmul(call: relax.Call) -> str | None:
    if not isinstance(call.args[1], GenericConst):
        return "both sides are activations"
    if len(shape_of(call.args[1])) != 2 or len(call.args[0].ty.shape) < 2:
        return f"{call.args[0].ty} times {call.args[1].ty} is no product of rows and one matrix"
    return _unfit_weights(call)


def _fits_avg_pool2d(call: relax.Call) -> bool:
    attrs = call.attrs
    layout = (str(attrs.layout), str(attrs.out_layout or "NHWC"))
    uniform = bool(attrs.count_include_pad) or not any(int(p) for p in attrs.padding)
    return layout == ("NHWC", "NHWC") and uniform and not attrs.ceil_mode


def _extend(graph: Dataflow, site: Site) -> Site:
    """Absorb the bias additions and the activation that follow a site."""
    if site.call.op in _KINDS:
        while (following := _only_user(graph, site.output)) is not None:
            bias = _bias_of(graph, *following, site)
            if bias is None:
                break
            total = bias if site.bias is None else site.bias + bias
            site = replace(
                site, chain=(*site.chain, following[0]), bias=total, linear=site.linear + 1
            )
    return _absorb_activation(graph, site)


def _absorb_activation(graph: Dataflow, site: Site) -> Site:
    while (following := _only_user(graph, site.output)) is not None:
        bounds = _bounds_of(*following)
        if bounds is None:
            break
        # A later clip maps the earlier bounds too: clip(clip(x, a, b), c, d).
        low, high = (min(max(x, bounds[0]), bounds[1]) for x in (site.low, site.high))
        site = replace(site, chain=(*site.chain, following[0]), low=low, high=high)
    return site


def _only_user(graph: Dataflow, var: relax.Var) -> tuple[relax.Var, relax.Call] | None:
    if not graph.used_once(var):
        return None
    user = graph.users[var][0]
    call = graph.definition[user]
    return (user, call) if isinstance(call, relax.Call) else None


def _bias_of(graph: Dataflow, var: relax.Var, call: relax.Call, site: Site) -> np.ndarray | None:
    """Return the float64 ``[K]`` that an addition adds to a site's result, if it is one."""
    if call.op != _ADD or shape_of(call) != shape_of(site.output):
        return None
    constants = [graph.constant(x) for x in call.args]
    value = next((c for c in constants if c is not None), None)
    channels = shape_of(site.output)[-1]
    if value is None or not np.isfinite(value).all():
        return None
    if value.size != 1 and (value.size != channels or value.shape[-1] != channels):
        return None
    return np.broadcast_to(value.astype(np.float64).reshape(-1), (channels,))


def _bounds_of(var: relax.Var, call: relax.Call) -> tuple[float, float] | None:
    """Return the bounds of an activation that only clips, else None."""
    if not _is_float32(call):
        return None
    if call.op == _RELU:
        return 0.0, math.inf
    if call.op == _CLIP:
        return float(call.args[1].value), float(call.args[2].value)
    if call.op in (_MAXIMUM, _MINIMUM):
        left, right = call.args
        value = right if isinstance(right, GenericConst) else left
        other = left if value is right else right
        if not isinstance(value, GenericConst) or value.value.numpy().size != 1:
            return None
        if shape_of(other) != shape_of(call):
            return None
        bound = float(value.value.numpy().reshape(()))
        return (bound, math.inf) if call.op == _MAXIMUM else (-math.inf, bound)
    return None


_CONV2D_TRANSPOSE = Op.get("relax.nn.conv2d_transpose")
_KINDS = {
    Op.get("relax.nn.conv2d"): Kind.CONV2D,
    _CONV2D_TRANSPOSE: Kind.CONV2D_TRANSPOSE,
    Op.get("relax.matmul"): Kind.DENSE,
}
_ADD = Op.get("relax.add")
_MULTIPLY = Op.get("relax.multiply")
_CONCAT = Op.get("relax.concat")
_MEAN = Op.get("relax.mean")
_AVG_POOL2D = Op.get("relax.nn.avg_pool2d")
_RELU = Op.get("relax.nn.relu")
_CLIP = Op.get("relax.clip")
_MAXIMUM = Op.get("relax.maximum")
_MINIMUM = Op.get("relax.minimum")
