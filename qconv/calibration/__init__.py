"""From images to ranges: observers, sketches, range estimators."""
