"""Rewrites 2-D convolutions and pooling from NCHW to NHWC, weights from OIHW to OHWI.

Rewrites ``relax.nn.conv2d``, ``conv2d_transpose`` of one group (whose weights stay IOHW; nothing
lowers others in NHWC) and, through layout inference, what stands between convolutions.
Runs after batch norm is folded and before quantization or legalization; running it twice is
the same as once. Numerics: exact, except that sums may be taken in another order.
"""

from __future__ import annotations

import tvm
from tvm import relax

from .keep_result_names import KeepResultNames, layer_names


@tvm.transform.module_pass(opt_level=0)
class ToNHWC:
    """Convert the layout of every convolution to NHWC with OHWI weights.

    Layout changes stay only at the borders to operators without a layout rule.
    """

    def transform_module(
        self, module: tvm.IRModule, _context: tvm.transform.PassContext
    ) -> tvm.IRModule:
        """Return the module in NHWC."""
        transform = relax.transform
        names = layer_names(module["main"])
        return tvm.transform.Sequential(
            [
                transform.ConvertLayout({}, _layouts),
                transform.Normalize(),
                transform.FoldConstant(),
                transform.CanonicalizeBindings(),
                transform.DeadCodeElimination(),
                KeepResultNames(names),
            ]
        )(module)


def _layouts(call: relax.Call) -> dict[str, list[str]]:
    """Return the layouts of a convolution's data and weights."""
    if call.op != _TRANSPOSED:
        return {"relax.nn.conv2d": ["NHWC", "OHWI"]}
    plain = int(call.attrs.groups) == 1 and all(int(x) == 1 for x in call.attrs.dilation)
    constant = isinstance(call.args[1], tvm.ir.GenericConst)
    # What cuts off more than its kernel reaches has no form in phases; see `UnifyConvolutions`.
    taps = [int(extent) for extent in call.args[1].ty.shape][2:]
    inside = all(int(p) < k for p, k in zip(call.attrs.padding, [*taps, *taps], strict=True))
    layout = "NHWC" if plain and constant and inside else "NCHW"
    return {str(_TRANSPOSED.name): [layout, "IOHW"]}


_TRANSPOSED = tvm.ir.Op.get("relax.nn.conv2d_transpose")
