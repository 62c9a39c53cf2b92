"""The steps of `quantize` in order: prepare, collect, quantize, check."""
