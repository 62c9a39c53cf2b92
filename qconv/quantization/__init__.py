"""From ranges to integers, and into the graph."""
