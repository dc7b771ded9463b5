"""Finds the layers whose data a normalization has brought to a scale near 1.

Products of sums (`pairs`) add values and weights before they multiply: of values far from 1 little
is left. What a network is given may have any scale, and what plain layers make of it too; behind a
normalization, or a function whose results are bounded, values are as large as in training.
"""

from __future__ import annotations

from collections.abc import Collection

import tvm
from tvm import relax
from tvm.ir import GenericConst

from hone.passes.graph.dataflow import Dataflow, is_dataflow, layer_of, variables
from hone.passes.graph.fold_batch_norm import BATCH_NORMALIZED

_NORMALIZING = tuple(
    tvm.ir.Op.get(f"relax.{name}")
    for name in (
        *("nn.batch_norm", "nn.layer_norm", "nn.rms_norm", "nn.group_norm", "nn.instance_norm"),
        *("nn.softmax", "sigmoid", "tanh"),
    )
)
_CLIP = tvm.ir.Op.get("relax.clip")
# Results of a clip to more than this may be of any scale.
MOST = 64.0
_LAYERS = tuple(tvm.ir.Op.get(f"relax.{name}") for name in ("matmul", "nn.conv2d"))


class KnownScale:
    """The constant weights of a module's layers whose data has a known scale.

    Parameters
    ----------
    weights : collection of GenericConst
        Of such layers.
    """

    def __init__(self, weights: Collection[GenericConst]) -> None:
        self._weights = tuple(weights)

    def __contains__(self, weight: object) -> bool:
        return any(weight is known or known.same_as(weight) for known in self._weights)


def known_scale(module: tvm.IRModule) -> KnownScale:
    """Return the weights of layers whose data comes from normalizations on every path.

    Parameters
    ----------
    module : IRModule
        Before legalization. Layers into which batch normalization was folded are those that
        `hone.passes.graph.fold_batch_norm` noted.
    """
    main = module["main"]
    if not is_dataflow(main):
        return KnownScale(())
    graph = Dataflow(main)
    folded = set(map(str, main.attrs.get(BATCH_NORMALIZED, ()))) if main.attrs else set()
    known: dict[relax.Var, bool] = {}
    weights = []
    for binding in graph.bindings:
        value = binding.value
        call = value if isinstance(value, relax.Call) else None
        # Integers are indices: what they choose from decides. Without any variable it is constant.
        operands = [known.get(v, not _is_float(v)) for v in variables(value)]
        normalizes = call is not None and (call.op in _NORMALIZING or _is_bounded(call))
        known[binding.var] = normalizes or layer_of(binding.var) in folded or all(operands)
        if call is not None and call.op in _LAYERS and all(operands):
            weights += [call.args[1]] if isinstance(call.args[1], GenericConst) else []
    return KnownScale(weights)


def _is_bounded(call: relax.Call) -> bool:
    """Say whether a call clips to small values, as ReLU6 does."""
    return call.op.same_as(_CLIP) and all(abs(float(a.value)) <= MOST for a in call.args[1:])


def _is_float(variable: relax.Var) -> bool:
    return "float" in str(getattr(variable.ty, "dtype", "float"))
