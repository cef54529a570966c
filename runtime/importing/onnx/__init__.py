"""From an ONNX file to a tensor program that ONNX Runtime runs exactly as it was uploaded."""
