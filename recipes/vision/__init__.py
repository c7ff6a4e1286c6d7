"""Image classification: SPSFT's tables 2 and 4."""
