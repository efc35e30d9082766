"""The deployments that are measured: a model's shapes, and the launch line that describes them to moetune.

The values are those of each model's config.json on Hugging Face. Weights are dummies, so nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from moetune.backends.grouped_triton.engine_files import ConfigFile
from moetune.inputs.options import Deployment, parse

MAX_BATCHED_TOKENS: Final = 16384
RUNNING: Final = (1, 8, 32, 128, 256, 512, 1024)
"""The numbers of running sequences, on each rank, at which decode steps are measured."""
PREFILL: Final = (1024, 4096, 16384)
MAX_MODEL_LEN: Final = 4608
"""The longest sequence: a prompt of 4096 tokens and its outputs."""
WEIGHTS_SHARE: Final = 0.72
"""The share of a GPU's memory that weights may fill. The rest holds the KV cache, graphs and activations."""

_QWEN3: Final[Mapping[str, Any]] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
_QWEN3_30B: Final = {
    **_QWEN3,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_hidden_layers": 48,
}
_QWEN3_235B: Final = {
    **_QWEN3,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_attention_heads": 64,
    "num_hidden_layers": 94,
}
_DEEPSEEK_R1: Final = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


@dataclass(frozen=True)
class Case:
    """A deployment of one model.

    Attributes:
        name: the case's name.
        config: the model's config.json.
        launch: the `vllm serve` line of the deployment, without `--moe-backend`. moetune tunes for it.
        layer_bytes: the weights of one layer on one GPU.
        ranks: the GPUs of one engine: the ranks of DP + EP.
        share_of: on one GPU, run the experts as one rank of expert parallelism over this many; see `ep_share`. 0: no.
        flashinfer: whether FlashInfer's CUTLASS experts are measured.
        environment: more variables for vLLM.
    """

    name: str
    config: Mapping[str, Any]
    launch: str
    layer_bytes: int
    ranks: int = 1
    share_of: int = 0
    flashinfer: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def line(self, moe_backend: str) -> str:
        """Returns the launch line with these experts."""
        return f"{self.launch} --max-num-batched-tokens {MAX_BATCHED_TOKENS} --moe-backend {moe_backend}"

    def regime(self, moe_backend: str) -> str:
        """Returns the value of MOETUNE_REGIME."""
        return f'--launch "{self.line(moe_backend)}"'

    def file_name(self, device: str) -> str:
        """Returns the name of the file in which vLLM looks for this case's Triton configurations."""
        deployment: Deployment = parse(self.regime("triton"))
        experts = deployment.regime.shard(deployment.layer, 0).num_local
        return ConfigFile.of(deployment.layer, deployment.regime, device, experts).vllm_name

    def layers(self, memory_bytes: float, most: int | None = None) -> int:
        """Returns how many layers fit into a GPU, at most all of the model's and at most `most`."""
        fitting = int(WEIGHTS_SHARE * memory_bytes / self.layer_bytes)
        whole: int = self.config["num_hidden_layers"]
        return max(1, min(fitting, whole, most or fitting))

    def write_model(self, folder: Path, layers: int) -> None:
        """Writes the config.json of the model with this many layers."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**self.config, "num_hidden_layers": layers}, indent=1))


_CASES: Final = (
    Case("qwen3-30b", _QWEN3_30B, "vllm serve Qwen/Qwen3-30B-A3B", 1_247_000_000, flashinfer=True),
    Case(
        "qwen3-30b-dp2",
        _QWEN3_30B,
        "vllm serve Qwen/Qwen3-30B-A3B -dp 2 --enable-expert-parallel",
        643_000_000,
        ranks=2,
        flashinfer=True,
    ),
    Case(
        "qwen3-235b-share",
        _QWEN3_235B,
        "vllm serve Qwen/Qwen3-235B-A22B -tp 8 --enable-expert-parallel",
        747_000_000,
        share_of=8,
    ),
    Case(
        "deepseek-r1-share",
        _DEEPSEEK_R1,
        "vllm serve deepseek-ai/DeepSeek-R1 -tp 8 --enable-expert-parallel",
        1_650_000_000,
        share_of=8,
        environment={"VLLM_USE_DEEP_GEMM": "0"},  # else it compiles kernels for minutes at the first start
    ),
)
CASES: Final[Mapping[str, Case]] = {case.name: case for case in _CASES}
