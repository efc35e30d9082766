"""Recordings for tests, and the files that hold them."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
import torch


def tokens(count: int, num_experts: int = 16, top_k: int = 4, seed: int = 0) -> torch.Tensor:
    """Skewed ids, int32 `[count, top_k]`, in which experts 2i and 2i + 1 come together more often than by chance."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, num_experts, generator=generator) * torch.linspace(1.0, 0.3, num_experts)
    pairs = scores.view(count, -1, 2)
    together = 0.6 * pairs.mean(2, keepdim=True) + 0.4 * pairs
    return together.flatten(1).topk(top_k, dim=1).indices.int()


def layers(count: int, each: int = 50, **sizes: int) -> torch.Tensor:
    """`count` layers of `each` tokens, int32 `[count, each, top_k]`."""
    return torch.stack([tokens(each, seed=seed, **sizes) for seed in range(count)])


def safetensors(**tensors: torch.Tensor) -> bytes:
    """The bytes that `safetensors.torch.save` writes for little-endian tensors."""
    names = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        content = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += content
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def calibrator(found: torch.Tensor, first_layer: int = 0) -> str:
    """The JSON of TensorRT-LLM's calibrator, for one rank and one iteration, of int32 `[layers, tokens, k]`.

    As `Calibrator._save_collected_data` in tensorrt_llm/tools/layer_wise_benchmarks/calibrator.py writes it.
    """
    metadata = [
        {"layer_idx": first_layer + number, "num_slots": 16, "token_selected_slots_shape": list(slots.shape)}
        for number, slots in enumerate(found)
    ]
    slots_data = torch.cat([slots.flatten() for slots in found])
    record = {
        "iteration": 7,
        "metadata": metadata,
        "raw_data": base64.b64encode(zlib.compress(slots_data.numpy().tobytes())).decode(),
    }
    return json.dumps({"world_size": 1, "all_ranks_records": [[record]]})


def response(found: torch.Tensor) -> str:
    """A response of vLLM to a completion, with the routed experts of int32 `[layers, tokens, k]`."""
    with io.BytesIO() as buffer:  # `numpy2base64` in vllm/utils/serial_utils.py
        numpy.save(buffer, found.transpose(0, 1).numpy().astype(numpy.uint8), allow_pickle=False)
        spelled = base64.b64encode(buffer.getbuffer()).decode("ascii")
    return json.dumps(
        {"id": "cmpl-1", "object": "text_completion", "choices": [{"text": "", "routed_experts": spelled}]}
    )


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
