"""Keeps each level tensor in the layouts that its readers want, converted once and lazily.

hone's integer convolutions work on NHWC, the module around them is NCHW; what lies between two of
them stays in NHWC. Numerics: exact, bytes are moved only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tvm import relax

from hone.passes.graph.dataflow import PART, Rebuilder, shape_of

from .levels import Levels
from .qdq_reader import SHIFT


class Layout(StrEnum):
    """Where the channels of a tensor of four axes are; another tensor is always as the model's."""

    MODEL = "model"
    NHWC = "nhwc"


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelTensor:
    """uint8 levels in the rewritten function.

    Parameters
    ----------
    var : relax.Var
        The tensor.
    layout : Layout
        Of its axes.
    levels : Levels
        What they mean.
    """

    var: relax.Var
    layout: Layout
    levels: Levels


class LevelLayouts:
    """Converts level tensors between layouts and to the model's own type, each once.

    Parameters
    ----------
    rebuilder : Rebuilder
        Where conversions are written.
    """

    def __init__(self, rebuilder: Rebuilder) -> None:
        self._rebuilder = rebuilder
        self._converted: dict[tuple[relax.Var, str], relax.Var] = {}

    def as_layout(self, tensor: LevelTensor, layout: Layout) -> relax.Var:
        """Return the levels in a layout."""
        if tensor.layout is layout or len(shape_of(tensor.var)) != 4:
            return tensor.var
        key = (tensor.var, str(layout))
        if key not in self._converted:
            name = _part(tensor.var, "layout")
            self._converted[key] = self._rebuilder.emit(change_layout(tensor.var, layout), name)
        return self._converted[key]

    def as_stored(self, tensor: LevelTensor, dtype: str) -> relax.Var:
        """Return the levels in the model's layout and type."""
        var = self.as_layout(tensor, Layout.MODEL)
        if dtype == "uint8":
            return var
        key = (tensor.var, dtype)
        if key not in self._converted:
            self._converted[key] = self._shifted(var, -SHIFT, dtype)
        return self._converted[key]

    def unsigned(self, var: relax.Var) -> relax.Var:
        """Return unsigned levels of a tensor that no quantization of the module made."""
        if str(var.ty.dtype) == "uint8":
            return var
        key = (var, "uint8")
        if key not in self._converted:
            self._converted[key] = self._shifted(var, SHIFT, "uint8")
        return self._converted[key]

    def _shifted(self, var: relax.Var, by: int, dtype: str) -> relax.Var:
        name = _part(var, "levels")
        wide = self._rebuilder.emit(relax.op.astype(var, "int32"), name)
        moved = self._rebuilder.emit(relax.op.add(wide, relax.const(by, "int32")), name)
        return self._rebuilder.emit(relax.op.astype(moved, dtype), name)


def change_layout(var: relax.Var, layout: Layout) -> relax.Call:
    """Return a tensor of four axes in a layout, whose layout is the other one."""
    order = (0, 2, 3, 1) if layout is Layout.NHWC else (0, 3, 1, 2)
    shape = shape_of(var)
    moved = [axis for axis in order if shape[axis] != 1]
    if moved == sorted(moved):  # no byte moves
        return relax.op.reshape(var, tuple(shape[axis] for axis in order))
    return relax.op.permute_dims(var, order)


def _part(var: relax.Var, what: str) -> str:
    return f"{str(var.name).partition(PART)[0]}{PART}{what}"
