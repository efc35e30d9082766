"""Writes docs/options.md: every option of the command line, from the table and from the commands themselves.

`make pages` runs it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence

import click

from moetune.cli.backend_choice import allowed, option_types
from moetune.cli.main import main
from moetune.inputs.option_table import OPTIONS, Group, Option

_INTRODUCTION = """\
# Options

`make pages` writes this page. `moetune COMMAND --help` has the same text.

`plan`, `tune`, `show` and `export` take the options of a question, listed first. So does the environment variable
`MOETUNE_REGIME` (docs/engines.md), except those of the kernels: there the engine chooses kernels and device itself.
`lookup` takes `--launch`, the options of a layer, `--ladder` and `--tune-max-num-tokens`."""
_BACKENDS = """\
## Options of one backend
`--backend-option KEY=VALUE` sets one of these. `--backend` is needed unless only one backend has the option."""


def page() -> str:
    """Returns the page as Markdown."""
    return "\n\n".join([_INTRODUCTION, *map(_group, Group), _backends(), *_commands()]) + "\n"


def _group(group: Group) -> str:
    rows = [
        (_spelled(option), option.help.replace("|", "\\|"), option.default, f"`{option.sets}`" if option.sets else "")
        for option in OPTIONS
        if option.group is group
    ]
    return f"## {group}\n{_table(('option', 'meaning', 'default', 'field'), rows)}"


def _spelled(option: Option) -> str:
    value = "\\|".join(option.choices) if option.choices and option.name != "precision" else option.metavar
    value = (value or "").replace("|", "\\|").replace("\\\\|", "\\|")
    return f"`{option.declarations[0]}{' ' if value else ''}{value}`"


def _backends() -> str:
    from moetune.backends.registry import backend, backends

    rows = []
    for name in backends():
        parameters = inspect.signature(type(backend(name)).__init__).parameters
        for key, hint in option_types(name).items():
            named = next((option for option in OPTIONS if option.sets == f"backend.{key}"), None)
            values = named.choices if named else allowed(name, key, hint)
            other = str((named and named.metavar) or getattr(hint, "__name__", ""))
            default = parameters[key].default
            rows.append((name, f"`{key}`", ", ".join(values) or other, "" if default is None else str(default).lower()))
    return f"{_BACKENDS}\n\n{_table(('backend', 'key', 'values', 'default'), rows)}"


def _commands() -> Iterator[str]:
    """Yields a section for each command that has options of its own."""
    for name, command in _walked(main, click.Context(main, info_name="moetune")):
        names = {parameter.name for parameter in command.params}
        shared = {option.name for option in OPTIONS} if "model" in names else set()
        records = [
            record
            for parameter in command.params
            if isinstance(parameter, click.Option)
            and parameter.name not in shared
            and (record := parameter.get_help_record(click.Context(command)))
        ]
        if records:
            rows = [(f"`{flag}`".replace("|", "\\|"), text.replace("|", "\\|")) for flag, text in records]
            yield f"## `{name}`\n{_table(('option', 'meaning'), rows)}"


def _walked(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _walked(command, click.Context(command, parent=context, info_name=name))
        else:
            yield f"{context.command_path} {name}", command


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    click.echo(page(), nl=False)
