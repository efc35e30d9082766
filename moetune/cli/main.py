"""The entry point `moetune`: a group that imports a command on its first use, and the exit codes."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any, NoReturn

import click

from moetune.errors import MoetuneError

DEBUG_VARIABLE = "MOETUNE_DEBUG"
INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called, so that its help costs no imports.

    Args:
        lazy: for each command its `module:attribute` and the line that the group's help shows.
    """

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order in which they were given."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the command, or None where there is none of that name."""
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help, without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.lazy.items()])


class CommandLine(LazyGroup):
    """The outermost group: whatever goes wrong ends in one line on stderr and an exit code, never in a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs the command line and leaves the process.

        0: done. 1: no valid result. 2: usage. 3: a miss under `--frozen`. 130: interrupted.
        """
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as asked:
            click.echo(asked.format_message(), err=True)
            code = asked.exit_code
        except click.UsageError as error:
            asked_of = error.ctx.command_path if error.ctx else "moetune"
            code = _fail(f"{error.format_message()} See `{asked_of} --help`.", error.exit_code)
        except click.ClickException as error:
            code = _fail(error.format_message(), error.exit_code)
        except MoetuneError as error:
            code = _fail(str(error), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            code = _fail("interrupted.", INTERRUPTED)
        except Exception as error:
            if os.environ.get(DEBUG_VARIABLE):
                traceback.print_exc()
            how = f"This is a bug in moetune; {DEBUG_VARIABLE}=1 shows where."
            code = _fail(f"unexpected {type(error).__name__}: {error}. {how}", 1)
        sys.exit(code)


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


@click.group(
    "moetune",
    cls=CommandLine,
    context_settings={"help_option_names": ["-h", "--help"]},
    lazy={
        "models": ("moetune.cli.models:models", "List the layers that moetune knows by name."),
        "doctor": ("moetune.cli.doctor:doctor", "Say which backends can run here, and what the others lack."),
        "plan": ("moetune.cli.plan:plan", "Show each bucket's load and the bytes on the wire; no GPU needed."),
        "tune": ("moetune.cli.tune:tune", "Measure each bucket's fastest tactic, or serve it from the store."),
        "show": ("moetune.cli.show:show", "Print a stored profile."),
        "export": ("moetune.cli.export:export", "Write a stored profile as the files that an engine reads."),
        "store": ("moetune.cli.store:store", "Look into the store of profiles."),
    },
)
@click.version_option(package_name="moetune", message="moetune %(version)s")
def main() -> None:
    """Find the fastest mixture-of-experts kernel tactic for the load that each expert-parallel rank will really see.

    Results go to stdout, progress to stderr; with --json stdout holds one JSON document and nothing else.
    """
