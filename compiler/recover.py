"""Recovery after a lossy step: the student learns to answer like its teacher, without labels.

Everything runs in Relax: the student's weights become parameters, its gradients come from
``relax.transform.Gradient``, and forward pass, backward pass and optimizer are compiled for the
host. With a fixed seed and number of threads the result is the same bit by bit on one machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax
from tvm.relax.training import SetupTrainer

from hone.passes.distill import gradients
from hone.passes.distill.adam import Adam
from hone.passes.distill.kl_loss import DistillationLoss, KLDivergence, SquaredError, Term
from hone.passes.distill.legalize_training import LegalizeTraining
from hone.passes.distill.lift_constants import (
    BindConstants,
    LiftConstants,
    Trainable,
    trainable_constants,
)
from hone.passes.graph.dataflow import Dataflow, Rebuilder, layer_of, shape_of, variables
from hone.passes.graph.fold_batch_norm import FoldBatchNorm
from hone.passes.graph.rebatch import Rebatch
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target, resolve

from . import pipeline
from .augment import Augmentation
from .errors import ModelError, UsageError
from .progress import Progress, silent

# The learning rate rises over this fraction of the training, then falls as a cosine to zero.
WARM_UP = 0.05
DEFAULT_AUGMENTATION = Augmentation(shift=1, mix=0.5)

# The functions of a module that SetupTrainer made.
_BACKBONE = "backbone"
_LOSS = "backbone_loss"
_STEP = "backbone_loss_adjoint"
_OPTIMIZER = "optimizer"

_CONV2D = tvm.ir.Op.get("relax.nn.conv2d")
_SOFTMAX = tvm.ir.Op.get("relax.nn.softmax")
"""Distillation reads the logits below a network's last softmax."""


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
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
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
        Of the order and of the augmentation of the samples.
    threads : int
        Threads of every kernel.
    augmentation : Augmentation
        Changes each batch before both networks see it.
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
    for name, value in (("epochs", epochs), ("batch", batch), ("threads", threads)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if not learning_rate > 0.0:
        raise UsageError(f"the learning rate must be above 0, not {learning_rate}")
    progress = progress or silent()
    student = FoldBatchNorm()(student)
    samples = _samples(student["main"], inputs)
    own = shape_of(student["main"].params[0])[0]
    batch = max(min(batch, len(samples[0])) // own, 1) * own
    compiler = _Compiler(target=resolve(target), threads=threads)
    with progress.task("compile the training step"):
        ask = _teacher(compiler, teacher, batch)
        answers = _in_batches(ask, samples, batch)
        terms, notes = _terms(student["main"], answers, temperature)
        trainer = _Trainer(compiler, student, terms, batch)
    notes += trainer.notes
    if not augmentation.applies_to(samples):
        augmentation = Augmentation()
    loss_before = trainer.evaluate(samples, answers)
    initial = trainer.weights()
    rng = np.random.default_rng(seed)
    steps_per_epoch = len(samples[0]) // batch
    losses: list[float] = []
    with progress.task("recover", total=epochs) as task:
        for epoch in range(epochs):
            order = rng.permutation(len(samples[0]))
            epoch_losses = []
            for index in range(steps_per_epoch):
                done = (epoch * steps_per_epoch + index) / (epochs * steps_per_epoch)
                if time_limit_s is not None:
                    done = max(done, (time.monotonic() - started) / time_limit_s)
                chosen = order[index * batch : (index + 1) * batch]
                rows = [array[chosen] for array in samples]
                if augmentation == Augmentation():
                    wanted = [answer[chosen] for answer in answers]
                else:
                    rows = augmentation.apply(rows, rng)
                    wanted = ask(rows)
                trainer.learning_rate = learning_rate * schedule(min(done, 1.0))
                epoch_losses.append(trainer.step(rows, wanted))
            losses.append(float(np.mean(epoch_losses)))
            task.update(epoch + 1, f"loss {losses[-1]:.4g}")
            if time_limit_s is not None and time.monotonic() - started >= time_limit_s:
                notes.append(
                    f"the time limit of {time_limit_s:g} s ended the training after "
                    f"{epoch + 1} of {epochs} epochs"
                )
                break
    loss_after = trainer.evaluate(samples, answers)
    weights = trainer.weights()
    if not loss_after <= loss_before:
        notes.append(
            f"training raised the loss from {loss_before:.4g} to {loss_after:.4g}: the weights "
            "stay as they were; a lower learning rate may help"
        )
        weights, loss_after = initial, loss_before
    return RecoverResult(
        module=BindConstants(weights)(LiftConstants(names=weights.keys())(student)),
        losses=tuple(losses),
        loss_before=loss_before,
        loss_after=loss_after,
        steps=len(losses) * steps_per_epoch,
        seconds=time.monotonic() - started,
        notes=tuple(notes),
    )


def schedule(done: float) -> float:
    """Return the fraction of the learning rate when a fraction of the training is done.

    ``done / 0.05`` up to 0.05, then ``(1 + cos(π (done − 0.05) / 0.95)) / 2``: 0.5 at 0.525.
    """
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1.0 + math.cos(math.pi * (done - WARM_UP) / (1.0 - WARM_UP)))


@dataclass(frozen=True, kw_only=True)
class _Compiler:
    """The one place where training functions become machine code."""

    target: Target
    threads: int

    def forward(self, module: tvm.IRModule) -> relax.VirtualMachine:
        """Compile a network like any model."""
        lowered = pipeline.lower(module, self.target, threads=self.threads)
        scheduled = pipeline.schedule(lowered, self.target, threads=self.threads)
        return self._machine(scheduled.module)

    def training(self, module: tvm.IRModule) -> relax.VirtualMachine:
        """Compile functions with gradients, whose weights are parameters."""
        machine = Machine.of(self.target, self.threads)
        transform = relax.transform
        with self.target.tvm_target(self.threads):
            lowered = tvm.transform.Sequential(
                [
                    LegalizeTraining(machine),
                    transform.AnnotateTIROpPattern(),
                    transform.FuseOps(),
                    transform.FuseTIR(),
                    transform.DeadCodeElimination([_LOSS, _STEP, _OPTIMIZER]),
                ]
            )(module)
        return self._machine(ScheduleModule(machine)(lowered))

    def _machine(self, scheduled: tvm.IRModule) -> relax.VirtualMachine:
        executable = pipeline.build_executable(scheduled, self.target, threads=self.threads)
        return relax.VirtualMachine(executable, tvm.cpu())


class _Trainer:
    """The compiled training step of a student, with its weights and optimizer states.

    Parameters
    ----------
    compiler : _Compiler
        Target and threads.
    student : tvm.IRModule
        At its own batch.
    terms : sequence of Term
        Loss of each output.
    batch : int
        Samples in a step.
    """

    def __init__(
        self, compiler: _Compiler, student: tvm.IRModule, terms: Sequence[Term], batch: int
    ) -> None:
        batched = Rebatch(batch)(student)
        found = _same_shapes(trainable_constants(student), trainable_constants(batched))
        if not found:
            raise ModelError("the model has no float32 weight of a convolution or matmul to train")
        self.notes: list[str] = []
        self._names = [constant.name for constant in found]
        self.learning_rate = 0.0
        backbone = _backbone(LiftConstants(names=self._names)(batched)["main"])
        _require_gradients(backbone, len(student["main"].params))
        attributes = {"param_num": len(found), "state_num": 0}
        module = tvm.IRModule({_BACKBONE: backbone}).with_attrs(attributes)
        outputs = Dataflow(backbone).outputs
        loss, optimizer = DistillationLoss(terms), Adam()
        types = [output.ty for output in outputs] * 2
        module = SetupTrainer(loss, optimizer, types, legalize=False)(module)
        functions = compiler.training(module)
        self._batch = batch
        self._loss = functions[_LOSS]
        self._adjoint = functions[_STEP]
        self._optimizer = functions[_OPTIMIZER]
        self._weights = [tvm.runtime.tensor(constant.value) for constant in found]
        self._states = list(optimizer.state)

    def step(self, inputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
        """Take one optimizer step on a batch and return its loss."""
        loss, slopes = self._adjoint(*_tensors(inputs), *self._weights, *_tensors(wanted))
        self._states[0] = tvm.runtime.tensor(np.array(self.learning_rate, np.float32))
        weights, states = self._optimizer(self._weights, list(slopes), self._states)
        self._weights, self._states = list(weights), list(states)
        return float(loss.numpy())

    def evaluate(self, inputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
        """Return the mean loss over all samples; a remainder of the batch is left out."""
        batch = self._batch
        losses = [
            self._loss(
                *_tensors([array[start : start + batch] for array in inputs]),
                *self._weights,
                *_tensors([array[start : start + batch] for array in wanted]),
            )
            for start in range(0, len(inputs[0]) - batch + 1, batch)
        ]
        return float(np.mean([loss.numpy() for loss in losses]))

    def weights(self) -> dict[str, np.ndarray]:
        """Return the present weights by name."""
        arrays = [np.array(weight.numpy()) for weight in self._weights]
        return dict(zip(self._names, arrays, strict=True))


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
    compiler: _Compiler, teacher: tvm.IRModule, batch: int
) -> Callable[[Sequence[np.ndarray]], list[np.ndarray]]:
    """Return the function from one batch of inputs to the teacher's outputs."""
    module = Rebatch(batch)(FoldBatchNorm()(teacher))
    main = _backbone(module["main"]).with_attr("global_symbol", "main")
    machine = compiler.forward(tvm.IRModule({"main": main}))

    def ask(inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        outputs = machine["main"](*_tensors(inputs))
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


def _same_shapes(constants: Sequence[Trainable], batched: Sequence[Trainable]) -> list[Trainable]:
    """Return the constants that are not repeated for each sample of the batch."""
    shapes = {constant.name: constant.value.shape for constant in batched}
    return [constant for constant in constants if shapes.get(constant.name) == constant.value.shape]


def _backbone(main: relax.Function) -> relax.Function:
    """Return the network with each output a variable of its own, logits instead of softmax."""
    graph = Dataflow(main)
    outputs = []
    for output in graph.outputs:
        call = graph.call(output, _SOFTMAX)
        last = call is not None and int(call.attrs.axis) in (-1, len(shape_of(call)) - 1)
        outputs.append(call.args[0] if call is not None and last else output)
    builder = Rebuilder(main)
    for binding in graph.bindings:
        builder.copy(binding)
    results = [
        builder.emit(builder.use(output), f"output_{index}", output=True)
        for index, output in enumerate(outputs)
    ]
    function = builder.finish(results[0] if len(results) == 1 else relax.Tuple(results))
    return function.with_attr("global_symbol", _BACKBONE)


def _require_gradients(main: relax.Function, inputs: int) -> None:
    """Raise an error that lists every layer behind a trained weight without a gradient."""
    gradients.register()
    reached = set(list(main.params)[inputs:])
    problems = []
    for binding in Dataflow(main).bindings:
        value = binding.value
        if not reached.intersection(variables(value)):
            continue
        reached.add(binding.var)
        if isinstance(value, relax.Call) and not _is_differentiable(value):
            problems.append(f"{layer_of(binding.var)}: {value.op.name} has no gradient")
    if problems:
        raise ModelError(
            "the model cannot be trained",
            problems=problems,
            hint="leave recovery out of the recipe",
        )


def _is_differentiable(call: relax.Call) -> bool:
    if call.op.same_as(_CONV2D):
        # Relax's gradient of a convolution takes it for one that is not dilated.
        layouts = (str(call.attrs.data_layout), str(call.attrs.kernel_layout))
        return layouts == ("NCHW", "OIHW") and all(int(step) == 1 for step in call.attrs.dilation)
    return isinstance(call.op, tvm.ir.Op) and gradients.has_gradient(call.op)


def _tensors(arrays: Sequence[np.ndarray]) -> list[tvm.runtime.Tensor]:
    return [tvm.runtime.tensor(array) for array in arrays]
