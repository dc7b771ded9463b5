"""What is wrong with a recipe, in the words of the file instead of pydantic's."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

Keys = Mapping[tuple[str, ...], Sequence[str]]

NEAR = 0.5
"""Similarity from which on a name is offered as the one that was meant (difflib's ratio)."""


def explain(error: ValidationError, *, keys: Keys, kinds: Sequence[str]) -> list[str]:
    """Return one line for each problem.

    Parameters
    ----------
    error : pydantic.ValidationError
        All problems of one file.
    keys : mapping
        Known keys of each table, by its place without list positions: ``("step", "prune")``.
    kinds : sequence of str
        Values of ``kind`` that tell the steps apart.
    """
    return [_line(detail, keys, kinds) for detail in error.errors(include_url=False)]


def _line(detail: ErrorDetails, keys: Keys, kinds: Sequence[str]) -> str:
    loc, problem, given = detail["loc"], detail["type"], detail["input"]
    where = _dotted(loc, kinds)
    if problem == "extra_forbidden":
        known = keys[tuple(part for part in loc[:-1] if isinstance(part, str))]
        near = _nearest(str(loc[-1]), known)
        return f"{where}: unknown key" + (near or f", known are {', '.join(known)}")
    if problem == "missing":
        return f"{where}: required, but not given"
    if problem == "union_tag_not_found":
        return f"{where}.kind: required is one of {_list(kinds)}, but not given"
    if problem == "union_tag_invalid":
        tag = detail["ctx"]["tag"]
        near = _nearest(str(tag), kinds)
        return f"{where}.kind: required is one of {_list(kinds)}, given is {tag!r}{near}"
    if problem == "value_error":
        reason = str(detail["ctx"]["error"])
        return f"{where}: {reason}" if where else reason
    if problem in {"model_type", "model_attributes_type", "dict_type"}:
        return f"{where}: required is a table, given is {given!r}"
    required = detail["msg"].removeprefix("Input should be ")
    return f"{where}: required is {required}, given is {given!r}"


def _nearest(given: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1, cutoff=NEAR)
    return f", the nearest is {near[0]!r}" if near else ""


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _dotted(loc: Sequence[int | str], kinds: Sequence[str]) -> str:
    """Write pydantic's location as the file's reader would: ``step[1].amount``."""
    text = ""
    for before, part in zip((None, *loc), loc, strict=False):
        if isinstance(part, int):
            text += f"[{part}]"
        elif not (isinstance(before, int) and text.startswith("step[") and part in kinds):
            text += f".{part}" if text else part
    return text
