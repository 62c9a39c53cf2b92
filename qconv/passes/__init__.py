"""Rewrites of the graph, a pass a module."""
