"""Inputs that a fuzz target has found: each raised something that is not moetune's own, or was not bounded."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fuzz.run import MOST_MESSAGE
from fuzz.targets import DATA, TARGETS, _profiles
from moetune.errors import MoetuneError

CONFIG = json.loads((DATA / "hf" / "deepseek-v3.json").read_text(encoding="utf-8"))


def profile(index: int = 0, **strict: str) -> bytes:
    document: dict[str, Any] = json.loads(_profiles()[index])
    document["environment"]["strict"] |= strict
    return json.dumps(document).encode()


def config(**changed: object) -> bytes:
    return json.dumps({**CONFIG, **changed}).encode()


def quantized(method: str, **fields: object) -> bytes:
    return config(quantization_config={"quant_method": method, **fields})


BLOCK = {"weights": {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": "²x²"}}
LAYER = {"num_experts": 1, "top_k": 1, "hidden_size": 1, "intermediate_size": 1}
FOUND: dict[str, tuple[str, bytes]] = {
    "no number in the compute capability": ("profile", profile(compute_capability="")),
    "a word as FlashInfer's compute capability": ("profile", profile(-3, compute_capability="x")),
    "a word as TensorRT-LLM's compute capability": ("profile", profile(-2, compute_capability="x")),
    "no number in Triton's version": ("profile", profile(triton="x")),
    "a version of 5000 digits": ("profile", profile(triton="9" * 900)),
    "a list as expert_dtype": ("config", config(expert_dtype=[128, 128])),
    "a layer of 5000 digits": ("config", quantized("modelopt", quant_algo="NVFP4", ignore=[f"layers.{'9' * 5000}"])),
    "numbers as GPTQ's modules": ("config", quantized("gptq", bits=4, modules_in_block_to_quantize=[1])),
    "a block of superscripts": ("config", quantized("compressed-tensors", config_groups={"a": BLOCK})),
    "a path that is too long": ("launch", b"vllm serve deepseek-ai/" + b"x/" * 3000),
    "a model that is too long": ("options", b"--model qwen" + b"9" * 5000 + b"/x"),
    "a value of 5000 digits": ("launch", b"vllm serve Qwen/Qwen3-30B-A3B -tp " + b"9" * 5000),
    "an option of 5000 digits": ("options", b"--model qwen3-30b-a3b --ep " + b"9" * 5000),
    "an unknown option that is long": ("options", b"--" + b"expert" * 2000),
    "a flag without a value at the end": ("launch", b"docker run --entrypoint"),
    "a number as the regime": ("provenance", json.dumps({"layer": LAYER, "regime": 4}).encode()),
    "a divisor of 5000 digits": ("ladder", b"pow2/" + b"9" * 5000),
    "a bucket of 5000 digits": ("ladder", b"1," + b"9" * 5000),
    "an empty YAML integer": ("settings", b"a: !!int ''"),
    "a YAML date": ("settings", b"hf-overrides: {a: 2020-01-01}"),
    "a row count of 5000 digits": ("tuned_file", json.dumps({"9" * 5000: {}}).encode()),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_is_read_or_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader, content = FOUND[name]
    said = ""
    try:
        TARGETS[reader].read(content, tmp_path)
    except MoetuneError as error:
        said = error.message
    assert len(said) < MOST_MESSAGE
