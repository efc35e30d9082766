"""Finds the command of a shell text that serves a model, inside containers, launchers and nested shells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from moetune.errors import UsageError
from moetune.inputs import shell
from moetune.inputs.shell import Command, Word
from moetune.quoting import enumerated, quoted, shortened
from moetune.untrusted import parse_json

FORMS: Final = (
    "vllm serve MODEL …, python -m sglang.launch_server …, sglang serve …, trtllm-serve MODEL …, trtllm-bench …, "
    "python -m dynamo.vllm …, or docker run … with one of these"
)
PROGRAMS: Final[Mapping[tuple[str, ...], tuple[str, str]]] = {
    ("vllm", "serve"): ("vllm", "vllm serve"),
    ("vllm.entrypoints.openai.api_server",): ("vllm", "vllm serve"),
    ("sglang", "serve"): ("sglang", "sglang serve"),
    ("sglang.launch_server",): ("sglang", "sglang serve"),
    ("trtllm-serve", "serve"): ("trtllm", "trtllm-serve"),
    ("trtllm-serve",): ("trtllm", "trtllm-serve"),
    ("trtllm-bench",): ("trtllm", "trtllm-bench"),
    ("dynamo.vllm",): ("vllm", "dynamo.vllm"),
    ("dynamo.sglang",): ("sglang", "dynamo.sglang"),
    ("dynamo.trtllm",): ("trtllm", "dynamo.trtllm"),
}
"""Maps the words that start a server to the engine, and to the program whose flags follow."""
_IMAGES: Final = (
    (re.compile(r"(^|/)vllm/vllm-openai([:@-]|$)"), ("vllm", "vllm serve")),
    (re.compile(r"(^|/)vllm-openai([:@-]|$)"), ("vllm", "vllm serve")),
)
"""The images whose entry point is a server. vLLM's `docker/Dockerfile` ends in `ENTRYPOINT ["vllm", "serve"]`. The
images of SGLang and TensorRT-LLM have no such entry point."""
_CONTAINERS: Final = ("docker", "podman", "nerdctl")
MOST_SHELLS: Final = 8
"""The most shells that run each other, as in `bash -c "bash -c …"`."""
_SHELLS: Final = ("bash", "sh", "zsh", "dash")
_TALK: Final = ("echo", "printf", "pip", "pip3", "git", "cd", "cat", "grep", "pkill", "curl", "watch", "sleep", "which")
_DOCKERFILE: Final = re.compile(r"(CMD|ENTRYPOINT|RUN)\s+(?=\S)")
_CONTAINERS_VARIABLE: Final = re.compile(r"^(--env=|-e=?)(?=[A-Za-z_]\w*=)")
_ASSIGNMENT: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_LOOKS_TYPED: Final = {
    "–": "an en dash", "—": "an em dash", "−": "a minus sign", "‐": "a typographic hyphen", "‑": "a fixed hyphen",
    "“": "a typographic quote", "”": "a typographic quote", "‘": "a typographic quote", "’": "a typographic quote",
    "\u00a0": "a no-break space",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """The command that starts a server.

    Attributes:
        engine: `vllm`, `sglang` or `trtllm`.
        program: the program whose flags the arguments are, as in `PROGRAMS`.
        arguments: the words after the program.
        variables: the environment variables that the line sets for it.
        launcher: the words before the first argument: `docker run …` and the image, or `vllm serve`.
    """

    engine: str
    program: str
    arguments: tuple[Word, ...]
    variables: Mapping[str, Word]
    launcher: tuple[str, ...]

    @property
    def spelled(self) -> str:
        """Returns the whole command as text."""
        return " ".join((*self.launcher, *(word.text for word in self.arguments)))


def find(text: str) -> ServerCommand:
    """Returns the one command of `text` that serves a model.

    Args:
        text: a shell's lines, or a Dockerfile's `CMD` or `ENTRYPOINT`.

    Raises:
        UsageError: no server or more than one, a quote that is not closed, or a flag that begins with a typographic
                sign.
    """
    found = list(_servers(_commands(text, {}), 0))
    if not found:
        shown = " ".join(text.split())
        raise UsageError(f"--launch finds no server in {quoted(shown[:100])}.", f"It reads {FORMS}.")
    if len(found) > 1:
        listed = enumerated((f"({number}) {one.spelled[:100]}" for number, one in enumerate(found, 1)), separator="; ")
        raise UsageError(f"--launch finds {len(found)} servers: {listed}.", "Pass the line of one of them.")
    for word in found[0].arguments:
        _require_plain(word)
    for command in _commands(text, {}):
        if command.words[0].text.startswith("-") and command.words[0].text.strip("-"):
            raise UsageError(
                f"A command begins with {shortened(command.words[0].text)}: the line before it does not end with a "
                "backslash, so a shell would not pass it to the server.",
                "End every line but the last with a backslash.",
            )
    return found[0]


def _commands(text: str, variables: Mapping[str, Word]) -> tuple[Command, ...]:
    text = text.strip()
    if match := _DOCKERFILE.match(text):
        text = text[match.end() :]
        try:
            listed = parse_json(text)
        except ValueError:
            return shell.commands(text, variables)
        if isinstance(listed, list) and all(isinstance(word, str) for word in listed):
            return (Command(tuple(map(Word, listed)), variables),)
    return shell.commands(text, variables)


def _servers(commands: tuple[Command, ...], depth: int) -> Iterator[ServerCommand]:
    if depth > MOST_SHELLS:  # a variable can contain the command that runs it
        raise UsageError(f"--launch has more than {MOST_SHELLS} shells inside each other.", "Give the innermost.")
    for command in commands:
        words = [word.text for word in command.words]
        if words[0] in _TALK:
            continue
        nested = _nested(words)
        if nested is not None:
            yield from _servers(_commands(words[nested], _variables(command, nested)), depth + 1)
        elif (called := _called(words)) is not None:
            (engine, program), start = called
            yield ServerCommand(
                engine, program, command.words[start:], _variables(command, start), tuple(words[:start])
            )


def _nested(words: list[str]) -> int | None:
    """Returns the index of the text that a nested shell runs (`bash -lc TEXT`), or None."""
    names = [PurePosixPath(word).name for word in words]
    if (first := next((index for index, name in enumerate(names) if name in _SHELLS), None)) is not None:
        for later in range(first + 1, len(words) - 1):
            if re.fullmatch(r"-[a-z]*c", words[later]):
                return later + 1
    # docker run --entrypoint bash IMAGE -c TEXT
    if "--entrypoint" in words[:-1] and names[words.index("--entrypoint") + 1] in _SHELLS:
        return next((index + 1 for index, word in enumerate(words[:-1]) if re.fullmatch(r"-[a-z]*c", word)), None)
    return None


def _called(words: list[str]) -> tuple[tuple[str, str], int] | None:
    """Returns `((engine, program), index of the first argument)`, or None if the words start no server."""
    for index, word in enumerate(words):
        name = PurePosixPath(word).name if "/" in word else word
        for calling, meant in PROGRAMS.items():
            if (name, *words[index + 1 : index + len(calling)]) == calling:
                return meant, index + len(calling)
    if any(word in _CONTAINERS for word in words[:2]) and "run" in words[:4]:
        for index, word in enumerate(words):
            for image, meant in _IMAGES:
                if image.search(word):
                    return meant, index + 1
    return None


def _variables(command: Command, end: int) -> dict[str, Word]:
    """Returns the shell's variables, and those set by `NAME=value` before the program (`env`, `docker run -e`)."""
    given = {}
    for word in command.words[:end]:
        spelled = _CONTAINERS_VARIABLE.sub("", word.text)
        if _ASSIGNMENT.match(spelled):
            name, _, value = spelled.partition("=")
            given[name] = Word(value, word.unexpanded, word.assumed)
    return {**command.variables, **given}


def _require_plain(word: Word) -> None:
    sign = word.text[:1]
    if sign in _LOOKS_TYPED:
        raise UsageError(
            f"{quoted(word.text)} begins with {_LOOKS_TYPED[sign]}, which no engine reads.",
            "An editor has replaced the plain sign: write - for a dash, ' or \" for a quote.",
        )
