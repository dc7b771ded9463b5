"""Every kind of float kernel on awkward shapes, for three targets, against numpy.

One network holds them all, so that each target compiles, links and (ARM) starts its emulator once.
The oracle is onnx's reference evaluator, which computes each operator by itself in numpy; its
transposed convolutions have no groups (onnx 1.19), so that they are here.
Elsewhere: 16-bit floats in ``test_arm_half.py``, integers in ``test_arm_integer.py``, weights of
few bits in ``test_arm_weight_only.py``; more shapes for x86 in ``tests/passes/lower``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from tvm import relax

import hone
from hone import pipeline
from hone.targets.target import Target, resolve

THREADS = 2
RULES = {
    *(
        "conv2d",
        "winograd",
        "winograd_rows",
        "window",
        "dense",
        "batch_matmul",
        "attention",
        "rows",
        "columns",
    ),
    *("bands", "copies", "pooling", "resize", "generic", "single_row", "strided_winograd"),
}


@dataclass(frozen=True, kw_only=True)
class Node:
    """An operator behind the one before it.

    Parameters
    ----------
    weights : tuple
        Further inputs: a shape of random weights, or an array.
    """

    op: str
    weights: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A chain of operators on inputs of its own.

    Parameters
    ----------
    inputs : tuple of shapes
        The first node takes all of them, before its weights.
    special : bool
        The inputs hold NaN and infinities.
    """

    kind: str
    inputs: tuple[tuple[int, ...], ...]
    nodes: tuple[Node, ...]
    special: bool = False


def conv(
    kind: str,
    x: tuple[int, ...],
    k: int,
    *,
    taps: tuple[int, ...] = (3, 3),
    pads: tuple[int, ...] = (1, 1, 1, 1),
    group: int = 1,
    op: str = "Conv",
    **attributes: Any,
) -> Case:
    weight = (k, x[1] // group, *taps) if op == "Conv" else (x[1], k // group, *taps)
    attributes |= {"pads": list(pads), "group": group}
    return Case(
        kind=kind,
        inputs=(x,),
        nodes=(Node(op=op, weights=(weight, (k,)), attributes=attributes), Node(op="Relu")),
    )


def expanded(
    x: tuple[int, ...], k: int, *, taps: int = 3, act: str = "Relu",
    strides: tuple[int, int] = (1, 1),
) -> Case:  # fmt: skip
    """Return a 1x1 convolution to k channels, and the depthwise one behind it."""
    attributes = {"pads": [taps // 2] * 4, "strides": list(strides), "group": k}
    return Case(
        kind="expansion and depthwise convolution",
        inputs=(x,),
        nodes=(
            # What reads a network's input changes its layout as well.
            Node(op="Conv", weights=((x[1], x[1], 1, 1), (x[1],))),
            Node(op="Relu"),
            Node(op="Conv", weights=((k, x[1], 1, 1), (k,))),
            Node(op=act),
            Node(op="Conv", weights=((k, 1, taps, taps), (k,)), attributes=attributes),
            Node(op=act),
        ),
    )  # fmt: skip


def projected(
    x: tuple[int, ...], k: int, *, taps: int = 3, strides: tuple[int, int] = (1, 1)
) -> Case:
    """Return a depthwise convolution, and the 1x1 one to k channels behind it."""
    channels = x[1]
    attributes = {"pads": [taps // 2] * 4, "strides": list(strides), "group": channels}
    return Case(
        kind="depthwise convolution and projection",
        inputs=(x,),
        nodes=(
            # Not 1x1, which would be joined with the depthwise one itself.
            conv("", x, channels).nodes[0],
            Node(op="Relu"),
            Node(
                op="Conv", weights=((channels, 1, taps, taps), (channels,)), attributes=attributes
            ),
            Node(op="Relu"),
            Node(op="Conv", weights=((k, channels, 1, 1), (k,))),
        ),
    )


PROJECTED = {
    f"rows {geometry}": "joined"
    for geometry in ("6x14x16 to 32", "7x7x32 to 64", "4x4x24 to 32", "1x1x48 to 16")
}


def one(
    kind: str, op: str, *inputs: tuple[int, ...], weights: tuple[Any, ...] = (), **attributes: Any
) -> Case:
    return Case(
        kind=kind, inputs=inputs, nodes=(Node(op=op, weights=weights, attributes=attributes),)
    )


def special(op: str, **attributes: Any) -> Case:
    node = Node(op=op, attributes=attributes)
    return Case(kind="NaN and infinities", inputs=((3, 37),), nodes=(node,), special=True)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


# Images as small as these are computed apart unless it was measured otherwise.
JOINED = {
    f"rows {geometry}": "joined"
    for geometry in (
        "13x11x48 of 7, 3x3", "14x12x32 of 5, 3x3", "9x7x64 of 6, 5x5", "15x14x16 of 9, 5x5",
        "1x1x16 of 8, 3x3",
    )
}  # fmt: skip
DECIDED = {
    **JOINED,
    **PROJECTED,
    "winograd 3x9x7x61 to 160": "4x4 rows",
    "winograd stride 2 3x7x8x32 to 48": "phases",
}
NONE = np.array([], np.float32)
POINT = {"taps": (1, 1), "pads": (0, 0, 0, 0)}
CASES = [
    conv("dense convolution", (1, 7, 13, 11), 5),
    conv("dense convolution", (3, 5, 7, 6), 16),
    conv("dense convolution", (1, 4, 8, 9), 8, pads=(2, 0, 1, 3)),
    conv("dense convolution", (1, 3, 17, 19), 10, taps=(7, 2), pads=(3, 0, 3, 1)),
    conv("1x1 convolution", (1, 3, 1, 1), 17, **POINT),
    conv("1x1 convolution", (3, 17, 9, 5), 33, **POINT),
    conv("strided convolution", (1, 6, 15, 13), 24, strides=[2, 2]),
    conv("strided convolution", (1, 32, 9, 9), 48, strides=[2, 2], **POINT),
    conv("dilated convolution", (1, 4, 14, 12), 20, pads=(3, 2, 3, 2), dilations=[3, 2]),
    conv("grouped convolution", (1, 6, 8, 7), 9, group=3),
    conv("grouped convolution", (3, 24, 9, 7), 72, group=2, strides=[2, 2]),
    conv("grouped convolution", (1, 5, 8, 7), 10, group=5),
    projected((3, 16, 6, 14), 32),
    projected((1, 32, 13, 13), 64, taps=5, strides=(2, 2)),
    projected((2, 24, 7, 7), 32, strides=(2, 2)),
    projected((1, 48, 1, 1), 16),
    conv("depthwise convolution", (1, 19, 13, 11), 19, group=19),
    conv("depthwise convolution", (3, 32, 12, 14), 32, group=32, strides=[2, 2]),
    expanded((1, 7, 13, 11), 48),
    expanded((3, 5, 14, 12), 32, strides=(2, 2), act="HardSwish"),
    expanded((1, 6, 9, 7), 64, taps=5),
    expanded((3, 9, 15, 14), 16, taps=5, strides=(2, 2)),
    expanded((1, 8, 1, 1), 16),
    conv("1-D convolution", (3, 5, 17), 7, taps=(3,), pads=(1, 1)),
    conv("transposed convolution", (3, 7, 5, 6), 11, op="ConvTranspose", strides=[2, 2],
         output_padding=[1, 0]),
    conv("transposed convolution", (1, 13, 5, 7), 6, op="ConvTranspose", taps=(4, 4),
         strides=[2, 2]),
    conv("transposed convolution", (3, 6, 5, 4), 9, op="ConvTranspose", strides=[2, 3], group=3),
    conv("transposed convolution", (1, 5, 6, 4), 7, op="ConvTranspose", dilations=[2, 3]),
    conv("transposed convolution", (2, 5, 1, 1), 19, op="ConvTranspose", pads=(0, 0, 0, 0)),
    conv("transposed convolution", (1, 7, 5, 6), 3, op="ConvTranspose", taps=(2, 2),
         pads=(2, 2, 2, 2), strides=[2, 2]),
    conv("transposed convolution", (2, 5, 9), 3, op="ConvTranspose", taps=(3, ), pads=(1, 1),
         strides=[2]),
    conv("dilated convolution", (3, 6, 9, 8), 10, group=2, dilations=[2, 2]),
    conv("dilated convolution", (1, 19, 11, 9), 19, group=19, pads=(2, 2, 2, 2), dilations=[2, 2],
         strides=[1, 2]),
    conv("dense convolution", (3, 5, 1, 1), 7),
    conv("3-D convolution", (2, 3, 5, 6, 7), 7, taps=(3, 2, 3), pads=(1, 0, 1, 1, 1, 0)),
    one("computed weights", "Conv", (3, 7, 9, 8), (5, 7, 3, 3), pads=[1, 0, 1, 0]),
    conv("Winograd", (3, 48, 13, 11), 37),
    conv("Winograd", (1, 128, 7, 7), 144),
    conv("Winograd, weights by rows", (3, 61, 9, 7), 160),
    conv("Winograd of stride 2", (3, 32, 13, 15), 48, strides=[2, 2]),
    conv("weights requested ahead", (1, 509, 3, 5), 577, **POINT),
    *(one("dense", "MatMul", x, weights=((x[-1], k), )) for x, k in (
        ((1, 7), 3), ((1, 64), 10), ((5, 33), 17), ((2, 37, 19), 23), ((3, 701), 809))),
    one("dense", "Gemm", (3, 45), weights=((17, 45), (17,)), transB=1),
    one("batched product", "MatMul", (2, 5, 7), (2, 7, 3)),
    one("batched product", "MatMul", (1, 3, 37, 16), (1, 3, 16, 37)),
    one("batched product", "MatMul", (2, 3, 5, 7), (7, 4)),
    one("layer norm", "LayerNormalization", (2, 7, 37), weights=((37,), (37,)), axis=-1),
    one("layer norm", "LayerNormalization", (5, 3), weights=((3,), (3,)), axis=-1),
    one("group norm", "GroupNormalization", (3, 12, 5, 7), weights=((12,), (12,)), num_groups=3),
    one("instance norm", "InstanceNormalization", (2, 5, 9, 13), weights=((5,), (5,))),
    one("softmax", "Softmax", (3, 5, 197), axis=-1),
    one("softmax", "Softmax", (3, 37, 12), axis=1),
    one("softmax", "LogSoftmax", (7, 10), axis=-1),
    *(one("reduction", op, (3, 19, 67), weights=(axes,), keepdims=keep) for op, axes, keep in (
        ("ReduceMean", ints(-1), 1), ("ReduceSum", ints(1), 0), ("ReduceMax", ints(0, 2), 0),
        ("ReduceMin", ints(0, 1, 2), 1), ("ReduceL2", ints(1, 2), 0))),
    one("pooling", "MaxPool", (1, 19, 13, 11), kernel_shape=[3, 3], strides=[2, 2],
        pads=[1, 1, 1, 1]),
    one("pooling", "AveragePool", (3, 5, 9, 7), kernel_shape=[3, 2], pads=[1, 0, 1, 1]),
    one("pooling", "AveragePool", (1, 17, 8, 8), kernel_shape=[2, 2], strides=[2, 2]),
    one("pooling", "GlobalAveragePool", (3, 13, 5, 7)),
    one("pooling", "MaxPool", (3, 5, 1, 1), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    one("pooling", "MaxPool", (1, 7, 12, 11), kernel_shape=[3, 2], strides=[2, 3], ceil_mode=1),
    one("pooling", "MaxPool", (2, 5, 11, 13), kernel_shape=[2, 3], dilations=[2, 3]),
    one("pooling", "AveragePool", (1, 5, 13, 37), kernel_shape=[5, 3], pads=[2, 1, 2, 1],
        count_include_pad=1),
    one("pooling", "MaxPool", (1, 3, 9, 67), kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
    one("pooling", "MaxPool", (3, 5, 37), kernel_shape=[3], strides=[2]),
    one("pooling", "LpPool", (1, 3, 7, 9), kernel_shape=[3, 3], p=2),
    # Between convolutions, in NHWC.
    *(Case(kind="pooling", inputs=((3, 17, 7, 5),), nodes=(
        Node(op="Conv", weights=((19, 17, 1, 1),)),
        Node(op=kind, attributes={"kernel_shape": [3, 2], "pads": [1, 1, 1, 0]}),
        Node(op="Conv", weights=((5, 19, 1, 1),)))) for kind in ("MaxPool", "AveragePool")),
    one("resize", "Resize", (1, 5, 7, 6), weights=(NONE, floats(1, 1, 2, 2)), mode="nearest"),
    one("resize", "Resize", (2, 3, 7, 5), weights=(NONE, NONE, ints(2, 3, 11, 13)),
        mode="linear"),
    one("resize", "Resize", (1, 3, 5, 7), weights=(NONE, NONE, ints(1, 3, 8, 4)), mode="cubic"),
    # Between convolutions, in NHWC.
    *(Case(kind="resize", inputs=((3, 17, 7, 5),), nodes=(
        Node(op="Conv", weights=((19, 17, 1, 1),)),
        Node(op="Resize", weights=(NONE, NONE, ints(3, 19, *size)), attributes={"mode": mode}),
        Node(op="Conv", weights=((5, 19, 1, 1),))))
      for mode, size in (("nearest", (11, 13)), ("linear", (14, 15)), ("cubic", (4, 3)))),
    one("concat", "Concat", (1, 7, 5, 37), (1, 7, 5, 11), axis=3),
    one("concat", "Concat", (2, 3, 5, 7), (2, 8, 5, 7), axis=1),
    one("copy", "Transpose", (2, 37, 3, 17), perm=[0, 3, 1, 2]),
    one("copy", "Pad", (1, 7, 5, 37), weights=(ints(0, 1, 3, 0, 0, 2, 0, 5),)),
    one("copy", "Slice", (7, 37), weights=(ints(3), ints(31), ints(1), ints(2))),
    one("copy", "Tile", (3, 5, 7), weights=(ints(2, 1, 3),)),
    one("copy", "Expand", (3, 1, 37), weights=(ints(3, 5, 37),)),
    one("copy", "Gather", (37, 19), weights=(ints(36, 0, 17, 5, 5),)),
    one("copy", "Gather", (7, 37), weights=(ints(36, 0, 17),), axis=1),
    one("copy", "DepthToSpace", (3, 12, 5, 7), blocksize=2),
    one("reduction", "ReduceProd", (3, 19, 67), weights=(ints(-1),)),
    one("reduction", "ReduceLogSumExp", (7, 197), weights=(ints(-1),)),
    one("reduction", "CumSum", (3, 67), weights=(np.array(1, np.int64),)),
    *(Case(kind="extremum", inputs=((3, 19, 67),), nodes=(
        Node(op=op, attributes={"axis": axis}), Node(op="Cast", attributes={"to": 1})))
      for op, axis in (("ArgMax", -1), ("ArgMin", 1))),
    one("extremum", "TopK", (3, 7, 101), weights=(ints(5),)),
    one("extremum", "TopK", (3, 37, 5), weights=(ints(7),), axis=1, largest=0),
    one("sampling", "GridSample", (3, 5, 7, 6), (3, 4, 3, 2), padding_mode="border"),
    one("normalization", "RMSNormalization", (3, 7, 37), weights=((37,),), axis=-1),
    *(Case(kind="activation", inputs=((3, 7, 41),), nodes=(Node(op="Mul", weights=((41,),)), node))
      for node in (Node(op="HardSwish"), Node(op="Gelu"), Node(op="Sigmoid"), Node(op="Tanh"),
                   Node(op="LeakyRelu"), Node(op="Softplus"), Node(op="Sin"), Node(op="Elu"),
                   Node(op="Mish"), Node(op="PRelu", weights=((7, 1),)))),
    one("elementwise", "Add", (100003,), (100003,)),
    one("elementwise", "Mul", (5, 1, 37), (1, 11, 37)),
    *(special(op) for op in ("Relu", "Exp", "Erf", "Gelu", "Tanh", "Sigmoid", "HardSwish", "Sign",
                             "Log", "Sqrt")),
    special("Softmax", axis=-1),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attention:
    """``softmax(Q K^T / 4 + bias) V`` of ``[B, rows, H D]``, as exporters write it."""

    batch: int = 3
    heads: int = 2
    rows: int = 5
    keys: int = 7
    depth: int = 16
    bias: tuple[int, ...] | None = None
    causal: bool = False


ATTENTIONS = [
    Attention(bias=(3, 1, 1, 7)),
    Attention(batch=1, heads=1, rows=1, keys=1),
    Attention(batch=1, rows=37, keys=67, depth=32),
    Attention(batch=1, heads=3, rows=13, keys=13, depth=8, bias=(13, 13)),
    Attention(batch=1, heads=1, rows=67, keys=67, depth=32, causal=True),
]


class Network:
    """Collects the cases into one graph."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.feeds: dict[str, np.ndarray] = {}
        self.kinds: list[str] = []
        for number, case in enumerate(CASES):
            self._add(f"c{number}", case)
        for number, attention in enumerate(ATTENTIONS):
            self._attention(f"a{number}", attention)

    def _input(self, name: str, shape: tuple[int, ...], special: bool = False) -> str:
        array = self.rng.standard_normal(shape).astype("float32")
        if special:
            array.reshape(-1)[::5] = np.nan
            array.reshape(-1)[2::7] = np.inf
            array.reshape(-1)[4::9] = -np.inf
        self.feeds[name] = array
        return name

    def _weight(self, name: str, weight: Any) -> str:
        if isinstance(weight, tuple):
            weight = self.rng.standard_normal(weight).astype("float32")
        self.weights.append(numpy_helper.from_array(weight, name))
        return name

    def _node(self, name: str, op: str, inputs: list[str], **attributes: Any) -> str:
        names = [name, f"{name}_indices"] if op == "TopK" else [name]
        self.nodes.append(helper.make_node(op, inputs, names, name=name, **attributes))
        return name

    def _add(self, name: str, case: Case) -> None:
        values = [
            self._input(f"{name}_x{i}", shape, case.special) for i, shape in enumerate(case.inputs)
        ]
        for position, node in enumerate(case.nodes):
            weights = [
                self._weight(f"{name}_w{position}_{i}", weight)
                for i, weight in enumerate(node.weights)
            ]
            last = position == len(case.nodes) - 1
            values = [
                self._node(
                    name if last else f"{name}_n{position}",
                    node.op,
                    [*values, *weights],
                    **node.attributes,
                )
            ]
        self.kinds.append(f"{case.kind} {case.nodes[0].op} {case.inputs}")

    def _attention(self, name: str, a: Attention) -> None:
        split = {
            part: self._node(
                f"{name}_{part}s",
                "Reshape",
                [
                    self._input(f"{name}_{part}", (a.batch, rows, a.heads * a.depth)),
                    self._weight(f"{name}_{part}_shape", ints(a.batch, rows, a.heads, a.depth)),
                ],
            )
            for part, rows in (("q", a.rows), ("k", a.keys), ("v", a.keys))
        }
        q, k, v = (
            self._node(f"{name}_{part}t", "Transpose", [split[part]], perm=perm)
            for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3]))
        )
        scores = self._node(f"{name}_qk", "MatMul", [q, k])
        quarter = self._weight(f"{name}_quarter", np.float32(0.25).reshape(()))
        scores = self._node(f"{name}_scaled", "Mul", [scores, quarter])
        if a.bias is not None:
            bias = self._input(f"{name}_bias", a.bias)
            scores = self._node(f"{name}_biased", "Add", [scores, bias])
        if a.causal:
            shown = self._weight(f"{name}_shown", np.tri(a.rows, a.keys, dtype=bool))
            least = self._weight(f"{name}_least", np.finfo(np.float32).min.reshape(()))
            scores = self._node(f"{name}_covered", "Where", [shown, scores, least])
        shares = self._node(f"{name}_shares", "Softmax", [scores], axis=-1)
        heads = self._node(f"{name}_heads", "MatMul", [shares, v])
        self._node(name, "Transpose", [heads], perm=[0, 2, 1, 3])
        self.kinds.append(f"attention {a}")

    def proto(self) -> Any:
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
            for name, array in self.feeds.items()
        ]
        names = [f"c{i}" for i in range(len(CASES))] + [f"a{i}" for i in range(len(ATTENTIONS))]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        graph = helper.make_graph(self.nodes, "kinds", inputs, outputs, self.weights)
        opset = [helper.make_opsetid("", 23)]
        return helper.make_model(graph, opset_imports=opset, ir_version=11)


class ConvTranspose(OpRun):
    """Every input pixel times the kernel, added where it falls; padding is cut off."""

    op_domain = ""

    def _run(
        self, x, w, b, dilations=None, group=None, output_padding=None, pads=None, strides=None,
        **_others,
    ):  # fmt: skip
        rank = x.ndim - 2
        dilations, strides = dilations or [1] * rank, strides or [1] * rank
        taps = w.shape[2:]
        sizes = [
            (size - 1) * stride + (tap - 1) * dilation + 1 + more
            for size, stride, tap, dilation, more in zip(
                x.shape[2:], strides, taps, dilations, output_padding or [0] * rank, strict=True
            )
        ]
        grouped = x.reshape(len(x), group, -1, *x.shape[2:]).astype("float64")
        kernel = w.reshape(group, -1, *w.shape[1:])
        full = np.zeros((len(x), group, w.shape[1], *sizes))
        for tap in np.ndindex(taps):
            where = tuple(
                slice(at * dilation, at * dilation + (size - 1) * stride + 1, stride)
                for at, dilation, size, stride in zip(
                    tap, dilations, x.shape[2:], strides, strict=True
                )
            )
            full[:, :, :, *where] += np.einsum("ngc...,gck->ngk...", grouped, kernel[..., *tap])
        full = full.reshape(len(x), -1, *sizes) + b.reshape(-1, *[1] * rank)
        kept = (
            slice(begin, size - end)
            for begin, end, size in zip(pads[:rank], pads[rank:], sizes, strict=True)
        )
        return (full[:, :, *kept].astype("float32"),)


@dataclass(frozen=True, kw_only=True)
class Expected:
    network: Network
    model: Any
    feeds: list[np.ndarray]
    results: list[np.ndarray]


@pytest.fixture(scope="module")
def expected() -> Expected:
    network = Network()
    proto = network.proto()
    with np.errstate(all="ignore"):  # NaN and infinities go in
        results = ReferenceEvaluator(proto, new_ops=[ConvTranspose]).run(None, network.feeds)
    model = hone.load(proto)
    feeds = [network.feeds[spec.name] for spec in model.signature.inputs]
    return Expected(network=network, model=model, feeds=feeds, results=results)


def scheduled(model: Any, target: Target) -> Any:
    lowered = pipeline.lower(model.module, target, threads=THREADS, decided=DECIDED)
    result = pipeline.schedule(lowered, target, threads=THREADS)
    assert {decision.rule for decision in result.decisions} >= RULES
    return result.module


def check(expected: Expected, actual: list[np.ndarray]) -> None:
    found = []
    rows = zip(expected.network.kinds, actual, expected.results, strict=True)
    for kind, ours, theirs in rows:
        # A float32 sum of n terms is off by at most n units of 2**-24 times the sum of their
        # magnitudes, F(4x4) by some 1.4e-6 of the largest output, a share of a softmax of scores
        # of up to 30 by 2**-20 of itself.
        finite = np.abs(theirs[np.isfinite(theirs)])
        atol = max(2e-5, 3e-6 * float(finite.max(initial=0)))
        if not np.allclose(ours, theirs, rtol=1e-4, atol=atol, equal_nan=True):
            found.append(f"{kind}: off by {np.nanmax(np.abs(ours - theirs))}, allowed {atol}")
    assert not found, "\n".join(found)


def test_every_kind_of_kernel_equals_numpy(target: Target, expected: Expected) -> None:
    module = scheduled(expected.model, target)
    executable = pipeline.build_executable(module, target, threads=THREADS)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    results = machine["main"](*[tvm.runtime.tensor(array) for array in expected.feeds])
    check(expected, [result.numpy() for result in results])


def test_every_kind_of_kernel_equals_numpy_on_a_board(
    arm_emulator, expected: Expected, tmp_path
) -> None:
    board = resolve("rpi4")
    module = scheduled(expected.model, board)
    path = tmp_path / "lib.so"
    path.write_bytes(pipeline.link(module, board, threads=THREADS))
    # The runner also requires that the planned run, on two threads, gives the same bytes.
    assert b"hone_run" in path.read_bytes()
    check(expected, arm_emulator.run(path, expected.feeds, cpu="cortex-a72", threads=THREADS))


def test_check_finds_one_wrong_value(expected: Expected) -> None:
    wrong = [result.copy() for result in expected.results]
    wrong[3].reshape(-1)[-1] += 1e-3
    with pytest.raises(AssertionError, match=r"dense convolution Conv .*off by"):
        check(expected, wrong)
