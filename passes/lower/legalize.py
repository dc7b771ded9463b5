"""Turns Relax operators into calls of TIR functions, hone's own where it has one.

Runs on an NHWC module before fusion. Layout changes are legalized last, so that a convolution can
read through them. Numerics: sums may be taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import tvm
from tvm import relax

from hone.passes.graph.to_half import LARGE_TILES
from hone.passes.quantize.binarize import NAME as BINARIZE
from hone.passes.quantize.decode_operator import NAME as DECODE_WEIGHTS
from hone.passes.quantize.legalize import rules as integer_rules
from hone.targets.schedule.machine import Machine

from .anchors import default_legalization, is_constant
from .arg_extremum import GREATEST, LEAST, legalize_arg_extremum
from .attention import legalize_attention
from .attention_operator import NAME as ATTENTION
from .computed_weights import legalize_computed_conv2d
from .conv2d import legalize_conv2d
from .elementary import ELEMENTARY_RULES
from .fuse_attention import FuseAttention
from .fuse_gelu import FuseGelu
from .grid_sample import legalize_grid_sample
from .half import is_half, legalize_astype
from .half_conv2d import legalize_half_conv2d
from .half_dense import legalize_half_matmul
from .half_models import legalize_half_model
from .join_projections import JoinProjections
from .known_scale import known_scale
from .normalize import legalize_group_norm, legalize_layer_norm, legalize_softmax
from .pool2d import legalize_avg_pool2d, legalize_max_pool2d
from .powers import legalize_power
from .products import legalize_product
from .reductions import STATISTICS, legalize_statistic
from .repeat import legalize_tile
from .resize2d import legalize_resize2d
from .trigonometry import cos, legalize_wave, sin
from .weight_only import legalize_decode
from .weight_only import rules as weight_only_rules

READ_THROUGH = (
    "relax.permute_dims",
    "relax.astype",
    "relax.strided_slice",
    DECODE_WEIGHTS,
    BINARIZE,
)

Rule = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def _by_weight(*, single: Rule, half: Rule) -> Rule:
    """Return the rule that fits the types of a layer's second operand and of its result."""

    def rule(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
        if not is_half(call.args[1]):
            return single(bb, call)
        if str(call.ty.dtype) == str(call.args[1].ty.dtype):
            return legalize_half_model(single, half, bb, call)
        return half(bb, call)

    return rule


def _by_origin(*, constant: Rule, computed: Rule) -> Rule:
    """Return the rule that fits weights that are constant, or computed by the model."""
    return lambda bb, call: (constant if is_constant(call.args[1]) else computed)(bb, call)


def _takes_large_tiles(module: tvm.IRModule) -> bool:
    """Say whether `hone.passes.graph.to_half.ToHalf` left a note that layers may take F(4x4)."""
    return any(
        bool(func.attrs and func.attrs.get(LARGE_TILES, False))
        for func in module.functions.values()
        if isinstance(func, relax.Function)
    )


@tvm.transform.module_pass(opt_level=0)
class LegalizeForCPU:
    """Legalize a module for a CPU.

    Parameters
    ----------
    machine : Machine
        Decides how weights are packed.
    compact : bool
        Keep weights small: no Winograd, whose weights are 1.8 or 4 times as large, of integers
        3.6 or 8 times.
    """

    def __init__(self, machine: Machine, *, compact: bool = False) -> None:
        self._machine = machine
        self._compact = compact

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module with every operator legalized."""
        module = tvm.transform.Sequential(
            [FuseAttention(self._machine), JoinProjections(), FuseGelu()]
        )(module)
        scaled = known_scale(module)
        own = {
            **weight_only_rules(
                self._machine,
                {
                    "relax.nn.conv2d": _by_weight(
                        single=_by_origin(
                            constant=partial(legalize_conv2d, self._machine, self._compact, scaled),
                            computed=partial(legalize_computed_conv2d, self._machine),
                        ),
                        half=partial(
                            legalize_half_conv2d,
                            self._machine,
                            self._compact,
                            _takes_large_tiles(module),
                        ),
                    ),
                    "relax.matmul": _by_weight(
                        single=partial(legalize_product, self._machine, scaled),
                        half=partial(legalize_half_matmul, self._machine),
                    ),
                    "relax.take": default_legalization,
                },
            ),
            ATTENTION: partial(legalize_attention, self._machine),
            "relax.nn.max_pool2d": legalize_max_pool2d,
            "relax.nn.avg_pool2d": legalize_avg_pool2d,
            "relax.image.resize2d": legalize_resize2d,
            "relax.image.grid_sample": legalize_grid_sample,
            "relax.nn.softmax": partial(legalize_softmax, False, self._machine),
            "relax.nn.log_softmax": partial(legalize_softmax, True, self._machine),
            "relax.nn.layer_norm": partial(legalize_layer_norm, True, self._machine),
            "relax.nn.rms_norm": partial(legalize_layer_norm, False, self._machine),
            "relax.nn.group_norm": partial(legalize_group_norm, self._machine),
            "relax.nn.instance_norm": partial(legalize_group_norm, self._machine),
            **{
                f"relax.{kind}": partial(legalize_statistic, kind, self._machine)
                for kind in STATISTICS
            },
            "relax.argmax": partial(legalize_arg_extremum, GREATEST, self._machine),
            "relax.argmin": partial(legalize_arg_extremum, LEAST, self._machine),
            "relax.tile": legalize_tile,
            **ELEMENTARY_RULES,
            "relax.sin": partial(legalize_wave, sin, "sin"),
            "relax.cos": partial(legalize_wave, cos, "cos"),
            "relax.power": legalize_power,
            **integer_rules(self._machine, compact=self._compact),
        }
        transform = relax.transform
        return tvm.transform.Sequential(
            [
                # These are read through by the kernels behind them; what is left comes last.
                transform.LegalizeOps(own, skip_ops=list(READ_THROUGH)),
                transform.DeadCodeElimination(),
                transform.LegalizeOps(
                    {
                        DECODE_WEIGHTS: legalize_decode,
                        "relax.astype": partial(legalize_astype, self._machine),
                    }
                ),
            ]
        )(module)
