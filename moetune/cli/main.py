"""Defines the entry point `moetune`, its exit codes, and how an error is shown."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from typing import Any, NoReturn

import click

from moetune.cli import signals
from moetune.cli.help import Commands, message_of
from moetune.cli.streams import discard_stdout, failure_of_stdout
from moetune.errors import MissError, MoetuneError, UsageError
from moetune.quoting import condensed

DEBUG_VARIABLE = "MOETUNE_DEBUG"


class LazyGroup(Commands):
    """A group that imports a command only when it is called, so that the group's help is fast.

    Args:
        lazy: for each command its `module:attribute` and its line in the group's help.
    """

    def __init__(self, *args: Any, lazy: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the commands in the order in which they were given."""
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports and returns the command, or returns None if there is none of that name."""
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.lazy.items()])


class CommandLine(LazyGroup):
    """The outermost group. It turns every error into a short message on stderr and an exit code."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs the command line and ends the process.

        Exit codes: 0 done. 1 no valid result, also of some jobs of a batch, or it cannot be written to stdout. 2 usage.
        3 a miss. 4 a check has failed. 5 measured, but not saved. 130, 143 and 129 ended by SIGINT, SIGTERM and SIGHUP.
        A reader that closes the pipe early, such as `head`, is no error.
        """
        try:
            code = self._run(*args, **kwargs)
            if signals.pending():
                raise KeyboardInterrupt
        except (click.Abort, KeyboardInterrupt):
            code = _interrupted()
        sys.exit(code)

    def _run(self, *args: Any, **kwargs: Any) -> int:
        """Runs the command line. Returns the exit code."""
        stdout = sys.stdout
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()
        except (BrokenPipeError, SystemExit):
            if sys.stdout is stdout and not isinstance(sys.exception(), BrokenPipeError):
                raise
            discard_stdout()  # click has wrapped stdout and turned the error into an exit with code 1
            return 0
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            return _fail("\nNo command is given.", code=error.exit_code)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "moetune"
            return _fail(f"{condensed(message_of(error))} See `{command} --help`.", code=error.exit_code)
        except click.ClickException as error:
            return _fail(condensed(error.format_message()), code=error.exit_code)
        except MissError as error:
            return _fail(error.message, error.hint, command=_view(error), code=error.exit_code)
        except MoetuneError as error:
            return _fail(str(error), code=error.exit_code)
        except Exception as error:
            return _unexpected(error)
        return code if isinstance(code, int) else 0


def _fail(*lines: str, code: int, command: str = "") -> int:
    from moetune.cli.output import report

    if signals.pending():
        raise KeyboardInterrupt  # the error is what became of the interrupt
    report("\n".join([f"error: {' '.join(lines[0].split())}", *filter(None, lines[1:])]), command=command)
    return code


def _view(miss: MissError) -> str:
    """Returns a line with the command that shows the nearest profile; empty if there is none."""
    from moetune.report.command import command, shortest

    return f"View the nearest: {command('show', shortest(miss.nearest))}" if miss.nearest else ""


def _interrupted() -> int:
    """Says that a signal has ended the command. Returns the exit code."""
    number = signals.take()
    by = "" if number == signal.SIGINT else f" by {number.name}"
    return _fail(f"interrupted{by}.", code=signals.EXIT_CODE_BASE + number)


def _unwritten(error: OSError) -> int:
    """Says that the result cannot be written to stdout. Returns the exit code."""
    discard_stdout()
    line = f"The result cannot be written to stdout: {error.strerror}."
    return _fail(line, "Stored profiles are not lost: `moetune show` prints them.", code=1)


def _unexpected(error: Exception) -> int:
    """Reports an error that moetune did not raise itself: a stdout that is full, a missing package, or a bug."""
    if isinstance(error, click.Abort):
        raise error
    if isinstance(error, OSError) and (failure := failure_of_stdout()):
        return _unwritten(failure)
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing == "torch":
        return _fail(
            "This command needs torch, which is not installed. pip install torch",
            "Without it run: models, doctor, lookup, store, and show and export with a profile's path.",
            code=UsageError.exit_code,
        )
    if missing and missing != "moetune":
        return _fail(
            f"The Python module {missing} is not installed.",
            "Install what moetune needs, as README.md says: pip install -e . in a checkout.",
            code=1,
        )
    report = f"This is a bug in moetune. Set {DEBUG_VARIABLE}=1 to see where."
    return _fail(f"unexpected {type(error).__name__}: {condensed(str(error))}. {report}", code=1)


@click.group(
    "moetune",
    cls=CommandLine,
    context_settings={"help_option_names": ["-h", "--help"]},
    lazy={
        "models": ("moetune.cli.models:models", "List the layers that moetune knows by name."),
        "doctor": ("moetune.cli.doctor:doctor", "List the backends that can run here, and what the others need."),
        "plan": ("moetune.cli.plan:plan", "Show what the kernel of one rank gets in each bucket. Needs no GPU."),
        "tune": ("moetune.cli.tune:tune", "Measure the fastest tactic of each bucket, or take it from the store."),
        "batch": ("moetune.cli.batch:batch", "Tune the layers and deployments that a file lists, on every GPU here."),
        "check": ("moetune.cli.check:check", "Measure whether a stored profile's choices are still good here."),
        "dep-bench": ("moetune.cli.dep_bench:dep_bench", "Measure a real MoE block over the GPUs of this host."),
        "show": ("moetune.cli.show:show", "Print a stored profile."),
        "compare": ("moetune.cli.compare:compare", "Say what differs between two profiles, and what it costs."),
        "report": ("moetune.cli.report:report", "Show profiles as one HTML page, as CSV, or as a short table."),
        "export": ("moetune.cli.export:export", "Write a stored profile as the files that an engine reads."),
        "lookup": ("moetune.cli.lookup:lookup", "Say whether an engine will find its tuned file, and why not."),
        "store": ("moetune.cli.store:store", "List, verify, merge and prune the stored profiles."),
    },
)
@click.version_option(package_name="moetune", message="moetune %(version)s")
def main() -> None:
    """Find the fastest mixture-of-experts kernel tactic for the load that each expert-parallel rank will really see.

    Results go to stdout and progress to stderr. With --json, stdout holds one JSON document and nothing else.
    docs/json-schemas.md describes the documents and the exit codes.
    """
