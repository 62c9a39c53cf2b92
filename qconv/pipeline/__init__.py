"""The story of `quantize`."""
