"""Reads out of an engine's log which tuned file it has read for each shape, and which MoE kernels it has chosen.

Texts: `get_moe_configs` of vLLM 0.26.0 and 0.33.0 (`fused_moe.py`) and of SGLang 0.5.23
(`fused_moe_triton_config.py`); `_make_log_backend` of vLLM's `fused_moe/oracle/*.py`. vLLM logs each text once.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from moetune.errors import UsageError
from moetune.quoting import shown_path
from moetune.spec.model import FrozenModel
from moetune.untrusted import opened

Event = Literal["read", "default", "other_triton", "reused"]
"""What an engine did: it read the file, ran its default, read the file of another Triton (SGLang), or took the first
GEMM's rows for the second one (SGLang)."""
MOST_BYTES: Final = 1_073_741_824
"""The largest log. It is read line by line."""
MOST_IN_LINE: Final = 2_048
"""The most bytes of a line; the rest counts as another line. The engines' lines about files have some hundred."""
MOST_LINES: Final = 10_000
"""The most lines that can say something of MoE kernels. Engines write them when they start."""
_MARKS: Final = re.compile(rb"MoE|moetune|Deterministic")
"""What each line that says something of MoE kernels has in it."""
_COLORS: Final = re.compile(r"\x1b\[[0-9;]*m")
_NAMED: Final = r"(?>[^\n]*?E=\d+,N=\d+,)[^\n]*?\.json"  # atomic: in a line without `.json` it gives up once
_TEXTS: Final[tuple[tuple[Event, re.Pattern[str]], ...]] = (
    ("read", re.compile(rf"Using configuration from ({_NAMED}) for MoE layer\.")),
    ("read", re.compile(rf"Using MoE kernel config from ({_NAMED})\.")),
    (
        "other_triton",
        re.compile(
            rf"Config file not found at {_NAMED}\. Fallback to triton version \S+ and use MoE kernel config from "
            rf"({_NAMED})\."
        ),
    ),
    ("reused", re.compile(rf"Down MoE config file not found at ({_NAMED}); reusing the tuned up-projection config")),
    (
        "default",
        re.compile(
            rf"Using default MoE (?:kernel )?config\. Performance might be sub-optimal! Config file not found at "
            rf"\[?'?({_NAMED})"
        ),
    ),
)
_KERNELS: Final = re.compile(r"Using '?([\w ]+?)'? (?:Fp8|Unquantized|MxFp8|NvFp4|Mxfp4|MXFP4) MoE backend")
_PLUGIN: Final = re.compile(r"moetune: Triton experts (E=\d+, N=\d+): profile of ")
"""The line of moetune's plugin (`moetune.engine.triton_answers`) that says that it answers the look-ups of a shape."""
_DETERMINISTIC: Final = "Deterministic inference is enabled, using default MoE kernel config."


class LoggedFile(FrozenModel):
    """What the log says of one file.

    Attributes:
        name: the file's name, which has the shape in it.
        path: the path that the log gives; the first one if it gives several.
        event: what the engine did.
    """

    name: str
    path: str
    event: Event


class EngineLog(FrozenModel):
    """What an engine's log says of tuned files.

    Attributes:
        path: the log.
        files: one entry for each file and event, in the log's order.
        kernels: the MoE backends that vLLM has chosen, as it names them.
        plugin: the shapes whose look-ups moetune's plugin answers from a profile, so that no file is read.
        deterministic: whether SGLang ran its default because of deterministic inference.
    """

    path: str
    files: tuple[LoggedFile, ...]
    kernels: tuple[str, ...] = ()
    plugin: tuple[str, ...] = ()
    deterministic: bool = False

    @property
    def all_read(self) -> bool:
        """Whether each shape in the log has a file that was read or a profile, and at least one shape is there.

        A default that ran, or another Triton's file, is neither.
        """
        events = {file.event for file in self.files}
        return (
            ("read" in events or bool(self.plugin))
            and not events & {"default", "other_triton"}
            and not self.deterministic
        )

    def of(self, name: str) -> LoggedFile | None:
        """Returns what the log says of the file of this name. A default or another Triton's file comes first."""
        found = [file for file in self.files if file.name == name]
        return min(found, key=lambda file: file.event == "read", default=None)


def read_log(path: Path | str) -> EngineLog:
    """Returns what an engine's log says.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        with opened(path, MOST_BYTES) as file:
            lines = iter(partial(file.readline, MOST_IN_LINE), b"")
            marked = list(islice(filter(_MARKS.search, lines), MOST_LINES))
    except OSError as error:
        raise UsageError(
            f"--log {shown_path(path)} cannot be read: {error.strerror or error}.",
            "Give the file with the engine's output.",
        ) from None
    return parsed_log(b"\n".join(marked).decode("utf-8", errors="replace"), str(path))


def parsed_log(text: str, path: str = "") -> EngineLog:
    """Returns what the text of a log says; `path` is where it is from."""
    plain = _COLORS.sub("", text)
    found = [
        (match.start(), LoggedFile(name=PurePosixPath(match[1]).name, path=match[1], event=event))
        for event, pattern in _TEXTS
        for match in pattern.finditer(plain)
    ]
    files = [file for _, file in sorted(found, key=lambda each: each[0])]
    return EngineLog(
        path=path,
        files=tuple(dict.fromkeys(files)),
        kernels=tuple(dict.fromkeys(match[1] for match in _KERNELS.finditer(plain))),
        plugin=tuple(dict.fromkeys(match[1] for match in _PLUGIN.finditer(plain))),
        deterministic=_DETERMINISTIC in plain,
    )
