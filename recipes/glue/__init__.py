"""Text classification: SPSFT's tables 3 and 5."""
