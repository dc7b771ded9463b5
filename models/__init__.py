"""Reference networks, built as ONNX from a seed."""
