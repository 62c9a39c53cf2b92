"""`make bench`: the qconv command beside ONNX Runtime's own quantizer, on real models and pictures."""
