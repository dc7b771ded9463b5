"""What a recipe may say of pruning."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .recover import Recover
from .section import Count, StepSection


class PruneStep(StepSection):
    """Remove whole channels."""

    kind: Literal["prune"]
    amount: Annotated[float, Field(gt=0, lt=1)] = Field(description="fraction of the channels")
    norm: Literal["l1", "l2"] = "l1"
    scope: Literal["local", "global"] = Field(
        default="local", description="rank channels within each layer, or over the whole network"
    )
    round_to: Count = Field(default=1, description="channels kept are a multiple of this")
    recover: Recover | None = None

    @property
    def title(self) -> str:
        """The step's row in the report."""
        return f"prune {100 * self.amount:g}% of channels" + (" + recover" if self.recover else "")

    @property
    def needs_calibration(self) -> bool:
        """Recovery trains on calibration data."""
        return self.recover is not None
