"""Recordings as the engines' own code writes them."""

from __future__ import annotations

import base64
import io
import logging
import time
from abc import ABC
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy
import pytest
import torch
from engine_code import parts
from recording_files import calibrator, layers, response, tokens

from moetune.errors import UsageError
from moetune.recordings.reading import read_recording

LAYERS = layers(2)


def metadata(physical_to_logical: torch.Tensor) -> Any:
    return SimpleNamespace(
        num_layers=len(physical_to_logical),
        num_physical_experts=physical_to_logical.shape[1],
        physical_to_logical_map=physical_to_logical,
    )


class Nothing:
    """In place of the base classes, which only count."""

    def __init__(self, location: Any, rank: int) -> None:
        self._expert_location_metadata, self._rank, self._records = location, rank, []

    def append(self, *arguments: Any) -> None:
        pass


def record_with_sglang(source: Path, folder: Path, found: torch.Tensor, physical_to_logical: torch.Tensor) -> None:
    """Writes two forward passes of ids of copies, int32 `[layers, tokens, k]`, with SGLang's recorder."""
    code = parts(
        source,
        {
            "_DetailSinglePassGatherer",
            "_DetailAccumulator",
            "_convert_per_token_to_global_physical_count",
            "_dump_to_file",
        },
        {
            "torch": torch, "time": time, "Path": Path, "ABC": ABC, "Optional": Optional,
            "logger": logging.getLogger(__name__),
            "_SinglePassGatherer": Nothing, "_UtilizationRateAccumulatorMixin": Nothing,
            "get_schedule": lambda: SimpleNamespace(chunked_prefill_size=16),
            "get_device_namespace": lambda: SimpleNamespace(device="cpu"),
            "get_exec": lambda: SimpleNamespace(overlap=SimpleNamespace(enable_two_batch_overlap=False)),
            "envs": SimpleNamespace(SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=SimpleNamespace(get=lambda: str(folder))),
        },
    )  # fmt: skip
    location = metadata(physical_to_logical)
    gatherer, accumulator = code["_DetailSinglePassGatherer"](location, 0), code["_DetailAccumulator"](location, 0)
    gatherer.reset()
    for number, step in enumerate(found.split(30, dim=1)):
        batch = SimpleNamespace(
            input_ids=torch.zeros(step.shape[1], dtype=torch.int64),
            positions=torch.arange(step.shape[1]),
            extend_seq_lens_cpu=[step.shape[1]],
            forward_mode=SimpleNamespace(value=1),
        )
        gatherer.on_forward_pass_start(batch)
        for layer, ids in enumerate(step):
            if layer != 1:  # as a dense layer, which routes nothing
                gatherer.on_select_experts(layer, ids)
        accumulator.append(number, "primary", gatherer.collect(), {})
        gatherer.reset()
    accumulator.dump("file")


@pytest.fixture
def sglang(engine_sources):
    return engine_sources("sglang") / "sglang" / "srt" / "eplb" / "expert_distribution.py"


def test_sglangs_recorder_is_read_with_dense_layers_left_out(sglang, tmp_path):
    found = torch.stack([LAYERS[0], LAYERS[0], LAYERS[1]])
    record_with_sglang(sglang, tmp_path, found, torch.arange(16).expand(3, 16).contiguous())
    for path in (tmp_path, *tmp_path.iterdir()):  # the folder and its one file
        recording = read_recording(path)
        assert torch.equal(recording.ids, torch.cat([LAYERS[0], LAYERS[1]]))
        assert (recording.layers, recording.left_out) == (2, 50)
        assert torch.equal(read_recording(path, 2).ids, LAYERS[1])
        with pytest.raises(UsageError, match="has no layer 1; its layers with routed tokens are 0, 2"):
            read_recording(path, 1)


def test_sglangs_ids_of_copies_become_ids_of_experts(sglang, tmp_path):
    physical_to_logical = torch.stack([torch.arange(20) % 16, torch.arange(20).flip(0) % 16, torch.arange(20) % 16])
    physical = torch.where(LAYERS[1] < 4, LAYERS[1] + 16, LAYERS[1])  # the second copies of experts 0 … 3
    record_with_sglang(sglang, tmp_path, torch.stack([19 - LAYERS[0], LAYERS[0], physical]), physical_to_logical)
    assert torch.equal(read_recording(tmp_path, 2).ids, LAYERS[1])
    assert torch.equal(read_recording(tmp_path, 0).ids, (19 - LAYERS[0]) % 16)


def test_the_ids_of_sglangs_tuner_are_read(tmp_path):
    """`torch.save(topk_output.topk_ids, …)` as benchmark/kernels/fused_moe_triton/README.md of SGLang asks for."""
    for layer in (3, 12):
        for index in (0, 1):
            torch.save(tokens(20, seed=layer + index), tmp_path / f"topk_ids_layer{layer}_idx{index}.pt")
    torch.save({"not": "read"}, tmp_path / "other.pt")
    found = read_recording(tmp_path)
    assert (found.layers, len(found.ids)) == (2, 80)
    assert torch.equal(read_recording(tmp_path, 12).ids, torch.cat([tokens(20, seed=12), tokens(20, seed=13)]))


def test_loads_without_ids_say_which_mode_has_ids(tmp_path):
    torch.save(
        {"rank": 0, "logical_count": torch.ones(1, 3, 16), "average_utilization_rate_over_window": None},
        tmp_path / "a.pt",
    )
    with pytest.raises(UsageError, match="--expert-distribution-recorder-mode per_token"):
        read_recording(tmp_path / "a.pt")


def test_vllms_responses_are_read(engine_sources, tmp_path):
    source = engine_sources("vllm") / "vllm" / "utils" / "serial_utils.py"
    code = parts(source, {"numpy2base64"}, {"io": io, "np": numpy, "pybase64": base64})
    array = LAYERS.transpose(0, 1).contiguous().to(torch.uint8).numpy()  # [seq_len, layer_num, topk]
    spelled = code["numpy2base64"](array)
    assert spelled in response(LAYERS)
    (tmp_path / "a.jsonl").write_text(f"{response(LAYERS)}\n{response(LAYERS)}\n")
    assert torch.equal(read_recording(tmp_path / "a.jsonl", 1).ids, torch.cat([LAYERS[1], LAYERS[1]]))
    numpy.savez(tmp_path / "b.npz", routed_experts=array)
    (tmp_path / "b.json").write_text(response(LAYERS))
    assert read_recording(tmp_path / "b.npz").digest == read_recording(tmp_path / "b.json").digest


def test_the_calibrator_of_tensorrt_llm_is_read_with_its_own_numbers_of_layers(tmp_path):
    (tmp_path / "a.json").write_text(calibrator(LAYERS, first_layer=3))
    assert torch.equal(read_recording(tmp_path / "a.json", 4).ids, LAYERS[1])
