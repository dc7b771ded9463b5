"""How many bytes of weights a lowered module stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tvm


def weights_bytes(lowered: tvm.IRModule) -> int:
    """Return the bytes of all constants of a lowered module, as the library stores them.

    Packing, the zeros that round a tile up, biases, scales and zero points are included. A
    constant that occurs several times with the same type and content is stored once.

    Parameters
    ----------
    lowered : IRModule
        Legalized, so that weights are packed.
    """
    import tvm
    from tvm import relax

    stored: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def visit(node: object) -> None:
        if isinstance(node, tvm.ir.GenericConst):
            value = node.value.numpy()
            stored[str(value.dtype), value.shape, value.tobytes()] = value.nbytes

    for function in lowered.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return sum(stored.values())
