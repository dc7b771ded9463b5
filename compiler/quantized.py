"""The precision that `hone.compile` and `hone.tune` are asked for, and the model in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from hone.passes.quantize.match_qdq import is_qdq

from .calibration_cache import user_folder
from .data import Dataset
from .data import load as load_data
from .errors import UsageError
from .kernel_table import rebound
from .model import Model
from .progress import Progress
from .steps import half as half_step
from .steps import int8 as int8_step
from .steps.candidate import Context
from .steps.options.half import Bf16Step, Fp16Step, HalfOptions
from .steps.options.int8 import Int8Step

if TYPE_CHECKING:
    from hone.targets.target import Target

HALF_STEPS: Final[Mapping[str, type[HalfOptions]]] = {"bf16": Bf16Step, "fp16": Fp16Step}
AVAILABLE = ("fp32", *HALF_STEPS, "int8")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A precision and how to get there.

    Parameters
    ----------
    precision : {"fp32", "bf16", "fp16", "int8"}
        Lowest precision of the kernels.
    calibration : str or Dataset, optional
        Samples for ``int8``, in the data syntax.
    int8 : Int8Step, optional
        How ``int8`` calibrates and quantizes, as in a recipe; its defaults when absent.
    half : Bf16Step or Fp16Step, optional
        Which layers ``bf16`` or ``fp16`` leaves in float32, as in a recipe; none when absent.
    allow_random_calibration : bool
        Whether ``random:N`` calibrates, which says nothing about real value ranges.
    """

    precision: str = "fp32"
    calibration: str | Dataset | None = None
    int8: Int8Step | None = None
    half: HalfOptions | None = None
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
        if self.half is not None and self.half.kind != self.precision:
            kind = self.half.kind
            raise UsageError(f"options of {kind} need precision {kind}", hint=f"precision={kind!r}")
        if is_qdq(model.module) and self.precision in HALF_STEPS:
            raise UsageError(
                f"the model is quantized already and keeps its own levels, not {self.precision}",
                where=model.origin.path,
                hint="leave the precision away, or give the fp32 model",
            )
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
        if self.precision == "fp32" or is_qdq(model.module):
            return model, self.precision
        needs_samples = self.precision not in HALF_STEPS
        context = Context(
            target=target,
            threads=threads,
            teacher=model,
            calibration=self._samples(model) if needs_samples else None,
            allow_random=self.allow_random_calibration,
            cache=user_folder(),
            progress=progress,
        )
        if needs_samples:
            candidate = int8_step.propose(model, self.int8 or Int8Step(kind="int8"), context)
        else:
            step = self.half or HALF_STEPS[self.precision].model_validate({"kind": self.precision})
            candidate = half_step.propose(model, step, context)
        candidate = replace(candidate, model=rebound(model, candidate.model, candidate.merged))
        progress.log(f"{self.precision}: {candidate.note}")
        for layer, reason in candidate.skipped:
            progress.log(f"{self.precision}: {layer} stays in float: {reason}")
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
