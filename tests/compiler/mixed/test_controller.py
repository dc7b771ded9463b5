"""The mixed precision search, against an oracle that knows every cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hone.mixed.controller import Answer, Controller, Question, duration, most_probes
from hone.mixed.oracle import FLOAT, Assignment, Clock, Remembering
from hone.mixed.partition import Border, total_us
from hone.mixed.state import State


@dataclass
class Task:
    details: list[str] = field(default_factory=list)

    def update(self, completed: float | None = None, detail: str | None = None) -> None:
        self.details.append(detail or "")


@dataclass
class Fake:
    """Losses add up over layers; times are those of the clock; every question is noted."""

    costs: Mapping[str, Mapping[str, float]]
    times: Clock | None = None
    seconds: float = 1.0
    asked: list[str] = field(default_factory=list)
    time: float = 0.0

    def now(self) -> float:
        return self.time

    def _ask(self, kind: str) -> None:
        self.asked.append(kind)
        self.time += self.seconds

    def sensitivity(self) -> Mapping[str, Mapping[str, float]]:
        self._ask("sensitivity")
        return self.costs

    def lost(self, assignment: Assignment) -> float:
        self._ask("lost")
        return sum(self.costs[precision][layer] for layer, precision in assignment.items())

    def clock(self) -> Clock | None:
        self._ask("clock")
        return self.times

    def fastest(self, assignments: Sequence[Assignment]) -> int:
        self._ask("fastest")
        assert self.times is not None
        nodes = self.times.nodes
        totals = [
            total_us({n: a.get(n, FLOAT) for n in nodes}, nodes, self.times.borders, str.__eq__)
            for a in assignments
        ]
        return totals.index(min(totals))


def layers(count: int) -> tuple[str, ...]:
    return tuple(f"conv{i}" for i in range(count))


def search(fake: Fake, question: Question, *, state: State | None = None, seconds=None) -> Answer:
    remembering = Remembering(fake, state or State(None, {}), seconds=seconds, now=fake.now)
    return Controller(question, remembering, Task()).run()


def int8_only(count: int, costs: Sequence[float], budget: float) -> tuple[Fake, Question]:
    names = layers(count)
    fake = Fake({"int8": dict(zip(names, costs, strict=True))})
    return fake, Question(layers=names, precisions=("int8",), budget=budget)


@pytest.mark.parametrize("sensitive", range(33))
def test_fewest_layers_stay_in_float_and_probes_are_logarithmic(sensitive: int):
    # The first `sensitive` layers, by index, cost more than the budget, alone and together.
    count = 32
    costs = [1.0 if i < sensitive else 0.001 for i in range(count)]
    fake, question = int8_only(count, costs, budget=0.5)
    answer = search(fake, question)
    assert set(answer.assignment) == set(layers(count)[sensitive:])
    assert fake.asked.count("lost") <= 1 + math.ceil(math.log2(count))
    assert answer.complete


def test_most_sensitive_layers_are_left_out_when_losses_add_up():
    fake, question = int8_only(6, [0.1, 0.3, 0.05, 0.2, 0.4, 0.01], budget=0.37)
    # 0.01 + 0.05 + 0.1 + 0.2 = 0.36 holds; with 0.3 more it does not.
    assert set(search(fake, question).assignment) == {"conv0", "conv2", "conv3", "conv5"}


def test_budget_of_zero_keeps_all_in_float():
    fake, question = int8_only(7, [0.1] * 7, budget=0.0)
    answer = search(fake, question)
    assert answer.assignment == {}
    assert set(answer.reasons.values()) == {"int8: costs more accuracy than the budget allows"}
    assert "clock" not in fake.asked


def test_first_probe_is_enough_when_everything_holds():
    fake, question = int8_only(20, [0.01] * 20, budget=1.0)
    assert len(search(fake, question).assignment) == 20
    assert fake.asked.count("lost") == 1


def clock_of(int8_us: Sequence[float], float_us: Sequence[float], border_us: float) -> Clock:
    names = layers(len(int8_us))
    return Clock(
        nodes={
            name: {"int8": fast, FLOAT: slow}
            for name, fast, slow in zip(names, int8_us, float_us, strict=True)
        },
        borders=tuple(Border(left=a, right=b, us=border_us) for a, b in itertools.pairwise(names)),
    )


def test_budget_of_one_quantizes_all_that_pays():
    fake, question = int8_only(4, [0.1] * 4, budget=1.0)
    fake.times = clock_of([5, 9, 5, 20], [10, 9.5, 10, 10], border_us=1.0)
    answer = search(fake, question)
    assert set(answer.assignment) == {"conv0", "conv1", "conv2"}
    assert answer.reasons == {"conv3": "int8: takes 20.0 us, fp32 10.0 us"}


def test_lone_slow_layer_stays_when_its_two_conversions_cost_more():
    fake, question = int8_only(3, [0.1] * 3, budget=1.0)
    fake.times = clock_of([5, 11, 5], [10, 10, 10], border_us=3.0)
    answer = search(fake, question)
    assert len(answer.assignment) == 3
    assert answer.reasons == {
        "conv1": "fp32: takes 10.0 us, int8 11.0 us, but the whole network was not faster with it"
    }


def test_conversions_keep_a_slow_layer_when_no_other_assignment_is_allowed():
    # Without the price of conversions conv1 would leave, but that breaks the budget.
    class Odd(Fake):
        def lost(self, assignment: Assignment) -> float:
            self._ask("lost")
            return 0.0 if len(assignment) == 3 else 9.0

    names = layers(3)
    fake = Odd({"int8": dict.fromkeys(names, 0.1)}, clock_of([5, 11, 5], [10, 10, 10], 3.0))
    answer = search(fake, Question(layers=names, precisions=("int8",), budget=1.0))
    assert answer.reasons == {
        "conv1": "fp32: takes 10.0 us and up to 6.0 us of conversions, int8 11.0 us"
    }


def test_proposal_that_the_clock_refutes_is_not_taken_and_named():
    class Honest(Fake):
        def fastest(self, assignments: Sequence[Assignment]) -> int:
            self._ask("fastest")
            return 0

    names = layers(3)
    clock = clock_of([5, 12, 5], [10, 10, 10], border_us=0.5)
    fake = Honest({"int8": dict.fromkeys(names, 0.1)}, clock)
    answer = search(fake, Question(layers=names, precisions=("int8",), budget=1.0))
    assert len(answer.assignment) == 3
    assert answer.reasons == {
        "conv1": "fp32: takes 10.0 us, int8 12.0 us, but the whole network was not faster with it"
    }


def test_conversions_that_eat_a_gain_are_named():
    fake, question = int8_only(3, [0.1, 9.0, 9.0], budget=1.0)
    fake.times = clock_of([8, 1, 1], [10, 10, 10], border_us=5.0)
    fake.times = Clock(
        nodes={**fake.times.nodes, "input": {FLOAT: 0.0}},
        borders=(*fake.times.borders, Border(left="input", right="conv0", us=5.0)),
    )
    answer = search(fake, question)
    # Nothing but float is left, which the step as a whole is measured against.
    assert set(answer.assignment) == {"conv0"}
    fake.costs["int8"]["conv2"] = 0.0
    fake.asked.clear()
    answer = search(fake, question)
    assert set(answer.assignment) == {"conv2"}
    assert answer.reasons["conv0"] == (
        "int8: takes 8.0 us and up to 10.0 us of conversions, fp32 10.0 us"
    )
    assert answer.reasons["conv1"] == "int8: costs more accuracy than the budget allows"


def test_proposal_that_breaks_the_budget_is_not_taken():
    # Taking conv1 back makes it worse here: losses need not grow with the number of layers.
    class Odd(Fake):
        def lost(self, assignment: Assignment) -> float:
            self._ask("lost")
            return 0.0 if len(assignment) == 3 else 9.0

    names = layers(3)
    fake = Odd({"int8": dict.fromkeys(names, 0.1)}, clock_of([5, 20, 5], [10, 10, 10], 1.0))
    answer = search(fake, Question(layers=names, precisions=("int8",), budget=1.0))
    assert len(answer.assignment) == 3
    assert "fastest" not in fake.asked


def test_layers_left_out_are_offered_to_the_next_precision():
    names = layers(4)
    fake = Fake(
        {
            "int8": dict(zip(names, (0.5, 0.6, 0.1, 0.1), strict=True)),
            "bf16": dict(zip(names, (0.01, 0.9, 0.01, 0.01), strict=True)),
        }
    )
    question = Question(
        layers=names,
        precisions=("int8", "bf16"),
        budget=0.3,
        refused={"int8": {"conv3": "its sums could overflow"}},
    )
    answer = search(fake, question)
    assert answer.assignment == {"conv2": "int8", "conv0": "bf16", "conv3": "bf16"}
    assert answer.reasons == {
        "conv0": "int8: costs more accuracy than the budget allows",
        "conv1": "int8: costs more accuracy than the budget allows; "
        "bf16: costs more accuracy than the budget allows",
        "conv3": "int8: its sums could overflow",
    }


def test_search_goes_on_where_it_was_interrupted(tmp_path: Path):
    class Stopping(Fake):
        def lost(self, assignment: Assignment) -> float:
            if self.asked.count("lost") == 3:
                raise KeyboardInterrupt
            return super().lost(assignment)

    costs = {"int8": {name: float(i) for i, name in enumerate(layers(32))}}
    question = Question(layers=layers(32), precisions=("int8",), budget=50.0)
    first = Stopping(costs)
    with pytest.raises(KeyboardInterrupt):
        search(first, question, state=State(tmp_path, {"model": "a"}))
    second = Fake(costs)
    resumed = search(second, question, state=State(tmp_path, {"model": "a"}))
    whole = Fake(costs)
    assert resumed == search(whole, question)
    assert len(first.asked) + len(second.asked) == len(whole.asked)
    assert second.asked.count("sensitivity") == 0


def test_finished_search_asks_nothing_when_it_runs_again(tmp_path: Path):
    fake, question = int8_only(4, [0.1] * 4, budget=1.0)
    fake.times = clock_of([5, 9, 5, 20], [10, 9.5, 10, 10], border_us=1.0)
    first = search(fake, question, state=State(tmp_path, {}))
    fake.asked.clear()
    assert search(fake, question, state=State(tmp_path, {})) == first
    assert fake.asked == []


@pytest.mark.parametrize("key", [{"model": "b"}, {"model": "a", "data": "x"}])
def test_search_begins_anew_when_model_or_data_differ(tmp_path: Path, key: dict[str, str]):
    fake, question = int8_only(4, [0.1] * 4, budget=1.0)
    search(fake, question, state=State(tmp_path, {"model": "a"}))
    fake.asked.clear()
    search(fake, question, state=State(tmp_path, key))
    assert "lost" in fake.asked


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"answers": [1]}', "\x00"])
def test_search_begins_anew_when_its_file_is_damaged(tmp_path: Path, damage: str):
    fake, question = int8_only(4, [0.1] * 4, budget=1.0)
    whole = search(fake, question, state=(state := State(tmp_path, {})))
    state.path.write_text(damage)
    assert State(tmp_path, {}).resumed == 0
    assert search(fake, question, state=State(tmp_path, {})) == whole
    assert State(tmp_path, {}).resumed > 0


def test_no_draft_is_left_beside_the_file(tmp_path: Path):
    fake, question = int8_only(4, [0.1] * 4, budget=1.0)
    search(fake, question, state=State(tmp_path, {}))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("seconds", [1.5, 2.5, 3.5, 4.5, 5.5])
def test_time_limit_ends_with_a_result_that_was_probed(seconds: float):
    costs = [1.0 if i < 3 else 0.001 for i in range(32)]
    fake, question = int8_only(32, costs, budget=0.5)
    answer = search(fake, question, seconds=seconds)
    assert not answer.complete
    assert fake.time <= max(seconds, 2.0)  # nobody knows what the first probe will take
    lost = sum(costs[int(name.removeprefix("conv"))] for name in answer.assignment)
    assert lost <= 0.5
    left_out = set(layers(32)) - set(answer.assignment)
    assert {answer.reasons[name] for name in left_out} == {"int8: the time limit came first"}


def test_every_build_gets_one_answer_on_when_calibration_takes_all_of_its_time():
    fake, question = int8_only(8, [1.0] * 2 + [0.0] * 6, budget=0.5)
    state = State(None, {})
    builds = 0
    complete = False
    while not complete:
        asked = fake.time
        answer = Controller(
            question, Remembering(fake, state, seconds=0, now=fake.now), Task()
        ).run()
        complete = answer.complete
        assert fake.time <= asked + 1.0  # each answer takes a second here
        builds += 1
    assert 2 < builds <= most_probes(question)
    assert set(answer.assignment) == set(layers(8)) - {"conv0", "conv1"}


def test_most_probes_is_the_worked_number():
    question = Question(layers=layers(21), precisions=("int8",), budget=0.0)
    assert most_probes(question) == 8
    refused = {"int8": dict.fromkeys(layers(21), "no")}
    nothing = Question(layers=layers(21), precisions=("int8",), budget=0.0, refused=refused)
    assert most_probes(nothing) == 2


def test_progress_says_which_probe_it_is_and_how_long_it_takes():
    fake, question = int8_only(8, [1.0] * 4 + [0.0] * 4, budget=0.5)
    fake.seconds = 10.0
    task = Task()
    Controller(question, Remembering(fake, State(None, {}), now=fake.now), task).run()
    assert task.details[:3] == [
        "sensitivity of each layer",
        "probe 1: 8 of 8 layers in int8",
        "probe 2: 4 of 8 layers in int8, at most 50 s left",
    ]
    assert duration(99) == "99 s"
    assert duration(240) == "4 min"
