"""Formats the help of a command: options in groups, and an example at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from moetune.errors import MissError, UsageError
from moetune.inputs.option_table import OPTIONS, Group
from moetune.inputs.suggestions import did_you_mean
from moetune.quoting import quoted

_GROUPS = {option.name: option.group.value for option in OPTIONS}
_FLAGS = {option.flag for option in OPTIONS}
_OTHER = "Options"
_TYPED = "moetune.typed"


def typed() -> tuple[str, ...]:
    """Returns the words of the running command as they were typed, without the command's name and `--json`."""
    words: tuple[str, ...] = click.get_current_context().meta.get(_TYPED, ())
    return tuple(word for word in words if word != "--json")


def is_model(text: str) -> bool:
    """Returns whether `text` is the name of a preset or of a repository that moetune knows."""
    from moetune.inputs import presets, repositories

    return text.lower() in presets.names() or text.lower() in repositories.known()


def model_hint(model: str, command: str) -> str:
    """Returns what to do if a model's name was given to a command without `--model`."""
    return f"Give --model {model} and the deployment, as in `moetune {command} --help`."


def message_of(error: click.UsageError) -> str:
    """Returns the message of an error of click's, with moetune's own suggestion for an unknown option."""
    if not isinstance(error, click.NoSuchOption):
        return error.format_message()
    if error.option_name in _FLAGS:
        return f"No such option {quoted(error.option_name)}: this command reads the deployment from --launch."
    known = error.ctx.command.params if error.ctx else []
    near = did_you_mean(error.option_name, [name for each in known for name in each.opts if name.startswith("--")])
    return f"No such option {quoted(error.option_name)}. {near}".rstrip()


class Argument(click.Argument):
    """An argument with a help of its own.

    Args:
        meaning: the help, one or two sentences.
    """

    def __init__(self, *args: Any, meaning: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meaning = meaning

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Returns the entry of the help."""
        return self.metavar or str(self.name), self.meaning


profile_argument = click.argument(
    "path",
    cls=Argument,
    type=click.Path(path_type=Path),
    metavar="[PROFILE]",
    required=False,
    meaning="A profile's file, as `moetune store list` prints it. Instead of --model or --launch.",
)


class Command(click.Command):
    """A command with grouped options and an example in its help.

    On a miss with `--json` it writes the miss as a JSON document before the error ends the command.

    Args:
        example: a complete command.
        usage: what the usage line has instead of `[OPTIONS]`.
    """

    allow_extra_args = True  # so that `parse_args` can say what they are

    def __init__(self, *args: Any, example: str, usage: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self.usage = usage

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Returns the parts of the usage line after the command's name."""
        return [self.usage] if self.usage else super().collect_usage_pieces(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the options below the headings of their groups, those of this command alone last."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in (*map(str, Group), _OTHER)}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                groups[_GROUPS.get(parameter.name or "", _OTHER)].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the example."""
        with formatter.section("Example"):
            for line in self.example.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the command's words, and keeps them as they were typed for `typed`.

        Raises:
            UsageError: there is an argument too many, and it is the name of a model.
            click.UsageError: there is an argument too many, or as click's own.
        """
        ctx.meta[_TYPED] = tuple(args)
        extra = super().parse_args(ctx, args)
        if not extra or ctx.resilient_parsing:
            return extra
        takes_model = "model" in ctx.params and ctx.params["model"] is None
        if takes_model and (model := next(filter(is_model, extra), None)):
            raise UsageError(f"{model} is the name of a model.", model_hint(model, ctx.info_name or ""))
        raise click.UsageError(f"Got unexpected extra argument{'s' if len(extra) > 1 else ''} ({' '.join(extra)})", ctx)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except MissError as miss:
            if ctx.params.get("as_json"):
                from moetune.cli.output import document, miss_document

                document(miss_document(miss))
            raise


class Commands(click.Group):
    """A group that suggests the nearest name for a mistyped command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the command that the first argument names.

        Raises:
            click.UsageError: there is none.
        """
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            known = self.list_commands(ctx)
            hint = did_you_mean(args[0], known) or f"Commands: {', '.join(known)}."
            raise click.UsageError(f"No such command {quoted(args[0])}. {hint}", ctx) from None
