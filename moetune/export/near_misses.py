"""Finds tuned files that an engine does not read, and says which parts of their names differ and what that means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.export.places import Places
from moetune.inputs.launch_table import TableLine
from moetune.spec.enums import ENGINE_TITLES
from moetune.spec.model import FrozenModel

MOST_NEAR_MISSES: Final = 5
_NAME: Final = re.compile(
    r"E=(?P<E>\d+),N=(?P<N>\d+),device_name=(?P<device_name>[^,]+?)(?:,dtype=(?P<dtype>[^,]+?))?"
    r"(?:,block_shape=(?P<block_shape>\[[^\]]*\]))?(?P<per_channel_quant>,per_channel_quant=True)?(?P<down>_down)?\.json"
)


class Part(FrozenModel):
    """One part of a file's name, or `folder`: what the engine looks for, and what a file has. None: it is absent."""

    wanted: str | None
    found: str | None


class NearMiss(FrozenModel):
    """A file that the engine does not read, the parts of its name that differ, and what they mean."""

    path: str
    differs: dict[str, Part]
    meaning: str = ""


def differing(wanted: str, found: str) -> dict[str, Part] | None:
    """Returns the parts in which two file names differ, or None if `found` is no name of a tuned file.

    >>> differing("E=8,N=2048,device_name=A.json", "E=8,N=1024,device_name=A.json")
    {'N': Part(wanted='2048', found='1024')}
    """
    mine, theirs = _NAME.fullmatch(wanted), _NAME.fullmatch(found)
    if mine is None or theirs is None:
        return None
    pairs = {part: (mine[part], theirs[part]) for part in _NAME.groupindex}
    return {part: Part(wanted=a, found=b) for part, (a, b) in pairs.items() if a != b}


def near_misses(
    line: TableLine, file: ConfigFile, name: str, found: Path | None, folders: Sequence[Path], places: Places
) -> tuple[NearMiss, ...]:
    """Returns the files that the engine does not read, the nearest first, at most `MOST_NEAR_MISSES`.

    Args:
        line: what the launch line says.
        file: what names the file that the engine looks for.
        name: that file's name.
        found: the file that the engine reads; None if there is none.
        folders: the folders in which the engine looks, in order.
        places: the folders of the user and of the engine.
    """
    roots = [root for root in (places.own, places.shipped) if root is not None and root.is_dir()]
    if line.engine == "sglang":
        roots = roots[:1]
    seen: dict[Path, NearMiss] = {}
    for path in (path for root in roots for path in _tuned_files(root)):
        parts = differing(name, path.name)
        if parts is None or path == found or set(parts) == {"down"}:
            continue
        if not parts:
            if path.parent in folders:
                continue
            parts = {"folder": Part(wanted=str(folders[0]) if folders else None, found=str(path.parent))}
        seen[path] = NearMiss(path=str(path), differs=parts, meaning=_meaning(line, file, parts))
    ranked = sorted(seen.items(), key=lambda each: (_in_own(each[0], places), _distance(each[1].differs), str(each[0])))
    return tuple(miss for _, miss in ranked[:MOST_NEAR_MISSES])


def _in_own(path: Path, places: Places) -> bool:
    return places.own is not None and not path.is_relative_to(places.own)


def _tuned_files(root: Path) -> Iterable[Path]:
    return (path for path in sorted(root.rglob("E=*.json")) if not path.name.endswith(".moetune.json"))


def _distance(parts: dict[str, Part]) -> tuple[int, int]:
    """Returns the order of near misses: first by the number of parts that differ, a device last among equals."""
    return (len(parts), int("device_name" in parts))


def _meaning(line: TableLine, file: ConfigFile, parts: dict[str, Part]) -> str:
    """Returns what the differing parts of a name mean, as sentences."""
    said = []
    for name, part in parts.items():
        found = part.found or ""
        match name:
            case "E":
                said.append(_experts(line, file.num_experts, int(found)))
            case "N":
                said.append(_size(line, file.intermediate_size, int(found)))
            case "device_name":
                said.append(f"It is for {found.replace('_', ' ')}.")
            case "dtype":
                said.append(f"It is for dtype {found or 'bf16 or fp16'}.")
            case "block_shape":
                said.append(f"Its scale block is spelled {found or 'not at all'}.")
            case "per_channel_quant":
                said.append("It is for another kind of scales.")
            case "down":
                said.append("It is for the second GEMM alone.")
            case "folder":
                said.append("The engine does not look in this folder.")
    return " ".join(said)


def _experts(line: TableLine, wanted: int, found: int) -> str:
    shared = line.layer.num_shared_experts
    if line.fused_experts and found == wanted - line.fused_experts:
        return f"SGLang fuses the shared expert, so E is {wanted}; --disable-shared-experts-fusion makes it {found}."
    if shared and not line.fused_experts and found == wanted + shared:
        return f"It counts the shared expert, which {ENGINE_TITLES[line.engine]} does not fuse here."
    if line.ep_size > 1 and found == line.layer.num_experts:
        return f"It counts all experts; at EP {line.ep_size} a rank has {wanted}."
    return f"It is for {found} experts on a rank."


def _size(line: TableLine, wanted: int, found: int) -> str:
    if line.tp_size > 1 and found == line.layer.intermediate_size:
        return f"It has the whole intermediate size; at TP {line.tp_size} a rank has {wanted}."
    return f"It is for an intermediate size of {found} on a rank."
