"""The compiled training step of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.relax.training import SetupTrainer

from hone.passes.apply import apply
from hone.passes.distill.adam import Adam
from hone.passes.distill.kl_loss import DistillationLoss, Term
from hone.passes.distill.legalize_training import LegalizeTraining
from hone.passes.distill.lift_constants import LiftConstants, Trainable, trainable_constants
from hone.passes.distill.training_view import backbone, require_gradients
from hone.passes.graph.dataflow import Dataflow
from hone.passes.graph.rebatch import Rebatch
from hone.targets.schedule.cpu import ScheduleModule
from hone.targets.schedule.machine import Machine
from hone.targets.target import Target

from . import pipeline
from .errors import ModelError

Projection = Callable[[str, np.ndarray], np.ndarray]

# The functions of a module that SetupTrainer made.
_BACKBONE = "backbone"
_LOSS = "backbone_loss"
_STEP = "backbone_loss_adjoint"
_OPTIMIZER = "optimizer"


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """Turns training functions and networks into machine code.

    Parameters
    ----------
    target : Target
        This machine.
    threads : int
        Threads of every kernel.
    """

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


class Trainer:
    """The compiled training step of a student, with its weights and optimizer states.

    Parameters
    ----------
    compiler : Compiler
        Target and threads.
    student : tvm.IRModule
        At its own batch.
    terms : sequence of Term
        Loss of each output.
    batch : int
        Samples in a step.
    view : sequence of tvm.transform.Pass
        What the training sees of the student beyond its weights, such as `FakeQuantize`; applied
        once the weights are parameters.

    Attributes
    ----------
    learning_rate : float
        Of the next step.
    project : callable or None
        Gives the network other weights than the ones that are trained: constant name and weight →
        weight of the same shape, such as the nearest one that integers can hold. The gradient is
        taken where the network is and applied where the weight is (straight-through estimator).
    frozen : mapping of str to ndarray
        Constant name → bool, where its elements get no gradient.

    Raises
    ------
    ModelError
        Nothing can be trained, a layer has no gradient, or the batch cannot be followed.
    """

    def __init__(
        self,
        compiler: Compiler,
        student: tvm.IRModule,
        terms: Sequence[Term],
        batch: int,
        *,
        view: Sequence[tvm.transform.Pass] = (),
    ) -> None:
        batched = apply(student, Rebatch(batch))
        found = _same_shapes(trainable_constants(student), trainable_constants(batched))
        if not found:
            raise ModelError("the model has no float32 weight of a convolution or matmul to train")
        self._names = [constant.name for constant in found]
        self.learning_rate = 0.0
        self.project: Projection | None = None
        self.frozen: Mapping[str, np.ndarray] = {}
        network = backbone(apply(batched, LiftConstants(names=self._names), *view)["main"])
        require_gradients(network, len(student["main"].params))
        attributes = {"param_num": len(found), "state_num": 0}
        module = tvm.IRModule({_BACKBONE: network}).with_attrs(attributes)
        outputs = Dataflow(network).outputs
        loss, optimizer = DistillationLoss(terms), Adam()
        types = [output.ty for output in outputs] * 2
        module = SetupTrainer(loss, optimizer, types, legalize=False)(module)
        functions = compiler.training(module)
        self._batch = batch
        self._loss = functions[_LOSS]
        self._adjoint = functions[_STEP]
        self._optimizer = functions[_OPTIMIZER]
        self._states = self._initial = list(optimizer.state)
        self._weights = tensors([constant.value for constant in found])

    def step(self, inputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
        """Take one optimizer step on a batch and return its loss."""
        loss, slopes = self._adjoint(*tensors(inputs), *self._used(), *tensors(wanted))
        slopes = [self._masked(*pair) for pair in zip(self._names, slopes, strict=True)]
        self._states[0] = tvm.runtime.tensor(np.array(self.learning_rate, np.float32))
        weights, states = self._optimizer(self._weights, slopes, self._states)
        self._weights, self._states = list(weights), list(states)
        return float(loss.numpy())

    def restart(self, weights: Mapping[str, np.ndarray]) -> None:
        """Go on from other weights, with an optimizer that knows nothing of earlier steps."""
        self._weights = tensors([weights[name] for name in self._names])
        self._states = list(self._initial)

    def evaluate(self, inputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
        """Return the mean loss over all samples; a remainder of the batch is left out."""
        batch = self._batch
        used = self._used()
        losses = [
            self._loss(
                *tensors([array[start : start + batch] for array in inputs]),
                *used,
                *tensors([array[start : start + batch] for array in wanted]),
            )
            for start in range(0, len(inputs[0]) - batch + 1, batch)
        ]
        return float(np.mean([loss.numpy() for loss in losses]))

    def weights(self) -> dict[str, np.ndarray]:
        """Return the present weights by name."""
        arrays = [np.array(weight.numpy()) for weight in self._weights]
        return dict(zip(self._names, arrays, strict=True))

    def _used(self) -> list[tvm.runtime.Tensor]:
        """Return the weights that the network computes with."""
        if self.project is None:
            return self._weights
        return tensors([self.project(name, value) for name, value in self.weights().items()])

    def _masked(self, name: str, slope: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
        frozen = self.frozen.get(name)
        if frozen is None:
            return slope
        return tvm.runtime.tensor(np.where(frozen, np.float32(0.0), slope.numpy()))


def _same_shapes(constants: Sequence[Trainable], batched: Sequence[Trainable]) -> list[Trainable]:
    """Return the constants that are not repeated for each sample of the batch."""
    shapes = {constant.name: constant.value.shape for constant in batched}
    return [constant for constant in constants if shapes.get(constant.name) == constant.value.shape]


def tensors(arrays: Sequence[np.ndarray]) -> list[tvm.runtime.Tensor]:
    """Copy arrays to where compiled functions can read them."""
    return [tvm.runtime.tensor(array) for array in arrays]
