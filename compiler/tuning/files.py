"""The files of a tuning database, read at once, appended to by one writer.

Three journals: the kernels, their records, and what else is known of them (`hone.database`).
Reading needs no TVM.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from . import journal
from .records import Verdict

WORKLOADS = "database_workload.json"
RECORDS = "database_tuning_record.json"
TASKS = "hone_tasks.json"
LOCK = "lock"
SCRATCH = "session"


def _is_workload(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], int)
        and isinstance(value[1], list)
        and len(value[1]) == 4
    )


class RecordFiles:
    """What the journals of one folder say.

    Parameters
    ----------
    folder : Path
        Need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.warnings: tuple[str, ...] = ()
        self._appenders: dict[str, journal.Appender] | None = None
        self._load()

    def _load(self) -> bool:
        """Read the files; return whether a writer has to repair them first."""
        contents = {name: journal.read(self.folder / name) for name in (WORKLOADS, RECORDS, TASKS)}
        warnings = [text for part in contents.values() for text in part.warnings]
        repair = any(part.torn or None in part.values for part in contents.values())

        self._workloads: list[list[Any]] = [
            value if _is_workload(value) else ["0", None] for value in contents[WORKLOADS].values
        ]
        self._records: list[list[Any]] = []
        self._of: dict[int, list[list[Any]]] = {}
        dangling = 0
        for value in contents[RECORDS].values:
            if value is None:
                continue
            known = _is_record(value) and 0 <= value[0] < len(self._workloads)
            if known and self._workloads[value[0]][1] is not None:
                self._keep(value)
            else:
                dangling += 1
        if dangling:
            repair = True
            path = self.folder / RECORDS
            warnings.append(f"{path}: {dangling} records belong to no known kernel: ignored.")
        self._tasks = [value for value in contents[TASKS].values if isinstance(value, dict)]
        self.warnings = tuple(warnings)

        self._positions: dict[str, int] = {}
        for position, (key, module) in enumerate(self._workloads):
            if module is not None:
                self._positions.setdefault(key, position)
        self._names: dict[str, str] = {}
        self._untuned: dict[str, float] = {}
        self._verdicts: dict[str, dict[str, Verdict]] = {}
        self._lowerings: dict[str, str] = {}
        for task in self._tasks:
            self._note(task)
        return repair

    def _keep(self, line: list[Any]) -> None:
        self._records.append(line)
        self._of.setdefault(line[0], []).append(line[1])

    def _note(self, task: dict[str, Any]) -> None:
        if "point" in task:
            self._lowerings[str(task["point"])] = str(task.get("option"))
            return
        key = str(task.get("workload"))
        self._names.setdefault(key, str(task.get("name")))
        seconds = task.get("untuned_s")
        if isinstance(seconds, (int, float)) and seconds > 0:
            self._untuned[key] = min(seconds, self._untuned.get(key, math.inf))
        if str(task.get("verdict")) in set(Verdict):
            verdict = Verdict(task["verdict"])
            self._verdicts.setdefault(key, {})[str(task.get("record"))] = verdict

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer: take the lock, repair and read again what others wrote.

        Raises
        ------
        UsageError
            If another process is writing; the message says which.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with journal.lock(self.folder / LOCK), ExitStack() as stack:
            if self._load():
                journal.rewrite(self.folder / WORKLOADS, self._workloads)
                journal.rewrite(self.folder / RECORDS, self._records)
                journal.rewrite(self.folder / TASKS, self._tasks)
            self._appenders = {}
            for name in (WORKLOADS, RECORDS, TASKS):
                self._appenders[name] = journal.Appender(self.folder / name)
                stack.callback(self._appenders[name].close)
            try:
                yield
            finally:
                self._appenders = None

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give the writer a folder for temporary files; what a killed writer left there goes.

        Yields
        ------
        Path
            Empty; removed at the end.
        """
        if self._appenders is None:
            raise RuntimeError("only a writer has a scratch folder: use `with database.writing()`")
        folder = self.folder / SCRATCH
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def append(self, name: str, value: Any) -> None:
        """Write one line, which is on the disk when this returns."""
        if self._appenders is None:
            raise RuntimeError("the database is open for reading: use `with database.writing()`")
        self._appenders[name].append(value)
