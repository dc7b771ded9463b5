"""The tuning database: MetaSchedule records, a folder per target, threads and TVM version.

The files are those of ``meta_schedule.database.JSONDatabase``, so that TVM's own tools read them;
its lookup ignores the target, hence the folders. A third file says what each kernel took without
a record, and what became of records inside a running model, so that a record that is no better is
not used. Opening and counting need no TVM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tuning import journal
from .tuning.files import RECORDS, TASKS, WORKLOADS, RecordFiles
from .tuning.records import (
    Applied,
    Entry,
    HitRate,
    Match,
    Verdict,
    choose,
    folder_of,
    kernels,
    seconds_of,
    trace_key,
    workload_module,
)

if TYPE_CHECKING:
    import tvm
    from tvm import tirx
    from tvm.s_tir import meta_schedule

    from hone.targets.target import Target


class Database(RecordFiles):
    """Records of one target, thread count and TVM version.

    Any number of processes may read while one writes. Opening drops what a crash left half
    written; `warnings` says so.

    Parameters
    ----------
    root : Path
        The whole database; need not exist.
    target : Target
        What the records are for.
    threads : int
        Threads that the kernels are measured with.
    """

    def __init__(self, root: Path, target: Target, *, threads: int) -> None:
        super().__init__(folder_of(root, target, threads=threads))
        self.root = root
        self.target = target
        self.threads = threads

    def of_threads(self, threads: int) -> Database:
        """Return the records of another thread count; the very same database for its own."""
        if threads == self.threads:
            return self
        return Database(self.root, self.target, threads=threads)

    def add_record(self, workload: list[Any], record: list[Any]) -> None:
        """Append one record; it is on the disk when this returns.

        Parameters
        ----------
        workload : list
            JSON of the ``Workload``: hash and module.
        record : list
            JSON of the ``TuningRecord``.

        Raises
        ------
        ToolchainError
            If the disk is full or fails.
        """
        key = workload[0]
        if key not in self._positions:
            self.append(WORKLOADS, workload)
            self._positions[key] = len(self._workloads)
            self._workloads.append(workload)
        line = [self._positions[key], record]
        self.append(RECORDS, line)
        self._keep(line)

    def add_task(self, workload: str, *, name: str, untuned_s: float | None) -> None:
        """Note a kernel's name, and its seconds without a record.

        Parameters
        ----------
        workload : str
            Its hash.
        name : str
            What the model calls it.
        untuned_s : float or None
            None when it could not be measured.
        """
        task = {"workload": workload, "name": name, "untuned_s": untuned_s}
        self.append(TASKS, task)
        self._tasks.append(task)
        self._note(task)

    def add_verdict(
        self,
        workload: str,
        *,
        name: str,
        record: str,
        verdict: Verdict,
        model_s: float,
        model_untuned_s: float,
    ) -> None:
        """Note what became of a record inside a running model; the last verdict counts.

        Parameters
        ----------
        workload : str
            Hash of the kernel.
        name : str
            What the model calls it.
        record : str
            `trace_key` of the record.
        verdict : Verdict
            Whether it is to be used.
        model_s, model_untuned_s : float
            Seconds of all its calls in one run of the model, with and without the record.
        """
        line = {
            "workload": workload,
            "name": name,
            "record": record,
            "verdict": str(verdict),
            "model_s": model_s,
            "model_untuned_s": model_untuned_s,
        }
        self.append(TASKS, line)
        self._tasks.append(line)
        self._note(line)

    def add_lowering(self, point: str, option: str, *, tried: Sequence[str]) -> None:
        """Note how layers are to be lowered at one point; the last note counts.

        Parameters
        ----------
        point : str
            As `hone.targets.schedule.machine.Machine.pick` names it.
        option : str
            The best option; empty for the model's own choice.
        tried : sequence of str
            The options that it was compared with inside a model.
        """
        line = {"point": point, "option": option, "tried": list(tried)}
        self.append(TASKS, line)
        self._tasks.append(line)
        self._note(line)

    def lowerings(self) -> dict[str, str]:
        """Return the best option of each point where it is not the model's own choice."""
        return {point: option for point, option in self._lowerings.items() if option}

    def tried_lowerings(self) -> dict[str, set[str]]:
        """Return the options of each point that were tried inside a model."""
        tried: dict[str, set[str]] = {}
        for task in self._tasks:
            if "point" in task:
                tried.setdefault(str(task["point"]), set()).update(task.get("tried", ()))
        return tried

    def verdicts(self, workload: str) -> dict[str, Verdict]:
        """Return the verdicts on a kernel's records, by `hone.tuning.records.trace_key`.

        Parameters
        ----------
        workload : str
            Its hash.
        """
        return dict(self._verdicts.get(workload, {}))

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    def records(self, workload: str) -> list[list[Any]]:
        """Return the valid records of a kernel, best first, as JSON.

        Parameters
        ----------
        workload : str
            Its hash.
        """
        position = self._positions.get(workload, -1)
        timed = [
            (seconds, journal.dumps(record), record)
            for record in self._of.get(position, ())
            if (seconds := seconds_of(record)) is not None
        ]
        # Equal times are ordered by content: a merged database gives the same package.
        return [record for _, _, record in sorted(timed, key=lambda row: row[:2])]

    def untuned_s(self, workload: str) -> float | None:
        """Return the seconds that a kernel took without a record, if that was measured."""
        return self._untuned.get(workload)

    def show(self) -> tuple[Entry, ...]:
        """Return what is known about each kernel, the slowest first."""
        entries = []
        for key in dict.fromkeys([*self._positions, *self._untuned]):
            records = self.records(key)
            best = seconds_of(records[0]) if records else None
            untuned = self._untuned.get(key)
            entries.append(
                Entry(
                    workload=key,
                    name=self._names.get(key, "?"),
                    records=len(records),
                    best_ms=None if best is None else best * 1e3,
                    untuned_ms=None if untuned is None else untuned * 1e3,
                    verdict=self._verdicts.get(key, {}).get(trace_key(records[0]))
                    if records
                    else None,
                )
            )
        return tuple(sorted(entries, key=lambda e: -(e.best_ms or e.untuned_ms or 0.0)))

    def stats(self) -> dict[str, Any]:
        """Return counts, size and identity as JSON-able data."""
        files = [self.folder / name for name in (WORKLOADS, RECORDS, TASKS)]
        return {
            "folder": str(self.folder),
            "target": self.target.name,
            "threads": self.threads,
            "tvm": version("apache-tvm"),
            "kernels": len(self._positions),
            "records": len(self._records),
            "bytes": sum(path.stat().st_size for path in files if path.exists()),
            "fingerprint": self.fingerprint(),
            "warnings": list(self.warnings),
        }

    def fingerprint(self) -> str:
        """Return a SHA-256 of everything that a compilation may read from the database.

        Returns
        -------
        str
            Independent of the order in which the records were written.
        """
        lines = {
            journal.dumps([self._workloads[owner][0], record]) for owner, record in self._records
        }
        lines |= {journal.dumps([key, seconds]) for key, seconds in self._untuned.items()}
        lines |= {
            journal.dumps([key, record, str(verdict)])
            for key, verdicts in self._verdicts.items()
            for record, verdict in verdicts.items()
        }
        lines |= {journal.dumps([point, option]) for point, option in self.lowerings().items()}
        if self.threads > 1 and (alone := self.of_threads(1)).folder.exists():
            lines.add(alone.fingerprint().encode())  # read where threads take slices of a batch
        return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()

    def as_tvm(self) -> meta_schedule.database.Database:
        """Return a copy in memory, as TVM's own passes read it.

        Returns
        -------
        meta_schedule.database.Database
            For ``relax.transform.MetaScheduleApplyDatabase`` and ``query_tuning_record``; what is
            committed to it is not written to the files.
        """
        from tvm.s_tir import meta_schedule as ms

        from .tuning.replay import ReplayError, parse

        database = ms.database.MemoryDatabase()
        broken = 0
        workloads: dict[int, Any] = {}
        for owner, record in self._records:
            if owner not in workloads:
                stored = ms.database.Workload.from_json(self._workloads[owner])
                workloads[owner] = database.commit_workload(stored.mod)
            try:
                database.commit_tuning_record(parse(record, workloads[owner]))
            except ReplayError:
                broken += 1
        if broken:
            self.warnings += (f"{self.folder}: {broken} records do not apply any more: left out.",)
        return database

    def lookup(self, func: tirx.PrimFunc) -> Match | None:
        """Return the record that a kernel is compiled with, else its fastest one.

        Parameters
        ----------
        func : PrimFunc
            Unscheduled; its attributes and names do not matter.

        Returns
        -------
        Match or None
            None when there is no record.
        """
        from tvm.s_tir import meta_schedule as ms
        from tvm_ffi import structural_equal

        module = workload_module(func)
        key = str(ms.database.Workload(module).as_json()[0])
        records = self.records(key)
        if not records:
            return None
        workload = self._workloads[self._positions[key]]
        if not structural_equal(ms.database.Workload.from_json(workload).mod, module):
            return None  # two kernels with one hash
        verdicts, untuned_s = self._verdicts.get(key, {}), self._untuned.get(key)
        record = choose(records, verdicts, untuned_s) or records[0]
        return Match(
            workload=workload,
            record=record,
            untuned_s=untuned_s,
            verdict=verdicts.get(trace_key(record)),
        )

    def hit_rate(self, module: tvm.IRModule) -> HitRate:
        """Count the kernels of a module that have a record.

        Parameters
        ----------
        module : IRModule
            Lowered, not scheduled.
        """
        functions = kernels(module)
        missing = tuple(name for name, func in functions.items() if self.lookup(func) is None)
        return HitRate(len(functions) - len(missing), len(functions), missing)

    def apply(self, module: tvm.IRModule) -> Applied:
        """Schedule every kernel by its record, where that is better than no record.

        Better inside the model, where that was tried; else in isolation: see
        `hone.tuning.records.choose`.

        Parameters
        ----------
        module : IRModule
            Lowered, not scheduled; not changed.

        Returns
        -------
        Applied
            The new module, and what became of each kernel.
        """
        from tvm import IRModule

        from .tuning.replay import ReplayError, replay

        hits, misses, kept, rejected, failed = [], [], [], [], []
        functions = dict(module.functions.items())
        variables = {variable.name_hint: variable for variable in functions}
        target = self.target.tvm_target(self.threads)
        for name, func in kernels(module).items():
            match = self.lookup(func)
            if match is None:
                misses.append(name)
            elif not match.worthwhile:
                kept.append(name)
                if match.verdict is Verdict.REJECTED:
                    rejected.append(name)
            else:
                try:
                    functions[variables[name]] = replay(func, match, target)
                except ReplayError as error:
                    failed.append((name, str(error)))
                else:
                    hits.append(name)
        return Applied(
            module=IRModule(functions, attrs=module.attrs),
            hits=tuple(hits),
            misses=tuple(misses),
            kept=tuple(kept),
            failed=tuple(failed),
            rejected=tuple(rejected),
        )
