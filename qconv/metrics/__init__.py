"""How near, how right, how sure: one module a task."""
