"""The model: read, edit, cut, run in parts, write. onnx-ir is imported here alone."""
