"""The package's only exception."""

import unicodedata

# Control characters, invisible formatting (it can reverse a line), surrogates, private, unassigned, line separators.
UNPRINTABLE = frozenset(("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"))


class SMTError(ValueError):
    """Bad input. The message says what was expected, what came, and what to do about it.

    Messages quote names from files, so they are made one line, and characters that a terminal would obey are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """Return a string as one printable line."""
    return printable(" ".join(text.splitlines()))


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message."""
    return str(error).partition("\n")[0]


def printable(text: str) -> str:
    """Return a string with every unprintable character as its escape sequence (`\\x1b`)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode() if unicodedata.category(character) in UNPRINTABLE else character
        for character in text
    )
