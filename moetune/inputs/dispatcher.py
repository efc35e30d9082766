"""Maps each engine's dispatchers to `Regime` fields.

vLLM's dispatchers are the values of `--all2all-backend`, SGLang's those of `--moe-a2a-backend`. TensorRT-LLM's are the
communication methods of `TRTLLM_FORCE_COMM_METHOD`, and also `attention_dp`, the routing that its own tuner uses
(TensorRT-LLM #13667). `dispatchers.json` names the engine version and source file of each dispatcher.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs.suggestions import did_you_mean
from moetune.quoting import quoted
from moetune.spec.enums import DEFAULT_BATCHED_TOKENS, ENGINE_TITLES
from moetune.spec.ladder import POW2_LAST
from moetune.spec.layer import MoELayer


@dataclass(frozen=True, slots=True)
class Dispatcher:
    """One dispatcher of one engine.

    Attributes:
        name: the engine's value, or moetune's own name if there are `aliases`.
        description: one line for the user.
        regime: `Regime` fields, empty if not tunable. In the ladder `{ep_size}` stands for the deployment's ep_size,
            and `{capacity}` for the engine's default capacity of an expert-major buffer, its tokens a rank times ep.
        untunable: the reason why moetune cannot tune its kernels, or None.
        aliases: the engine's own names.
        uneven_shards: whether the engine accepts an ep_size that does not divide the experts.
    """

    engine: str
    name: str
    description: str
    regime: Mapping[str, Any]
    untunable: str | None = None
    aliases: tuple[str, ...] = ()
    uneven_shards: bool = False

    @property
    def tunable(self) -> bool:
        """Whether moetune can tune its kernels."""
        return self.untunable is None

    def __str__(self) -> str:
        return f"{self.engine}:{self.name}"


@functools.cache
def dispatchers() -> tuple[Dispatcher, ...]:
    """Returns every dispatcher of every engine, in the order of the data file."""
    return tuple(
        Dispatcher(
            engine,
            name,
            entry["description"],
            entry.get("regime", {}),
            entry.get("untunable"),
            tuple(entry.get("aliases", ())),
            entry.get("uneven_shards", described.get("uneven_shards", False)),
        )
        for engine, described in _engines().items()
        for name, entry in described["dispatchers"].items()
    )


def trtllm_name(value: str) -> str:
    """Returns the dispatcher name for a value of TensorRT-LLM's `TRTLLM_FORCE_COMM_METHOD`, e.g. `DEEPEPLOWLATENCY`.

    Values of the older `TRTLLM_FORCE_ALLTOALL_METHOD` (`AlltoallMethodType`: `NotEnabled`, `MNNVL`, `DeepEP` …) are
    accepted too. Case is ignored, as TensorRT-LLM ignores it for the former.

    Raises:
        UsageError: the value is unknown.
    """
    spellings = {alias: known.name for known in dispatchers() if known.engine == "trtllm" for alias in known.aliases}
    for alias, name in spellings.items():
        if alias.lower() == value.strip().lower():
            return name
    raise UsageError(
        f"TensorRT-LLM has no communication method {quoted(value)} "
        "(TRTLLM_FORCE_COMM_METHOD, TRTLLM_FORCE_ALLTOALL_METHOD).",
        f"Known: {', '.join(spellings)}.",
    )


def resolve(
    spelled: str,
    layer: MoELayer,
    ep_size: int,
    redundant_experts: int = 0,
    attention_dp: bool | None = None,
    tp_size: int = 1,
) -> dict[str, Any]:
    """Returns the `Regime` fields of the dispatcher `ENGINE:NAME`. Options of the user replace single fields later.

    Without attention DP every rank holds all rows. So nothing is dispatched, and the ladder has no divisor; vLLM then
    runs its grouped kernel, also with a dispatcher of expert-major rows. If several
    ranks share each expert (`tp_size`), TensorRT-LLM gathers all ranks' rows, even if another method is forced
    (`CommunicationFactory.create_strategy`). An ep_size that does not divide the experts sets `uneven_shards` if the
    engine accepts it. vLLM always does, and TensorRT-LLM with `allgather` and `nvlink_one_sided` (#13888). In both the
    first ranks hold one expert more (TensorRT-LLM's `_compute_ep_partition`). Redundant experts are placed by the
    engine's balancer, which matters under a skewed distribution only.

    Args:
        spelled: `ENGINE:NAME`; case is ignored.
        layer: the layer whose experts are shared.
        ep_size, redundant_experts, attention_dp, tp_size: as in `Regime`. `attention_dp` None means the dispatcher's.

    Raises:
        UsageError: the engine or the dispatcher is unknown.
        UnsupportedError: the dispatcher's kernels cannot be tuned.
    """
    dispatcher = _find(spelled)
    if dispatcher.engine == "trtllm" and tp_size > 1 and attention_dp is not False and not _holds_all(dispatcher):
        dispatcher = _find("trtllm:allgather")
    if dispatcher.untunable is not None:
        tunable = [str(known) for known in dispatchers() if known.engine == dispatcher.engine and known.tunable]
        raise UnsupportedError(
            f"{dispatcher} cannot be tuned: {dispatcher.untunable}.",
            f"Use one of {', '.join(tunable)}. `moetune plan --dispatch` with one of them shows the load of that "
            "dispatcher, not of yours.",
        )
    arguments = dict(dispatcher.regime)
    if attention_dp is False:
        ladder = "adaptive" if arguments.get("layout") == "batched" else arguments["ladder"].partition("/")[0]
        arguments = {"attention_dp": False, "ladder": ladder}
    if redundant_experts:
        arguments["eplb"] = dispatcher.engine
    arguments["ladder"] = arguments["ladder"].format(ep_size=ep_size, capacity=DEFAULT_BATCHED_TOKENS * ep_size)
    if arguments["ladder"] == "pow2" and arguments.get("layout") == "pool":
        arguments["ladder"] = _pools(ep_size)
    physical = layer.num_experts + redundant_experts
    dispatched = dispatcher.engine == "vllm" or attention_dp is not False  # TensorRT-LLM's rule belongs to its dispatch
    if dispatcher.uneven_shards and dispatched and 0 < ep_size <= physical and physical % ep_size:
        arguments["uneven_shards"] = True
    return arguments


def _holds_all(dispatcher: Dispatcher) -> bool:
    """Returns whether every rank holds the same rows, because there is no attention DP."""
    return dispatcher.regime.get("attention_dp") is False


def _pools(ep_size: int) -> str:
    """Returns the ladder of TensorRT-LLM's pools: ep_size times each power of two.

    TensorRT-LLM looks up the rows of one block, and a pool has ep_size blocks. The ladder is `pow2` if ep_size is a
    power of two.
    """
    if ep_size & (ep_size - 1) == 0:
        return "pow2"
    blocks = (1 << exponent for exponent in range(max(1, POW2_LAST // ep_size).bit_length()))
    return ",".join(str(ep_size * block) for block in blocks)


def untunable(spelled: str) -> bool:
    """Returns whether `ENGINE:NAME` is a dispatcher whose kernels moetune cannot tune."""
    return any(str(known) == spelled.strip().lower() and not known.tunable for known in dispatchers())


def matching(dispatch: str, layout: str | None = None) -> tuple[str, ...]:
    """Returns the dispatchers (`ENGINE:NAME`) that have this dispatch, and this layout if one is given."""
    return tuple(
        str(known)
        for known in dispatchers()
        if known.regime.get("dispatch") == dispatch and layout in (None, known.regime.get("layout"))
    )


@functools.cache
def _engines() -> dict[str, Any]:
    text = resources.files("moetune.inputs").joinpath("dispatchers.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def _find(spelled: str) -> Dispatcher:
    engine, _, name = spelled.strip().lower().partition(":")
    if engine not in _engines():
        near = did_you_mean(spelled.strip().lower(), map(str, dispatchers()), cutoff=0.8)
        raise UsageError(
            f"Unknown dispatcher {quoted(spelled)}.",
            f"{near} Write ENGINE:NAME, where ENGINE is one of {', '.join(_engines())}.".lstrip(),
        )
    described = _engines()[engine]
    for known in dispatchers():
        if (known.engine, known.name) == (engine, name):
            return known
    raise UsageError(
        f"{ENGINE_TITLES[engine]} has no dispatcher {quoted(name)} ({described['option']}).",
        f"{did_you_mean(name, described['dispatchers'])} Known: {', '.join(described['dispatchers'])}.".lstrip(),
    )
