"""1-D and transposed convolutions become plain ones and compute what they did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import tvm
from tvm import relax

from hone.passes.lower.unify_convolutions import Phases, UnifyConvolutions

RunOp = Callable[..., tuple[np.ndarray, list[str]]]


def transposed_oracle(
    x: np.ndarray,
    weight: np.ndarray,
    *,
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    output_padding: tuple[int, int],
) -> np.ndarray:
    """Scatter every input times every tap in float64, then crop the padding."""
    batch, _, height, width = x.shape
    _, channels, taps_h, taps_w = weight.shape
    top, left, bottom, right = padding
    full = np.zeros(
        (
            batch,
            channels,
            (height - 1) * strides[0] + taps_h + output_padding[0],
            (width - 1) * strides[1] + taps_w + output_padding[1],
        )
    )
    for r in range(taps_h):
        for s in range(taps_w):
            part = np.einsum("nchw,ck->nkhw", x.astype("float64"), weight[:, :, r, s])
            full[
                :,
                :,
                r : r + (height - 1) * strides[0] + 1 : strides[0],
                s : s + (width - 1) * strides[1] + 1 : strides[1],
            ] += part
    return full[:, :, top : full.shape[2] - bottom, left : full.shape[3] - right]


@dataclass(frozen=True, kw_only=True)
class Case:
    id: str
    x: tuple[int, int, int, int]
    k: int
    taps: tuple[int, int]
    strides: tuple[int, int] = (2, 2)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    output_padding: tuple[int, int] = (0, 0)


CASES = [
    Case(id="doubling", x=(1, 16, 7, 5), k=24, taps=(2, 2)),
    Case(id="odd taps", x=(3, 7, 9, 8), k=5, taps=(3, 3), padding=(1, 1, 1, 1),
         output_padding=(1, 1)),
    Case(id="uneven", x=(1, 3, 5, 6), k=4, taps=(5, 3), strides=(3, 2), padding=(2, 1, 1, 0),
         output_padding=(1, 0)),
    Case(id="stride one", x=(1, 4, 5, 5), k=6, taps=(3, 3), strides=(1, 1), padding=(1, 1, 1, 1)),
    Case(id="stride larger than the taps", x=(1, 4, 5, 3), k=6, taps=(1, 1),
         output_padding=(1, 1)),
    Case(id="one pixel", x=(1, 5, 1, 1), k=3, taps=(4, 4), padding=(1, 1, 1, 1)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_transposed_convolution_equals_the_oracle(
    case: Case, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(case.x).astype("float32")
    weight = rng.standard_normal((case.x[1], case.k, *case.taps)).astype("float32")
    exact = transposed_oracle(
        x, weight, strides=case.strides, padding=case.padding, output_padding=case.output_padding
    )
    actual, rules = run_op(
        lambda v: relax.op.nn.conv2d_transpose(
            v,
            relax.const(weight),
            strides=case.strides,
            padding=case.padding,
            output_padding=case.output_padding,
        ),
        x,
    )
    assert {"conv2d", "winograd"} & set(rules)
    # Sums of at most 64 products of size about 1: 64 units of 2**-24 times their magnitude.
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_transposed_convolution_over_nhwc_equals_the_oracle(
    case: Case, run_op: RunOp, rng: np.random.Generator
) -> None:
    x = rng.standard_normal(case.x).astype("float32")
    weight = rng.standard_normal((case.x[1], case.k, *case.taps)).astype("float32")
    exact = transposed_oracle(
        x, weight, strides=case.strides, padding=case.padding, output_padding=case.output_padding
    )
    actual, rules = run_op(
        lambda v: relax.op.nn.conv2d_transpose(
            v,
            relax.const(weight),
            strides=case.strides,
            padding=case.padding,
            output_padding=case.output_padding,
            data_layout="NHWC",
        ),
        np.ascontiguousarray(x.transpose(0, 2, 3, 1)),
    )
    assert {"conv2d", "winograd"} & set(rules)
    np.testing.assert_allclose(actual.transpose(0, 3, 1, 2), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "k", "taps", "stride", "padding", "dilation", "groups"),
    [((1, 7, 33), 5, 3, 1, (1, 1), 1, 1), ((3, 16, 40), 32, 5, 2, (2, 1), 1, 1),
     ((2, 8, 20), 8, 3, 1, (2, 2), 2, 8)],
    ids=str,
)  # fmt: skip
def test_conv1d_equals_the_oracle(
    x: tuple[int, int, int], k: int, taps: int, stride: int, padding: tuple[int, int],
    dilation: int, groups: int, run_op: RunOp, rng: np.random.Generator,
) -> None:  # fmt: skip
    data = rng.standard_normal(x).astype("float32")
    weight = rng.standard_normal((k, x[1] // groups, taps)).astype("float32")
    padded = np.pad(data.astype("float64"), ((0, 0), (0, 0), padding))
    size = (padded.shape[2] - dilation * (taps - 1) - 1) // stride + 1
    exact = np.zeros((x[0], k, size))
    for channel in range(k):
        first = channel // (k // groups) * weight.shape[1]
        for tap in range(taps):
            at = slice(tap * dilation, tap * dilation + (size - 1) * stride + 1, stride)
            window = padded[:, first : first + weight.shape[1], at]
            exact[:, channel] += np.einsum("ncw,c->nw", window, weight[channel, :, tap])
    actual, rules = run_op(
        lambda v: relax.op.nn.conv1d(
            v, relax.const(weight), strides=stride, padding=padding, dilation=dilation,
            groups=groups,
        ),
        data,
    )  # fmt: skip
    assert {"conv2d", "window"} & set(rules)
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)


def _module(weight: relax.Expr, x: tuple[int, ...], parameters: list[relax.Var]) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType(x, "float32"))
    with builder.function("main", [data, *parameters]):
        with builder.dataflow():
            result = builder.emit_output(relax.op.nn.conv2d_transpose(data, weight, strides=2))
        builder.emit_func_output(result)
    return builder.get()


def test_module_stays_the_same_when_the_weights_are_not_constant() -> None:
    weight = relax.Var("w", relax.TensorType((3, 4, 2, 2), "float32"))
    module = _module(weight, (1, 3, 5, 6), [weight])
    assert UnifyConvolutions()(module).same_as(module)


def test_running_it_twice_is_the_same_as_once() -> None:
    weight = relax.const(np.ones((3, 4, 2, 2), "float32"))
    once = UnifyConvolutions()(_module(weight, (1, 3, 5, 6), []))
    tvm.ir.assert_structural_equal(UnifyConvolutions()(once), once)


def test_phases_of_a_doubling_upsampling_read_one_input_each() -> None:
    phases = Phases.of(size=7, taps=2, stride=2, before=0, result=14)
    assert phases == Phases(stride=2, taps=1, padding=(0, 0), skip=0)
