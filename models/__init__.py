"""Reference networks, built as ONNX from a seed.

They need onnx and numpy only: ``hone.models.build("resnet18")`` downloads nothing and is the same
model, byte for byte, for the same seed. All but the digits CNN that is committed (trained) under
``hone.models.digits`` have random weights, and are meant for measuring, not for predicting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

from hone.errors import UsageError

if TYPE_CHECKING:
    import onnx

__all__ = ["build", "names"]

# Where each network is built; imported on first use, so that listing the names stays light.
_BUILDERS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "mlp": ("hone.models.mlp", "mlp"),
        "digits-cnn": ("hone.models.digits_cnn", "digits_cnn"),
        "resnet18": ("hone.models.resnet", "resnet18"),
        "resnet50": ("hone.models.resnet", "resnet50"),
        "mobilenetv2": ("hone.models.mobilenet", "mobilenetv2"),
        "bert-mini": ("hone.models.bert", "bert_mini"),
        "vit-tiny": ("hone.models.vit", "vit_tiny"),
        "shufflenetv2": ("hone.models.shufflenet", "shufflenetv2"),
        "convnext-atto": ("hone.models.convnext", "convnext_atto"),
        "unet": ("hone.models.unet", "unet"),
        "efficientnet-b0": ("hone.models.efficientnet", "efficientnet_b0"),
    }
)


def names() -> tuple[str, ...]:
    """Names of the networks that `build` knows, smallest first."""
    return tuple(_BUILDERS)


def build(name: str, seed: int = 0) -> onnx.ModelProto:
    """Build a reference network with random weights.

    Parameters
    ----------
    name : str
        One of `names`.
    seed : int
        Seed of every weight and statistic, at least 0. The same seed gives the same bytes
        (``SerializeToString(deterministic=True)``).

    Returns
    -------
    onnx.ModelProto
        Opset 17, float32, static shapes with batch 1, accepted by the full ONNX checker.

    Raises
    ------
    UsageError
        If the name is unknown, or the seed is negative.
    """
    if name not in _BUILDERS:
        nearest = get_close_matches(name.lower(), _BUILDERS, n=1, cutoff=0.5)
        raise UsageError(
            f"unknown reference model {name!r}; the names are {', '.join(_BUILDERS)}",
            hint=f"did you mean {nearest[0]!r}?" if nearest else None,
        )
    if seed < 0:
        raise UsageError(f"the seed of a reference model must be at least 0, not {seed}")
    module, function = _BUILDERS[name]
    builder = cast("Callable[[int], onnx.ModelProto]", getattr(import_module(module), function))
    return builder(seed)
