"""What the runtime makes of a file, and by which rule."""
