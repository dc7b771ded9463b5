from __future__ import annotations

import math

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.errors import UsageError
from hone.passes.distill.kl_loss import DistillationLoss, KLDivergence, SquaredError, Term

RNG = np.random.default_rng(0)


def compiled(terms: list[Term], *shapes: tuple[int, ...]) -> relax.VirtualMachine:
    """Return a machine with the loss and its gradient by the student's outputs."""
    types = [relax.TensorType(shape, "float32") for shape in shapes]
    loss = DistillationLoss(terms)(*types * 2).with_attr("global_symbol", "loss")
    module = tvm.IRModule({"loss": loss})
    module = relax.transform.Gradient("loss", require_grads=list(loss.params[: len(shapes)]))(
        module
    )
    return relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())


def tensors(*arrays: np.ndarray) -> list[tvm.runtime.Tensor]:
    return [tvm.runtime.tensor(np.asarray(a, "float32")) for a in arrays]


def kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """T² · mean of Σ p_teacher (log p_teacher − log p_student), in float64."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype("float64") / temperature
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    s, t = log_softmax(student), log_softmax(teacher)
    return temperature**2 * float((np.exp(t) * (t - s)).sum(-1).mean())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 5)])
def test_kl_equals_numpy_and_finite_differences_when_random(
    shape: tuple[int, ...], temperature: float
) -> None:
    student, teacher = 3 * RNG.standard_normal((2, *shape))
    machine = compiled([KLDivergence(temperature)], shape)
    value, (slope,) = machine["loss_adjoint"](*tensors(student, teacher))
    # float32 sums of a few terms of size 10.
    np.testing.assert_allclose(value.numpy(), kl(student, teacher, temperature), rtol=1e-5)
    step = 1e-5
    for index in np.ndindex(*shape):
        moved = student.copy()
        moved[index] += step
        back = student.copy()
        back[index] -= step
        difference = (kl(moved, teacher, temperature) - kl(back, teacher, temperature)) / (2 * step)
        np.testing.assert_allclose(slope.numpy()[index], difference, rtol=1e-4, atol=1e-5)


def test_kl_is_zero_when_student_and_teacher_agree() -> None:
    logits = RNG.standard_normal((3, 4))
    machine = compiled([KLDivergence(2.0)], (3, 4))
    value, (slope,) = machine["loss_adjoint"](*tensors(logits, logits + 5.0))  # softmax ignores it
    np.testing.assert_allclose(value.numpy(), 0.0, atol=1e-6)
    np.testing.assert_allclose(slope.numpy(), 0.0, atol=1e-6)


def test_kl_is_the_documented_number_when_the_docstrings_example() -> None:
    machine = compiled([KLDivergence(2.0)], (1, 2))
    value = machine["loss"](*tensors([[2 * math.log(3.0), 0.0]], [[0.0, 0.0]]))
    # softmax of the student's softened logits [ln 3, 0] is [3/4, 1/4].
    want = 4 * 0.5 * (math.log(0.5 / 0.75) + math.log(0.5 / 0.25))
    np.testing.assert_allclose(value.numpy(), want, rtol=1e-6)
    assert round(want, 4) == 0.5754


def test_squared_error_equals_numpy_when_scaled() -> None:
    student, teacher = RNG.standard_normal((2, 2, 3, 4))
    machine = compiled([SquaredError(0.5)], (2, 3, 4))
    value, (slope,) = machine["loss_adjoint"](*tensors(student, teacher))
    difference = student - teacher
    np.testing.assert_allclose(value.numpy(), np.mean(difference**2) / 0.5, rtol=1e-5)
    np.testing.assert_allclose(slope.numpy(), 2 * difference / (24 * 0.5), rtol=1e-5, atol=1e-7)


def test_losses_add_up_when_there_are_several_outputs() -> None:
    a, b = RNG.standard_normal((2, 2, 3))
    c, d = RNG.standard_normal((2, 2, 1))
    machine = compiled([KLDivergence(2.0), SquaredError()], (2, 3), (2, 1))
    value = machine["loss"](*tensors(a, c, b, d))
    np.testing.assert_allclose(value.numpy(), kl(a, b, 2.0) + np.mean((c - d) ** 2), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: KLDivergence(0.0), "the temperature must be above 0, not 0.0"),
        (lambda: SquaredError(-1.0), "the scale must be above 0, not -1.0"),
        (lambda: DistillationLoss([]), "a distillation loss needs at least one output"),
    ],
)
def test_losses_raise_when_an_option_is_out_of_range(make: object, text: str) -> None:
    with pytest.raises(UsageError) as error:
        make()
    assert str(error.value) == text
