"""Declare all properties of an `SMTConfig` field in one place.

A field has a type, a default, a help text, what it decides, and a `Kind`, which parses its value from text and checks
it. From these come the checks of the configuration, the flags of the command line, what a resumed run may change, the
table in the README and `help(SMTConfig)`.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any, Literal

from smt_trainer.errors import SMTError

# For messages to those who may have given a budget in percent.
PERCENT = "0.84 % is written 0.0084"

Decides = Literal["targets", "scores", "warm-up", "choice", "training", "run"]
"""What a field can decide."""


class Kind:
    """The values that a field may have.

    Attributes:
        flag: keyword arguments for the `add_argument` of the field's flag; the kind checks the parsed value, too.
    """

    flag: Mapping[str, Any] = {}

    def __call__(self, name: str, value: Any) -> Any:
        """Return the value of the field `name` as the configuration stores it. Raise `SMTError` if it is invalid."""
        raise NotImplementedError


class Choice(Kind):
    """One of a few words; an alias stands for one of them."""

    def __init__(self, *options: str, aliases: Mapping[str, str] | None = None) -> None:
        self.options, self.aliases = options, aliases or {}
        self.flag = {"choices": (*options, *self.aliases)}

    def __call__(self, name: str, value: Any) -> str:
        value = self.aliases.get(value, value) if isinstance(value, str) else value
        if not isinstance(value, str) or value not in self.options:
            also = f" (or {', '.join(self.aliases)})" if self.aliases else ""
            raise SMTError(f"{name} must be one of {', '.join(self.options)}{also}, got {value!r}.")
        return value


class Flag(Kind):
    """True or False."""

    flag: Mapping[str, Any] = {"action": "store_const", "const": True}

    def __call__(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise SMTError(f"{name} must be True or False, got {value!r}.")
        return value


class Integer(Kind):
    """A whole number."""

    flag: Mapping[str, Any] = {"type": int}

    def __init__(self, least: int) -> None:
        self.least = least

    def __call__(self, name: str, value: Any) -> int:
        if not is_int(value) or value < self.least:
            raise SMTError(f"{name} must be an int >= {self.least}, got {value!r}.")
        return value


class Names(Kind):
    """Names of modules or their endings, a keyword, or a regular expression: a string that cannot be a module's name.

    A string and a list of just this string mean the same, since a command line gives a list even for one word.
    """

    flag: Mapping[str, Any] = {"nargs": "+"}

    def __init__(self, *keywords: str) -> None:
        self.keywords = keywords

    def __call__(self, name: str, value: Any) -> str | list[str]:
        names = [value] if isinstance(value, str) else sorted(value) if isinstance(value, set) else value
        if isinstance(names, (list, tuple)) and names and all(isinstance(item, str) and item for item in names):
            return names[0] if len(names) == 1 and self._is_no_name(names[0]) else list(names)
        raise SMTError(f"{name} must be a name, a regular expression or a non-empty list of names, got {value!r}.")

    def _is_no_name(self, text: str) -> bool:
        return text in self.keywords or not text.replace("_", "").replace(".", "").replace("-", "").isalnum()


class NameList(Kind):
    """A list of names, which may be empty; a single string is taken as a list of one name."""

    flag: Mapping[str, Any] = {"nargs": "+"}

    def __call__(self, name: str, value: Any) -> list[str]:
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, (list, tuple, set)) or not all(isinstance(item, str) and item for item in names):
            raise SMTError(f"{name} must be a list of names of modules, got {value!r}.")
        return sorted(names) if isinstance(names, set) else list(names)


class Name(Kind):
    """The name of something, such as a column."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, name: str, value: Any) -> str:
        if not (isinstance(value, str) and value):
            raise SMTError(f"{name} must be the name of {self.what} or None, got {value!r}.")
        return value


class BlockSize(Kind):
    """`"auto"`, an edge, or a pair (rows, columns); as text `"64"` or `"64x32"`."""

    def __call__(self, name: str, value: Any) -> str | int | tuple[int, int]:
        if value == "auto":
            return "auto"
        if isinstance(value, str):
            parts = value.split("x")
            if all(part.isascii() and part.isdigit() for part in parts):
                value = int(value) if len(parts) == 1 else tuple(map(int, parts))
        edges = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(edges) != 2 or not all(is_int(edge) and edge >= 1 for edge in edges):
            raise SMTError(f"{name} must be 'auto', an int >= 1 or a pair (rows, columns) of them, got {value!r}.")
        return edges if isinstance(value, (list, tuple)) else value


class Budget(Kind):
    """A count or a fraction, or one for each group; as text `"100"`, `"0.0084"` or `"attention=0.0042,mlp=100"`."""

    def __call__(self, name: str, value: Any) -> float | int | dict[str, float | int]:
        if isinstance(value, str):
            value = _parse_budget(name, value)
        groups = isinstance(value, dict) and value and all(isinstance(group, str) and group for group in value)
        amounts = {f"{name}[{group!r}]": amount for group, amount in value.items()} if groups else {name: value}
        for label, amount in amounts.items():
            if not is_amount(amount):
                raise SMTError(
                    f"{label} must be a float in (0, 1] (fraction of the parameters; {PERCENT}) or an int >= 1 (number "
                    f"of blocks){'' if groups else ', or a dict of these by group'}, got {amount!r}."
                )
        return dict(value) if groups else value


class Amount(Kind):
    """A count or a fraction."""

    def __init__(self, fraction_of: str) -> None:
        self.fraction_of = fraction_of

    def __call__(self, name: str, value: Any) -> float | int:
        value = parse_amount(name, value) if isinstance(value, str) else value
        if not is_amount(value):
            raise SMTError(
                f"{name} must be an int >= 1 (number of blocks), a float in (0, 1] (fraction of {self.fraction_of}) "
                f"or None, got {value!r}."
            )
        return value


class SelectionSource(Kind):
    """The path of a file or folder, or what the file holds."""

    flag: Mapping[str, Any] = {"metavar": "PATH"}

    def __call__(self, name: str, value: Any) -> Any:
        if hasattr(value, "__fspath__"):
            return str(value)
        if isinstance(value, str | Mapping) or hasattr(value, "to_dict"):
            return value
        raise SMTError(f"{name} must be the path of a file or folder, or what the file holds, got {value!r}.")


class Setting(str):
    """A field's help text, with the field's other properties as attributes.

    It is a string because `HfArgumentParser` passes all of a field's metadata to argparse, which accepts only `help`.

    Attributes:
        default: the value if none is given; a field whose default is None may be None.
        kind: the values that it may have otherwise.
        decides: what the field decides.
    """

    default: Any
    kind: Kind
    decides: Decides

    def take(self, name: str, value: Any) -> Any:
        """Return the value to store in the field `name`; None means its default. Raise `SMTError` if it is invalid."""
        # HfArgumentParser gives None for a list that is not on the command line.
        value = self.default if value is None else value
        return None if value is None else self.kind(name, value)


def setting(default: Any, kind: Kind, decides: Decides, help: str) -> Any:
    """Declare a field of a configuration; the value None means its default."""
    described = Setting(help)
    described.default, described.kind, described.decides = default, kind, decides
    return dataclasses.field(default=default, metadata={"help": described})


def settings(config: Any) -> dict[str, Setting]:
    """Return field name -> setting of a configuration or its class, in the order of the fields."""
    return {field.name: field.metadata["help"] for field in dataclasses.fields(config)}


def describe(config: type) -> str:
    """Describe all fields of a configuration, with their defaults and help, for its docstring."""
    margin = " " * 8
    return "\n".join(
        f"    {name} (default {text.default!r})\n"
        + textwrap.fill(text, 112, initial_indent=margin, subsequent_indent=margin)
        for name, text in settings(config).items()
    )


def parse_amount(name: str, text: str) -> float | int:
    """Parse a count such as `"100"` or a fraction such as `"0.0084"`. Raise `SMTError` for anything but a number."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise SMTError(
        f"{name} must be a count of blocks such as 100 or a fraction such as 0.0084 ({PERCENT}), got {text!r}."
    )


def is_int(value: Any) -> bool:
    """Return whether a value is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_amount(value: Any) -> bool:
    """Return whether a value is a count >= 1 or a fraction in (0, 1]."""
    return (is_int(value) and value >= 1) or (isinstance(value, float) and 0.0 < value <= 1.0)


def _parse_budget(name: str, text: str) -> float | int | dict[str, float | int]:
    if "=" not in text:
        return parse_amount(name, text)
    pairs = [pair.partition("=") for pair in text.split(",")]
    budgets = {group.strip(): parse_amount(name, amount) for group, _, amount in pairs}
    if len(budgets) < len(pairs):
        raise SMTError(f"{name} names a group twice: {text!r}. Give each group one budget.")
    return budgets
