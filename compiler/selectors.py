"""Layer selectors: short patterns that name layers of a model, in recipes and options.

``conv1`` is a layer's id, ``name:layer1.*`` all ids that match a glob, ``re:block[0-3]/.*`` all
that a regular expression matches as a whole, ``op:Conv`` all of an ONNX operator type, ``first``
and ``last`` the first and last layer with weights. ``!`` before any of them takes its layers away.
A list of selectors means: all that the plain ones name (every layer, where there are only negated
ones), without all that the negated ones name, wherever those stand in the list. A selector that
names no layer is an error.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Sequence
from typing import Final

from .errors import UsageError
from .model import Layer

WEIGHTED: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""ONNX operator types that ``first`` and ``last`` look for."""

_NEAREST: Final = 3


def select(
    layers: Sequence[Layer],
    selectors: Sequence[str],
    *,
    among: Collection[str] | None = None,
    where: str | None = None,
) -> tuple[Layer, ...]:
    """Return the layers that a list of selectors names, in graph order.

    Parameters
    ----------
    layers : sequence of Layer
        Of the model.
    selectors : sequence of str
        See the module's text; none name no layer.
    among : collection of str, optional
        ONNX operator types that patterns are limited to. A plain id names its layer regardless.
    where : str, optional
        The option that they come from, for errors.

    Returns
    -------
    tuple of Layer

    Raises
    ------
    UsageError
        A selector names no layer (with the nearest names), or is not written as one: all of them.
    """
    added: set[str] = set()
    removed: set[str] = set()
    problems: list[str] = []
    candidates = [layer for layer in layers if among is None or layer.op_type in among]
    for selector in selectors:
        negated = selector.startswith("!")
        try:
            found = _matches(selector.removeprefix("!"), layers, candidates)
        except _NothingError as error:
            problems.append(f"{selector!r} {error}")
            continue
        (removed if negated else added).update(found)
    if problems:
        raise UsageError(
            "cannot select layers: " + "; ".join(problems),
            where=where,
            hint="`hone inspect MODEL` lists the layers",
        )
    if selectors and all(selector.startswith("!") for selector in selectors):
        added = {layer.id for layer in candidates}
    return tuple(layer for layer in layers if layer.id in added - removed)


class _NothingError(Exception):
    """Why a selector names no layer."""


def _matches(text: str, layers: Sequence[Layer], candidates: Sequence[Layer]) -> list[str]:
    """Return the ids that one selector names, without its negation."""
    kind, colon, pattern = text.partition(":")
    if text in ("first", "last"):
        weighted = [layer.id for layer in candidates if layer.op_type in WEIGHTED]
        if not weighted:
            raise _NothingError(f"needs a layer of {', '.join(sorted(WEIGHTED))}; there is none")
        return [weighted[0 if text == "first" else -1]]
    ids = [layer.id for layer in candidates]
    if colon and kind == "name":
        found = [name for name in ids if fnmatch.fnmatchcase(name, pattern)]
        return found or _nothing("matches no layer", _literal(pattern, "*?["), ids)
    if colon and kind == "re":
        try:
            expression = re.compile(pattern)
        except re.error as error:
            raise _NothingError(f"is no regular expression: {error}") from error
        found = [name for name in ids if expression.fullmatch(name)]
        return found or _nothing("matches no layer", _literal(pattern, r".*+?[](){}|\^$"), ids)
    if colon and kind == "op":
        types = [layer.op_type for layer in candidates]
        found = [layer.id for layer in candidates if layer.op_type == pattern]
        return found or _nothing("is the type of no layer", pattern, types)
    if any(layer.id == text for layer in layers):
        return [text]
    return _nothing("is no layer", text, [layer.id for layer in layers])


def _nothing(reason: str, text: str, names: Sequence[str]) -> list[str]:
    """Raise with the names nearest to a text: by spelling, else by a shared beginning."""
    known = list(dict.fromkeys(names))
    lowered = {name.lower(): name for name in reversed(known)}
    near = [lowered[n] for n in difflib.get_close_matches(text.lower(), lowered, n=_NEAREST)]
    if not near and text:
        near = [name for name in known if name.startswith(text[:_NEAREST])][:_NEAREST]
    raise _NothingError(f"{reason}, the nearest: {', '.join(near)}" if near else reason)


def _literal(pattern: str, special: str) -> str:
    """Return a pattern without its special characters, to compare names with."""
    return "".join(c for c in pattern if c not in special)
