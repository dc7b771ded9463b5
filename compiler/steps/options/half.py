"""What a recipe may say of 16-bit floats."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from .section import StepSection


class HalfOptions(StepSection):
    """Which layers a step that computes from 16-bit floats leaves alone."""

    accepts: ClassVar[frozenset[str]] = frozenset({"fp32", "int8"})
    selector_key: ClassVar[str | None] = "skip"

    skip: list[str] = Field(
        default=[],
        description="layers that stay in float32: ids, name:GLOB, re:REGEX, op:TYPE, first, last, "
        "each with ! before it to negate",
    )


class Bf16Step(HalfOptions):
    """Compute convolutions and matrix products from bfloat16, with float32 sums."""

    kind: Literal["bf16"]
    winograd: Literal["2x2", "4x4"] = Field(
        default="2x2",
        description="largest output tile of Winograd's form of 3x3 layers where the processor "
        "multiplies bfloat16: 4x4 takes fewer products, and rounding costs more accuracy; "
        "elsewhere products are of float32 and take either",
    )


class Fp16Step(HalfOptions):
    """Compute convolutions and matrix products from float16, with float32 sums."""

    kind: Literal["fp16"]
