"""Fills in the fields of a regime whose defaults depend on other fields."""

from __future__ import annotations

from typing import Any

from moetune.spec.bounds import MOST_ROWS
from moetune.spec.enums import DEFAULT_BATCHED_TOKENS, DEFAULT_TUNE_MAX_NUM_TOKENS
from moetune.spec.ladder import Ladder


def with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields with the defaults that depend on other fields."""
    data = dict(given)
    if "attention_dp" not in data:
        data["attention_dp"] = data.get("dispatch", "none") != "none" or "layout" in data
    if "dispatch" not in data:
        data["dispatch"] = "alltoall" if data["attention_dp"] else "none"
    if data["dispatch"] == "alltoall":
        data.setdefault("layout", "packed")
    if data.get("layout") == "batched" and "ladder" not in data and isinstance(data.get("ep_size", 1), int):
        data["ladder"] = str(DEFAULT_BATCHED_TOKENS * max(1, data.get("ep_size", 1)))
    also = data.get("also", ())
    if also and "objective" not in data:
        data["objective"] = "mean"
    if "draws" not in data and not also and str(data.get("distribution", "random")).strip().lower() == "balanced":
        data["draws"] = 1
    skewed = ":" in f"{data.get('distribution', '')} {also}".lower().replace("ddist_", "ddist:")
    if not (skewed and data.get("redundant_experts")):
        data.pop("eplb", None)
    if "tune_max_num_tokens" not in data and "ladder" in data:
        sizes = Ladder.parse(data["ladder"]).sizes
        data["tune_max_num_tokens"] = max((DEFAULT_TUNE_MAX_NUM_TOKENS, *sizes))
    if "tune_max_num_tokens" in data and "ladder" in data:
        data["tune_max_num_tokens"] = _least_of_alike(Ladder.parse(data["ladder"]), data["tune_max_num_tokens"])
    return data


def _least_of_alike(ladder: Ladder, maximum: Any) -> Any:
    """Returns the default maximum if `maximum` leads to the same buckets and look-ups, so that both have one key.

    This can happen with the ladders `vllm` and `adaptive`, because their last bucket is fixed.
    """
    has_fixed_end = ladder.name in ("vllm", "adaptive")
    if not has_fixed_end or isinstance(maximum, bool) or not isinstance(maximum, int) or not 1 <= maximum <= MOST_ROWS:
        return maximum
    default = DEFAULT_TUNE_MAX_NUM_TOKENS
    last = ladder.buckets(default)[-1]
    if ladder.buckets(maximum)[-1:] != (last,):
        return maximum
    return default if ladder.served(last, default) == ladder.served(last, maximum) else maximum
