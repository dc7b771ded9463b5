"""The search: a child process that proposes candidates, has them timed and says what it found.

It owns no file, and no clock but its deadline: every result goes up a pipe at once, and the parent
writes it down. It can be killed at any moment. `tune.py` starts `main`.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms

from hone.targets.schedule.machine import Machine

from . import journal
from .bench import REFERENCE, Bench, Outcome
from .builder import Job, die_with_parent
from .confirm import Confirmation
from .kernel import KernelSearch, cores
from .order import WORTH_NOTING, Order
from .reason import reason_of
from .records import Verdict, contenders, seconds_of, trace_key
from .replay import REFUSALS
from .space import Made, TemplateSpace
from .whole_handle import WholeModel
from .whole_model import Candidates

WARM_MODEL = 24
"""Measured candidates from which on the cost model is believed (TVM: 100)."""

INSIDE_SHARE = 0.75
MAKING_SHARE = 0.3
LEAST_SHARE = 0.003
"""How much of the time may go to schedules that are tried inside the model, and how much of what is
left of that to making the next ones; and what a kernel has to take of a run."""

MOST_NEIGHBOURS = 24
LATER_CHANGES = 6
IDLE_TURNS = 3
"""Schedules of a kernel in the first turn inside the model and in each further one, and the turns
after which it ends when they have brought nothing."""

PROFILE_SHARE = 0.2
PROFILE_MOST_S = 30.0
"""How much of the time may pass until the untuned model has run: a share, and at most so long."""


class Kernel:
    """One kernel of the request.

    Parameters
    ----------
    task : dict
        Its part of the request: ``module``, ``untuned``, ``records``.
    target : dict
        TVM's target dictionary.
    reference : Path
        Where its right results will be kept.
    """

    def __init__(self, task: dict[str, Any], target: dict[str, Any], reference: Path) -> None:
        self.module = tvm.ir.load_json(task["module"])
        self.untuned = str(task["untuned"])
        self.name = str(task["name"])
        self.names = tuple(task["names"])
        self.records: list[Any] = task["records"]
        self.verdicts = {key: Verdict(verdict) for key, verdict in task["verdicts"].items()}
        self.calls = int(task["calls"])
        self._workload = str(task["module"])
        self._weights = tuple(task["weights"])
        self._cold_bytes = int(task["cold_bytes"])
        self._reference = reference
        self.untuned_s: float | None = task["untuned_s"]
        self.is_timed = False
        self.search: KernelSearch | None = None
        self._space: TemplateSpace | None = None
        self._known: set[str] = set()
        self._target = json.dumps(target)
        self._arguments = tuple(
            (str(info.dtype), tuple(int(extent) for extent in info.shape))
            for info in ms.arg_info.ArgInfo.from_entry_func(self.module)
        )

    def contenders(self) -> list[Any]:
        """Return the records to try inside the model, best first."""
        records = sorted(self.records, key=lambda record: seconds_of(record) or math.inf)
        return contenders(records, self.verdicts, self.untuned_s)

    def is_settled(self, record: list[Any]) -> bool:
        """Say whether a record was tried inside a model before."""
        return trace_key(record) in self.verdicts

    def candidates(self) -> Candidates:
        """Return what the model's process has to know."""
        return Candidates(
            functions=self.names, module=self._workload, records=tuple(self.contenders())
        )

    def proposals(self, machine: Machine, seed: int, target: tvm.target.Target) -> list[Made]:
        """Return what the template offers next and nobody has timed; none when there is no more."""
        first = self._space is None
        if self._space is None:
            self._space = TemplateSpace(self.module, machine, seed=seed)
            self._space.note({}, self.untuned_s or 1.0)
            self._known = {trace_key(record) for record in self.records}
        count = MOST_NEIGHBOURS if first else LATER_CHANGES
        made = self._space.next(count, lambda _: None)
        return [
            one
            for one in made
            if one.decided and trace_key(self._record(one, target)) not in self._known
        ]

    def note(self, made: Made, seconds: float) -> bool:
        """Remember how long a proposal takes; return whether it is the best one so far."""
        if self._space is None:
            return False
        best_s = self._space.best_s or seconds
        self._space.note(made.decided, seconds)
        return seconds < WORTH_NOTING * best_s

    def offering(self, made: Sequence[Made], target: tvm.target.Target) -> Candidates:
        """Return proposals for the model's process."""
        records = tuple(self._record(one, target) for one in made)
        return Candidates(functions=self.names, module=self._workload, records=records)

    def _record(self, made: Made, target: tvm.target.Target) -> list[Any]:
        record: list[Any] = ms.database.TuningRecord(
            made.candidate.sch.trace,
            ms.database.Workload(self.module),
            [1.0],
            target,
            made.candidate.args_info,
        ).as_json()
        return record

    def job(self, module: str) -> Job:
        """Return the measurement of one scheduled form of this kernel."""
        return Job(
            module=module,
            target=self._target,
            arguments=self._arguments,
            reference=str(self._reference),
            save_reference=module == self.untuned and not self._reference.exists(),
            weights=self._weights,
            cold_bytes=self._cold_bytes,
        )

    def time(self, outcome: Outcome) -> tuple[float, ...]:
        """Return the seconds of a candidate on the scale that all its records share.

        The untuned kernel took `untuned_s` when it was first timed; every record since is its
        ratio to it, whatever the clock did in between.
        """
        if not outcome.ratios or self.untuned_s is None:
            return outcome.seconds
        return tuple(ratio * self.untuned_s for ratio in outcome.ratios)


class Search:
    """The whole search, over all kernels of the request.

    Parameters
    ----------
    link : Connection
        To the parent: every message is one JSON object.
    request : dict
        What `tune.py` sends.
    bench : Bench
        Measures.
    """

    def __init__(self, link: Connection, request: dict[str, Any], bench: Bench) -> None:
        self._link = link
        self._bench = bench
        self._started = time.monotonic()
        self._last_s = float(request["deadline"])
        self._deadline = self._last_s - float(request["confirm_s"])
        self._searched = bool(request["searched"])
        self._batch = int(request["batch"])
        self._seed = int(request["seed"])
        self._machine = Machine(**request["machine"])
        self._target = tvm.target.Target(request["target"])
        tasks = request["tasks"]
        self._kernels = [
            Kernel(task, request["target"], Path(request["folder"], f"{position}.npz"))
            for position, task in enumerate(tasks)
        ]
        self._model_s = [0.0] * len(tasks)
        self._shares = [0.0] * len(tasks)
        self._whole = WholeModel(
            bench.context,
            model=request["model"],
            target=json.dumps(request["target"]),
            threads=self._machine.threads,
        )
        self._order = Order(
            [t["estimate_s"] for t in tasks], [t["calls"] for t in tasks], self._profile()
        )
        self._quarantined = [bool(task["quarantined"]) for task in tasks]
        for position, quarantined in enumerate(self._quarantined):
            if quarantined:
                self._order.finish(position)
        self._longest_thought_s = 0.0
        self._database = ms.database.MemoryDatabase()
        # More threads make training on this little data slower, ten times so on a busy machine.
        self._model = ms.CostModel.create("xgb", num_tuning_cores=1, num_warmup_samples=WARM_MODEL)

    def _profile(self) -> list[float] | None:
        """Return the seconds of each kernel in one run of the untuned model, if it runs."""
        share = 1.0 if self._searched else PROFILE_SHARE
        patience = min(share * (self._last_s - self._started), PROFILE_MOST_S)
        times = self._whole.profile(self._started + patience)
        if times is None:
            self._say("say", text=f"the whole model could not be timed: {self._whole.failure}")
            return None
        seconds = [sum(times.get(n, 0.0) for n in kernel.names) for kernel in self._kernels]
        self._model_s = seconds
        self._shares = [s / sum(times.values()) for s in seconds]
        self._say("profile", seconds=seconds)
        return seconds

    def run(self) -> None:
        """Search until every space is exhausted or the time is over; then try what was found.

        The templates are searched inside the model; alone, in a loop of its own, is a kernel timed
        where that found nothing better any more, and for TVM's general space.
        """
        if not self._searched and not self._whole.failure:
            self._search_inside()
        exhausted = not self._searched and self._search()
        self._say("searched")
        self._confirm()
        self._whole.close()
        self._say("done", exhausted=exhausted)

    def _search_inside(self) -> None:
        """Search the templates inside the running model, one candidate of each kernel at a time.

        First what lies next to the untuned schedules, then changes of the best ones.
        """
        now = time.monotonic()
        deadline = now + INSIDE_SHARE * (self._deadline - now)
        large = [
            i
            for i, share in enumerate(self._shares)
            if share >= LEAST_SHARE and not self._quarantined[i]
        ]
        idle = 0
        self._say("say", text=f"searching schedules of {len(large)} kernels inside the model")
        while large and idle < IDLE_TURNS and time.monotonic() < deadline:
            made: dict[str, list[Made]] = {}
            until = time.monotonic() + MAKING_SHARE * (deadline - time.monotonic())
            for position in large:
                self._say("turn", task=position)
                if time.monotonic() < until:
                    made[str(position)] = self._proposals(position)
            self._say("between")
            large = [i for i in large if made.get(str(i), True)]
            offered = {i: proposals for i, proposals in made.items() if proposals}
            if not offered or self._whole.failure:
                break
            news = self._try_inside(offered, deadline)
            idle = 0 if news else idle + 1

    def _proposals(self, position: int) -> list[Made]:
        """Return what a kernel's template offers next; none where TVM refuses it."""
        try:
            return self._kernels[position].proposals(self._machine, self._seed, self._target)
        except REFUSALS as error:
            self._say("quarantine", task=position, reason=reason_of(error))
            self._order.finish(position)
            return []

    def _try_inside(self, made: Mapping[str, list[Made]], deadline: float) -> bool:
        """Time schedules inside the model; return whether one is the best of its kernel so far."""
        offered = {
            i: self._kernels[int(i)].offering(proposals, self._target)
            for i, proposals in made.items()
        }
        confirmed = self._whole.confirm(
            offered, deadline, lambda text: self._say("say", text=text), decide=False
        )
        if confirmed is None:
            if self._whole.failure:
                self._say("say", text=f"the model does not run any more: {self._whole.failure}")
            return False
        progress = False
        for trial in confirmed.trials:
            position = int(trial.kernel)
            kernel = self._kernels[position]
            if kernel.untuned_s is None:
                kernel.untuned_s = self._model_s[position] / kernel.calls
                self._say("untuned", task=position, seconds=kernel.untuned_s, reason="")
            record = offered[trial.kernel].records[trial.candidate]
            record[1] = [kernel.untuned_s / trial.gain]
            kernel.records.append(record)
            progress |= kernel.note(made[trial.kernel][trial.candidate], record[1][0])
            self._say("record", task=position, record=record)
        return progress

    def _confirm(self) -> None:
        """Try the best records inside the model, unless all of them have been tried before."""
        kernels = {str(i): kernel for i, kernel in enumerate(self._kernels)}
        offered = {i: kernel.candidates() for i, kernel in kernels.items()}
        offered = {i: candidates for i, candidates in offered.items() if candidates.records}
        news = any(
            not kernels[i].is_settled(record)
            for i, candidates in offered.items()
            for record in candidates.records
        )
        if not news or self._whole.failure:
            return
        confirmed = self._whole.confirm(
            offered, self._last_s, lambda text: self._say("say", text=text)
        )
        if confirmed is None:
            reason = self._whole.failure or "too little time was left"
            self._say("say", text=f"the records were not tried inside the model: {reason}")
            return
        self._judge(confirmed, offered)

    def _judge(self, confirmed: Confirmation, offered: Mapping[str, Candidates]) -> None:
        """Say what became of candidates."""
        trials = []
        for trial in confirmed.trials:
            position = int(trial.kernel)
            record = offered[trial.kernel].records[trial.candidate]
            trials.append(
                {
                    "task": position,
                    "record": trace_key(record),
                    "kept": trial.kept,
                    "seconds": trial.seconds,
                    "untuned_s": trial.untuned_s,
                }
            )
        speedup = None if confirmed.speedup is None else confirmed.speedup.ratio
        self._say("verdicts", speedup=speedup, trials=trials)

    def _search(self) -> bool:
        """Search; return whether every space was searched to its end."""
        while (position := self._order.next()) is not None:
            self._say("turn", task=position)
            try:
                finished = not self._turn(position)
            except REFUSALS as error:
                # What TVM's search refuses about one kernel does not concern the others.
                self._say("quarantine", task=position, reason=reason_of(error))
                self._order.finish(position)
                continue
            if finished:
                return False
        return True

    def _turn(self, position: int) -> bool:
        """Do one batch of a kernel; return False when the time is over."""
        kernel = self._kernels[position]
        if kernel.search is None:
            kernel.search = KernelSearch(
                kernel.module,
                self._target,
                self._machine,
                records=kernel.records,
                database=self._database,
                model=self._model,
                batch=self._batch,
                seed=(self._seed * 1009 + position) % (2**31 - 2) + 1,
            )
        search = kernel.search
        started = time.monotonic()
        if started + self._longest_thought_s > self._deadline:
            return False
        proposal = search.propose()
        thought_s = time.monotonic() - started
        self._longest_thought_s = max(self._longest_thought_s, thought_s)
        if not proposal.candidates:
            self._say("exhausted", task=position, reason=search.refusal)
            self._order.finish(position)
            return True
        seconds = [search.known(candidate) for candidate in proposal.candidates]
        new = [i for i, times in enumerate(seconds) if not times]
        jobs = [kernel.job(tvm.ir.save_json(proposal.candidates[i].sch.mod)) for i in new]
        progress = False
        outcomes = 0
        reference = kernel.job(kernel.untuned)
        for outcome in self._bench.measure(jobs, self._deadline, reference=reference):
            if outcome.position == REFERENCE:
                self._untuned(position, kernel, outcome)
                continue
            outcomes += 1
            i = new[outcome.position]
            if not outcome.seconds:
                self._say("failed", task=position, reason=outcome.reason)
                continue
            seconds[i] = kernel.time(outcome)
            progress |= self._order.timed(position, float(np.mean(seconds[i])))
            record = search.record(proposal.candidates[i], seconds[i])
            kernel.records.append(record)
            self._say("record", task=position, record=record)
        if outcomes < len(jobs):
            return False
        started = time.monotonic()
        search.learn(proposal, seconds, new)
        thought_s += time.monotonic() - started
        self._longest_thought_s = max(self._longest_thought_s, thought_s)
        self._order.turned(position, progress=progress)
        self._say("batch", task=position)
        self._link.recv_bytes()  # the parent has written everything down
        return True

    def _untuned(self, position: int, kernel: Kernel, outcome: Outcome) -> None:
        """Take the time of a kernel as it is without a record, once in a session."""
        if kernel.is_timed:
            return
        kernel.is_timed = True
        if not outcome.seconds:
            self._say("untuned", task=position, seconds=None, reason=outcome.reason)
            return
        if kernel.untuned_s is None:
            kernel.untuned_s = float(np.mean(outcome.seconds))
        self._order.timed(position, kernel.untuned_s)
        self._say("untuned", task=position, seconds=kernel.untuned_s, reason="")

    def _say(self, kind: str, **values: Any) -> None:
        self._link.send_bytes(journal.dumps({"kind": kind, **values}))


def main() -> None:
    """Run the search; the arguments are the number of the pipe and the request's file."""
    die_with_parent()
    faulthandler.enable()
    link = Connection(int(sys.argv[1]))
    request = json.loads(Path(sys.argv[2]).read_bytes())
    bench = Bench(
        workers=cores(),
        build_timeout_s=float(request["build_timeout_s"]),
        run_timeout_s=float(request["run_timeout_s"]),
    )
    np.random.seed(int(request["seed"]))  # the cost model's guesses before it is warm
    try:
        Search(link, request, bench).run()
    except (EOFError, ConnectionError):
        os._exit(1)  # the parent is gone
