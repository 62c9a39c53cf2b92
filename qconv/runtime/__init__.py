"""ONNX Runtime: sessions and the clock."""
