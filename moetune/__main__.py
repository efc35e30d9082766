"""Starts the command line: `python -m moetune`, and the script `moetune`."""

from __future__ import annotations

from typing import NoReturn

from moetune.cli import signals


def main() -> NoReturn:
    """Runs the command line as the only purpose of this process, and ends the process.

    The command line is imported once signals are handled: the import takes longer than all before it.
    """
    signals.install()
    try:
        try:
            from moetune.cli.streams import repair

            repair()
            from moetune.cli.main import main as command_line

            command_line()
        finally:
            signals.leave()
    except KeyboardInterrupt:  # outside of the command line, which turns it into an exit code
        pass
    signals.end_at_once()


if __name__ == "__main__":
    main()
