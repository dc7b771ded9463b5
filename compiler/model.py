"""The model in flight: a Relax module with its weights, its signature and where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .signature import Signature

if TYPE_CHECKING:
    import onnx
    import tvm


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model came from.

    Parameters
    ----------
    path : str or None
        File name as given; None for a model that was passed as a proto.
    sha256 : str
        Of the serialized ONNX model, external data included.
    opset : int
        Version of the default ONNX domain.
    weights_bytes : int
        Bytes of the initializers (and folded constant nodes) as the ONNX file stores them.
    """

    path: str | None
    sha256: str
    opset: int
    weights_bytes: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A weight-bearing or otherwise selectable layer.

    Parameters
    ----------
    id : str
        ONNX node name, else ``<OpType>_<first output name>``, made unique.
    op_type : str
        ONNX operator type.
    binding : str
        Name of the Relax binding variable that carries the layer's result.
    """

    id: str
    op_type: str
    binding: str


@dataclass(frozen=True, kw_only=True)
class Model:
    """A trained network as a Relax module.

    Parameters
    ----------
    module : tvm.IRModule
        One Relax function ``main``; weights are constants; parameters in the order of
        ``signature.inputs``; returns one tensor, or a tuple in the order of ``signature.outputs``.
    signature : Signature
        Exact ONNX names, dtypes and static shapes.
    origin : Origin
        Where it came from.
    layers : tuple of Layer
        In graph order, one entry for each ONNX node that computes part of an output; not for those
        that were folded into constants.
    source : onnx.ModelProto or None
        The ONNX model with the shapes of the signature, for the parity check and the
        onnxruntime baseline. None when it is not kept.
    """

    module: tvm.IRModule
    signature: Signature
    origin: Origin
    layers: tuple[Layer, ...]
    source: onnx.ModelProto | None = field(default=None, repr=False, compare=False)

    def with_module(self, module: tvm.IRModule) -> Model:
        """Return this model with another module of the same signature."""
        return replace(self, module=module)
