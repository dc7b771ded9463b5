"""What the tables of a recipe have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A table of the file: frozen, unknown keys are errors, nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StepSection(Section):
    """A ``[[step]]``; every kind of step derives from it."""

    kind: str

    accepts: ClassVar[frozenset[str]] = frozenset({"fp32"})
    """Precisions of the models that the step can work on."""

    selector_key: ClassVar[str | None] = None
    """The key that holds layer selectors, checked before any step runs."""

    weighted_only: ClassVar[bool] = False
    """Whether the selectors' patterns look at convolutions and matrix products only."""

    @property
    def selects(self) -> bool:
        """Whether the selectors name layers; a step may choose them itself."""
        return True

    @property
    def title(self) -> str:
        """The step's row in the report."""
        return self.kind

    @property
    def needs_calibration(self) -> bool:
        """Whether the step cannot work without ``data.calibration``."""
        return False
