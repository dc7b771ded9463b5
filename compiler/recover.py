"""Recovery after a lossy step: the student learns to answer like its teacher, without labels."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import tvm

from hone.targets.target import Target

from .distillation import MIX, Distillation, RecoverResult
from .progress import Progress


def distill(
    student: tvm.IRModule,
    teacher: tvm.IRModule,
    inputs: Mapping[str, np.ndarray],
    *,
    epochs: int = 100,
    batch: int = 32,
    learning_rate: float = 0.003,
    temperature: float = 2.0,
    seed: int = 0,
    threads: int = 1,
    mix: float = MIX,
    target: str | Target = "host",
    progress: Progress | None = None,
    time_limit_s: float | None = None,
) -> RecoverResult:
    """Train a student to repeat its teacher's outputs on unlabelled samples.

    Outputs [N, C] with C > 1 are compared by the KL divergence of softened probabilities (their
    logits, where a softmax ends the network), other ones by squared error. The optimizer is Adam;
    its learning rate rises over the first 5% of the steps and falls as a cosine.

    Parameters
    ----------
    student, teacher : tvm.IRModule
        One function ``main`` each, with the same inputs and outputs and constant float32 weights.
    inputs : mapping of str to ndarray
        Input name → [samples, *input shape].
    epochs : int
        Passes over the samples.
    batch : int
        Samples in a step; rounded down to a multiple of the model's own batch, and to the number
        of samples.
    learning_rate : float
        The highest one.
    temperature : float
        Softens both sides of the KL divergence.
    seed : int
        Of the order and of the mixing of the samples.
    threads : int
        Threads of every kernel.
    mix : float
        Fraction of the samples, in [0, 1], that are mixed with another one of their batch before
        both networks see them: few samples then go a longer way (Beyer et al. 2022, "Knowledge
        distillation: A good teacher is patient and consistent"). Where an input is not floating
        point, nothing is mixed.
    target : str or Target
        What the training runs on: this machine.
    progress : Progress, optional
        Is told epochs and losses.
    time_limit_s : float, optional
        Wall seconds, compiling included. The learning rate then falls to zero by that time; the
        result depends on the machine's speed when the limit is reached.

    Raises
    ------
    UsageError
        An option or the samples do not fit.
    ModelError
        Nothing can be trained, a layer has no gradient, or the batch cannot be followed.
    """
    started = time.monotonic()
    run = Distillation(
        student,
        teacher,
        inputs,
        batch=batch,
        temperature=temperature,
        threads=threads,
        mix=mix,
        target=target,
        progress=progress,
    )
    loss_before, initial = run.loss(), run.trainer.weights()
    left = None if time_limit_s is None else max(time_limit_s - (time.monotonic() - started), 1e-9)
    losses = run.train(epochs=epochs, learning_rate=learning_rate, seed=seed, time_limit_s=left)
    return run.conclude(
        losses,
        epochs=epochs,
        loss_before=loss_before,
        initial=initial,
        started=started,
        time_limit_s=time_limit_s,
    )
