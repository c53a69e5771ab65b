"""ONNX graphs: what is in one, and what onnxruntime makes of it."""
