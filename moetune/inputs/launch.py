"""What an engine's own launch line says of the deployment, as the options of moetune's command line.

vLLM: docs/serving/expert_parallel_deployment.md (ep = tp · dp) and `FusedMoEParallelConfig.make` (without expert
parallelism the experts are cut over tp · dp). SGLang: docs/advanced_features/expert_parallelism.md and
`server_args.py` (an all-to-all sets ep = tp; DP attention divides the chunk by dp). TensorRT-LLM: `trtllm-serve` and
the settings of `TorchLlmArgs`; a settings file there overrides the flags.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs import presets
from moetune.inputs.launch_line import TRUE, Words, parse, settings, split
from moetune.spec.words import Precision

FORMS: Final = "vllm serve MODEL …, python -m sglang.launch_server …, sglang serve …, or trtllm-serve MODEL …"
_SWITCHES: Final = (
    "enable-expert-parallel", "enable-eplb", "enable-dp-attention", "enable-deepep-moe", "enable-ep-moe",
    "trust-remote-code", "headless", "enforce-eager",
)  # fmt: skip
_KERNELS: Final = {
    "triton": "triton",
    "flashinfer-cutlass": "flashinfer-cutlass",
    "flashinfer-trtllm": "flashinfer-trtllm",
    "flashinfer-trtllm-routed": "flashinfer-trtllm-routed",
    "flashinfer-mxfp4": "flashinfer-trtllm",
}
"""vLLM's `--moe-backend` and SGLang's `--moe-runner-backend` → moetune's backends."""
_TRTLLM_KERNELS: Final = {
    "cutlass": "flashinfer-cutlass",
    "wideep": "flashinfer-cutlass",
    "trtllm": "flashinfer-trtllm",
}
_VARIANT: Final = re.compile(r"-(\d{4}|instruct|thinking|base|chat|exp|it)$")
_QUANTIZED: Final = re.compile(r"-(nvfp4|fp4|fp8)$")


def options(spelled: str, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that a launch line stands for: `ep`, `dispatch` …, as `moetune.inputs.options.resolve` takes them.

    Flags that say nothing of the experts are ignored. `backend` is there where the line names the kernels.

    Args:
        spelled: the line as a shell reads it; variables before the command and continued lines are understood.
        given: options given beside it; they win, and what they replace is not looked at.

    Raises:
        UsageError: no launch line of an engine, a flag's value that cannot be used, an unknown model.
        UnsupportedError: kernels or a quantization that moetune does not tune.
    """
    beside = {name: value for name, value in (given or {}).items() if value is not None}
    words = split(spelled)
    engine, start = _engine(words)
    line = parse(words, start, _SWITCHES)
    found = {"vllm": _vllm, "sglang": _sglang, "trtllm": _trtllm}[engine](line, beside)
    if "dispatch" in beside or "layout" in beside:
        found.pop("dp", None)
    if "dispatch" in beside:
        found.pop("ladder", None)
    if "model" not in beside:
        model, precision = _model(_named_model(engine, line), line)
        found |= {"model": model, "precision": precision}
    elif "precision" not in beside:
        found["precision"] = _quantization(line, None)
    return {name: value for name, value in found.items() if value is not None and name not in beside}


def _engine(words: list[str]) -> tuple[str, int]:
    for index, word in enumerate(words):
        name, following = Path(word).name, words[index + 1 : index + 2]
        if name in ("vllm", "sglang") and following == ["serve"]:
            return name, index + 2
        if name == "trtllm-serve":
            return "trtllm", index + (2 if following == ["serve"] else 1)
        if name in ("vllm.entrypoints.openai.api_server", "sglang.launch_server"):
            return name.partition(".")[0], index + 1
    raise UsageError(f"--launch does not know this command: {' '.join(words)[:80]!r}.", f"It reads {FORMS}")


def _vllm(line: Words, beside: Mapping[str, Any]) -> dict[str, Any]:
    line = _with_settings(line, "config")
    tp = line.number("tensor-parallel-size", "tp", default=1) or 1
    dp = line.number("data-parallel-size", "dp", default=1) or 1
    world = tp * dp * (line.number("prefill-context-parallel-size", "pcp", default=1) or 1)
    experts = line.switch("enable-expert-parallel", "ep")
    word = line.first("all2all-backend") or line.variables.get("VLLM_ALL2ALL_BACKEND")
    if not experts or dp == 1 or word is None:
        word = "allgather_reducescatter"
    replicas = None
    if line.switch("enable-eplb"):
        replicas = line.number("eplb-config.num-redundant-experts", "num-redundant-experts")
        if replicas is None and (config := line.first("eplb-config")):
            replicas = _replicas(config)
    rows = line.number("max-num-batched-tokens")
    return {
        "ep": world if experts else 1,
        "tp": 1 if experts else world,
        "dispatch": f"vllm:{word}",
        "dp": None if dp > 1 else False,
        "redundant_experts": replicas or None,
        "tune_max_num_tokens": None if rows is None else rows * dp,
        **_kernels(line.first("moe-backend"), beside),
    }


def _sglang(line: Words, beside: Mapping[str, Any]) -> dict[str, Any]:
    line = _with_settings(line, "config")
    tp = line.number("tp-size", "tp", "tensor-parallel-size", default=1) or 1
    dp = line.number("dp-size", "dp", "data-parallel-size", default=1) or 1
    ep = line.number("ep-size", "ep", "expert-parallel-size", default=1) or 1
    word = line.first("moe-a2a-backend") or ("deepep" if line.switch("enable-deepep-moe") else "none")
    if word != "none" or line.switch("enable-ep-moe"):
        ep = tp
    if tp % ep:
        raise UsageError(f"SGLang's --ep {ep} must divide --tp {tp}.")
    own_tokens = word != "none" or (line.switch("enable-dp-attention") and dp > 1)
    rows = line.number("chunked-prefill-size")
    return {
        "ep": ep,
        "tp": tp // ep,
        "dispatch": f"sglang:{word}",
        "dp": None if own_tokens else False,
        "redundant_experts": line.number("ep-num-redundant-experts"),
        "tune_max_num_tokens": rows if rows is not None and rows > 0 else None,
        **_kernels(line.first("moe-runner-backend"), beside),
    }


def _trtllm(line: Words, beside: Mapping[str, Any]) -> dict[str, Any]:
    path = line.first("extra-llm-api-options", "config")
    chosen = settings(path) if path else {}
    tp = _setting(chosen, "tensor_parallel_size") or line.number("tp-size", "tensor-parallel-size", default=1) or 1
    ep = _setting(chosen, "moe_expert_parallel_size") or line.number("ep-size", "moe-expert-parallel-size") or 1
    rows = _setting(chosen, "max_num_tokens") or line.number("max-num-tokens")
    if tp % ep:
        raise UsageError(f"TensorRT-LLM's --ep_size {ep} must divide --tp_size {tp}.")
    own_tokens = chosen.get("enable_attention_dp", "").lower() in TRUE or line.switch("enable-attention-dp")
    word = line.variables.get("TRTLLM_FORCE_COMM_METHOD", "attention_dp").lower() if own_tokens else "none"
    kernels = chosen.get("moe_config.backend", "").lower() or None
    backend = None
    if kernels not in (None, "auto") and "backend" not in beside:
        backend = _TRTLLM_KERNELS.get(str(kernels))
        if backend is None:
            raise _no_kernels(str(kernels), _TRTLLM_KERNELS)
        backend += "-routed" if own_tokens and backend == "flashinfer-trtllm" else ""
    return {
        "ep": ep,
        "tp": tp // ep,
        "dispatch": f"trtllm:{word}",
        "tune_max_num_tokens": rows,
        "backend": backend,
    }


def _with_settings(line: Words, flag: str) -> Words:
    """`line` with the settings of the file that it names; its own flags win."""
    path = line.first(flag)
    if path is None:
        return line
    chosen = {name.replace("_", "-"): value for name, value in settings(path).items()}
    return Words(line.variables, line.command, line.positional, {**chosen, **line.flags})


def _setting(chosen: Mapping[str, str], name: str) -> int | None:
    value = chosen.get(name)
    return int(value) if value is not None and value.isdecimal() else None


def _replicas(config: str) -> int | None:
    try:
        parsed = json.loads(config)
        return None if "num_redundant_experts" not in parsed else int(parsed["num_redundant_experts"])
    except (ValueError, TypeError):
        raise UsageError(f"--eplb-config must be a JSON object, given {config!r}.") from None


def _kernels(named: str | None, beside: Mapping[str, Any]) -> dict[str, Any]:
    """The backend that the line names, and FlashInfer's ladder with FlashInfer's kernels."""
    if named in (None, "auto") or "backend" in beside:
        return {}
    backend = _KERNELS.get(str(named).replace("_", "-"))
    if backend is None:
        raise _no_kernels(str(named), _KERNELS)
    return {"backend": backend, **({"ladder": "hybrid"} if backend.startswith("flashinfer") else {})}


def _no_kernels(named: str, known: Mapping[str, str]) -> UnsupportedError:
    return UnsupportedError(
        f"The launch line asks for the MoE kernels {named}, which moetune does not tune.",
        f"It tunes {', '.join(known)}; or give --backend beside --launch.",
    )


def _named_model(engine: str, line: Words) -> str:
    model = line.first("model-path", "model") or (line.positional[0] if line.positional else None)
    if not model:
        raise UsageError("The launch line names no model.", "Give --model beside --launch.")
    return model


def _model(named: str, line: Words) -> tuple[str, str | None]:
    """The preset of a Hugging Face repository, or the path as it is, and the precision where it is not the preset's.

    Raises:
        UsageError: neither a path here nor a repository that is a preset's or a variant of one.
    """
    if Path(named).exists():
        return named, _quantization(line, presets.layer(named).precision)
    repositories = {_repository(name): name for name in presets.names()}
    owner, _, name = named.lower().rstrip("/").rpartition("/")
    exact = repositories.get((owner, name)) or (name if name in presets.names() and not owner else None)
    if exact:
        return exact, _quantization(line, presets.preset(exact).precision)
    bare, precision = _plain(name), None
    if match := _QUANTIZED.search(bare):
        bare = _plain(bare[: match.start()])
        precision = "nvfp4" if match[1] != "fp8" else {"qwen": "fp8_block", "nvidia": "fp8_tensor"}.get(owner)
        if precision is None:
            raise UsageError(f"The launch line's model {named!r} does not say how its fp8 is scaled.", _SAY)
    alike = {_plain(repository): preset for (_, repository), preset in repositories.items()}
    if bare not in alike:
        raise UsageError(f"The launch line's model {named!r} is no path here and no known repository.", _SAY)
    return alike[bare], precision or _quantization(line, presets.preset(alike[bare]).precision)


_SAY: Final = (
    "Give --model with a name of `moetune models` or a path to its config.json, and --precision, beside --launch."
)


def _repository(preset: str) -> tuple[str, str]:
    owner, _, name = presets.source(preset).url.lower().removeprefix("https://huggingface.co/").partition("/")
    return owner, name


def _plain(name: str) -> str:
    """A repository's name without what does not change the layer: dates, -Instruct …"""
    while match := _VARIANT.search(name):
        name = name[: match.start()]
    return name


def _quantization(line: Words, own: Precision | None) -> str | None:
    """The precision that `--quantization` makes of the weights; None where the checkpoint's `own` stays."""
    asked = line.first("quantization", "q")
    known = {"fp8": "fp8_tensor", "modelopt": None, "modelopt-fp4": "nvfp4", "modelopt-fp8": "fp8_tensor"}
    known |= {"mxfp4": "mxfp4", "compressed-tensors": None}
    if asked is None:
        return None
    if asked.replace("_", "-") not in known:
        raise UnsupportedError(
            f"moetune knows no experts of --quantization {asked}.", "Give --precision beside --launch."
        )
    if asked == "fp8" and own not in (None, Precision.BF16):
        return None
    return known[asked.replace("_", "-")]
