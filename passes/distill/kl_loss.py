"""The losses that make a student network repeat its teacher's outputs.

Rewrites nothing: each is a Relax function that ``SetupTrainer`` appends to a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tvm import relax
from tvm.relax.training.loss import Loss

from hone.errors import UsageError
from hone.passes.graph.dataflow import shape_of


class DistillationLoss(Loss):  # type: ignore[misc]
    """The sum of one loss for each output, between a student's outputs and a teacher's.

    Parameters
    ----------
    terms : sequence of Term
        The loss of each output, in the order of the outputs.

    Raises
    ------
    UsageError
        There is no term.

    Notes
    -----
    The function takes the student's outputs, then the teacher's, and returns a scalar. No gradient
    is to be asked for the teacher's.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        if not terms:
            raise UsageError("a distillation loss needs at least one output")
        super().__init__("distillation_loss", len(terms), "mean")
        self._terms = tuple(terms)

    def __call__(self, *tensors: relax.Type) -> relax.Function:
        """Return the loss function for the types of the student's and the teacher's outputs."""
        count = len(self._terms)
        variables = [
            relax.Var(f"{'student' if index < count else 'teacher'}_{index % count}", ty)
            for index, ty in enumerate(tensors)
        ]
        builder = relax.BlockBuilder()
        with builder.function(self._loss_name, variables):
            with builder.dataflow():
                total: relax.Expr | None = None
                for term, student, teacher in zip(
                    self._terms, variables[:count], variables[count:], strict=True
                ):
                    value = builder.emit(term(student, teacher))
                    total = value if total is None else builder.emit(relax.op.add(total, value))
                result = builder.emit_output(total)
            builder.emit_func_output(result)
        return builder.get()[self._loss_name]


class Term:
    """The loss of one output."""

    def __call__(self, student: relax.Var, teacher: relax.Var) -> relax.Expr:
        """Return the scalar loss between two tensors of one shape."""
        raise NotImplementedError


class KLDivergence(Term):
    """Kullback-Leibler divergence of softened class probabilities.

    ``T² · mean over samples of KL(softmax(teacher / T) || softmax(student / T))`` along the last
    axis (Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network"; T² keeps
    the size of the gradient independent of T). For the teacher's logits [0, 0], the student's
    [2 ln 3, 0] and T = 2 it is ``4 · (ln 4 / 2 − ln 3 / 2 + ln 4 / 2 − ln 2) = 0.5754``.

    Parameters
    ----------
    temperature : float
        T, above 0.

    Raises
    ------
    UsageError
        The temperature is not positive.
    """

    def __init__(self, temperature: float) -> None:
        if not temperature > 0.0:
            raise UsageError(f"the temperature must be above 0, not {temperature}")
        self._temperature = temperature

    def __call__(self, student: relax.Var, teacher: relax.Var) -> relax.Expr:
        """Return the divergence of logits [..., C], averaged over all axes but the last."""
        op = relax.op
        inverse = relax.const(1.0 / self._temperature, "float32")
        log_student = op.nn.log_softmax(op.multiply(student, inverse))
        log_teacher = op.nn.log_softmax(op.multiply(teacher, inverse))
        terms = op.multiply(op.exp(log_teacher), op.subtract(log_teacher, log_student))
        samples = prod(shape_of(student)[:-1])
        return op.multiply(op.sum(terms), relax.const(self._temperature**2 / samples, "float32"))


class SquaredError(Term):
    """Mean squared error, relative to the mean square of the teacher's output.

    ``mean((student − teacher)²) / scale``: with the scale set to the variance of the teacher's
    output, 1 means that the student knows nothing and one learning rate fits every network.

    Parameters
    ----------
    scale : float
        What the mean squared error is divided by, above 0.

    Raises
    ------
    UsageError
        The scale is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not scale > 0.0:
            raise UsageError(f"the scale must be above 0, not {scale}")
        self._scale = scale

    def __call__(self, student: relax.Var, teacher: relax.Var) -> relax.Expr:
        """Return the relative error of two tensors of any shape."""
        op = relax.op
        difference = op.subtract(student, teacher)
        squares = op.sum(op.multiply(difference, difference))
        count = prod(shape_of(student))
        return op.multiply(squares, relax.const(1.0 / (self._scale * count), "float32"))
