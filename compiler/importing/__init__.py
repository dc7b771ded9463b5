"""Reads an ONNX graph and writes it as Relax: what stands behind hone.importer."""
