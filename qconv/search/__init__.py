"""Candidates built, scored, chosen: bits, ranges, latency."""
