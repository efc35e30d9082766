"""FlashInfer's parameters, so that a change of its API breaks a test here and not a user's run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from flashinfer import fused_moe
from flashinfer.autotuner import AutoTuner
from flashinfer.fused_moe.backends.trtllm import MoERunner
from flashinfer.fused_moe.shared.inputs import MoeRunnerInputs
from trtllm_compiled import CompiledModule, native_parameters

from moetune.backends.flashinfer_trtllm.call import record_call
from moetune.backends.flashinfer_trtllm.formats import FORMATS
from moetune.errors import UnsupportedError

GOLDEN = json.loads((Path(__file__).parent / "flashinfer-0.7.2.post1.json").read_text())
TUNER_OPS = tuple(GOLDEN["tuner_ops"])


@pytest.fixture
def ops(compiled: CompiledModule) -> Any:
    from flashinfer.fused_moe import core

    return core.get_trtllm_moe_sm100_module()


@pytest.mark.parametrize("name", TUNER_OPS)
def test_each_of_the_seven_tuner_ops_takes_the_parameters_it_took(ops: Any, name: str) -> None:
    assert len(TUNER_OPS) == 7
    signature = inspect.signature(getattr(ops, name))
    assert list(signature.parameters) == GOLDEN["tuner_ops"][name]
    signature.bind(*GOLDEN["tuner_ops"][name])


@pytest.mark.parametrize("name", list(GOLDEN["public_ops"]))
def test_each_public_op_takes_the_parameters_it_took(name: str) -> None:
    assert list(inspect.signature(getattr(fused_moe, name)).parameters) == GOLDEN["public_ops"][name]


def test_the_golden_ops_are_those_of_the_formats_and_per_channel() -> None:
    used = {op for fmt in FORMATS.values() for op in (fmt.op, fmt.routed_op)}
    assert used < set(GOLDEN["public_ops"])
    assert set(GOLDEN["public_ops"]) - used == {
        "trtllm_fp8_per_channel_scale_moe",
        "trtllm_fp8_per_channel_scale_routed_moe",
    }


@pytest.mark.parametrize("name", TUNER_OPS)
def test_each_native_function_takes_the_parameters_it_took(name: str) -> None:
    assert native_parameters(name) == GOLDEN["native"][name]


def test_the_runner_and_the_tuner_are_called_as_they_were() -> None:
    assert MoeRunnerInputs._FIELDS == (
        "output",
        "routing_logits",
        "topk_ids",
        "expert_weights",
        "hidden_states",
        "hidden_states_scale",
        "gemm1_lora_delta",
        "per_token_scale",
    )
    inspect.signature(AutoTuner.choose_one).bind(None, "op", [], None, [], some="argument")
    inspect.signature(MoERunner.forward).bind(None, [], tactic=[8, 3], some="argument")
    inspect.signature(MoERunner.get_valid_tactics).bind(None, [], None)
    assert hasattr(AutoTuner, "_instance")


def test_another_flashinfers_parameters_are_an_error_that_names_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_moe, "trtllm_bf16_moe", lambda logits=None: None)
    with pytest.raises(UnsupportedError, match=r"another trtllm_bf16_moe.*routing_logits.*0\.7\.2"):
        record_call("trtllm_bf16_moe", {"routing_logits": torch.zeros(1)})


def test_an_op_that_asks_no_tuner_is_an_error_and_the_tuner_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = AutoTuner.get()
    monkeypatch.setattr(fused_moe, "trtllm_bf16_moe", lambda x: x)
    with pytest.raises(UnsupportedError, match="without asking its tuner"):
        record_call("trtllm_bf16_moe", {"x": 1})
    assert AutoTuner.get() is before


def test_an_op_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(fused_moe, "trtllm_bf16_moe")
    with pytest.raises(UnsupportedError, match="no such function"):
        record_call("trtllm_bf16_moe", {})
