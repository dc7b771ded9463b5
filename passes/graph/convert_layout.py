"""Rewrites 2-D convolutions and pooling from NCHW to NHWC, weights from OIHW to OHWI.

Rewrites ``relax.nn.conv2d`` and, through layout inference, what stands between convolutions.
Transposed convolutions stay in NCHW: nothing lowers them in another layout.
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
                transform.ConvertLayout(
                    {
                        "relax.nn.conv2d": ["NHWC", "OHWI"],
                        "relax.nn.conv2d_transpose": ["NCHW", "IOHW"],
                    }
                ),
                transform.Normalize(),
                transform.FoldConstant(),
                transform.CanonicalizeBindings(),
                transform.DeadCodeElimination(),
                KeepResultNames(names),
            ]
        )(module)
