"""What a recipe may say of splitting operators."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from .section import StepSection

AUTOMATIC = "auto"


class SplitStep(StepSection):
    """Split operators into parts whose working set is smaller."""

    selector_key: ClassVar[str | None] = "layers"
    weighted_only: ClassVar[bool] = True

    kind: Literal["split"]
    layers: Annotated[list[str], Field(min_length=1)] = Field(
        description="convolutions and matrix products: ids, name:GLOB, re:REGEX, op:TYPE, first, "
        'last, each with ! before it to negate; or ["auto"]: with axis = "patches" those whose '
        "split needs the least memory, else those that leave threads idle and are faster in parts"
    )
    parts: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description='required, unless layers = ["auto"] chooses it'
    )
    axis: Literal["channels", "batch", "patches"] = Field(
        default="channels",
        description="patches computes a part of the network around the layers in bands of rows, "
        "one after the other, so that its large images never exist as a whole",
    )

    @property
    def automatic(self) -> bool:
        """Whether the step chooses the layers."""
        return self.layers == [AUTOMATIC]

    @property
    def selects(self) -> bool:
        """Whether the selectors name layers."""
        return not self.automatic

    @model_validator(mode="after")
    def _can_choose(self) -> SplitStep:
        if not self.automatic and self.parts is None:
            raise ValueError('parts is required, unless layers = ["auto"] chooses it')
        return self

    @property
    def title(self) -> str:
        """The step's row in the report."""
        layers = ", ".join(self.layers) if len(self.layers) < 3 else f"{len(self.layers)} layers"
        if self.automatic:
            layers = "the first layers" if self.axis == "patches" else "layers with idle threads"
        into = "" if self.parts is None else f" into {self.parts}"
        return f"split {layers}{into} by {self.axis}"
