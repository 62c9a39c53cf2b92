"""What the user asks for: recipe, choices, targets, preprocessing. Standard library alone."""
