"""What a verb prints: its result on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hone.errors import UsageError

if TYPE_CHECKING:
    from hone.signature import TensorSpec


WIDE = 100
"""Columns of a terminal from which on numbers are not wrapped: texts beside them are."""


def write_json(data: Any) -> None:
    """Print the one JSON document of a ``--json`` run."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def note(message: str) -> None:
    """Print a line for the person at the terminal."""
    click.echo(message, err=True)


def tensor(spec: TensorSpec) -> dict[str, Any]:
    """Return an input or output as JSON data."""
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def size(count: int | None) -> str:
    """Return a number of bytes for people."""
    from hone.report.numbers import size

    return size(count)


def count(value: int) -> str:
    """Return a number with three significant digits and k, M or G; ``-`` for none at all."""
    if not value:
        return "-"
    scaled, unit = float(value), ""
    for larger in ("k", "M", "G", "T"):
        if scaled < 999.5:
            break
        scaled, unit = scaled / 1000, f" {larger}"
    return f"{scaled:.3g}{unit}" if scaled < 99.95 else f"{scaled:.0f}{unit}"


def figure(value: float | None) -> str:
    """Return a number with four significant digits; ``-`` for None."""
    return "-" if value is None else f"{value:.4g}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: str = "") -> None:
    """Print a table: drawn on a terminal, aligned text in a pipe.

    Parameters
    ----------
    columns : sequence of str
        Headings.
    rows : iterable of sequence of str
        Cells; markup in them is not interpreted.
    right : str
        One character per column: ``>`` for numbers, anything else for text.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    # A pipe has no width: cutting or wrapping a cell there would break whatever reads it.
    console = Console(file=sys.stdout, highlight=False, width=None if terminal else 10_000)
    whole = console.width >= WIDE
    drawn = Table(
        box=box.SIMPLE_HEAD if terminal else None,
        pad_edge=False,
        collapse_padding=terminal,
        show_edge=False,
        header_style="bold",
    )
    for column, side in zip(columns, right.ljust(len(columns)), strict=True):
        drawn.add_column(
            Text(column),
            justify="right" if side == ">" else "left",
            no_wrap=not terminal or (whole and side == ">"),
            overflow="fold",
        )
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    with console.capture() as captured:
        console.print(drawn)
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def write_text(path: Path, text: str) -> None:
    """Write a file that the user asked for.

    Raises
    ------
    UsageError
        It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write: {error.strerror}", where=str(path)) from error


def pairs(rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one pair per line, aligned."""
    rows = [(name, str(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        click.echo(f"{name:<{width}}  {value}".rstrip())
