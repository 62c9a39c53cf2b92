"""Images in, preprocessing found out. Pillow is imported here."""
