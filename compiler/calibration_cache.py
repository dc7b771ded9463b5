"""The calibration cache: what a network's tensors look like on a dataset, kept on disk.

One file for each combination of network, data and options; nothing in it is ever out of date, so it
can be deleted at any time and shared between builds.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

REVISION: Final = 1
"""Raised when the meaning of a stored number changes."""

_NAMES: Final = "names"


class CalibrationCache:
    """A folder of calibration results.

    Parameters
    ----------
    folder : Path
        Created with the first result.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, parts: Mapping[str, object]) -> Path:
        """Return the file of a combination.

        Parameters
        ----------
        parts : mapping of str to JSON value
            Everything that decides the result, such as hashes and options.
        """
        text = json.dumps({"revision": REVISION, **parts}, sort_keys=True)
        return self._folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npz"

    def load(self, parts: Mapping[str, object]) -> dict[str, np.ndarray] | None:
        """Return what was stored for a combination, by name in its order.

        None where there is nothing, and where a file cannot be read as what `save` writes: it is
        then computed and written again.
        """
        try:
            with np.load(self.path(parts), allow_pickle=False) as stored:
                names = json.loads(str(stored[_NAMES]))
                return {name: stored[str(index)] for index, name in enumerate(names)}
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, parts: Mapping[str, object], arrays: Mapping[str, np.ndarray]) -> None:
        """Store a result, whole or not at all.

        Parameters
        ----------
        parts : mapping of str to JSON value
            As for `load`.
        arrays : mapping of str to numpy.ndarray
            Numbers only; the names may be anything.
        """
        path = self.path(parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        members: dict[str, Any] = {_NAMES: np.array(json.dumps(list(arrays)))}
        members |= {str(index): array for index, array in enumerate(arrays.values())}
        with draft.open("wb") as stream:
            np.savez(stream, **members)
        draft.replace(path)


def user_folder() -> Path:
    """Return the user's own folder for it: below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "hone", "calibration")
