"""The classification of images, SPSFT's tables 2 and 4."""
