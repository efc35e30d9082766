"""Reads the file of `moetune batch`: jobs, each as the words of a command line.

The file is YAML with a list `jobs`, or has one launch line, or the options of one job, in each line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any, Final

from moetune.errors import UsageError
from moetune.inputs.settings_file import MOST_BYTES, parse_yaml
from moetune.inputs.shell import MOST_CHARACTERS
from moetune.quoting import quoted, shortened, shown_path
from moetune.untrusted import read_text

MOST_JOBS: Final = 1_000
KEYS: Final = ("model", "launch", "options")
_YAML_SUFFIXES: Final = (".yaml", ".yml", ".json")
_YAML_BEGINS: Final = ("jobs:", "jobs :", "{", "---")
_CONTINUED: Final = re.compile(r"\\[ \t]*\r?\n")
_EXAMPLE: Final = "Write `jobs:` and a list of `- model: NAME` with `options: --ep 8`, or one launch line in each line."


def read_jobs(path: Path | str) -> tuple[tuple[str, ...], ...]:
    """Returns the words of each job, such as `("--model", "deepseek-r1", "--ep", "8")`.

    Args:
        path: the file.

    Raises:
        UsageError: the file cannot be read, is too large, is not YAML, has another form, or has no job.
    """
    name = shown_path(path)
    try:
        text = read_text(path, MOST_BYTES)
        found = tuple(_of_yaml(parse_yaml(text)) if _is_yaml(path, text) else _of_lines(text))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"{name} cannot be read: {shortened(why)}.", _EXAMPLE) from None
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}", error.hint or _EXAMPLE) from None
    if not found:
        raise UsageError(f"{name} has no job.", _EXAMPLE)
    return found


def _is_yaml(path: Path | str, text: str) -> bool:
    if str(path).lower().endswith(_YAML_SUFFIXES):
        return True
    return next(iter(_written(text.splitlines())), "").startswith(_YAML_BEGINS)


def _written(lines: Iterable[str]) -> list[str]:
    """Returns the lines that are neither blank nor comments, without the blanks around them."""
    stripped = (line.strip() for line in lines)
    return [line for line in stripped if line and not line.startswith("#")]


def _of_lines(text: str) -> Iterator[tuple[str, ...]]:
    """Yields a job for each line. A line that begins with `-` has options, another one is a launch line."""
    written = _written(_CONTINUED.sub(" ", text).splitlines())
    _require_few(len(written))
    for line in written:
        yield _split(line) if line.startswith("-") else ("--launch", line)


def _of_yaml(document: Any) -> Iterator[tuple[str, ...]]:
    if not isinstance(document, Mapping) or set(document) != {"jobs"} or not isinstance(document["jobs"], list):
        given = list(document) if isinstance(document, Mapping) else document
        raise UsageError(f"A batch is an object with the one key jobs, a list; given {quoted(given)}.")
    count = 0
    for number, job in enumerate(document["jobs"], 1):
        parts = _parts(job, number)
        count += len(parts[0]) * len(parts[1]) * len(parts[2])
        _require_few(count)
        for models, launches, options in product(*parts):
            yield (*models, *launches, *options)


def _parts(job: Any, number: int) -> list[list[tuple[str, ...]]]:
    """Returns for each of `KEYS` the alternatives that an entry of the list gives, as words."""
    if not isinstance(job, Mapping) or not job or job.keys() - set(KEYS):
        raise UsageError(
            f"Entry {number} of jobs must be an object with {', '.join(KEYS)} or some of these, given {quoted(job)}."
        )
    found: list[list[tuple[str, ...]]] = []
    for key in KEYS:
        texts = _texts(job.get(key, ""), key, number)
        found.append([_split(text) if key == "options" else ((f"--{key}", text) if text else ()) for text in texts])
    return found


def _texts(value: Any, key: str, number: int) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"Entry {number} of jobs: {key} must be a text or a list of texts, given {quoted(value)}.")
    return texts


def _split(text: str) -> tuple[str, ...]:
    if len(text) > MOST_CHARACTERS:
        raise UsageError(f"Options have at most {MOST_CHARACTERS:,} characters, given {len(text):,}.")
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise UsageError(f"{quoted(text)} cannot be split into options: {error}.", "Close every quote.") from None


def _require_few(count: int) -> None:
    if count > MOST_JOBS:
        raise UsageError(f"It has {count:,} jobs or more, allowed {MOST_JOBS:,}.", "Split it into several files.")
