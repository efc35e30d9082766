"""The engines' own words for how tokens travel to the experts, and the `Regime` that each stands for.

vLLM's are the values of `--all2all-backend` (`All2AllBackend` in its `config/parallel.py`), SGLang's those of
`--moe-a2a-backend` (`MOE_A2A_BACKEND_CHOICES` in its `server_args.py`), TensorRT-LLM's the communication methods of
`TRTLLM_FORCE_COMM_METHOD`, and `attention_dp` for the dummy of its own tuner (TensorRT-LLM #13667).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from moetune.errors import UnsupportedError, UsageError
from moetune.spec.layer import MoELayer


@dataclass(frozen=True, slots=True)
class Dispatcher:
    """One word of one engine. `brings` are `Regime` arguments; empty where `untunable` says why it has none.

    `{ep_size}` in the ladder stands for the deployment's.
    """

    engine: str
    word: str
    description: str
    brings: Mapping[str, Any]
    untunable: str | None = None

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
        Dispatcher(engine, word, entry["description"], entry.get("brings", {}), entry.get("untunable"))
        for engine, described in _engines().items()
        for word, entry in described["words"].items()
    )


def resolve(
    spelled: str, layer: MoELayer, ep_size: int, redundant_experts: int = 0, attention_dp: bool | None = None
) -> dict[str, Any]:
    """The `Regime` arguments that `engine:word` stands for; an option given beside it is to replace its entry.

    What hangs on attention DP goes with it: where `attention_dp` is False every rank holds all rows, nothing is
    dispatched whatever the word, and no pool is divided at look-up. vLLM alone takes an ep_size that does not divide
    the experts (`uneven_shards`).

    Raises:
        UsageError: no such engine or word; the message lists them.
        UnsupportedError: the kernels behind the word cannot be tuned.
    """
    dispatcher = _find(spelled)
    if dispatcher.untunable is not None:
        tunable = [str(known) for known in words() if known.engine == dispatcher.engine and known.tunable]
        raise UnsupportedError(
            f"{dispatcher} cannot be tuned: {dispatcher.untunable}.", f"Tunable: {', '.join(tunable)}."
        )
    arguments = dict(dispatcher.brings)
    if attention_dp is False:
        arguments = {"attention_dp": False, "ladder": arguments["ladder"].partition("/")[0]}
    arguments["ladder"] = arguments["ladder"].format(ep_size=ep_size)
    slots = layer.num_experts + redundant_experts
    if dispatcher.engine == "vllm" and 0 < ep_size <= slots and slots % ep_size:
        arguments["uneven_shards"] = True
    return arguments


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
