"""Integer quantization: observers, parameters, integer operators."""
