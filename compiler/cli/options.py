"""Options and their types that several verbs share."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from hone.errors import UsageError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_ZIP_MAGIC = b"PK\x03\x04"
_NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"


def duration(text: str) -> float:
    """Return the seconds of a time such as ``90``, ``60s``, ``10m`` or ``1.5h``."""
    match = re.fullmatch(_NUMBER + r"\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS or float(match[1]) == 0:
        raise click.BadParameter(f"required is a time such as 60s, 10m or 1h, given is {text!r}")
    return float(match[1]) * _UNITS[match[2]]


def percentage(text: str) -> float:
    """Return the fraction of a share such as ``3%`` or ``0.03``."""
    match = re.fullmatch(_NUMBER + r"\s*(%?)", text.strip())
    if match is None:
        raise click.BadParameter(f"required is a share such as 3% or 0.03, given is {text!r}")
    return float(match[1]) / (100 if match[2] else 1)


def names(*choices: str) -> Callable[[str], tuple[str, ...]]:
    """Return a type that reads names with commas between them, each once, in their order."""

    def names(text: str) -> tuple[str, ...]:
        given = [name for name in text.replace(" ", "").split(",") if name]
        for name in given:
            if name not in choices:
                known = ", ".join(choices)
                raise click.BadParameter(f"required are names of {known}, given is {name!r}")
        return tuple(dict.fromkeys(given))

    return names


def default_threads() -> int:
    """Return 2, or the cores that this process may use where there are fewer."""
    return min(2, len(os.sched_getaffinity(0)))


def is_package(file: Path) -> bool:
    """Say whether a file is a package, by its content and else by its name."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC or file.suffix == ".hone"
    except OSError:
        return file.suffix == ".hone"


def read_shapes(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each input that a ``--shape`` names.

    Raises
    ------
    UsageError
        One is not written as a shape, or an input has two of them.
    """
    from hone.importer import parse_shape

    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in map(parse_shape, given):
        if shapes.setdefault(name, shape) != shape:
            raise UsageError(
                f"input {name!r} is given two shapes, {list(shapes[name])} and {list(shape)}",
                where="--shape",
            )
    return shapes


def writable(to: Path, *read: Path) -> None:
    """Check, before any work, that a result can be written where the user wants it.

    Parameters
    ----------
    to : Path
        The file to write.
    read : Path
        Files that the verb reads; the result must not take the place of one.

    Raises
    ------
    UsageError
        It cannot be written there, or the verb reads that very file.
    """
    if to.is_dir():
        raise UsageError("this is a folder, required is the name of a file", where=f"-o {to}")
    if not to.absolute().parent.is_dir():
        raise UsageError(f"the folder {to.absolute().parent} does not exist", where=f"-o {to}")
    if any(file.exists() and to.exists() and file.samefile(to) for file in read):
        raise UsageError("the result would take the place of what is read", where=f"-o {to}")
    try:
        if to.is_file():
            to.open("ab").close()
        elif not to.exists():
            tempfile.TemporaryFile(dir=to.absolute().parent).close()
    except OSError as error:
        raise UsageError(f"cannot write: {error.strerror}", where=f"-o {to}") from error


MOST_THREADS = 1024
"""More than any processor that hone knows has; a slip of the finger must not start a million."""

DATABASE = Path(".hone", "tuning")
"""Where tuning records go when nothing else is said."""

PATH = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

shape = click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME:[D,D,...]",
    help="Static shape of an input; repeat for several inputs.",
)

target = click.option(
    "--target",
    default="host",
    metavar="NAME",
    show_default=True,
    help="As `hone target list` prints it.",
)

THREADS = click.IntRange(min=1, max=MOST_THREADS)

threads = click.option(
    "--threads",
    type=THREADS,
    default=default_threads,
    metavar="N",
    show_default="2, or the cores there are",
    help="Threads of one run.",
)

database = click.option(
    "--database",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help=f"Folder of tuning records; default for tuning: {DATABASE}.",
)

goal = click.option(
    "--goal",
    type=click.Choice(["latency", "size"]),
    default="latency",
    show_default=True,
    help="What matters where a kernel has the choice: size keeps weights small.",
)
