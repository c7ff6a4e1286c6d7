"""The package's only exception."""


class SMTError(ValueError):
    """Bad input. The message says what was expected, what came, and what to do about it."""
