"""Runners that note what they are given, in the input order of FlashInfer's own, and take planted times."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from flashinfer.autotuner import AutoTuner, DynamicTensorSpec, TunableRunner, TuningConfig
from flashinfer.fused_moe.core import MoeRunnerInputs
from flashinfer.fused_moe.utils import get_hybrid_num_tokens_buckets, make_hybrid_bucket_mapper

from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.packing import unpack_topk
from moetune.workload.router import route

FROM_LOGITS, PACKED, UNPACKED = 0, 1, 2
FAST, MIDDLING, SLOW = [16, 1], [8, 0], [8, 1]
_running: list[MoERunner] = []


class PlantedClock:
    """Takes what the runner says its last call took."""

    eager: dict[int, str] = {}

    def warm_up(self, call, draw):
        call(draw)

    def paired_samples(self, calls, draws):
        return [[self._time(call, draw) for draw in draws] for call in calls]

    @staticmethod
    def _time(call, draw):
        call(draw)
        return _running[-1].last_us


class MoERunner(TunableRunner):
    """FlashInfer's trtllm-gen runner as the tuner sees it."""

    def __init__(self, layer: MoELayer, num_local: int, times_us: dict[str, float]) -> None:
        self.top_k, self.num_local_experts, self.num_experts = layer.top_k, num_local, layer.num_experts
        self.times_us_cache = times_us
        self.seen_cache: list[tuple[object, list[object]]] = []
        self.last_us_cache = [0.0]

    @property
    def seen(self):
        return self.seen_cache

    @property
    def last_us(self):
        return self.last_us_cache[0]

    @staticmethod
    def rows(inputs):
        return inputs[0].shape[0]

    def get_valid_tactics(self, inputs, profile):
        return [SLOW, MIDDLING, FAST]

    def get_cache_key_extras(self, inputs):
        return ("MoERunner", self.top_k, self.num_local_experts)

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
        if do_preparation:
            return None
        self.seen_cache.append((tactic, list(inputs)))
        name = str(list(tactic) if isinstance(tactic, tuple) else tactic)
        self.last_us_cache[0] = self.times_us_cache[name]
        _running.append(self)
        return inputs[0]


TIMES_US = {"-1": 100.0, str(SLOW): 150.0, str(MIDDLING): 90.0, str(FAST): 50.0}


@dataclass
class Trtllm:
    """An op that calls the tuner as `flashinfer.fused_moe.core` does, for one rank."""

    layer: MoELayer
    regime: Regime
    rank: int = 1
    op: str = "flashinfer::trtllm_fp4_block_scale_moe"
    mode: int = PACKED
    maximum: int = 8
    bias: torch.Tensor | None = None
    times_us: dict[str, float] = field(default_factory=lambda: dict(TIMES_US))
    hook: object = None
    says_mode: bool = True

    def __post_init__(self):
        shard = self.regime.shard(self.layer, self.rank)
        self.runner = MoERunner(self.layer, shard.num_local, self.times_us)
        self.runner.top_k = self.top_k
        self.first = shard.first

    @property
    def top_k(self):
        return 1 if self.regime.layout == "slot" else self.layer.top_k

    def inputs(self, rows: int) -> list[object]:
        hidden = self.layer.hidden_size
        logits = ids = weights = None
        match self.mode:
            case 0:  # some ops pass uninitialised buffers, fp4 among them
                logits = torch.zeros(rows, self.layer.num_experts, dtype=torch.bfloat16)
                ids = torch.zeros(rows, self.top_k, dtype=torch.int32)
                weights = torch.zeros(rows, self.top_k, dtype=torch.bfloat16)
            case 1:  # the weights are an empty placeholder
                ids, weights = torch.zeros(rows, self.top_k, dtype=torch.int32), torch.empty(0, dtype=torch.bfloat16)
            case 2:
                ids = torch.zeros(rows, self.top_k, dtype=torch.int32)
                weights = torch.zeros(rows, self.top_k, dtype=torch.bfloat16)
        return MoeRunnerInputs(
            output=torch.zeros(rows, hidden, dtype=torch.bfloat16),
            routing_logits=logits,
            topk_ids=ids,
            expert_weights=weights,
            hidden_states=torch.zeros(rows, hidden // 2, dtype=torch.uint8),
            hidden_states_scale=torch.zeros(rows, hidden // 16, dtype=torch.uint8),
            gemm1_lora_delta=None,
            per_token_scale=None,
        ).to_list()

    def config(self, inputs: list[object]) -> TuningConfig:
        """Every input that is a tensor grows with the rows, empty placeholders too."""
        at = tuple(number for number, tensor in enumerate(inputs) if tensor is not None)

        def sevens(shape, dtype, device):
            return torch.full(shape, 7, dtype=dtype, device=device)

        return TuningConfig(
            dynamic_tensor_specs=(
                DynamicTensorSpec(
                    at,
                    (0,) * len(at),
                    get_hybrid_num_tokens_buckets(self.maximum, 1),
                    make_hybrid_bucket_mapper(self.maximum),
                ),
            ),
            tensor_initializers=tuple((number, sevens) for number in at),
            inputs_pre_hook=self.hook,
        )

    def __call__(self, rows: int = 8) -> object:
        """One call of the op: the tactic that the tuner chose."""
        inputs = self.inputs(rows)
        arguments = {
            "num_experts": self.layer.num_experts,
            "local_expert_offset": self.first,
            "routing_bias": self.bias,
        }
        if self.says_mode:
            arguments["routing_input_mode"] = self.mode
        _, tactic = AutoTuner.get().choose_one(self.op, [self.runner], self.config(inputs), inputs, **arguments)
        return tactic

    def load(self, inputs: list[Any]) -> list[int]:
        """The slots of each local expert that the kernel would compute."""
        match self.mode:
            case 0:
                bias = None if self.bias is None else self.bias.float()
                ids = route(self.layer.routing, inputs[1].float(), self.top_k, bias)[0]
            case 1:
                ids = unpack_topk(inputs[2])[0]
            case 2:
                ids = inputs[2]
        local = ids.flatten()[(ids.flatten() >= self.first) & (ids.flatten() < self.first + 4)] - self.first
        return torch.bincount(local.long(), minlength=4).tolist()


def real_runner(layer, regime, maximum=8):
    """An op of packed ids on bf16 experts with FlashInfer's own runner, and the stand-in that notes its calls."""
    sm100 = pytest.importorskip("flashinfer.fused_moe.backends.trtllm.sm100_runner", reason="from FlashInfer 0.7.2")
    from flashinfer.fused_moe.core import ActivationType, WeightLayout
    from flashinfer.tllm_enums import DtypeTrtllmGen, Fp8QuantizationType, RoutingInputMode

    class Module:
        @staticmethod
        def trtllm_get_valid_moe_configs(*question):
            return [[8, 0], [16, 1]]

    op = Trtllm(layer, regime, mode=PACKED, maximum=maximum, op="flashinfer::trtllm_bf16_moe")
    stand_in = op.runner

    class MoERunner(sm100.MoERunner):  # type: ignore[name-defined]
        rows = staticmethod(stand_in.rows)
        last_us = 1.0

        def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
            stand_in.times_us_cache[str(tactic)] = 100.0 if tactic == -1 else 50.0
            return stand_in.forward(inputs, tactic)

    op.runner = MoERunner(
        Module(),
        top_k=layer.top_k,
        num_local_experts=4,
        num_experts=layer.num_experts,
        dtype_act=DtypeTrtllmGen.Bfloat16,
        dtype_weights=DtypeTrtllmGen.Bfloat16,
        fp8_quantization_type=Fp8QuantizationType.NoneFp8,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        activation_type=ActivationType.Swiglu,
        use_shuffled_weight=True,
        weight_layout=WeightLayout.BlockMajorK,
    )
    inputs_of = op.inputs

    def inputs(rows):
        named = dataclasses.replace(sm100.MoeRunnerInputs.from_list(inputs_of(rows)), hidden_states_scale=None)
        hidden_states = torch.zeros(rows, layer.hidden_size, dtype=torch.bfloat16)
        return dataclasses.replace(named, hidden_states=hidden_states).to_list()

    def config(inputs):
        return op.runner._make_tuning_config(
            sm100.MoeRunnerInputs.from_list(inputs),
            maximum,
            RoutingInputMode.PackedPrecomputed,
            use_cuda_graph=True,
            use_cold_l2_cache=True,
        )

    op.inputs, op.config = inputs, config
    return op, stand_in
