"""The command line: one module a command. Click is imported here alone."""
