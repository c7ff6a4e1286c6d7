"""Scripts that make bash, zsh and fish complete a command line."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

FILES, FOLDERS = "files", "folders"
GLOBAL = ("--help", "--version")


class Flag(NamedTuple):
    """A flag of a command.

    Attributes:
        names: such as `-h`, `--help`.
        help: a few words.
        takes: whether it takes a value.
        values: possible values: `FILES`, `FOLDERS`, or some words; no words if any value will do.
    """

    names: Sequence[str]
    help: str
    takes: bool
    values: str | tuple[str, ...]


class Command(NamedTuple):
    """A command; `values` are those of its positional arguments, as in `Flag`."""

    name: str
    help: str
    flags: list[Flag]
    values: str | tuple[str, ...]


def bash(commands: list[Command]) -> str:
    """Return a script for bash 3.2 and later."""

    def reply(values: str | tuple[str, ...]) -> str:
        kinds = {FILES: "-f", FOLDERS: "-d"}
        chosen = kinds[values] if isinstance(values, str) else f"-W {_lines(values)}"
        return f'COMPREPLY=($(compgen {chosen} -- "$word"))'

    after: dict[str, list[str]] = {}
    for command in commands:
        for flag in command.flags:
            if flag.takes:
                said = reply(flag.values) if flag.values else "COMPREPLY=()"
                after.setdefault(said, []).extend(f'"{command.name} {name}"' for name in flag.names)
    flags = [
        f'        "{command.name} -"*) {reply(tuple(name for flag in command.flags for name in flag.names))} ;;\n'
        f'        "{command.name} "*) {reply(command.values)} ;;'
        for command in commands
    ]
    first = reply((*(command.name for command in commands), *GLOBAL))
    return "\n".join(
        [
            "_smt() {",
            "    local word=${COMP_WORDS[COMP_CWORD]} before=${COMP_WORDS[COMP_CWORD-1]} IFS=$'\\n'",
            f"    if ((COMP_CWORD == 1)); then {first}; return; fi",
            '    case "${COMP_WORDS[1]} $before" in',
            *(f"        {' | '.join(patterns)}) {said}; return ;;" for said, patterns in after.items()),
            "    esac",
            '    case "${COMP_WORDS[1]} $word" in',
            *flags,
            "    esac",
            "}",
            "complete -o filenames -F _smt smt",
        ]
    )


def zsh(commands: list[Command]) -> str:
    """Return a script for zsh, to be evaluated or put into a folder of `fpath` as `_smt`."""

    def action(values: str | tuple[str, ...]) -> str:
        kinds = {FILES: "_files", FOLDERS: "_files -/"}
        return kinds[values] if isinstance(values, str) else f"({' '.join(values)})" if values else " "

    def spec(name: str, flag: Flag) -> str:
        text = flag.help.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
        return shlex.quote(f"{name}[{text}]" + f":value:{action(flag.values)}" * flag.takes)

    cases = []
    for command in commands:
        specs = [spec(name, flag) for flag in command.flags for name in flag.names]
        specs.append(shlex.quote(f"*:argument:{action(command.values)}"))
        cases.append(f"        {command.name}) _arguments {' '.join(specs)} ;;")
    names = [shlex.quote(f"{command.name}:{command.help}") for command in commands]
    return "\n".join(
        [
            "#compdef smt",
            "_smt() {",
            f"    local -a names=({' '.join(names)})",
            f"    if ((CURRENT == 2)); then _describe command names; compadd -- {' '.join(GLOBAL)}; return; fi",
            "    shift words",
            "    ((CURRENT--))",
            "    case $words[1] in",
            *cases,
            "    esac",
            "}",
            'if [[ $funcstack[1] == _smt ]]; then _smt "$@"; else compdef _smt smt; fi',
        ]
    )


def fish(commands: list[Command]) -> str:
    """Return a script for fish 3.0 and later."""

    def quote(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    def values(found: str | tuple[str, ...]) -> str:
        kinds = {FILES: "-rF", FOLDERS: "-xa '(__fish_complete_directories)'"}
        return kinds[found] if isinstance(found, str) else f"-xa {quote(' '.join(found))}" if found else "-x"

    lines = ["complete -c smt -f"]
    lines += [f"complete -c smt -n __fish_use_subcommand -l {name.removeprefix('--')}" for name in GLOBAL]
    for command in commands:
        lines.append(f"complete -c smt -n __fish_use_subcommand -a {command.name} -d {quote(command.help)}")
        start = f"complete -c smt -n '__fish_seen_subcommand_from {command.name}'"
        lines.append(f"{start} {values(command.values)}")
        for flag in command.flags:
            names = "".join(f" -{'l' if name[:2] == '--' else 's'} {name.lstrip('-')}" for name in flag.names)
            lines.append(f"{start}{names}{f' {values(flag.values)}' * flag.takes} -d {quote(flag.help)}")
    return "\n".join(lines)


def _lines(words: Sequence[str]) -> str:
    return "$'" + "\\n".join(words) + "'"


SCRIPTS: dict[str, Callable[[list[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
