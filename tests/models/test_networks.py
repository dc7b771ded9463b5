from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hone import models
from hone.errors import UsageError

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

VOCABULARY = 8192


@dataclass(frozen=True, kw_only=True)
class Network:
    name: str
    # Published counts, without running statistics and constants: torchvision 11 689 512,
    # 25 557 032 and 3 504 872; timm's vit_tiny_patch16_224 5 717 416; Keras' mnist_mlp 669 706.
    # torchvision's efficientnet_b0 and shufflenet_v2_x1_0 have 5 288 548 and 2 278 604 with the
    # scales that are folded here; ConvNeXt (without layer scales) and the U-Net were only counted.
    # BERT-mini: 4 layers of 789 760, as published, and a vocabulary of 8192.
    parameters: int
    inputs: dict[str, tuple[int, ...]]
    output: tuple[str, tuple[int, ...]]
    layers: dict[str, int]


IMAGE = {"image": (1, 3, 224, 224)}
LOGITS = ("logits", (1, 1000))
NETWORKS = [
    Network(
        name="mlp",
        parameters=669_706,
        inputs={"x": (1, 784)},
        output=("logits", (1, 10)),
        layers={"Gemm": 3},
    ),
    Network(
        name="digits-cnn",
        parameters=98_026,
        inputs={"image": (1, 1, 8, 8)},
        output=("logits", (1, 10)),
        layers={"Conv": 3, "BatchNormalization": 3, "Gemm": 1},
    ),
    Network(
        name="resnet18",
        parameters=11_689_512,
        inputs=IMAGE,
        output=LOGITS,
        layers={"Conv": 20, "BatchNormalization": 20, "Add": 8, "Gemm": 1},
    ),
    Network(
        name="resnet50",
        parameters=25_557_032,
        inputs=IMAGE,
        output=LOGITS,
        layers={"Conv": 53, "BatchNormalization": 53, "Add": 16, "Gemm": 1},
    ),
    Network(
        name="mobilenetv2",
        parameters=3_504_872,
        inputs=IMAGE,
        output=LOGITS,
        layers={"Conv": 52, "BatchNormalization": 52, "Clip": 35, "Add": 10, "Gemm": 1},
    ),
    Network(
        name="bert-mini",
        parameters=4 * 789_760 + (VOCABULARY + 128 + 2) * 256,
        inputs={"input_ids": (1, 128), "attention_mask": (1, 128)},
        output=("last_hidden_state", (1, 128, 256)),
        layers={"LayerNormalization": 9, "Softmax": 4, "Erf": 4, "MatMul": 32},
    ),
    Network(
        name="vit-tiny",
        parameters=5_717_416,
        inputs=IMAGE,
        output=LOGITS,
        layers={"LayerNormalization": 25, "Softmax": 12, "Erf": 12, "MatMul": 72, "Gemm": 1},
    ),
    Network(
        name="shufflenetv2",
        parameters=2_270_514,
        inputs=IMAGE,
        output=LOGITS,
        layers={"Conv": 56, "Split": 13, "Concat": 16, "Gemm": 1},
    ),
    Network(
        name="convnext-atto",
        parameters=3_693_040,
        inputs=IMAGE,
        output=LOGITS,
        layers={"Conv": 16, "LayerNormalization": 16, "Erf": 12, "MatMul": 24, "Gemm": 1},
    ),
    Network(
        name="unet",
        parameters=1_925_410,
        inputs={"image": (1, 3, 160, 160)},
        output=("mask", (1, 2, 160, 160)),
        layers={"Conv": 15, "ConvTranspose": 3, "Concat": 3, "MaxPool": 3},
    ),
    Network(
        name="efficientnet-b0",
        parameters=5_267_540,
        inputs=IMAGE,
        output=LOGITS,
        layers={"Conv": 81, "Sigmoid": 65, "Add": 9, "Gemm": 1},
    ),
]
every_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)


@pytest.fixture(scope="module")
def built() -> dict[str, onnx.ModelProto]:
    return {network.name: models.build(network.name) for network in NETWORKS}


def draw(model: onnx.ModelProto, rng: np.random.Generator) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.input:
        shape = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        if value.name == "input_ids":
            feeds[value.name] = rng.integers(0, VOCABULARY, shape)
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones(shape, np.int64)
        else:
            feeds[value.name] = rng.standard_normal(shape, dtype=np.float32)
    return feeds


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def test_names_lists_every_tested_network() -> None:
    assert models.names() == tuple(network.name for network in NETWORKS)


@every_network
def test_build_is_valid_opset_17(network: Network, built: dict[str, onnx.ModelProto]) -> None:
    model = built[network.name]
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 17)]
    assert model.graph.name == network.name


@every_network
def test_signature_and_layers_are_the_documented_ones(
    network: Network, built: dict[str, onnx.ModelProto]
) -> None:
    graph = built[network.name].graph
    shapes = {
        value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in [*graph.input, *graph.output]
    }
    assert shapes == network.inputs | dict([network.output])
    counts = Counter(node.op_type for node in graph.node)
    assert {op_type: counts[op_type] for op_type in network.layers} == network.layers


@every_network
def test_parameters_are_as_many_as_published(
    network: Network, built: dict[str, onnx.ModelProto]
) -> None:
    count = sum(
        array.size
        for name, array in initializers(built[network.name]).items()
        if array.dtype == np.float32
        and array.ndim > 0
        and not name.endswith((".running_mean", ".running_var"))
    )
    assert count == network.parameters


@every_network
def test_node_names_are_unique_and_scoped(
    network: Network, built: dict[str, onnx.ModelProto]
) -> None:
    names = [node.name for node in built[network.name].graph.node]
    assert len(set(names)) == len(names)
    assert all(name.startswith("/") for name in names)


@pytest.mark.parametrize(
    ("network", "node", "parameter"),
    [
        ("resnet18", "/layer2/0/downsample/0/Conv", "layer2.0.downsample.0.weight"),
        ("resnet18", "/layer1/0/relu/Relu_1", "layer1.0.bn2.running_var"),
        ("mobilenetv2", "/features/17/conv/1/0/Conv", "features.17.conv.1.0.weight"),
        (
            "bert-mini",
            "/encoder/layer/3/attention/self/query/MatMul",
            "encoder.layer.3.attention.self.query.weight",
        ),
        ("vit-tiny", "/blocks/11/attn/qkv/MatMul", "blocks.11.attn.qkv.weight"),
    ],
)
def test_names_read_like_a_pytorch_export(
    network: str, node: str, parameter: str, built: dict[str, onnx.ModelProto]
) -> None:
    assert node in {n.name for n in built[network].graph.node}
    assert parameter in initializers(built[network])


@every_network
def test_output_is_finite_and_tells_classes_and_inputs_apart(
    network: Network, built: dict[str, onnx.ModelProto]
) -> None:
    model = built[network.name]
    runner = session(model)
    rng = np.random.default_rng(3)
    outputs = np.stack([runner.run(None, draw(model, rng))[0].ravel() for _ in range(3)])
    assert np.isfinite(outputs).all()
    assert 0.3 < outputs.std(axis=1).mean() < 5.0
    assert outputs.std(axis=0).mean() > 0.05


@every_network
def test_build_is_byte_identical_when_the_seed_is_the_same(
    network: Network, built: dict[str, onnx.ModelProto]
) -> None:
    def serialize(model: onnx.ModelProto) -> bytes:
        return model.SerializeToString(deterministic=True)

    assert serialize(models.build(network.name, seed=0)) == serialize(built[network.name])


@every_network
def test_every_random_parameter_differs_when_the_seed_differs(
    network: Network, built: dict[str, onnx.ModelProto]
) -> None:
    first = initializers(built[network.name])
    second = initializers(models.build(network.name, seed=1))
    assert first.keys() == second.keys()
    for name, array in first.items():
        if array.dtype == np.float32 and array.ndim > 0:
            assert not np.array_equal(array, second[name]), name


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "mobilenetv2"])
def test_batch_norm_statistics_describe_the_activations(
    network: str, built: dict[str, onnx.ModelProto]
) -> None:
    """The standard deviation within a factor of 2.5, the mean within one standard deviation.

    One image is measured, and the last stage has 49 positions for each channel: an exact match is
    not to be had, while statistics of 0 and 1 are off by orders of magnitude in deep layers.
    """
    model = onnx.ModelProto()
    model.CopyFrom(built[network])
    values = initializers(model)
    norms = [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    model.graph.output.extend(
        helper.make_tensor_value_info(norm.input[0], TensorProto.FLOAT, None) for norm in norms
    )
    activations = session(model).run(None, draw(model, np.random.default_rng(4)))[1:]
    for norm, activation in zip(norms, activations, strict=True):
        mean, variance = values[norm.input[3]], values[norm.input[4]]
        assert len(np.unique(mean)) > 0.9 * len(mean)
        assert len(np.unique(variance)) > 0.9 * len(variance)
        measured = np.sqrt(activation.var(axis=(0, 2, 3)).mean() / variance.mean())
        assert 0.4 < measured < 2.5, norm.name
        off = activation.mean(axis=(0, 2, 3)) - mean
        assert (off**2).mean() < variance.mean(), norm.name


def test_bert_ignores_a_token_when_its_mask_is_zero(built: dict[str, onnx.ModelProto]) -> None:
    model = built["bert-mini"]
    runner = session(model)
    feeds = draw(model, np.random.default_rng(5))
    feeds["attention_mask"][0, 100:] = 0
    (before,) = runner.run(None, feeds)
    feeds["input_ids"][0, 100:] = 7
    (after,) = runner.run(None, feeds)
    np.testing.assert_allclose(after[0, :100], before[0, :100], atol=1e-5)
    assert not np.allclose(after[0, 100:], before[0, 100:], atol=1e-2)


def test_build_names_the_nearest_when_the_name_is_unknown() -> None:
    with pytest.raises(UsageError) as caught:
        models.build("ResNet-18")
    assert str(caught.value) == (
        "unknown reference model 'ResNet-18'; the names are mlp, digits-cnn, resnet18, resnet50, "
        "mobilenetv2, bert-mini, vit-tiny, shufflenetv2, convnext-atto, unet, efficientnet-b0\n"
        "  hint: did you mean 'resnet18'?"
    )


def test_build_gives_no_hint_when_nothing_is_near() -> None:
    with pytest.raises(UsageError) as caught:
        models.build("???")
    assert caught.value.hint is None


def test_build_refuses_when_the_seed_is_negative() -> None:
    with pytest.raises(UsageError) as caught:
        models.build("mlp", seed=-1)
    assert str(caught.value) == "the seed of a reference model must be at least 0, not -1"


def test_models_need_neither_tvm_nor_onnxruntime() -> None:
    program = (
        "import sys, hone.models as models\n"
        "assert models.names() and 'onnx' not in sys.modules\n"
        "models.build('digits-cnn')\n"
        "assert not {'tvm', 'tvm_ffi', 'onnxruntime', 'torch'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
