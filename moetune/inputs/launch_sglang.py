"""Reads SGLang's own flags and variables (SGLang 0.5.23).

Every all-to-all except `ascend_tp` distributes the experts over all tp ranks (`_A2A_EP_SPANNING_BACKENDS` in
`arg_groups/overrides.py`). `--attn-dp-size N` replaces `--dp-size N --enable-dp-attention`
(`arg_groups/parallel_hook.py`).
"""

from __future__ import annotations

from typing import Any, Final

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.engine_flags import backend_of, engine_flags
from moetune.inputs.launch_line import TRUE, Line
from moetune.inputs.launch_model import Deployed

DECIDING: Final = (
    "tp-size", "dp-size", "ep-size", "attn-dp-size", "moe-dp-size", "enable-dp-attention", "moe-a2a-backend",
    "enable-deepep-moe", "enable-ep-moe", "moe-runner-backend", "ep-num-redundant-experts", "chunked-prefill-size",
    "quantization", "dtype", "json-model-override-args",
)  # fmt: skip
_OLD_KERNELS: Final = {
    "enable-flashinfer-trtllm-moe": "flashinfer_trtllm",
    "enable-flashinfer-cutlass-moe": "flashinfer_cutlass",
    "enable-flashinfer-cutedsl-moe": "flashinfer_cutedsl",
    "enable-flashinfer-mxfp4-moe": "flashinfer_mxfp4",
    "enable-triton-kernel-moe": "triton_kernel",
}
"""Maps the switches of versions before `--moe-runner-backend` to its values."""


def options(line: Line, deployed: Deployed) -> dict[str, Any]:
    """Returns the options for a line of SGLang's server.

    Raises:
        UsageError: a value is invalid.
        UnsupportedError: moetune does not tune the selected kernels.
    """
    tp = line.number("tp-size", default=1) or 1
    ep = line.number("ep-size", default=1) or 1
    copies = line.number("moe-dp-size", default=1) or 1
    word = line.text("moe-a2a-backend") or ("deepep" if line.switch("enable-deepep-moe") else "none")
    if word not in ("none", "ascend_tp") or line.switch("enable-ep-moe"):
        ep = tp
    if tp % (ep * copies):
        raise UsageError(
            f"SGLang's --ep-size {ep} and --moe-dp-size {copies} must divide --tp-size {tp}.", "Correct these flags."
        )
    rows = line.number("chunked-prefill-size", least=-1)
    return {
        "ep": ep,
        "tp": tp // ep // copies,
        "dispatch": f"sglang:{word}",
        "dp": None if word != "none" or _attention_dp(line) > 1 else False,
        "redundant_experts": line.number("ep-num-redundant-experts", least=0) or None,
        "tune_max_num_tokens": rows if rows is not None and rows > 0 else None,
        **_kernels(line, deployed, word),
    }


def _attention_dp(line: Line) -> int:
    replicas = line.number("dp-size", default=1) or 1
    own = line.number("attn-dp-size", default=1) or 1
    return replicas if own == 1 and line.switch("enable-dp-attention") else own


def _kernels(line: Line, deployed: Deployed, word: str) -> dict[str, Any]:
    """Returns the backend that the line names, and FlashInfer's ladder for its kernels."""
    backend = _backend(line, deployed)
    if word == "flashinfer" and backend == "flashinfer-trtllm" and "backend" not in deployed.beside:
        backend = "flashinfer-trtllm-routed"
    _warn_of_unseen_experts(line, deployed, backend)
    return {"backend": backend, "ladder": "hybrid" if (backend or "").startswith("flashinfer") else None}


def _warn_of_unseen_experts(line: Line, deployed: Deployed, backend: str | None) -> None:
    """Adds a warning if SGLang is to return experts that the kernel chooses from logits, without telling them.

    SGLang captures the experts where it chooses them itself (`select_experts` in `srt/layers/moe/topk.py`). For these
    kernels it passes the logits on (`BypassedTopKOutput`), wherever they have the model's router.
    """
    if backend != "flashinfer-trtllm" or not line.switch("enable-return-routed-experts"):
        return
    routed = engine_flags("flashinfer-trtllm-routed", deployed.layer.precision)["sglang"]
    instead = "Select kernels to which SGLang passes the ids."
    if routed != engine_flags(backend, deployed.layer.precision)["sglang"]:
        instead = f"Start it with {routed}, to which SGLang passes the ids; that is tuned apart."
    deployed.warn(
        "The line's kernels choose the experts from the router's logits, so SGLang does not see them, and "
        f"--enable-return-routed-experts does not return them. {instead}"
    )


def _backend(line: Line, deployed: Deployed) -> str | None:
    if "backend" in deployed.beside:
        return str(deployed.beside["backend"])
    if (line.variable("SGLANG_USE_AITER") or "").lower() in TRUE:
        raise UnsupportedError(
            "SGLANG_USE_AITER selects AITER's MoE kernels, which moetune does not tune.",
            "Pass --backend to tune other kernels.",
        )
    named, flag = named_kernels(line)
    return None if named is None else backend_of(named, flag)


def named_kernels(line: Line) -> tuple[str | None, str]:
    """Returns the value of `--moe-runner-backend` that a line sets, and the flag that sets it; None for `auto`."""
    named = line.text("moe-runner-backend")
    flag = "--moe-runner-backend"
    for old, value in _OLD_KERNELS.items():
        if named is None and line.switch(old):
            named, flag = value, f"--{old}"
    return None if named == "auto" else named, flag
