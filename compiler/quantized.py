"""The precision that `hone.compile` and `hone.tune` are asked for, and the model in it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hone.passes.quantize.match_qdq import is_qdq

from .calibration_cache import user_folder
from .data import Dataset
from .data import load as load_data
from .errors import UsageError
from .kernel_table import rebound
from .model import Model
from .progress import Progress
from .steps import int8 as int8_step
from .steps.candidate import Context
from .steps.options.int8 import Int8Step

if TYPE_CHECKING:
    from hone.targets.target import Target

AVAILABLE = ("fp32", "int8")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A precision and how to get there.

    Parameters
    ----------
    precision : {"fp32", "int8"}
        Lowest precision of the kernels.
    calibration : str or Dataset, optional
        Samples for ``int8``, in the data syntax.
    int8 : Int8Step, optional
        How ``int8`` calibrates and quantizes, as in a recipe; its defaults when absent.
    allow_random_calibration : bool
        Whether ``random:N`` calibrates, which says nothing about real value ranges.
    """

    precision: str = "fp32"
    calibration: str | Dataset | None = None
    int8: Int8Step | None = None
    allow_random_calibration: bool = False

    def check(self, model: Model) -> None:
        """Refuse what does not go together, before any work.

        Raises
        ------
        UsageError
            The precision does not exist, or an option has no effect.
        """
        if self.precision not in AVAILABLE:
            raise UsageError(
                f"precision {self.precision!r} is not available in this version",
                hint=f"one of {', '.join(AVAILABLE)}",
            )
        if self.precision != "int8" and (self.int8 is not None or self.allow_random_calibration):
            raise UsageError("options of int8 need precision int8", hint="precision='int8'")
        if is_qdq(model.module) and (self.calibration is not None or self.int8 is not None):
            raise UsageError(
                "the model is quantized already and keeps its own levels, so that nothing is left "
                "to calibrate or to choose",
                where=model.origin.path,
                hint="leave the calibration data and the options of int8 away, or give the fp32 "
                "model",
            )

    def apply(
        self, model: Model, target: Target, *, threads: int, progress: Progress
    ) -> tuple[Model, str]:
        """Return the model in this precision, and the lowest precision that it really has.

        Parameters
        ----------
        model : Model
            As loaded; one that is quantized already comes back as it is.
        target : Target
            What it is compiled for.
        threads : int
            Of calibration.
        progress : Progress
            Is told what became of the layers.

        Raises
        ------
        UsageError
            ``int8`` without calibration data.
        """
        if self.precision != "int8" or is_qdq(model.module):
            return model, self.precision
        context = Context(
            target=target,
            threads=threads,
            teacher=model,
            calibration=self._samples(model),
            allow_random=self.allow_random_calibration,
            cache=user_folder(),
            progress=progress,
        )
        candidate = int8_step.propose(model, self.int8 or Int8Step(kind="int8"), context)
        candidate = replace(candidate, model=rebound(model, candidate.model, candidate.merged))
        progress.log(f"int8: {candidate.note}")
        for layer, reason in candidate.skipped:
            progress.log(f"int8: {layer} stays in float: {reason}")
        return candidate.model, candidate.precision or "fp32"

    def _samples(self, model: Model) -> Dataset:
        if self.calibration is None:
            raise UsageError(
                "int8 needs calibration data: a few hundred samples of what the model will see",
                hint="--calibration DATA, such as calibration.npz",
            )
        if isinstance(self.calibration, str):
            return load_data(
                self.calibration, model.signature, allow_random=self.allow_random_calibration
            )
        return self.calibration
