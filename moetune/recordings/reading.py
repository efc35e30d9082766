"""Reads a recording: from a file or a folder to distinct ids in each row."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

import torch

from moetune.errors import UsageError
from moetune.quoting import enumerated, quoted, shortened, shown_path
from moetune.recordings import json_file, torch_file
from moetune.recordings.arrays import MOST_BYTES, MOST_NUMBERS, Array, npy, npz, safetensors
from moetune.recordings.recording import Recording, remember
from moetune.spec.bounds import MOST_EXPERTS, MOST_TOP_K
from moetune.spec.distribution import Replay, parse_also, replay_of, weighted
from moetune.spec.regime import Regime
from moetune.untrusted import opened, read_bytes

_IDS: Final = ("topk_ids", "ids", "routed_experts")
_WEIGHTS: Final = "topk_weights"
_LAYERS: Final = "layers"
_OF_LAYER: Final = re.compile(r"topk_(?:ids|idx)_layer(?P<layer>[0-9]{1,6})_idx[0-9]{1,6}\.pt")
"""The files of the folder that `--topk-ids-dir` of SGLang's tuner names (benchmark/kernels/fused_moe_triton)."""
_OF_RANK: Final = re.compile(r"expert_distribution_recorder_[0-9.]{1,40}_(?P<layer>[0-9]{1,6})\.pt")
"""The files of SGLang's recorder, one for each rank."""
_MOST_FILES: Final = 4_096
_MOST_PARTS: Final = 65_536
_PIECE: Final = 2**16
_HINT: Final = "docs/workload.md, section Recordings, lists the formats."


@dataclass(frozen=True, slots=True)
class _Part:
    """Some tokens of one layer: ids int32 `[tokens, k]`, and their weights float32 of the same shape, or None."""

    layer: int
    ids: torch.Tensor
    weights: torch.Tensor | None = None


def with_digest(regime: Regime) -> Regime:
    """Returns the regime with the paths of its recordings replaced by their digests; other regimes as they are.

    Raises:
        UsageError: as `read_recording`, or two files have the same ids.
    """
    if all(replay.digest is not None for replay in regime.recordings):
        return regime
    main, *others = (replace(each, distribution=_by_digest(each.distribution)) for each in regime.distributions)
    also = parse_also(map(str, others))
    weighted(main.distribution, also)
    return regime.model_copy(update={"distribution": main.distribution, "also": also})


def _by_digest(distribution: str) -> str:
    replay = replay_of(distribution)
    if replay is None or replay.digest is not None:
        return distribution
    return str(Replay(read_recording(replay.source, replay.layer).digest))


def read_recording(path: Path | str, layer: int | None = None) -> Recording:
    """Reads a recording, and keeps it in this process for the regimes that name its digest.

    Args:
        path: a `.npz`, `.npy`, `.safetensors`, `.pt`, `.json` or `.jsonl` file, or a folder of SGLang's `.pt` files.
        layer: the number of the layer to take; None pools all.

    Raises:
        UsageError: it cannot be read, it has no such layer, or its ids are not those of routed tokens.
    """
    place = Path(path).expanduser()
    try:
        parts = list(islice(_parts(place), _MOST_PARTS + 1))
        if len(parts) > _MOST_PARTS:
            raise ValueError(f"it has more than {_MOST_PARTS:,} pieces of layers")
        found = _joined(parts, layer)
    except OSError as error:
        raise UsageError(f"The recording {shown_path(path)} cannot be read: {shortened(str(error))}.", _HINT) from None
    except (ValueError, MemoryError) as error:
        said = str(error) or "it is too large"
        raise UsageError(f"The recording {shown_path(path)} cannot be used: {said}.", _HINT) from None
    ids, weights, layers, left_out = found
    recording = Recording(
        digest=_digest(ids),
        name=place.resolve().name,
        spelled=str(Replay(os.fspath(path), layer)),
        ids=ids,
        weights=weights,
        loads=tuple(torch.bincount(ids.flatten()).tolist()),
        layers=layers,
        layer=layer,
        left_out=left_out,
    )
    remember(recording)
    return recording


def _parts(place: Path) -> Iterator[_Part]:
    if place.is_dir():
        yield from _of_folder(place)
        return
    match place.suffix.lower():
        case ".npy":
            with opened(place, MOST_BYTES) as file:
                yield from _of_arrays([("topk_ids", npy(file))])
        case ".npz":
            with opened(place, MOST_BYTES) as file:
                yield from _of_arrays(npz(file))
        case ".safetensors":
            with opened(place, MOST_BYTES) as file:
                yield from _of_arrays(safetensors(file))
        case ".pt":
            yield from _of_torch_file(place, 0)
        case ".json" | ".jsonl" as suffix:
            found = json_file.documents(read_bytes(place, json_file.MOST_BYTES), lines=suffix == ".jsonl")
            yield from (_Part(layer, ids) for layer, ids in json_file.of_layers(found))
        case suffix:
            with opened(place, MOST_BYTES):
                pass  # a missing file is the clearer error
            raise ValueError(
                f"its name ends with {quoted(suffix) if suffix else 'no suffix'}; known are .npz, .npy, .safetensors, "
                ".pt, .json and .jsonl"
            )


def _of_torch_file(place: Path, layer: int) -> Iterator[_Part]:
    with opened(place, MOST_BYTES) as file:
        yield from (_Part(number, ids) for number, ids in torch_file.of_layers(torch_file.load(file), layer))


def _of_folder(folder: Path) -> Iterator[_Part]:
    """Yields the layers in a folder of SGLang: of its tuner, or of its recorder with one file for each rank."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in islice(entries, _MOST_FILES + 1))
    if len(names) > _MOST_FILES:
        raise ValueError(f"it is a folder of more than {_MOST_FILES:,} files")
    of_layer = [found for name in names if (found := _OF_LAYER.fullmatch(name))]
    chosen = of_layer or [found for name in names if (found := _OF_RANK.fullmatch(name))]
    if not chosen:
        raise ValueError(
            "it is a folder without files named topk_ids_layer<L>_idx<I>.pt, as SGLang's tuner reads, or "
            "expert_distribution_recorder_<time>_<rank>.pt, as SGLang's recorder writes"
        )
    if sum((folder / found[0]).stat().st_size for found in chosen) > MOST_BYTES:
        raise ValueError(f"its files have more than {MOST_BYTES:,} bytes")
    for found in chosen:
        try:
            yield from _of_torch_file(folder / found[0], int(found["layer"]))
        except ValueError as error:
            raise ValueError(f"{found[0]}: {error}") from None


def _of_arrays(arrays: Iterable[tuple[str, Array]]) -> Iterator[_Part]:
    """Yields the layers of named arrays: the ids, and where they are there the weights and the layers' numbers."""
    read = _read(arrays)
    name = next((each for each in read if each in _IDS), None) or next(
        (each for each in read if each not in (_WEIGHTS, _LAYERS)), None
    )
    if name is None:
        raise ValueError(f"none of its arrays has one of the names {enumerated(_IDS)}")
    ids, weights, numbers = read[name], read.get(_WEIGHTS), read.get(_LAYERS)
    if weights is not None and weights.shape != ids.shape:
        raise ValueError(f"its weights have the shape {list(weights.shape)}, its ids {list(ids.shape)}")
    if ids.dim() not in (2, 3):
        raise ValueError(f"its ids have {ids.dim()} dimensions; they are [tokens, k] or [layers, tokens, k]")
    if ids.dim() == 2:
        ids, weights = ids.unsqueeze(0), None if weights is None else weights.unsqueeze(0)
    elif name == "routed_experts":  # vLLM's own name, and its order [tokens, layers, k]
        ids, weights = ids.transpose(0, 1), None if weights is None else weights.transpose(0, 1)
    layers = list(range(len(ids))) if numbers is None else numbers.flatten().tolist()
    if len(layers) != len(ids):
        raise ValueError(f"it has the numbers of {len(layers)} layers and the ids of {len(ids)}")
    for at, layer in enumerate(layers):
        yield _Part(layer, ids[at], None if weights is None else weights[at])


def _read(arrays: Iterable[tuple[str, Array]]) -> dict[str, torch.Tensor]:
    """Returns the arrays by name: ids under one name, `topk_weights` and `layers`. A single array can have any name."""
    read: dict[str, torch.Tensor] = {}
    for name, array in arrays:
        if len(read) >= 3:
            raise ValueError(f"it has more arrays than {_IDS[0]}, {_WEIGHTS} and {_LAYERS}")
        if array.is_integer == (name == _WEIGHTS):
            kind = (
                "integers; weights are floating-point numbers"
                if array.is_integer
                else "floating-point numbers; ids are integers"
            )
            raise ValueError(f"the numbers of {quoted(name)} are {kind}")
        read[name] = array.numbers()
    return read


def _joined(parts: list[_Part], layer: int | None) -> tuple[torch.Tensor, torch.Tensor | None, int, int]:
    """Returns ids, weights, the number of layers, and the number of rows that were left out."""
    by_layer: defaultdict[int, list[_Part]] = defaultdict(list)
    left_out = 0
    for part in parts:
        recorded = _recorded(part)
        left_out += len(part.ids) - len(recorded.ids)
        if len(recorded.ids):
            by_layer[part.layer].append(recorded)
    if not by_layer:
        raise ValueError("it has no routed token")
    if layer is not None and layer not in by_layer:
        raise ValueError(f"it has no layer {layer}; its layers with routed tokens are {enumerated(sorted(by_layer))}")
    chosen = [part for number in sorted(by_layer) if layer in (None, number) for part in by_layer[number]]
    widths = {part.ids.shape[1] for part in chosen}
    if len(widths) > 1:
        raise ValueError(f"its layers have different numbers of experts a token: {enumerated(sorted(widths))}")
    if sum(part.ids.numel() for part in chosen) > MOST_NUMBERS:
        raise ValueError(f"it has more than {MOST_NUMBERS:,} ids. Choose a layer (@LAYER), or keep fewer tokens")
    for part in chosen:
        _require_distinct(part)
    weights = [part.weights for part in chosen if part.weights is not None]
    return (
        torch.cat([part.ids for part in chosen]),
        torch.cat(weights) if len(weights) == len(chosen) else None,
        1 if layer is not None else len(by_layer),
        left_out,
    )


def _recorded(part: _Part) -> _Part:
    """Returns the rows and columns that were recorded.

    Rows of −1 are padding. Rows of zeros are those of layers without experts in vLLM's buffer, and padding in
    SGLang's on AMD. Columns that are −1 everywhere are those that SGLang's recorder has beyond k.
    """
    ids, weights = part.ids, part.weights
    if ids.dim() != 2 or not 1 <= ids.shape[1] <= MOST_TOP_K:
        raise ValueError(f"the ids of a layer have the shape {list(ids.shape)}; they are [tokens, k]")
    first = ids[:, :1]
    absent = (first == -1) | ((first == 0) if ids.shape[1] > 1 else torch.zeros_like(first, dtype=torch.bool))
    rows = ~((ids == first).all(1) & absent.squeeze(1))
    if not bool(rows.all()):
        ids, weights = ids[rows], None if weights is None else weights[rows]
    if len(ids) and bool((ids[0] == -1).any()):
        columns = ~(ids == -1).all(0)
        ids, weights = ids[:, columns], None if weights is None else weights[:, columns]
    return _Part(part.layer, ids, weights)


def _require_distinct(part: _Part) -> None:
    """Checks that each row has distinct ids of experts.

    Raises:
        ValueError: it does not.
    """
    for piece in torch.split(part.ids, _PIECE):
        least, most = int(piece.min()), int(piece.max())
        if least < 0:
            row = piece[(piece < 0).any(1)][0].tolist()
            raise ValueError(
                f"a row of layer {part.layer} has a negative id: {enumerated(row)}. −1 stands for a whole row that was "
                "not recorded, or for a whole column"
            )
        if most >= MOST_EXPERTS:
            raise ValueError(f"layer {part.layer} has the id {most}; there are at most {MOST_EXPERTS:,} experts")
        ordered = piece.sort(1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
        if bool(twice.any()):
            row = piece[twice][0].tolist()
            raise ValueError(f"a row of layer {part.layer} has one expert twice: {enumerated(row)}")


def _digest(ids: torch.Tensor) -> str:
    """Returns the first 16 hex digits of the SHA-256 over the shape and the ids."""
    plain = ids.contiguous()
    view = (ctypes.c_char * (plain.numel() * 4)).from_address(plain.data_ptr())
    found = hashlib.sha256(f"{len(plain)}x{plain.shape[1]} int32\n".encode())
    found.update(memoryview(view))
    return found.hexdigest()[:16]
