"""Reads the ids in JSON: the records of TensorRT-LLM's calibrator, and the responses of vLLM."""

from __future__ import annotations

import base64
import binascii
import io
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from moetune.quoting import shortened
from moetune.recordings.arrays import MOST_NUMBERS, npy
from moetune.untrusted import decoded, parse_json

MOST_BYTES: Final = 2**25
"""The largest file. Compressed ids need about a byte each."""


def documents(content: bytes, *, lines: bool) -> list[Any]:
    """Returns the one document of a JSON file, or that of each line of a `.jsonl` file.

    Raises:
        ValueError: as `parse_json`.
    """
    if not lines:
        return [parse_json(content, most=MOST_BYTES)]
    return [parse_json(line, most=MOST_BYTES) for line in decoded(content).splitlines() if line.strip()]


def of_layers(found: Sequence[Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields layers and their ids, int32 `[tokens, k]`, in the order of the documents. A layer can come more than once.

    Raises:
        ValueError: a document has no ids, or is not as its engine writes it.
    """
    for document in found:
        match document:
            case {"all_ranks_records": list(ranks)}:
                for records in ranks:
                    for record in records if isinstance(records, list) else [None]:
                        yield from _of_calibrator(record)
            case {"choices": list(choices)}:
                for choice in choices:
                    yield from _of_response(choice)
            case _:
                raise ValueError(
                    "it has neither all_ranks_records, as TensorRT-LLM's calibrator writes, nor choices with "
                    "routed_experts, as vLLM answers with --enable-return-routed-experts"
                )


def _of_calibrator(record: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the layers of one iteration.

    `raw_data` is the base64 of the zlib stream of the int32 ids of all layers, one after the other; `metadata` has
    their numbers and shapes (`Calibrator._save_collected_data` in tensorrt_llm/tools/layer_wise_benchmarks).
    """
    match record:
        case {"metadata": list(metadata), "raw_data": str(raw)}:
            shapes = [_shape(each) for each in metadata]
        case _:
            raise ValueError("a record of it has no metadata or no raw_data")
    count = sum(math.prod(shape) for _, shape in shapes)
    if count > MOST_NUMBERS:
        raise ValueError(f"a record of it has {count:,} ids, more than {MOST_NUMBERS:,}")
    content = _inflated(_from_base64(raw), 4 * count)
    if not count:
        return
    ids = torch.frombuffer(content, dtype=torch.int32)
    start = 0
    for layer, shape in shapes:
        size = math.prod(shape)
        yield layer, ids[start : start + size].view(shape)
        start += size


def _shape(entry: Any) -> tuple[int, tuple[int, int]]:
    match entry:
        case {"layer_idx": int(layer), "token_selected_slots_shape": [int(tokens), int(top_k)]} if (
            0 <= layer < 10**6 and tokens >= 0 and top_k >= 0
        ):
            return layer, (tokens, top_k)
    raise ValueError("an entry of its metadata has no layer_idx, or no token_selected_slots_shape [tokens, k]")


def _inflated(stream: bytes, size: int) -> bytearray:
    """Returns the `size` bytes of a zlib stream. Raises ValueError if it has fewer or more; no more are made."""
    inflater = zlib.decompressobj()
    try:
        content = bytearray(inflater.decompress(stream, size + 1))
    except zlib.error as error:
        raise ValueError(f"a raw_data of it is no zlib stream: {shortened(str(error))}") from None
    if len(content) != size:
        raise ValueError(f"a raw_data of it has not the {size:,} bytes that its metadata says")
    return content


def _of_response(choice: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields the layers of one choice of a response.

    `routed_experts` is the base64 of a `.npy` file, `[tokens, layers, k]` (`numpy2base64` in vllm/utils/serial_utils.py
    of vLLM 0.33). Layers without experts have zeros only.
    """
    spelled = choice.get("routed_experts") if isinstance(choice, dict) else None
    if not isinstance(spelled, str):
        raise ValueError("a choice of it has no routed_experts. Start vLLM with --enable-return-routed-experts")
    array = npy(io.BytesIO(_from_base64(spelled)))
    if len(array.shape) != 3 or not array.is_integer:
        raise ValueError("its routed_experts are not integers [tokens, layers, k]")
    yield from enumerate(array.numbers().transpose(0, 1))


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"it has a text that is no base64: {shortened(str(error))}") from None
