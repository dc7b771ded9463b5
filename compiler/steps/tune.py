"""Search for better schedules of the model as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hone.model import Model
from hone.tuning.records import Verdict

from .candidate import Candidate, Context
from .options.tune import TuneStep

if TYPE_CHECKING:
    from hone.tune import TuneResult


def propose(model: Model, step: TuneStep, context: Context) -> Candidate | str:
    """Return the same model once the database knows more of its kernels, or why it does not."""
    if context.search is None:
        return "no device"
    result = context.search(model, step)
    if isinstance(result, str):
        return result
    return Candidate(model=model, note=found(result))


def found(result: TuneResult) -> str:
    """Say what a tuning session brought, new records or those that were there before."""
    if result.records:
        text = f"{result.records} new records"
    else:
        covered = sum(kernel.after_ms is not None for kernel in result.kernels)
        text = (
            f"no new record in {result.elapsed_s:.0f} s, "
            f"the database covers {covered} of {len(result.kernels)} kernels"
        )
    confirmed = sum(kernel.verdict is Verdict.CONFIRMED for kernel in result.kernels)
    if confirmed:
        of = len(result.kernels)
        return f"{text}, used for {confirmed} of {of} kernels, which are faster inside the model"
    if any(kernel.verdict is not None for kernel in result.kernels):
        return f"{text}, none makes the model faster"
    return text
