"""Give each layer the precision that the accuracy budget and the clock allow.

How the search works is said in `hone.mixed.controller`; here its questions are answered by
compiling, running and timing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import hone
from hone import fingerprint
from hone.data import Dataset
from hone.errors import UsageError
from hone.kernel_table import tensor_ids
from hone.measure import Outcome
from hone.mixed.controller import Answer, Controller, Question, most_probes
from hone.mixed.conversion_price import conversion_us, timed_conversions
from hone.mixed.layer_precision import ConversionCost, Cost, LayerPrecision
from hone.mixed.oracle import FLOAT, Assignment, Clock, Remembering
from hone.mixed.partition import Border
from hone.mixed.sensitivity import kl_divergence, relative_error, sensitivity
from hone.mixed.state import State
from hone.mixed.tensor_graph import tensor_graph
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.graph.convert_layout import ToNHWC
from hone.passes.quantize.site import WEIGHTED
from hone.passes.quantize.slice_splits import SliceSplits
from hone.passes.quantize.survey import survey
from hone.profiling.call_times import CallTime, call_times, is_conversion, layer_us
from hone.profiling.conversions import conversions
from hone.profiling.roofline import of_this_machine
from hone.quantization_error import Compared, compared_floats, compared_levels
from hone.summary import Version

from . import int8
from .candidate import Candidate, Context, bindings_left, prepared, selected
from .options.mixed import MixedStep
from .quantizers import QUANTIZERS, Ground, Int8Quantizer, Quantizer
from .sqnr import sqnr
from .trials import Trials

TIMING_S = 0.5
"""About how long the kernels of one network are timed."""

CONVERTED_BYTES = 5
"""That a conversion moves for each element: four as float, one as level."""

KEPT_VERSIONS = 4
"""Compiled networks that are kept: the last probe's is often asked for again."""


def propose(model: Model, step: MixedStep, context: Context) -> Candidate | str:
    """Return the model with a precision for each layer, or why all of it stays in float.

    Raises
    ------
    UsageError
        A selector of ``skip`` names no layer, there are no data, they do not calibrate, or nobody
        can evaluate.
    """
    trials = context.trials
    if trials is None:
        raise UsageError("mixed precision needs a build, which evaluates and measures its probes")
    started = time.monotonic()
    data = context.calibration_for(step)
    ready = model.with_module(apply(prepared(model), SliceSplits(), ToNHWC()))
    skip = bindings_left(ready, selected(model, step), where="skip")
    ground = _ground(ready, step, skip, data, context)
    oracle = _Oracle(model, ground, step, data, context, trials)
    question = oracle.question()
    state = State(trials.folder / "mixed", _key(model, step, data, trials))
    if state.resumed:
        context.progress.log(f"mixed precision: {state.resumed} answers of an earlier build")
    with context.progress.task("mixed precision", total=most_probes(question)) as task:
        left = None
        if step.seconds is not None:
            left = max(step.seconds - (time.monotonic() - started), 0.0)
        remembering = Remembering(oracle, state, seconds=left)
        answer = Controller(question, remembering, task).run()
    return oracle.candidate(answer)


def _ground(
    ready: Model, step: MixedStep, skip: Sequence[str], data: Dataset, context: Context
) -> Ground:
    found = int8.calibrated(ready, step, skip, data, context) if "int8" in step.precisions else None
    model = ready if found is None else found.model
    surveyed = survey(model.module["main"])
    names = [site.layer for site in surveyed.sites if site.kind in WEIGHTED]
    names += [each.layer for each in surveyed.skipped]
    split = {name: "is several operators" for name, count in Counter(names).items() if count > 1}
    return Ground(
        model=model,
        layers=tensor_graph(model.module, names).layers,
        refused={**split, **dict.fromkeys(skip, "kept in float by request")},
        calibrated=found,
    )


def _key(model: Model, step: MixedStep, data: Dataset, trials: Trials) -> dict[str, Any]:
    """Return what decides the answers: network, data, options, machine, and who computes them."""
    return {
        "module": fingerprint.of_module(model.module),
        "calibration": fingerprint.of_dataset(data),
        "options": step.model_dump(mode="json", exclude={"seconds"}),
        "versions": {"hone": hone.__version__, "tvm": version("apache-tvm")},
        **trials.key(),
    }


class _Oracle:
    """Answers by compiling, running and timing; see `hone.mixed.oracle.Oracle`."""

    def __init__(
        self,
        model: Model,
        ground: Ground,
        step: MixedStep,
        data: Dataset,
        context: Context,
        trials: Trials,
    ) -> None:
        self._model = model
        self._ground = ground
        self._step = step
        self._data = data
        self._context = context
        self._trials = trials
        self._quantizers: dict[str, Quantizer] = {
            name: make(ground) for name, make in QUANTIZERS.items() if name in step.precisions
        }
        self._ids = {layer.binding: layer.id for layer in model.layers}
        self._versions: dict[tuple[tuple[str, str], ...], Version] = {}

    def question(self) -> Question:
        """Return what is searched for."""
        return Question(
            layers=self._ground.layers,
            precisions=tuple(self._step.precisions),
            budget=self._trials.budget,
            refused={name: each.refused for name, each in self._quantizers.items()},
            activations={name: each.activations for name, each in self._quantizers.items()},
        )

    # ---------------------------------------------------------------- answers

    def sensitivity(self) -> Mapping[str, Mapping[str, float]]:
        """Run the network with one layer at a time in each precision."""
        return sensitivity(
            self._ground.model,
            {name: each.emulations() for name, each in self._quantizers.items()},
            self._data,
            samples=self._step.samples,
            threads=self._context.threads,
            divergence=kl_divergence if self._trials.metric == "top1" else relative_error,
            progress=self._context.progress,
        )

    def lost(self, assignment: Assignment) -> float:
        """Compile and evaluate."""
        return self._trials.lost(self._version(assignment))

    def clock(self) -> Clock | None:
        """Time the kernels of the float network and of each precision throughout."""
        if self._trials.measure is None:
            return None
        question = self.question()
        graph = tensor_graph(self._ground.model.module, self._ground.layers)
        nodes: dict[str, dict[str, float]] = {
            **{name: dict.fromkeys((FLOAT, *question.precisions), 0.0) for name in graph.free},
            **{name: {FLOAT: 0.0} for name in graph.fixed},
            **{name: {} for name in graph.layers},
        }
        priced: list[tuple[int, float]] = []
        for precision in (FLOAT, *question.precisions):
            uniform = {
                layer: precision
                for layer in question.layers
                if precision != FLOAT and question.fits(layer, precision)
            }
            version = self._version(uniform)
            calls, found = self._calls(version), conversions(version.model.module)
            priced += timed_conversions(version.model.module, calls)
            for layer, us in layer_us(calls, self._ground.layers, found).items():
                if precision == FLOAT or layer in uniform:
                    nodes[layer][precision] = us
        roofline, problem = of_this_machine(self._context.target, threads=self._context.threads)
        if problem is not None:
            self._context.progress.log(problem)
        borders = []
        for edge in graph.edges:
            moved = round(CONVERTED_BYTES * edge.elements)
            least = moved / roofline.level(moved).bytes_per_second * 1e6
            us = conversion_us(edge.elements, priced, least=least)
            borders.append(Border(left=edge.left, right=edge.right, us=us))
        return Clock(nodes=nodes, borders=tuple(borders))

    def fastest(self, assignments: Sequence[Assignment]) -> int:
        """Run whole networks in interleaved rounds."""
        if self._trials.measure is None:
            return 0
        versions = {str(index): self._version(each) for index, each in enumerate(assignments)}
        measured = self._trials.measure(versions)
        best = 0
        for index in range(1, len(assignments)):
            if measured.speedup(str(index), over=str(best)).outcome is Outcome.FASTER:
                best = index
        return best

    # ---------------------------------------------------------------- networks

    def _write(self, assignment: Assignment) -> tuple[Model, dict[str, str]]:
        """Return a network with these precisions, and which layers were merged."""
        module = self._ground.model.module
        merged: dict[str, str] = {}
        for name, quantizer in self._quantizers.items():
            layers = {layer for layer, precision in assignment.items() if precision == name}
            if layers:
                written = quantizer.write(module, layers)
                module, merged = written.module, {**merged, **written.merged}
        return self._model.with_module(module), merged

    def _package(self, assignment: Assignment) -> str:
        """Return the precision of a package: the lowest one that is used."""
        used = (
            each.package for name, each in self._quantizers.items() if name in assignment.values()
        )
        return next(used, FLOAT)

    def _version(self, assignment: Assignment) -> Version:
        key = tuple(sorted(assignment.items()))
        if key not in self._versions:
            while len(self._versions) >= KEPT_VERSIONS:
                del self._versions[next(iter(self._versions))]
            model, _ = self._write(assignment)
            self._versions[key] = self._trials.build("probe", model, self._package(assignment))
        return self._versions[key]

    def _calls(self, found: Version) -> tuple[CallTime, ...]:
        return call_times(
            found.runner, self._trials.sample, found.assembled.lowered, seconds=TIMING_S
        )

    # ---------------------------------------------------------------- result

    def candidate(self, answer: Answer) -> Candidate:
        """Return the network that was found, with what each layer has and costs."""
        if not answer.assignment:
            why = "; ".join(dict.fromkeys(answer.reasons.values()))
            return Candidate(
                model=self._model,
                note=f"all layers stay in float after {_probes(answer.probes)}: {why}",
                precisions=self._layers(answer, {}, {}),
            )
        model, merged = self._write(answer.assignment)
        calls: tuple[CallTime, ...] = ()
        if self._trials.measure is not None:
            calls = self._calls(self._version(answer.assignment))
        times = layer_us(calls, self._ground.layers, conversions(model.module))
        given = Counter(answer.assignment.values())
        counts = [f"{given[name]} in {name}" for name in self._step.precisions if name in given]
        note = (
            f"{', '.join(counts)} of {len(self._ground.layers)} layers, {_probes(answer.probes)}"
            + ("" if answer.complete else ", the time limit came first")
            + (self._ground.calibrated.note if self._ground.calibrated is not None else "")
        )
        errors = self._errors(answer.assignment, model)
        ids = self._ids
        return Candidate(
            model=model,
            precision=self._package(answer.assignment),
            note=note,
            errors=tuple(errors.items()),
            merged=merged,
            precisions=self._layers(answer, errors, times),
            conversions=_conversion_costs(model, calls, ids),
        )

    def _errors(self, assignment: Assignment, model: Model) -> dict[str, float | None]:
        """Return id → SQNR in dB of each layer that is not in float, as the network has them."""
        ground = self._ground.model
        quantizer = self._quantizers.get("int8")
        layers = {layer for layer, precision in assignment.items() if precision == "int8"}
        pairs: tuple[Compared, ...] = ()
        if layers and isinstance(quantizer, Int8Quantizer):
            pairs = compared_levels(quantizer.quantization(ground.module, layers))
        others = [layer for layer in assignment if layer not in layers]
        pairs += compared_floats(ground.module, model.module, others)
        return dict(sqnr(ground, model, pairs, self._data, self._context))

    def _layers(
        self, answer: Answer, errors: Mapping[str, float | None], times: Mapping[str, float]
    ) -> tuple[LayerPrecision, ...]:
        """Return a row for each layer."""
        ids = self._ids
        nodes = answer.clock.nodes if answer.clock is not None else {}
        rows = []
        for layer in self._ground.layers:
            costs: dict[str, Cost] = {
                name: Cost(
                    error=answer.sensitivity[name].get(layer), us=nodes.get(layer, {}).get(name)
                )
                for name in self._step.precisions
            }
            costs[FLOAT] = Cost(error=0.0, us=nodes.get(layer, {}).get(FLOAT))
            rows.append(
                LayerPrecision(
                    layer=ids.get(layer, layer),
                    precision=answer.assignment.get(layer, FLOAT),
                    reason=answer.reasons.get(layer, ""),
                    us=times.get(layer),
                    costs=costs,
                    sqnr_db=errors.get(ids.get(layer, layer)),
                )
            )
        return tuple(rows)


def _probes(count: int) -> str:
    return "1 probe" if count == 1 else f"{count} probes"


def _conversion_costs(
    model: Model, calls: Sequence[CallTime], ids: Mapping[str, str]
) -> tuple[ConversionCost, ...]:
    """Return what each conversion of a network takes, in the order of execution."""
    found = conversions(model.module)
    tensors = tensor_ids(model)
    rows = []
    for call in calls:
        alone = is_conversion(call, found)
        beside = tuple(ids[name] for name in call.names if name in ids and name not in found)
        rows += [
            ConversionCost(
                tensor=tensors.get(found[name].layer, found[name].layer),
                direction=found[name].direction,
                kernel=call.kernel,
                us=call.us if alone else None,
                layers=beside,
            )
            for name in call.names
            if name in found
        ]
    return tuple(rows)
