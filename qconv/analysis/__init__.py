"""The stories of the other commands."""
