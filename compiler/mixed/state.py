"""What a mixed precision search has found out so far, on disk, so that it can be resumed.

One JSON file for each combination of network, data and options, with every question that was
answered; written whole or not at all after each answer. A search is a function of the answers: run
again, it asks the same questions in the same order and goes on where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

SCHEMA: Final = "hone.mixed/1"
"""Raised when the meaning of an answer changes."""


class State:
    """The answers of one search.

    Parameters
    ----------
    folder : Path or None
        Created with the first answer; None keeps the answers in memory only.
    key : mapping of str to JSON value
        Everything that decides the answers, such as hashes and options.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, Any]) -> None:
        self._key = json.loads(json.dumps({"schema": SCHEMA, **key}))
        text = json.dumps(self._key, sort_keys=True)
        self._path = folder and folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        self._answers: dict[str, dict[str, Any]] = self._read()
        self.resumed = len(self._answers)

    @property
    def path(self) -> Path | None:
        """The file; it may not exist yet."""
        return self._path

    def recall(self, question: list[Any]) -> Any:
        """Return the answer to a question; None where it was not answered."""
        entry = self._answers.get(_text(question))
        return None if entry is None else entry["answer"]

    def seconds(self, kind: str) -> list[float]:
        """Return what each answered question of a kind took to answer, oldest first."""
        entries = self._answers.values()
        return [entry["seconds"] for entry in entries if entry["question"][0] == kind]

    def keep(self, question: list[Any], answer: Any, *, seconds: float) -> None:
        """Store an answer.

        Parameters
        ----------
        question : list
            Its kind, then JSON values.
        answer : JSON value
            Not None.
        seconds : float
            What it took.
        """
        entry = {"question": question, "answer": answer, "seconds": round(seconds, 3)}
        self._answers[_text(question)] = entry
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        document = {**self._key, "answers": list(self._answers.values())}
        draft.write_text(json.dumps(document) + "\n", encoding="utf-8")
        draft.replace(self._path)

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the answers on disk; none where a file is not what `keep` writes.

        They are then found out again.
        """
        if self._path is None:
            return {}
        try:
            document = json.loads(self._path.read_text(encoding="utf-8"))
            entries = document.pop("answers")
            if document != self._key:
                return {}
            return {
                _text(entry["question"]): {
                    "question": list(entry["question"]),
                    "answer": entry["answer"],
                    "seconds": float(entry["seconds"]),
                }
                for entry in entries
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def _text(question: list[Any]) -> str:
    return json.dumps(question, sort_keys=True)
