"""Lists the options of a question, each one once.

The command line, `MOETUNE_REGIME` and `docs/options.md` are all made from this table. It imports no pydantic, so that
`moetune --help` stays fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import click

from moetune.spec.enums import (
    DEFAULT_TUNE_MAX_NUM_TOKENS,
    DISPATCHES,
    DISTRIBUTION_VARIABLE,
    DISTRIBUTIONS,
    LAYOUTS,
    OBJECTIVES,
    RANK_WORDS,
    REPLAY,
    SKEWED_DISTRIBUTIONS,
    Precision,
)


class Group(StrEnum):
    """The headings under which `--help` lists the options."""

    ENGINE = "Engine"
    LAYER = "Layer"
    DEPLOYMENT = "Deployment"
    WORKLOAD = "Workload"
    KERNELS = "Kernels"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a question.

    Args:
        name: its name in Python. `top_k` is spelled `--top-k`.
        group: its heading.
        sets: the field that gets its value: `layer.top_k`, `regime.ep_size`, `backend.kernel`; `layer` for a whole
            layer. Empty for an option that sets no field by itself.
        help: one or two sentences. The default is added to them.
        metavar: the placeholder for the value.
        type: `int` or `str`; `bool` is a switch with an opposite, `--dp/--no-dp`.
        choices: the allowed values, if there are few.
        default: what holds if the option is not given, for the help only.
        repeatable: may be given several times.
    """

    name: str
    group: Group
    sets: str
    help: str
    metavar: str | None = None
    type: type[int] | type[str] | type[bool] = str
    choices: tuple[str, ...] = ()
    default: str = ""
    repeatable: bool = False

    @property
    def flag(self) -> str:
        """The spelling on the command line: `--top-k`."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def owner(self) -> str:
        """What has the field: `layer`, `regime` or `backend`; empty if it sets none."""
        return self.sets.partition(".")[0]

    @property
    def field(self) -> str:
        """The name of the field: `ep_size`."""
        return self.sets.partition(".")[2]

    @property
    def declarations(self) -> tuple[str, ...]:
        """The positional arguments of `click.option`."""
        return (f"{self.flag}/--no-{self.flag[2:]}" if self.type is bool else self.flag, self.name)

    @property
    def attributes(self) -> dict[str, Any]:
        """The keyword arguments of `click.option`. An option that is not given is None, or () if repeatable."""
        default = f"  [default: {self.default}]" if self.default else ""
        found: dict[str, Any] = {"help": self.help + default, "default": () if self.repeatable else None}
        if self.type is bool:
            return found
        found["type"] = click.Choice(self.choices) if self.choices else self.type
        return {**found, "metavar": self.metavar, "multiple": self.repeatable}


_LINE, _DISPATCHER = "from --launch, otherwise ", "from --launch or the dispatcher, otherwise "
_PRECISIONS = tuple(map(str, Precision))
TUNABLE: Final = (
    "fp32",
    "bf16",
    "fp16",
    "fp8_block",
    "fp8_tensor",
    "nvfp4",
    "nvfp4_a16",
    "mxfp4",
    "mxint4",
    "int4_g128",
    "w4a8",
)
"""The precisions that some backend computes."""
OPTIONS: Final[tuple[Option, ...]] = (
    Option(
        "launch",
        Group.ENGINE,
        "",
        "Read the layer and the deployment from the command that starts an engine's server, such as 'vllm serve …'. "
        "Options given beside it win.",
        "LINE",
    ),
    Option(
        "model",
        Group.LAYER,
        "layer",
        "A name from `moetune models`, a Hugging Face repository that moetune knows, or the path of a config.json.",
        "NAME|PATH",
    ),
    Option("experts", Group.LAYER, "layer.num_experts", "Number of experts.", "N", int, default="from the model"),
    Option("top_k", Group.LAYER, "layer.top_k", "Experts per token.", "N", int, default="from the model"),
    Option("hidden", Group.LAYER, "layer.hidden_size", "Hidden size.", "N", int, default="from the model"),
    Option(
        "intermediate",
        Group.LAYER,
        "layer.intermediate_size",
        "Intermediate size of one expert.",
        "N",
        int,
        default="from the model",
    ),
    Option(
        "precision",
        Group.LAYER,
        "layer.precision",
        f"Weight precision. Tunable: {', '.join(TUNABLE)}. Plan only: "
        f"{', '.join(name for name in _PRECISIONS if name not in TUNABLE)}.",
        "PRECISION",
        choices=_PRECISIONS,
        default="from the model",
    ),
    Option("ep", Group.DEPLOYMENT, "regime.ep_size", "Ranks that share the experts.", "N", int, default=f"{_LINE}1"),
    Option("tp", Group.DEPLOYMENT, "regime.tp_size", "Ranks that share each expert.", "N", int, default=f"{_LINE}1"),
    Option(
        "dp",
        Group.DEPLOYMENT,
        "regime.attention_dp",
        "Attention DP: each rank has tokens of its own.",
        type=bool,
        default=f"{_DISPATCHER}no-dp",
    ),
    Option(
        "dispatch",
        Group.DEPLOYMENT,
        "regime.dispatch",
        "How tokens reach the experts: none, alltoall, allgather, or an engine's dispatcher such as "
        "vllm:deepep_high_throughput.",
        "|".join((*DISPATCHES, "ENGINE:NAME")),
        default=f"{_LINE}alltoall with --dp, otherwise none",
    ),
    Option(
        "layout",
        Group.DEPLOYMENT,
        "regime.layout",
        "How the rows of an all-to-all arrive: only local slots (packed), each token once (deduplicated), one row for "
        "each slot (slot), a buffer with room for all tokens (pool), or one with a block for each expert (batched). "
        "docs/workload.md has a table.",
        choices=LAYOUTS,
        default=f"{_DISPATCHER}packed",
    ),
    Option(
        "rank",
        Group.DEPLOYMENT,
        "regime.rank",
        "The rank to measure: the one with the load nearest the mean, the one with the highest load, or number R.",
        "|".join((*RANK_WORDS, "R")),
        default="mean; fullest if shards are uneven",
    ),
    Option(
        "redundant_experts",
        Group.DEPLOYMENT,
        "regime.redundant_experts",
        "Number of redundant experts.",
        "N",
        int,
        default=f"{_LINE}0",
    ),
    Option(
        "distribution",
        Group.WORKLOAD,
        "regime.distribution",
        "How the experts of a token are sampled: from random logits by the model's routing rule, balanced, skewed, or "
        "from a recording of real traffic. docs/workload.md explains ddist, zipf, powerlaw and replay.",
        "|".join((*DISTRIBUTIONS, *SKEWED_DISTRIBUTIONS, REPLAY)),
        default=f"${DISTRIBUTION_VARIABLE}, otherwise random",
    ),
    Option(
        "also",
        Group.WORKLOAD,
        "regime.also",
        "Measure tactics under this distribution too, with a weight between 0 and 1, such as zipf:1=0.3. May be "
        "repeated; --distribution has the weight that is left.",
        "DISTRIBUTION=WEIGHT",
        repeatable=True,
    ),
    Option(
        "objective",
        Group.WORKLOAD,
        "regime.objective",
        "What a choice minimizes over several distributions: the weighted mean of its slowdowns against the fastest "
        "tactic under each, or the worst of them.",
        choices=OBJECTIVES,
        default="mean if --also is given",
    ),
    Option(
        "strict_skew",
        Group.WORKLOAD,
        "",
        "Fail if the achieved effective number of experts differs from the asked one by more than 5 %.",
        type=bool,
        default="no-strict-skew: a warning",
    ),
    Option("seed", Group.WORKLOAD, "regime.seed", "Seed of the sampled routings.", "N", int, default="0"),
    Option(
        "draws",
        Group.WORKLOAD,
        "regime.draws",
        "Number of sampled routings per bucket.",
        "N",
        int,
        default="16; 1 if balanced",
    ),
    Option(
        "ladder",
        Group.WORKLOAD,
        "regime.ladder",
        "The buckets to tune: a named ladder or a list of row counts.",
        "pow2|hybrid|vllm|adaptive|1,2,4",
        default=f"{_DISPATCHER}pow2",
    ),
    Option(
        "tune_max_num_tokens",
        Group.WORKLOAD,
        "regime.tune_max_num_tokens",
        "The largest bucket. The ladder vllm has none above 4096, adaptive none above 8192.",
        "N",
        int,
        default=f"{_LINE}{DEFAULT_TUNE_MAX_NUM_TOKENS}",
    ),
    Option(
        "backend",
        Group.KERNELS,
        "backend",
        "The kernels to tune; `moetune doctor` lists them. With auto, `tune` tunes all that run here and the other "
        "commands take the first.",
        "auto|NAME",
        default="auto",
    ),
    Option(
        "kernel",
        Group.KERNELS,
        "backend.kernel",
        "Whose grouped GEMM the triton backend times.",
        choices=("builtin", "vllm", "sglang"),
        default="builtin",
    ),
    Option(
        "remote",
        Group.KERNELS,
        "backend.remote",
        "How the Triton kernel treats slots of non-local experts: drop skips them, as vLLM does from 0.31; zero writes "
        "blocks of zeros, as SGLang does. docs/workload.md says more.",
        choices=("drop", "zero"),
        default="zero for --kernel sglang, a dispatcher of sglang, or a kernel_version before 0.31; otherwise drop",
    ),
    Option(
        "engine_configs",
        Group.KERNELS,
        "backend.engine_configs",
        "A folder of the engine's tuned Triton files. Their rows are the default that tactics are compared with.",
        "DIR",
        default="that of the installed vLLM; of SGLang for --kernel sglang",
    ),
    Option(
        "backend_option",
        Group.KERNELS,
        "",
        "An option that only one backend has, such as fp8_block_layout=plain. May be repeated; docs/options.md lists "
        "them.",
        "KEY=VALUE",
        repeatable=True,
    ),
    Option(
        "device",
        Group.KERNELS,
        "",
        "The device to use: cpu, cuda or cuda:N.",
        "DEVICE",
        default="cuda if there is a GPU, otherwise cpu",
    ),
)
SIZES: Final = tuple(option.name for option in OPTIONS if option.owner == "layer" and option.type is int)
"""The options that give a layer's sizes: all four of a layer without a name, or some of them beside `--model`."""


def flag(name: str) -> str:
    """Returns the spelling of an option's name: `--top-k` for `top_k`."""
    return next(option.flag for option in OPTIONS if option.name == name)
