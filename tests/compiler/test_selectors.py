from __future__ import annotations

import pytest

from hone.errors import UsageError
from hone.model import Layer
from hone.selectors import select

LAYERS = [
    Layer(id=name, op_type=op, binding=f"b_{name}")
    for name, op in [
        ("permute", "Transpose"),
        ("layer1/conv1", "Conv"),
        ("layer1/relu", "Relu"),
        ("layer1/conv2", "Conv"),
        ("layer2/conv1", "Conv"),
        ("layer2/add", "Add"),
        ("[odd]*", "Relu"),
        ("first", "Conv"),
        ("head", "Gemm"),
        ("softmax", "Softmax"),
    ]
]


def ids(*selectors: str, **options: object) -> list[str]:
    return [layer.id for layer in select(LAYERS, selectors, **options)]


@pytest.mark.parametrize(
    ("selectors", "expected"),
    [
        ((), []),
        (("head",), ["head"]),
        (("name:layer1/*",), ["layer1/conv1", "layer1/relu", "layer1/conv2"]),
        (("name:*/conv?",), ["layer1/conv1", "layer1/conv2", "layer2/conv1"]),
        (("name:[[]odd[]]*",), ["[odd]*"]),
        (("[odd]*",), ["[odd]*"]),
        ((r"re:layer\d/conv1",), ["layer1/conv1", "layer2/conv1"]),
        (("op:Gemm", "op:Add"), ["layer2/add", "head"]),
        (("first",), ["layer1/conv1"]),
        (("name:first",), ["first"]),
        (("last",), ["head"]),
        (("op:Conv", "!first"), ["layer1/conv2", "layer2/conv1", "first"]),
        (("!first", "op:Conv"), ["layer1/conv2", "layer2/conv1", "first"]),
        (("head", "!head"), []),
        (("!re:layer.*", "!first", "!op:Relu"), ["permute", "first", "head", "softmax"]),
    ],
    ids=str,
)
def test_layers_are_selected_in_graph_order(
    selectors: tuple[str, ...], expected: list[str]
) -> None:
    assert ids(*selectors) == expected


def test_patterns_are_limited_to_operator_types_and_plain_ids_are_not() -> None:
    types = {"Conv", "Gemm"}
    assert ids("name:layer1/*", among=types) == ["layer1/conv1", "layer1/conv2"]
    assert ids("!name:*/conv1", among=types) == ["layer1/conv2", "first", "head"]
    assert ids("layer2/add", among=types) == ["layer2/add"]


def test_error_lists_every_selector_that_names_nothing_with_the_nearest_names() -> None:
    with pytest.raises(UsageError) as error:
        ids("heat", "!name:layer3/conv*", "re:lay(er1", "op:conv", "op:Loop", "head", where="skip")
    assert str(error.value) == (
        "skip: cannot select layers: 'heat' is no layer, the nearest: head; "
        "'!name:layer3/conv*' matches no layer, the nearest: layer2/conv1, layer1/conv2, "
        "layer1/conv1; "
        "'re:lay(er1' is no regular expression: missing ), unterminated subpattern at position 3; "
        "'op:conv' is the type of no layer, the nearest: Conv; "
        "'op:Loop' is the type of no layer\n"
        "  hint: `hone inspect MODEL` lists the layers"
    )


@pytest.mark.parametrize("selector", ["first", "!last"])
def test_error_when_first_or_last_has_no_layer_with_weights(selector: str) -> None:
    with pytest.raises(UsageError) as error:
        select(LAYERS[:1], [selector])
    assert str(error.value) == (
        f"cannot select layers: {selector!r} needs a layer of Conv, ConvTranspose, Gemm, MatMul; "
        "there is none\n  hint: `hone inspect MODEL` lists the layers"
    )


@pytest.mark.parametrize("selector", ["", "!", "name:", "re:", "op:", "nom:conv1", "First"])
def test_error_when_a_selector_is_malformed(selector: str) -> None:
    with pytest.raises(UsageError, match="cannot select layers"):
        ids(selector)
