"""A student and its teacher, compiled for training: the student learns to answer likewise.

The student's weights become parameters, its gradients come from ``relax.transform.Gradient``, and
forward pass, backward pass and optimizer are compiled for the host. With a fixed seed and number of
threads the result is the same bit by bit on one machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax

from hone.passes.apply import apply
from hone.passes.distill.fake_quantize import FakeQuantize
from hone.passes.distill.kl_loss import KLDivergence, SquaredError, Term
from hone.passes.distill.lift_constants import BindConstants, LiftConstants, trainable_constants
from hone.passes.distill.training_view import ToNCHW, backbone, in_own_layout
from hone.passes.graph.dataflow import Dataflow, layer_of, shape_of
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.graph.rebatch import Rebatch
from hone.passes.quantize.quantize_int8 import QuantizedRead
from hone.targets.target import Target, resolve

from .errors import UsageError
from .progress import Progress, silent
from .trainer import Compiler, Trainer, tensors

# The learning rate rises over this fraction of the training, then falls as a cosine to zero.
WARM_UP = 0.05
# The digits CNN (top-1 99.1%), half of its channels removed, 256 samples, three seeds: 98.9 to
# 99.1% without mixing, 99.6% with half of the samples mixed; 99.3 to 99.6% with all of them.
MIX = 0.5


@dataclass(frozen=True, kw_only=True)
class RecoverResult:
    """A recovered student.

    Parameters
    ----------
    module : tvm.IRModule
        The student with new weights, batch norm folded; same inputs, outputs and layer ids.
    losses : tuple of float
        Mean training loss of each epoch.
    loss_before, loss_after : float
        Loss on the unchanged samples, before and after.
    steps : int
        Optimizer steps taken.
    seconds : float
        Wall time, compiling included.
    notes : tuple of str
        What the user should know: outputs trained by squared error, a time limit reached, weights
        that stayed as they were.
    """

    module: tvm.IRModule
    losses: tuple[float, ...]
    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    notes: tuple[str, ...] = field(default=())


class Distillation:
    """A student and its teacher, compiled once, for one training or several.

    Parameters
    ----------
    student, teacher : tvm.IRModule
        One function ``main`` each, with the same inputs and outputs and constant float32 weights.
        Convolutions of the student may be in NHWC.
    inputs : mapping of str to ndarray
        Input name → [samples, *input shape].
    batch : int
        Samples in a step; rounded down to a multiple of the model's own batch, and to the number
        of samples.
    temperature : float
        Softens both sides of the KL divergence.
    threads : int
        Threads of every kernel.
    mix : float
        As for `distill`.
    target : str or Target
        What the training runs on: this machine.
    reads : sequence of QuantizedRead
        Activations that are rounded while training, see `FakeQuantize`.
    progress : Progress, optional
        Is told epochs and losses.

    Raises
    ------
    UsageError
        An option or the samples do not fit.
    ModelError
        Nothing can be trained, a layer has no gradient, or the batch cannot be followed.
    """

    def __init__(
        self,
        student: tvm.IRModule,
        teacher: tvm.IRModule,
        inputs: Mapping[str, np.ndarray],
        *,
        batch: int = 32,
        temperature: float = 2.0,
        threads: int = 1,
        mix: float = MIX,
        target: str | Target = "host",
        reads: Sequence[QuantizedRead] = (),
        progress: Progress | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("threads", threads)):
            if value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if not 0.0 <= mix <= 1.0:
            raise UsageError(f"mix must be in [0, 1], not {mix}")
        self._progress = progress or silent()
        self._student = apply(student, FoldBatchNorm())
        self._samples = _samples(student["main"], inputs)
        own = shape_of(student["main"].params[0])[0]
        self._batch = max(min(batch, len(self._samples[0])) // own, 1) * own
        # Integers cannot be mixed.
        floating = all(array.dtype.kind == "f" for array in self._samples)
        self._mix = mix if floating else 0.0
        compiler = Compiler(target=resolve(target), threads=threads)
        view = apply(self._student, ToNCHW())
        with self._progress.task("compile the training step"):
            self._ask = _teacher(compiler, teacher, self._batch)
            self._answers = _in_batches(self._ask, self._samples, self._batch)
            terms, notes = _terms(view["main"], self._answers, temperature)
            self.trainer = Trainer(
                compiler, view, terms, self._batch, view=[FakeQuantize(reads)] if reads else ()
            )
        self.notes: tuple[str, ...] = tuple(notes)

    def loss(self) -> float:
        """Return the mean loss on the unchanged samples."""
        return self.trainer.evaluate(self._samples, self._answers)

    def train(
        self,
        *,
        epochs: int,
        learning_rate: float,
        seed: int = 0,
        time_limit_s: float | None = None,
        name: str = "recover",
    ) -> list[float]:
        """Train, and return the mean loss of each epoch.

        Parameters
        ----------
        epochs : int
            Passes over the samples; fewer when the time limit ends them.
        learning_rate : float
            The highest one.
        seed : int
            Of the order and of the mixing of the samples.
        time_limit_s : float, optional
            Wall seconds. The learning rate then falls to zero by that time.
        name : str
            Of the progress bar.
        """
        if epochs < 1:
            raise UsageError(f"epochs must be at least 1, not {epochs}")
        if not learning_rate > 0.0:
            raise UsageError(f"the learning rate must be above 0, not {learning_rate}")
        started = time.monotonic()
        rng = np.random.default_rng(seed)
        steps = self.steps_per_epoch
        losses: list[float] = []
        with self._progress.task(name, total=epochs) as task:
            for epoch in range(epochs):
                order = rng.permutation(len(self._samples[0]))
                epoch_losses = []
                for index in range(steps):
                    done = (epoch * steps + index) / (epochs * steps)
                    if time_limit_s is not None:
                        done = max(done, (time.monotonic() - started) / time_limit_s)
                    self.trainer.learning_rate = learning_rate * schedule(min(done, 1.0))
                    chosen = order[index * self._batch : (index + 1) * self._batch]
                    epoch_losses.append(self.trainer.step(*self._drawn(chosen, rng)))
                losses.append(float(np.mean(epoch_losses)))
                task.update(epoch + 1, f"loss {losses[-1]:.4g}")
                if time_limit_s is not None and time.monotonic() - started >= time_limit_s:
                    break
        return losses

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the samples."""
        return len(self._samples[0]) // self._batch

    def module(self) -> tvm.IRModule:
        """Return the student with its present weights, in its own layout."""
        weights = self.trainer.weights()
        graph = Dataflow(self._student["main"])
        own = {
            constant.name: in_own_layout(graph, constant, weights[constant.name])
            for constant in trainable_constants(self._student)
            if constant.name in weights
        }
        return apply(self._student, LiftConstants(names=own.keys()), BindConstants(own))

    def conclude(
        self,
        losses: Sequence[float],
        *,
        epochs: int,
        loss_before: float,
        initial: Mapping[str, np.ndarray],
        started: float,
        time_limit_s: float | None = None,
    ) -> RecoverResult:
        """Return what a training came to; one that raised the loss is undone.

        Parameters
        ----------
        losses : sequence of float
            Of the epochs that were taken.
        epochs : int
            How many were wanted.
        loss_before : float
            Before the training.
        initial : mapping
            The trainer's weights then.
        started : float
            When it began, by `time.monotonic`.
        time_limit_s : float, optional
            Wall seconds that it had.
        """
        notes = list(self.notes)
        if len(losses) < epochs:
            notes.append(
                f"the time limit of {time_limit_s:g} s ended the training after "
                f"{len(losses)} of {epochs} epochs"
            )
        loss_after = self.loss()
        if not loss_after <= loss_before:
            notes.append(
                f"training raised the loss from {loss_before:.4g} to {loss_after:.4g}: the weights "
                "stay as they were; a lower learning rate may help"
            )
            self.trainer.restart(initial)
            loss_after = loss_before
        return RecoverResult(
            module=self.module(),
            losses=tuple(losses),
            loss_before=loss_before,
            loss_after=loss_after,
            steps=len(losses) * self.steps_per_epoch,
            seconds=time.monotonic() - started,
            notes=tuple(notes),
        )

    def _drawn(
        self, chosen: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return a batch of samples and what the teacher says of them."""
        rows = [array[chosen] for array in self._samples]
        if not self._mix:
            return rows, [answer[chosen] for answer in self._answers]
        rows = mixed(rows, self._mix, rng)
        return rows, self._ask(rows)


def schedule(done: float) -> float:
    """Return the fraction of the learning rate when a fraction of the training is done.

    ``done / 0.05`` up to 0.05, then ``(1 + cos(π (done − 0.05) / 0.95)) / 2``: 0.5 at 0.525.
    """
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1.0 + math.cos(math.pi * (done - WARM_UP) / (1.0 - WARM_UP)))


def mixed(
    inputs: Sequence[np.ndarray], fraction: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Return a batch in which some samples are ``λ a + (1 − λ) b`` of two of its samples.

    Parameters
    ----------
    inputs : sequence of ndarray
        Floating point, [N, ...] each.
    fraction : float
        Probability that a sample is mixed; λ is then uniform in [0, 1].
    rng : numpy.random.Generator
        Draws partners and λ.
    """
    count = len(inputs[0])
    partner = rng.permutation(count)
    share = np.where(rng.random(count) < fraction, rng.random(count), 1.0)
    result = []
    for array in inputs:
        own = share.astype(array.dtype).reshape(-1, *[1] * (array.ndim - 1))
        result.append(array * own + array[partner] * (1 - own))
    return result


def _samples(main: relax.Function, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return the samples in the order of the parameters, as [samples × batch, ...]."""
    names = [str(param.name) for param in main.params]
    if set(names) != set(inputs):
        raise UsageError(
            f"samples for the inputs {', '.join(map(repr, names))} are required, "
            f"given are {', '.join(map(repr, inputs))}"
        )
    result = []
    for param in main.params:
        array, wanted = inputs[str(param.name)], shape_of(param)
        if array.shape[1:] != wanted or str(array.dtype) != str(param.ty.dtype):
            raise UsageError(
                f"samples of {param.ty.dtype} [*, {', '.join(map(str, wanted))}] are required, "
                f"given are {array.dtype} {list(array.shape)}",
                where=str(param.name),
            )
        result.append(np.ascontiguousarray(array).reshape(-1, *wanted[1:]))
    if len({len(array) for array in result}) != 1 or not len(result[0]):
        raise UsageError("recovery needs the same number of samples, at least one, of each input")
    return result


def _teacher(
    compiler: Compiler, teacher: tvm.IRModule, batch: int
) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Return the function from one batch of inputs to the teacher's outputs."""
    module = apply(teacher, FoldBatchNorm(), Rebatch(batch))
    main = backbone(module["main"]).with_attr("global_symbol", "main")
    machine = compiler.forward(tvm.IRModule({"main": main}))

    def ask(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        outputs = machine["main"](*tensors(inputs))
        outputs = [outputs] if isinstance(outputs, tvm.runtime.Tensor) else outputs
        return [output.numpy() for output in outputs]

    return ask


def _in_batches(
    ask: Callable[[Sequence[np.ndarray]], list[np.ndarray]],
    samples: Sequence[np.ndarray],
    batch: int,
) -> list[np.ndarray]:
    """Return the teacher's outputs for all samples."""
    count = len(samples[0])
    parts = []
    for start in range(0, count, batch):
        # The last batch is filled up with samples from the beginning.
        chosen = np.arange(start, start + batch) % count
        parts.append(ask([array[chosen] for array in samples]))
    return [np.concatenate(arrays)[:count] for arrays in zip(*parts, strict=True)]


def _terms(
    main: relax.Function, answers: Sequence[np.ndarray], temperature: float
) -> tuple[list[Term], list[str]]:
    """Return the loss of each output, and a note for each one that is not classes."""
    terms: list[Term] = []
    notes = []
    outputs = Dataflow(main).outputs
    for output, answer in zip(outputs, answers, strict=True):
        if answer.ndim == 2 and answer.shape[1] > 1:
            terms.append(KLDivergence(temperature))
            continue
        variance = float(np.var(answer, dtype=np.float64))
        terms.append(SquaredError(variance if variance > 0.0 else 1.0))
        name = layer_of(output) if isinstance(output, relax.Var) else "output"
        notes.append(f"{name!r} of shape {list(answer.shape[1:])} is trained by squared error")
    return terms, notes
