"""The two backends: what they offer, what they refuse, and why they do not run here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from trtllm_compiled import CompiledModule
from trtllm_questions import SIZES, backend, layer

from moetune.backends import registry
from moetune.backends.base import Backend
from moetune.backends.flashinfer_trtllm.enumeration import DEFAULT_TACTIC, equivalent_rows
from moetune.errors import UnsupportedError, UsageError
from moetune.inputs import flashinfer_versions
from moetune.inputs.presets import preset
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, RoutingMethod
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.workload.routing import Routing, realize

EP = Regime(ep_size=4)
NAMES = ("flashinfer-trtllm", "flashinfer-trtllm-routed")


def tiles(tactics: tuple[Tactic, ...]) -> set[int]:
    return {int(tactic["tile_n"]) for tactic in tactics if tactic != DEFAULT_TACTIC}


@pytest.mark.parametrize("how", ["logits", "packed", "unpacked"])
@pytest.mark.parametrize("precision", SIZES)
def test_candidates_are_the_runners_own_and_the_default(
    compiled: CompiledModule, precision: Precision, how: str
) -> None:
    if (precision, how) == (Precision.MXINT4, "unpacked"):
        return
    made, asked = backend(how), layer(precision)
    candidates = made.candidates(asked, EP, 64, "cpu")
    assert candidates.tactics[0] == made.default(asked, EP, 64) == DEFAULT_TACTIC
    assert len(set(candidates.tactics)) == len(candidates.tactics) > 4
    assert not compiled.calls, "enumerating launches nothing"
    sizes = made._sizes(asked, EP)
    for query in compiled.queries:
        assert (query["top_k"], query["num_local_experts"]) == (3, 4)
        assert (query["hidden_size"], query["intermediate_size"]) == (sizes.padded_hidden, sizes.padded_intermediate)
        assert query["has_gemm1_lora_delta"] is False


def test_a_global_load_also_gets_the_small_tiles_that_the_enumerator_prunes(compiled: CompiledModule) -> None:
    asked = layer(num_experts=256, top_k=8)
    regime = Regime(ep_size=16, dispatch="allgather", distribution="balanced")
    found = tiles(backend("packed").candidates(asked, regime, 256, "cpu").tactics)
    # 256 rows are 8 tokens an expert; the enumerator takes them for 128
    own = {tile for tile, _ in compiled.trtllm_get_valid_moe_configs(*query_of(asked, regime, 256))}
    assert own == {64, 128}
    assert found == own | {8, 16, 32}
    assert {query["num_tokens"] for query in compiled.queries} == {16, 256}


def test_a_packed_load_is_enumerated_at_its_own_rows_and_at_its_busiest_expert(compiled: CompiledModule) -> None:
    asked = layer(num_experts=64, top_k=4)
    regime = Regime(ep_size=4, dispatch="alltoall")
    load = realize(asked, regime, 64).load
    busiest = -(-int(load.max()) * 16 // 4)
    backend("packed").candidates(asked, regime, 64, "cpu")
    assert {query["num_tokens"] for query in compiled.queries} == {64, busiest}
    assert busiest > 64


def query_of(asked: Any, regime: Regime, rows: int) -> list[Any]:
    """A query as the runner makes it; only the load's numbers are read."""
    return [0, 0, 0, asked.top_k, 0, 0, 0, regime.shard(asked).num_local, 0, False, 0, False, rows, False]


@pytest.mark.parametrize(("load", "expected"), [([8, 8, 8, 8], (16,)), ([0, 0, 0, 32], (16, 64)), ([0] * 4, (1, 16))])
def test_equivalent_rows_are_those_at_which_all_slots_would_be_local(
    load: list[int], expected: tuple[int, ...]
) -> None:
    routing = Routing(torch.zeros(16, 2, dtype=torch.int32), torch.zeros(16, 2), torch.tensor(load))
    assert equivalent_rows(routing, 4) == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_knows_both_and_says_which_chip_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = registry.backend(name)
    assert isinstance(made, Backend)
    assert made.name == name
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason, _ = made.unavailable() or ("", "")
    assert "10.0 or 10.3" in reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    reason, hint = made.unavailable() or ("", "")
    assert "10.0 or 10.3" in reason
    assert "has 9.0" in reason
    assert hint
    for capability in ((10, 0), (10, 3)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert made.unavailable() is None


def test_an_old_flashinfer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_versions, "version", lambda: "0.6.18.post2")
    reason, hint = registry.backend(NAMES[0]).unavailable() or ("", "")
    assert "0.6.18.post2" in reason
    assert "flashinfer-python" in hint


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": Precision.FP16}, "not fp16"),
        ({"hidden_size": 96}, "multiples of 128.*H = 96"),
        ({"precision": Precision.MXINT4, "hidden_size": 384}, "multiples of 256"),
        ({"activation": Activation.GELU}, "no gelu"),
        ({"precision": Precision.NVFP4, "activation": Activation.SWIGLU_CLAMPED}, "no swiglu_clamped with nvfp4"),
        ({"expert_bias": True}, "no bias to bf16"),
        ({"weight_on_input": True}, "input of fp8_tensor"),
        ({"precision": Precision.FP8_BLOCK, "num_experts": 18, "hidden_size": 256}, "multiple of 4 experts"),
        ({"num_experts": 64, "top_k": 33}, "32 experts at most"),
    ],
)
@pytest.mark.parametrize("how", ["logits", "packed"])
def test_what_the_kernels_lack_is_said(changes: dict[str, Any], said: str, how: str) -> None:
    given = {"hidden_size": 128, "intermediate_size": 128, **changes}
    asked = layer(**given)
    made = backend(how)
    assert re.search(said, made.unsupported(asked, Regime()) or "")
    with pytest.raises(UnsupportedError, match=said):
        made.candidates(asked, Regime(), 8, "cpu")


def test_the_size_that_counts_is_that_of_a_rank() -> None:
    asked = layer(intermediate_size=256)
    assert backend("packed").unsupported(asked, Regime(tp_size=2)) is None
    assert "I/tp = 64" in str(backend("packed").unsupported(asked, Regime(tp_size=4)))


@pytest.mark.parametrize(
    ("asked", "regime", "said"),
    [
        (preset("deepseek-v2"), EP, "softmax with groups"),
        (preset("ernie-4.5-21b-a3b"), EP, "softmax with a bias"),
        (layer(), Regime(ep_size=4, redundant_experts=4), "redundant"),
        (layer(routing=RoutingMethod(scoring="sigmoid", bias=True, renormalize=False)), EP, "renormalized"),
        (layer(routing=RoutingMethod(scoring="sigmoid", bias=True, num_groups=8, top_k_groups=6)), EP, "4 groups"),
    ],
)
def test_what_only_the_routed_op_computes_points_to_it(asked: Any, regime: Regime, said: str) -> None:
    reason = backend("logits").unsupported(asked, regime)
    assert reason is not None
    assert said in reason
    assert "flashinfer-trtllm-routed" in reason
    assert backend("packed").unsupported(asked, regime) is None


def test_mxint4_takes_packed_ids_only() -> None:
    assert "packed ids only" in str(backend("unpacked").unsupported(layer(Precision.MXINT4), EP))
    assert backend("packed").unsupported(layer(Precision.MXINT4), EP) is None


@pytest.mark.parametrize("name", ["deepseek-r1", "kimi-k2.5", "gpt-oss-120b", "minimax-m2.5", "qwen3-235b-a22b"])
@pytest.mark.parametrize("how", ["logits", "packed"])
def test_the_models_that_these_kernels_serve_are_supported(name: str, how: str) -> None:
    assert backend(how).unsupported(preset(name), Regime(ep_size=8, dispatch="allgather")) is None


def test_every_option_is_part_of_the_environment() -> None:
    def environment(how: str, **options: Any) -> tuple[tuple[str, str], ...]:
        return tuple(backend(how, **options).environment().items())

    variants = [
        environment("logits"),
        environment("packed"),
        environment("unpacked"),
        environment("packed", quantized=True),
        environment("packed", quantized=False),
        environment("packed", mxfp4_activations="mxfp8"),
        environment("packed", hidden_dtype="float16"),
        environment("packed", fp8_block_layout="plain"),
    ]
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize(
    "options", [{"mxfp4_activations": "nvfp4"}, {"hidden_dtype": "float8"}, {"fp8_block_layout": "x"}]
)
def test_an_option_that_is_none_is_an_error_that_lists_the_values(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be one of"):
        backend("packed", **options)
