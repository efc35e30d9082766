"""Reads what SGLang saves with `torch.save`: tensors of ids, and the records of its recorder.

torch's own reader loads them with `weights_only=True`: tensors, numbers, texts, lists and dictionaries, nothing else.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from typing import IO, Any, Final

import torch

from moetune.quoting import shortened
from moetune.recordings.arrays import MOST_BYTES, MOST_NUMBERS, as_ids
from moetune.recordings.zipped import require_small_directory

_MOST_OBJECTS: Final = 2**20
"""The largest description of the objects in bytes. A tensor's numbers are not part of it."""
_HOW: Final = (
    "Save only tensors of integers: torch.save(topk_ids.cpu(), path), or as .npy with numpy.save(path, topk_ids)"
)


def load(file: IO[bytes]) -> Any:
    """Returns what `torch.save` has saved.

    Raises:
        ValueError: it is no archive of torch, it has other objects than `weights_only` allows, or it is too large.
    """
    require_small_directory(file, most=2**22)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"it is no archive of torch: {shortened(str(error))}") from None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its archive is compressed, which torch never does")
    if sum(member.file_size for member in members) > MOST_BYTES:
        raise ValueError(f"its content has more than {MOST_BYTES:,} bytes")
    objects = sum(member.file_size for member in members if member.filename.endswith(".pkl"))
    if objects > _MOST_OBJECTS:
        raise ValueError(f"its objects have {objects:,} bytes, more than {_MOST_OBJECTS:,}. {_HOW}")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"it has objects that only pickle reads, and moetune never unpickles. {_HOW}") from None
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"torch cannot read it: {type(error).__name__}: {shortened(str(error))}") from None


def of_layers(content: Any, layer: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the layers' ids, int32 `[tokens, k]`, of one saved tensor or of SGLang's recorder.

    The recorder (`_DetailAccumulator.dump` in srt/eplb/expert_distribution.py of SGLang 0.5.23, mode `per_token`) saves
    the ids of copies for each forward pass, `[layers, tokens, 8]`, with −1 where a layer routes nothing. They are
    replaced by the ids of experts from `last_physical_to_logical_map`, `[layers, copies]`.

    Args:
        content: what `load` returns.
        layer: the layer's number of a tensor `[tokens, k]`.

    Raises:
        ValueError: it is neither.
    """
    match content:
        case torch.Tensor():
            found = _integers(content)
            yield from [(layer, found)] if found.dim() == 2 else enumerate(found)
        case {"records": list(records), "last_physical_to_logical_map": torch.Tensor() as experts}:
            experts = _integers(experts)
            passes = [_of_pass(record, experts) for record in records]
            if not passes:
                raise ValueError("it has no forward pass")
            if sum(each.numel() for each in passes) > MOST_NUMBERS:
                raise ValueError(f"it has more than {MOST_NUMBERS:,} ids. Record fewer tokens")
            for number in range(len(experts)):
                yield number, torch.cat([each[number] for each in passes])
        case {"logical_count": _}:
            raise ValueError(
                "it has the loads of experts and no ids of tokens. Start SGLang with "
                "--expert-distribution-recorder-mode per_token"
            )
        case _:
            raise ValueError(f"it is neither a tensor of ids nor a recording of SGLang. {_HOW}")


def _of_pass(record: Any, experts: torch.Tensor) -> torch.Tensor:
    ids = record.get("topk_ids_of_layer") if isinstance(record, dict) else None
    if not isinstance(ids, torch.Tensor):
        raise ValueError("a record of it has no topk_ids_of_layer. Use --expert-distribution-recorder-mode per_token")
    ids = _integers(ids)
    if ids.dim() != 3 or experts.dim() != 2 or len(ids) != len(experts):
        raise ValueError(f"a record of it has ids of the shape {list(ids.shape)} for {len(experts)} layers")
    if ids.numel() and int(ids.max()) >= experts.shape[1]:
        raise ValueError(f"a record of it has the id {int(ids.max())}, and there are {experts.shape[1]} copies")
    copies = ids.clamp(min=0).flatten(1).long()
    return torch.where(ids < 0, ids, experts.gather(1, copies).view_as(ids))


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a dense tensor of two or three dimensions as int32."""
    if tensor.layout != torch.strided or tensor.dim() not in (2, 3):
        raise ValueError(f"a tensor of it has {tensor.dim()} dimensions; ids are [tokens, k] or [layers, tokens, k]")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise ValueError(f"its numbers are {str(tensor.dtype).removeprefix('torch.')}; ids are integers")
    if tensor.numel() > MOST_NUMBERS:
        raise ValueError(f"it has {tensor.numel():,} ids, more than {MOST_NUMBERS:,}. Keep fewer tokens or layers")
    return as_ids(tensor)
