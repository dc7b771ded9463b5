"""Whether a network in 16-bit floats computes what onnxruntime computes in float32, but rounded."""

from __future__ import annotations

from typing import Final

import numpy as np

from .deviation import TOLERANCE, relative_error
from .errors import AccuracyError
from .model import Model
from .parity import OutputError, ParityReport, Run, Status, random_inputs
from .reference import NotCheckedError, reference

DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16"}


def check_half(
    model: Model, run: Run, *, precision: str, seed: int = 0, samples: int = 2, threads: int = 2
) -> ParityReport:
    """Compare a network whose layers compute in 16-bit floats with onnxruntime.

    Only float outputs are compared: an index such as that of a maximum may be another one.

    Parameters
    ----------
    model : Model
        As it was imported, in float32.
    run : callable
        Runs what was compiled.
    precision : {"bf16", "fp16"}
        Decides the tolerance, see `hone.deviation.TOLERANCE`.
    seed, samples, threads
        As for `hone.parity.check`.

    Raises
    ------
    AccuracyError
        An output is further off than rounding explains.
    """
    limit = TOLERANCE[DTYPES[precision]]
    floats = [s.name for s in model.signature.outputs if np.dtype(s.dtype).kind == "f"]
    worst = dict.fromkeys(floats, 0.0)
    try:
        session = reference(model, threads=threads)
        for number in range(seed, seed + samples):
            inputs = random_inputs(model, number)
            expected, given = session.run(inputs), run(dict(inputs))
            for name in floats:
                error = relative_error(given[name], expected[name])
                worst[name] = error if error > worst[name] or np.isnan(error) else worst[name]
    except NotCheckedError as error:
        return ParityReport(
            status=Status.NOT_CHECKED, outputs=(), reason=str(error), seed=seed, samples=0
        )
    outputs = tuple(
        OutputError(name=name, relative_error=error, tolerance=limit)
        for name, error in worst.items()
    )
    failed = [output for output in outputs if not output.ok]
    if failed:
        raise AccuracyError(
            f"the model computed in {precision} is further off than rounding explains: "
            + "; ".join(
                f"output {output.name!r} has relative error {output.relative_error:.1e}, "
                f"{output.tolerance:.0e} is allowed"
                for output in failed
            ),
            where=model.origin.path,
            hint="--precision fp32, or a recipe whose step skips the layers that need float32",
        )
    if not outputs:
        return ParityReport(
            status=Status.NOT_CHECKED,
            outputs=(),
            reason="no output is a float",
            seed=seed,
            samples=0,
        )
    return ParityReport(status=Status.EQUAL, outputs=outputs, reason="", seed=seed, samples=samples)
