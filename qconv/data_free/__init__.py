"""BatchNormalization statistics in place of images."""
