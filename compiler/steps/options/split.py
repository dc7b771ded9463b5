"""What a recipe may say of splitting operators."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .section import StepSection


class SplitStep(StepSection):
    """Split operators into parts whose working set is smaller."""

    selector_key: ClassVar[str | None] = "layers"
    weighted_only: ClassVar[bool] = True

    kind: Literal["split"]
    layers: Annotated[list[str], Field(min_length=1)] = Field(
        description="convolutions and matrix products: ids, name:GLOB, re:REGEX, op:TYPE, first, "
        "last, each with ! before it to negate"
    )
    parts: Annotated[int, Field(ge=2)]
    axis: Literal["channels", "batch"] = "channels"

    @property
    def title(self) -> str:
        """The step's row in the report."""
        layers = ", ".join(self.layers) if len(self.layers) < 3 else f"{len(self.layers)} layers"
        return f"split {layers} into {self.parts} by {self.axis}"
