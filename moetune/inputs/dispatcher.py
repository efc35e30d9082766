"""The engines' own words for how tokens travel to the experts, and the `Regime` that each stands for.

vLLM's are the values of `--all2all-backend`, SGLang's those of `--moe-a2a-backend`, TensorRT-LLM's the communication
methods of `TRTLLM_FORCE_COMM_METHOD`, and `attention_dp` for the dummy of its own tuner (TensorRT-LLM #13667). The data
file names the version and the files that each was read in.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from moetune.errors import UnsupportedError, UsageError
from moetune.spec.ladder import POW2_LAST
from moetune.spec.layer import MoELayer


@dataclass(frozen=True, slots=True)
class Dispatcher:
    """One word of one engine. `brings` are `Regime` arguments; empty where `untunable` says why it has none.

    `{ep_size}` in the ladder stands for the deployment's. `aliases`: the engine's own spellings, where `word` is
    moetune's. `uneven_shards`: whether the engine takes an ep_size that does not divide the experts behind it.
    """

    engine: str
    word: str
    description: str
    brings: Mapping[str, Any]
    untunable: str | None = None
    aliases: tuple[str, ...] = ()
    uneven_shards: bool = False

    @property
    def tunable(self) -> bool:
        """Whether moetune tunes the kernels behind it."""
        return self.untunable is None

    def __str__(self) -> str:
        return f"{self.engine}:{self.word}"


@functools.cache
def words() -> tuple[Dispatcher, ...]:
    """Every dispatcher of every engine, in the order of the data file."""
    return tuple(
        Dispatcher(
            engine,
            word,
            entry["description"],
            entry.get("brings", {}),
            entry.get("untunable"),
            tuple(entry.get("aliases", ())),
            entry.get("uneven_shards", described.get("uneven_shards", False)),
        )
        for engine, described in _engines().items()
        for word, entry in described["words"].items()
    )


def trtllm_word(value: str) -> str:
    """moetune's word for a value of TensorRT-LLM's `TRTLLM_FORCE_COMM_METHOD`, `DEEPEPLOWLATENCY` for one.

    The names of the older `TRTLLM_FORCE_ALLTOALL_METHOD` (`AlltoallMethodType`: `NotEnabled`, `MNNVL`, `DeepEP` …) are
    taken too. Case is folded, as TensorRT-LLM does it for the former.

    Raises:
        UsageError: no value of either; the message lists them.
    """
    spellings = {alias: known.word for known in words() if known.engine == "trtllm" for alias in known.aliases}
    for alias, word in spellings.items():
        if alias.lower() == value.strip().lower():
            return word
    raise UsageError(
        f"TensorRT-LLM has no communication method {value!r} (TRTLLM_FORCE_COMM_METHOD, TRTLLM_FORCE_ALLTOALL_METHOD).",
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
    """The `Regime` arguments that `engine:word` stands for; an option given beside it is to replace its entry.

    What hangs on attention DP goes with it: where `attention_dp` is False every rank holds all rows, nothing is
    dispatched whatever the word, and no pool is divided at look-up. Where `tp_size` ranks share each expert,
    TensorRT-LLM gathers the rows of all ranks, whatever method is forced (`CommunicationFactory.create_strategy`).
    An ep_size that does not divide the experts gives `uneven_shards` where the engine takes one: vLLM behind every
    word, TensorRT-LLM behind `allgather` and `nvlink_one_sided` (#13888). Both give the first ranks one expert more
    (TensorRT-LLM's `_compute_ep_partition`).

    Raises:
        UsageError: no such engine or word; the message lists them.
        UnsupportedError: the kernels behind the word cannot be tuned.
    """
    dispatcher = _find(spelled)
    if dispatcher.engine == "trtllm" and tp_size > 1 and attention_dp is not False and not _holds_all(dispatcher):
        dispatcher = _find("trtllm:allgather")
    if dispatcher.untunable is not None:
        tunable = [str(known) for known in words() if known.engine == dispatcher.engine and known.tunable]
        raise UnsupportedError(
            f"{dispatcher} cannot be tuned: {dispatcher.untunable}.", f"Tunable: {', '.join(tunable)}."
        )
    arguments = dict(dispatcher.brings)
    if attention_dp is False:
        arguments = {"attention_dp": False, "ladder": arguments["ladder"].partition("/")[0]}
    arguments["ladder"] = arguments["ladder"].format(ep_size=ep_size)
    if arguments["ladder"] == "pow2" and arguments.get("layout") == "pool":
        arguments["ladder"] = _pools(ep_size)
    slots = layer.num_experts + redundant_experts
    dispatched = dispatcher.engine == "vllm" or attention_dp is not False  # TensorRT-LLM's rule is one of its dispatch
    if dispatcher.uneven_shards and dispatched and 0 < ep_size <= slots and slots % ep_size:
        arguments["uneven_shards"] = True
    return arguments


def _holds_all(dispatcher: Dispatcher) -> bool:
    """Whether the word stands for no attention DP: every rank holds the same rows."""
    return dispatcher.brings.get("attention_dp") is False


def _pools(ep_size: int) -> str:
    """The ladder of TensorRT-LLM's pools: it looks up the rows of one block, whose powers of two stand for ep as many.

    Those are powers of two themselves where ep is one.
    """
    if ep_size & (ep_size - 1) == 0:
        return "pow2"
    blocks = (1 << exponent for exponent in range(max(1, POW2_LAST // ep_size).bit_length()))
    return ",".join(str(ep_size * block) for block in blocks)


def bringing(dispatch: str, layout: str | None = None) -> tuple[str, ...]:
    """The dispatchers, as `engine:word`, that bring this dispatch, and this layout where one is given."""
    return tuple(
        str(known)
        for known in words()
        if known.brings.get("dispatch") == dispatch and layout in (None, known.brings.get("layout"))
    )


@functools.cache
def _engines() -> dict[str, Any]:
    text = resources.files("moetune.inputs").joinpath("dispatchers.json").read_text(encoding="utf-8")
    return json.loads(text)  # type: ignore[no-any-return]


def _find(spelled: str) -> Dispatcher:
    engine, _, word = spelled.strip().lower().partition(":")
    if engine not in _engines():
        raise UsageError(
            f"Unknown dispatcher {spelled!r}.", f"Write ENGINE:NAME; the engines are {', '.join(_engines())}."
        )
    described = _engines()[engine]
    for known in words():
        if (known.engine, known.word) == (engine, word):
            return known
    raise UsageError(
        f"{engine} has no dispatcher {word!r} ({described['option']}).", f"Known: {', '.join(described['words'])}."
    )
