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


class Fp16Step(HalfOptions):
    """Compute convolutions and matrix products from float16, with float32 sums."""

    kind: Literal["fp16"]
