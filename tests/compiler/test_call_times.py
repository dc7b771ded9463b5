"""Times of calls become times of layers."""

from __future__ import annotations

from hone.profiling.call_times import CallTime, layer_us

CALLS = (
    CallTime(kernel="transpose", names=("t", "t@quantize"), us=1.0),
    CallTime(kernel="conv", names=("conv1",), us=10.0),
    CallTime(kernel="dequantize", names=("relu1",), us=2.0),
    CallTime(kernel="pool", names=("pool",), us=3.0),
    CallTime(kernel="conv", names=("conv2@conv2d", "conv2", "relu2"), us=20.0),
    CallTime(kernel="both", names=("expand", "depthwise"), us=8.0),
    CallTime(kernel="library", names=(), us=0.5),
)


def test_layer_has_its_kernels_and_what_follows_until_the_next_layer():
    layers = {"conv1", "conv2", "expand", "depthwise"}
    found = layer_us(CALLS, layers, {"t@quantize", "relu1"})
    assert found == {"conv1": 13.0, "conv2": 20.0, "expand": 4.25, "depthwise": 4.25}


def test_conversion_counts_for_its_layer_when_it_is_not_known_as_one():
    assert layer_us(CALLS[:4], {"conv1"}, ())["conv1"] == 15.0
