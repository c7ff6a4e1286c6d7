"""`smt completion SHELL`: print a shell's completion script, made from the parsers of all commands.

A value is completed from its choices, or by its metavar: FILE, PATH and OTHER are files, FOLDER and all other
positional arguments are folders. Other values are not completed.
"""

from __future__ import annotations

import argparse
import functools
import re

from smt_trainer.cli.options import add_command
from smt_trainer.cli.shells import FILES, FOLDERS, SCRIPTS, Command, Flag

KINDS = {"FILE": FILES, "PATH": FILES, "OTHER": FILES, "FOLDER": FOLDERS}


def add_parser(commands) -> None:
    """Add the command to the parser of `smt`."""
    parser = add_command(
        commands,
        "completion",
        functools.partial(run, commands),
        "print a script that makes a shell complete smt's commands, flags and paths",
        'bash and zsh: eval "$(smt completion bash)" in ~/.bashrc, or zsh in ~/.zshrc. fish: smt completion fish > '
        "~/.config/fish/completions/smt.fish",
    )
    parser.add_argument("shell", metavar="SHELL", choices=tuple(SCRIPTS), help=f"one of {', '.join(SCRIPTS)}")


def run(commands, arguments: argparse.Namespace) -> None:
    """Print the completion script of a shell."""
    print(SCRIPTS[arguments.shell]([_read(name, parser) for name, parser in commands.choices.items()]))


def _read(name: str, parser: argparse.ArgumentParser) -> Command:
    # argparse has no public access to a parser's arguments.
    actions = parser._actions
    flags = [
        Flag(action.option_strings, _first(action.help), action.nargs != 0, _values(action, ()))
        for action in actions
        if action.option_strings
    ]
    values = next((_values(action, FOLDERS) for action in actions if not action.option_strings), ())
    return Command(name, _first(parser.description), flags, values)


def _values(action: argparse.Action, otherwise: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if action.choices is not None:
        return tuple(map(str, action.choices))
    return KINDS.get(str(action.metavar), otherwise)


def _first(text: str | None) -> str:
    """Return the beginning of a help text, up to the end of a sentence, a colon, a semicolon or a bracket."""
    return re.split(r"\.(?: |$)|[;:] | \(", (text or "").replace("%%", "%"))[0]
