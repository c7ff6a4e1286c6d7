"""The classification of texts, SPSFT's tables 3 and 5."""
