"""Runs that look for what breaks qconv: foreign models, damaged files, sudden deaths."""
