"""Remove channels, and recover by distillation where the recipe asks for it."""

from __future__ import annotations

from hone.errors import UsageError
from hone.model import Model
from hone.passes.apply import apply
from hone.passes.prune.prune_channels import PruneChannels

from .candidate import Candidate, Context, prepared
from .options.prune import PruneStep


def propose(model: Model, step: PruneStep, context: Context) -> Candidate:
    """Return the model without its least important channels.

    Raises
    ------
    UsageError
        Recovery lacks calibration data or the unchanged model.
    """
    pruning = PruneChannels(
        amount=step.amount, norm=step.norm, scope=step.scope, round_to=step.round_to
    )
    student = prepared(model)
    plan = pruning.plan(student)
    skipped = tuple((layer, group.reason) for group in plan.skipped for layer in group.layers)
    if not plan.removed:
        return Candidate(model=model, skipped=skipped, note="no channel can be removed")
    total = sum(group.size for group in plan.pruned)
    note = f"removed {plan.removed} of {total} channels"
    module = apply(student, pruning)
    if step.recover is not None:
        from hone import recover

        if context.teacher is None:
            raise UsageError("recovery needs the unchanged model", where="recover")
        options = step.recover
        result = recover.distill(
            module,
            prepared(context.teacher),
            context.calibration_for(step).inputs,
            epochs=options.epochs,
            batch=options.batch,
            learning_rate=options.learning_rate,
            temperature=options.temperature,
            seed=context.seed,
            threads=context.threads,
            time_limit_s=options.seconds,
            progress=context.progress,
        )
        module = result.module
        note += (
            f", recovered in {result.steps} steps of {options.batch}, loss {result.loss_before:.3g}"
        )
        note += f" → {result.loss_after:.3g}"
        note += "".join(f"; {text}" for text in result.notes)
    return Candidate(model=model.with_module(module), skipped=skipped, note=note)
