"""The options of precision that `hone compile` and `hone tune` share."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from hone.quantized import Wanted

_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.option(
        "--precision",
        type=click.Choice(["fp32", "bf16", "fp16", "int8"]),
        default="fp32",
        show_default=True,
        help="Lowest precision of the kernels.",
    ),
    click.option("--calibration", metavar="DATA", help="Samples that int8 takes its ranges from."),
    click.option(
        "--allow-random-calibration",
        is_flag=True,
        help="Take random:N for calibration, which says nothing about real value ranges.",
    ),
    click.option(
        "--observer",
        type=click.Choice(["minmax", "moving_average", "percentile", "entropy", "mse"]),
        help="Chooses the ranges of int8; minmax when absent.",
    ),
    click.option(
        "--percentile",
        type=click.FloatRange(50, 100, min_open=True),
        help="Of the values in the range, with --observer percentile; 99.99 when absent.",
    ),
    click.option(
        "--equalize",
        type=click.Choice(["weights", "activations"]),
        help="Scale channels between layers first, to suit int8.",
    ),
    click.option(
        "--bias-correction", is_flag=True, help="Take int8's mean error out of each layer's bias."
    ),
    click.option(
        "--skip",
        multiple=True,
        metavar="LAYER",
        help="Layer to leave in float32: ID, name:GLOB, re:REGEX, op:TYPE, first, last; ! negates.",
    ),
)


def precision(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a verb; its function passes what they give to `wanted`."""
    return reduce(lambda wrapped, option: option(wrapped), reversed(_OPTIONS), command)


def wanted(
    precision: str,
    *,
    calibration: str | None,
    allow_random_calibration: bool,
    observer: str | None,
    percentile: float | None,
    equalize: str | None,
    bias_correction: bool,
    skip: tuple[str, ...],
) -> Wanted:
    """Return the precision that the options ask for.

    Raises
    ------
    UsageError
        They do not go together.
    """
    from hone.quantized import HALF_STEPS, Wanted
    from hone.steps.options.int8 import Int8Step

    chosen = {
        "--calibration": calibration,
        "--allow-random-calibration": allow_random_calibration,
        "--observer": observer,
        "--percentile": percentile,
        "--equalize": equalize,
        "--bias-correction": bias_correction,
    }
    useless = [name for name, value in chosen.items() if value]
    if useless and precision != "int8":
        raise click.UsageError(f"{useless[0]} is for --precision int8.")
    if skip and precision == "fp32":
        raise click.UsageError("--skip is for --precision int8, bf16 and fp16.")
    if percentile is not None and observer != "percentile":
        raise click.UsageError("--percentile is for --observer percentile.")
    if precision in HALF_STEPS:
        half = HALF_STEPS[precision].model_validate({"kind": precision, "skip": list(skip)})
        return Wanted(precision=precision, half=half)
    int8 = Int8Step.model_validate(
        {
            "kind": "int8",
            "observer": observer or "minmax",
            "percentile": percentile,
            "equalize": equalize,
            "bias_correction": bias_correction,
            "skip": list(skip),
        }
    )
    return Wanted(
        precision=precision,
        calibration=calibration,
        int8=int8 if any((observer, percentile, equalize, bias_correction, skip)) else None,
        allow_random_calibration=allow_random_calibration,
    )
