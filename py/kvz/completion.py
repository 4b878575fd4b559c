"""Completion for shells, written from the parser itself. Called by cli.py (`kvz completion`)."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

SHELLS = ("bash", "zsh", "fish")


class Option(NamedTuple):
    """One option of a command."""

    flags: tuple[str, ...]
    help: str
    choices: tuple[str, ...]
    takes_file: bool


def commands_of(parser: argparse.ArgumentParser) -> dict[str, tuple[str, list[Option]]]:
    """List the commands: what each is for, and its options."""
    (actions,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {one.dest: one.help or "" for one in actions._choices_actions}
    return {
        name: (helps[name], [_option(action) for action in one._actions])
        for name, one in actions.choices.items()
    }


def _option(action: Any) -> Option:
    return Option(
        flags=tuple(action.option_strings),
        help=(action.help or "").partition(" (")[0].replace("%%", "%"),
        choices=tuple(map(str, action.choices or ())),
        takes_file=getattr(action.type, "__name__", "") == "Path",
    )


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Return the script that a shell reads.

    Parameters
    ----------
    shell : {"bash", "zsh", "fish"}
    parser : argparse.ArgumentParser
        With the commands as its subparsers.
    """
    commands = commands_of(parser)
    if shell == "fish":
        return _fish(commands)
    text = _bash(commands)
    return f"autoload -Uz bashcompinit && bashcompinit\n{text}" if shell == "zsh" else text


def _bash(commands: dict[str, tuple[str, list[Option]]]) -> str:
    cases = []
    for name, (_, options) in commands.items():
        words = " ".join(flag for one in options for flag in one.flags)
        words += "".join(f" {choice}" for one in options if not one.flags for choice in one.choices)
        cases.append(f'        {name}) words="{words}" ;;')
        for one in options:
            for flag in one.flags if one.choices else ():
                choices = " ".join(one.choices)
                cases.append(f'        {name}:{flag}) words="{choices}" ;;')
    return "\n".join(
        [
            "_kvz() {",
            '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
            '    local command="${COMP_WORDS[1]}" words=""',
            '    if [ "$COMP_CWORD" -eq 1 ]; then',
            f'        words="{" ".join(commands)} --help --version"',
            "    else",
            '    case "$command:$before" in',
            *(case for case in cases if ":" in case.partition(")")[0]),
            "        *)",
            '    case "$command" in',
            *(case for case in cases if ":" not in case.partition(")")[0]),
            "    esac ;;",
            "    esac; fi",
            '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
            "}",
            "complete -o default -F _kvz kvz",
            "",
        ]
    )


def _fish(commands: dict[str, tuple[str, list[Option]]]) -> str:
    lines = ["complete -c kvz -n __fish_use_subcommand -f -l help -l version"]
    for name, (text, options) in commands.items():
        lines.append(f"complete -c kvz -n __fish_use_subcommand -f -a {name} -d {_quoted(text)}")
        inside = f"complete -c kvz -n '__fish_seen_subcommand_from {name}'"
        for one in options:
            names = "".join(f" -l {flag[2:]}" for flag in one.flags if flag.startswith("--"))
            wanted = " -r" if one.takes_file else ""
            if one.choices:
                flag = " -x" if one.flags else " -f"
                wanted = f"{flag} -a {_quoted(' '.join(one.choices))}"
            if names or one.choices:
                lines.append(f"{inside}{names}{wanted} -d {_quoted(one.help)}")
    return "\n".join([*lines, ""])


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
