"""Which tensor becomes integer, and why not."""
