"""Decoders: what the outputs of a detector say, as boxes with scores and classes; one module a family."""
