"""Which tensor becomes integer, which node stays float, and why."""
