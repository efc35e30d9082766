"""Reads the tuned files that vLLM and SGLang ship for their grouped Triton GEMM.

Where such a file exists for the layer and the device, the engine runs its rows. So these are the default to compare
with there. The engine is found without importing it. Sources: `get_moe_configs` and `try_get_optimal_moe_config` of
vLLM 0.33.0 (`fused_moe.py`) and SGLang 0.5.23 (`fused_moe_triton_config.py`), and `_prepare_fused_moe_run` of SGLang.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from moetune.backends.grouped_triton.engine_files import ConfigFile, sglang_folder
from moetune.backends.grouped_triton.kernel_versions import numbers
from moetune.backends.grouped_triton.space import (
    SCALE_BLOCK,
    VALUES,
    Limits,
    Shapes,
    effective_block_size_k,
    shared_bytes,
    tactic_of,
)
from moetune.errors import UsageError
from moetune.quoting import quoted, shortened
from moetune.spec.enums import ENGINE_TITLES
from moetune.spec.tactic import Tactic
from moetune.untrusted import read_json

Values = Mapping[str, Any]
"""One row of a file: the kernel's tunables by name, as JSON."""

FOLDERS: Final[Mapping[str, tuple[str, ...]]] = {
    "vllm": ("model_executor/layers/fused_moe/configs",),
    "sglang": ("srt/layers/moe/moe_runner/triton_utils/configs", "srt/layers/moe/fused_moe_triton/configs"),
}
"""The folder of an engine's files, below its package; the newest first."""
TRITONS_OWN: Final = {"num_warps": 4, "num_stages": 3}
"""What Triton takes on a GPU of NVIDIA if a row does not name it (`CUDAOptions`)."""
_POWERS_OF_TWO: Final = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "num_warps")
MOST_ROWS: Final = 4_096
"""Of one file. Engines' own have some twenty."""
_LARGEST_BLOCK_SIZE_M: Final = 256  # of moetune's own alignment of slots


@dataclass(frozen=True, slots=True)
class ShippedRow:
    """The row of a file that an engine runs for one row count.

    Attributes:
        name: the file's name below the engine's folder.
        key: the file's row count that is nearest.
        values: the tunables of the first GEMM, and of the second one if it has no row of its own.
        down_name: the file of the second GEMM; empty if there is none.
        down: the tunables of the second GEMM, if it has a file.
    """

    name: str
    key: int
    values: Values
    down_name: str = ""
    down: Values | None = None


@dataclass(frozen=True, slots=True)
class EngineConfigs:
    """An engine's files.

    Attributes:
        engine: `vllm` or `sglang`.
        folder: where they are; None if the engine is not installed, or ships none.
        given: the value of `--engine-configs`; empty if these are the installed engine's.
    """

    engine: str
    folder: Path | None
    given: str = ""

    @classmethod
    def of(cls, engine: str, given: Path | str | None) -> EngineConfigs:
        """Finds the files of an engine.

        Args:
            engine: `vllm` or `sglang`.
            given: a folder of such files, or the one that has it as `configs`. None means those of the installed
                engine.

        Raises:
            UsageError: `given` is no folder.
        """
        if given is not None:
            folder = Path(given)
            if not os.path.isdir(folder):
                raise UsageError(
                    f"--engine-configs must be a folder, given {quoted(str(given))}.",
                    f"Give the folder of {ENGINE_TITLES[engine]}'s tuned files; for none of them, an empty folder.",
                )
            return cls(engine, inner if (inner := folder / "configs").is_dir() else folder, str(given))
        spec = importlib.util.find_spec(engine)
        roots = (spec.submodule_search_locations or []) if spec else []
        folders = (Path(root) / name for root in roots for name in FOLDERS[engine])
        return cls(engine, next((folder for folder in folders if folder.is_dir()), None))

    def row(self, file: ConfigFile, rows: int, triton: str) -> ShippedRow | None:
        """Returns the row that the engine runs for `rows` rows; None if it has no file of this name.

        Args:
            file: what names the file.
            rows: the row count.
            triton: Triton's version, by which SGLang sorts its files into folders.

        Raises:
            UsageError: a file cannot be read.
        """
        if self.folder is None:
            return None
        if self.engine == "vllm":
            path = self.folder / file.vllm_name
            return self._row(path, rows) if path.is_file() else None
        up_path = in_folders(self.folder, file.sglang_name(), triton)
        found = self._row(up_path, rows) if up_path else None
        down_path = in_folders(self.folder, file.sglang_name(down=True), triton)
        down = self._row(down_path, rows) if down_path and found else None
        if found is None or down is None:
            return found
        # both GEMMs use one alignment of the slots, so SGLang takes the first one's BLOCK_SIZE_M
        values = {**down.values, "BLOCK_SIZE_M": found.values.get("BLOCK_SIZE_M")}
        return ShippedRow(found.name, found.key, found.values, down.name, values)

    def _row(self, path: Path, rows: int) -> ShippedRow | None:
        """Returns the nearest row of a file, the first of two; None for a file without rows, which engines ignore."""
        assert self.folder is not None
        by_key = read_rows(path, has_triton_version=self.engine == "vllm")
        if not by_key:
            return None
        key = min(by_key, key=lambda key: abs(key - rows))
        return ShippedRow(path.relative_to(self.folder).as_posix(), key, by_key[key])

    def named(self, name: str) -> str:
        """Returns what to call a file of these: `shipped file NAME of vllm 0.33.0`."""
        return f"file {name} in {self.given}" if self.given else f"shipped file {name} of {self._owner}"

    def absent(self, file: ConfigFile) -> str:
        """Returns why there is no file of this name."""
        name = file.vllm_name if self.engine == "vllm" else file.sglang_name()
        if self.given:
            return f"no {name} in {self.given}"
        if importlib.util.find_spec(self.engine) is None:
            return f"{self.engine} is not installed"
        return f"{self._owner} ships no {name}"

    @property
    def title(self) -> str:
        """The engine's name in a sentence: `vLLM`."""
        return ENGINE_TITLES[self.engine]

    @property
    def _owner(self) -> str:
        try:
            return f"{self.engine} {importlib.metadata.version(self.engine)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.engine} of unknown version"


def device_name() -> str | None:
    """Returns the name of the GPU that runs Triton's kernels; None if there is none, as under Triton's interpreter."""
    import torch

    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()


def runnable(values: Values, engine: str, shapes: Shapes, limits: Limits | None) -> Tactic | str:
    """Returns a row as the tactic that runs it in both GEMMs, or why moetune's kernel cannot run it.

    A key that changes nothing is left out: `SPLIT_K` in vLLM, which sets it to 1 itself; one CTA per block; TMA that is
    off. BLOCK_SIZE_K is clamped to the scale block as vLLM does it.

    Args:
        values: the row.
        engine: `vllm` or `sglang`.
        shapes: the bucket's shapes.
        limits: the device's limits; None if they are unknown.
    """
    given = {**TRITONS_OWN, **{name: value for name, value in values.items() if not _is_idle(engine, name, value)}}
    if unknown := [f"{name} is {json.dumps(given[name])}" for name in given if name not in VALUES]:
        return ", ".join(unknown)
    if missing := [name for name in VALUES if name not in given]:
        return f"{', '.join(missing)} is missing"
    for name, value in given.items():
        if type(value) is not int or value < 1 or (name in _POWERS_OF_TWO and value.bit_count() != 1):
            return f"{name} is {json.dumps(value)}"
    if given["BLOCK_SIZE_M"] > _LARGEST_BLOCK_SIZE_M:
        return f"BLOCK_SIZE_M is {given['BLOCK_SIZE_M']}, the largest is {_LARGEST_BLOCK_SIZE_M}"
    if shapes.fp8 and engine == "sglang" and given["BLOCK_SIZE_K"] > SCALE_BLOCK:
        return f"BLOCK_SIZE_K is {given['BLOCK_SIZE_K']}, which exceeds the scale block of {SCALE_BLOCK}"
    given["BLOCK_SIZE_K"] = effective_block_size_k(given, shapes.fp8)
    tactic = tactic_of(*(given[name] for name in VALUES))
    if limits and (needed := shared_bytes(tactic, shapes.fp8, limits.capability, shapes.version)) > limits.shared_bytes:
        return f"it needs {needed} bytes of shared memory, a block may have {limits.shared_bytes}"
    return tactic


def _is_idle(engine: str, name: str, value: object) -> bool:
    """Returns whether a key of a row changes nothing in what the engine runs."""
    match name:
        case "SPLIT_K":
            return engine == "vllm"
        case "num_ctas":
            return value == 1
        case "USE_TMA":
            return engine == "sglang" and value is False
    return False


def in_folders(folder: Path, name: str, triton: str) -> Path | None:
    """Returns SGLang's file of a name: that of the running Triton, else that of the newest other Triton."""
    return next((path for each in triton_folders(folder, triton) if (path := each / name).is_file()), None)


def triton_folders(folder: Path, triton: str) -> tuple[Path, ...]:
    """Returns the folders in which SGLang looks for a file, the first one first: that of the running Triton leads."""
    own = folder / sglang_folder(triton)
    others = [path for path in folder.iterdir() if path.name.startswith("triton_") and path != own]
    others.sort(key=lambda path: numbers(path.name.removeprefix("triton_").replace("_", ".")), reverse=True)
    return (own, *others)


def read_rows(path: Path, *, has_triton_version: bool, option: str = "--engine-configs") -> dict[int, Values]:
    """Returns a file's rows by their row counts, in the file's order.

    Args:
        path: the file.
        has_triton_version: whether its key `triton_version` is no row count, as in vLLM.
        option: the option that gives another folder, for the error.

    Raises:
        UsageError: it is no JSON object of rows.
    """
    try:
        document = read_json(path)
        if not isinstance(document, dict):
            raise ValueError("it is no JSON object")
        if len(document) > MOST_ROWS:
            raise ValueError(f"it has more than {MOST_ROWS:,} rows")
        rows = {int(key): row for key, row in document.items() if not (has_triton_version and key == "triton_version")}
        if wrong := [key for key, row in rows.items() if not isinstance(row, dict)]:
            raise ValueError(f"its row {wrong[0]} is no JSON object")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read as an engine's tuned configurations: {shortened(str(error))}.",
            f"Repair the file or remove it, or give another folder with {option}.",
        ) from None
    return rows
