from __future__ import annotations

import subprocess
import sys

import pytest
import tvm
import tvm_ffi
from tvm import relax
from tvm.s_tir import meta_schedule as ms

from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import resolve
from hone.tuning.kernel import KernelSearch, Proposal
from hone.tuning.records import kernels, workload_module
from hone.tuning.space import TemplateSpace, machines

HOST = resolve("host")
MACHINE = Machine.of(HOST, 2)
BATCH = 6


@pytest.fixture(scope="module")
def workload() -> tvm.IRModule:
    """``relu(a @ b)``, 64 x 48 x 56."""
    block = relax.BlockBuilder()
    a = relax.Var("a", relax.TensorType((64, 48), "float32"))
    b = relax.Var("b", relax.TensorType((48, 56), "float32"))
    with block.function("main", [a, b]):
        with block.dataflow():
            result = block.emit_output(relax.op.nn.relu(relax.op.matmul(a, b)))
        block.emit_func_output(result)
    (func,) = kernels(relax.get_pipeline("zero")(block.get())).values()
    return workload_module(func)


def search(workload: tvm.IRModule, records: list | None = None) -> KernelSearch:
    return KernelSearch(
        workload,
        HOST.tvm_target(2),
        MACHINE,
        records=records or [],
        database=ms.database.MemoryDatabase(),
        model=ms.CostModel.create("random"),
        batch=BATCH,
        seed=1,
    )


def template_candidates(workload: tvm.IRModule) -> list[ms.MeasureCandidate]:
    """Return what the template gives next to the untuned schedule."""
    space = TemplateSpace(workload, MACHINE, seed=1)
    found = []
    while (made := space.next(1000, lambda _: None)) and not found:
        found += [one.candidate for one in made]
    return found


def keys(proposal: Proposal) -> list[int]:
    return [tvm_ffi.structural_hash(candidate.sch.mod) for candidate in proposal.candidates]


def learn(kernel: KernelSearch, proposal: Proposal, seconds: float = 1e-3) -> None:
    count = len(proposal.candidates)
    kernel.learn(proposal, [(seconds,)] * count, list(range(count)))


def test_templates_come_first_the_untuned_schedule_leading(workload: tvm.IRModule) -> None:
    first = search(workload).propose()
    assert not first.bred
    untuned = ScheduleModule(MACHINE)(workload)["main"].without_attr("tirx.is_scheduled")
    tvm.ir.assert_structural_equal(first.candidates[0].sch.mod["main"], untuned)


def test_candidates_are_distinct_and_become_bred_after_the_first_ones(
    workload: tvm.IRModule,
) -> None:
    kernel = search(workload)
    first: list[int] = []
    proposal = kernel.propose()
    while not proposal.bred:
        assert 0 < len(proposal.candidates) <= BATCH
        first += keys(proposal)
        learn(kernel, proposal)
        proposal = kernel.propose()
    assert len(first) == len(set(first)) > BATCH
    learn(kernel, proposal)
    again = kernel.propose()
    assert again.bred
    assert not set(keys(proposal)) & set(keys(again))


def test_known_candidates_are_not_queued_again_when_a_search_resumes(
    workload: tvm.IRModule,
) -> None:
    kernel = search(workload)
    first = kernel.propose()
    assert not any(kernel.known(candidate) for candidate in first.candidates)
    records = [kernel.record(candidate, (1e-3, 2e-3)) for candidate in first.candidates]
    assert kernel.known(first.candidates[0]) == (1e-3, 2e-3)

    resumed = search(workload, records)
    again = resumed.propose()
    # Nothing that was measured is queued again; evolution may reach the same program by other
    # steps, which nobody can know beforehand.
    assert again.bred or not set(keys(first)) & set(keys(again))
    while not again.bred:
        learn(resumed, again)
        again = resumed.propose()
    assert resumed.refusal == ""
    assert resumed.known(first.candidates[-1]) == (1e-3, 2e-3)


def test_a_broken_record_does_not_stop_a_resumed_search(workload: tvm.IRModule) -> None:
    kernel = search(workload)
    record = kernel.record(kernel.propose().candidates[0], (1e-3,))
    broken = [[[["GetSBlock", [], ["nowhere", "main"], ["b0"]]], []], *record[1:]]
    assert search(workload, [broken, record]).propose().candidates


def test_only_the_template_is_tried_when_the_general_space_refuses_a_kernel(
    workload: tvm.IRModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise RuntimeError("Check failed: no such loop")

    monkeypatch.setattr(ms.TuneContext, "generate_design_space", refuse)
    kernel = search(workload)
    tried = 0
    while (proposal := kernel.propose()).candidates:
        tried += len(proposal.candidates)
        learn(kernel, proposal)
    assert kernel.refusal == "Check failed: no such loop"
    assert tried >= len(template_candidates(workload)) > 0


def test_machines_start_with_the_real_one() -> None:
    given = list(machines(MACHINE).values())
    assert given[0] == MACHINE
    assert len(given) == len(set(given))


def test_template_candidates_can_be_stored_and_replayed(workload: tvm.IRModule) -> None:
    stored = ms.database.Workload(workload)
    for candidate in template_candidates(workload):
        record = ms.database.TuningRecord(
            candidate.sch.trace, stored, [1.0], HOST.tvm_target(2), candidate.args_info
        )
        again = ms.database.TuningRecord.from_json(record.as_json(), stored)
        replayed = again.as_measure_candidate().sch.mod
        tvm.ir.assert_structural_equal(replayed, candidate.sch.mod)


def test_search_never_loads_the_tensor_intrinsics() -> None:
    code = (
        "import sys, tvm\n"
        "from hone.targets.target import resolve\n"
        "from hone.tuning import builder, worker\n"
        "from hone.tuning.kernel import make_context\n"
        "from tvm.s_tir import meta_schedule as ms\n"
        "target, strategy = resolve('host').tvm_target(1), ms.search_strategy.ReplayTrace()\n"
        "make_context(tvm.IRModule(), target, strategy, seed=1)\n"
        "print('tvm.s_tir.tensor_intrin' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr
