"""`Regime`, the deployment's part of every stored key, and `Shard`, the experts of one rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from moetune.errors import UsageError
from moetune.quoting import enumerated, quoted, shortened
from moetune.spec.bounds import MOST_DRAWS, MOST_EXPERTS, MOST_RANKS, MOST_ROWS, require_between
from moetune.spec.distribution import (
    Replay,
    Skew,
    Weighted,
    parse_also,
    parse_distribution,
    replay_of,
    skew_of,
    weighted,
)
from moetune.spec.enums import (
    DEFAULT_BATCHED_TOKENS,
    DEFAULT_TUNE_MAX_NUM_TOKENS,
    DISTRIBUTION_VARIABLE,
    Dispatch,
    Eplb,
    Layout,
    Objective,
)
from moetune.spec.ladder import Ladder
from moetune.spec.layer import MoELayer
from moetune.spec.model import FrozenModel, digest_of
from moetune.spec.regime_defaults import with_defaults

RANDOM_DRAWS = 16


@dataclass(frozen=True, slots=True)
class Shard:
    """The experts of one rank: the physical experts `first` … `first + num_local − 1` of `num_physical`."""

    rank: int
    first: int
    num_local: int
    num_physical: int


class Regime(FrozenModel):
    """Everything of one deployment that decides what a rank's kernel receives. Defaults are resolved at construction.

    Attributes:
        ep_size: the number of ranks that share the experts.
        tp_size: the number of ranks that share each expert's intermediate size.
        attention_dp: whether every rank has tokens of its own. It is true by default if a dispatch or a layout is set.
        dispatch: how these tokens travel to the experts. The default is `alltoall` with attention DP, else `none`.
        layout: how the rows of an all-to-all arrive. The default is `packed`.
        redundant_experts: the number of physical experts beyond `num_experts`.
        eplb: the engine whose balancer places the redundant experts by load. It is set if and only if a distribution
            is skewed and experts are redundant; otherwise physical expert s is a copy of expert s mod E. It is in dumps
            and keys only if it is set.
        distribution, seed: how sampled routings are made. `plan`, `tune` and `load` replace the path of a recording by
            its digest, so that the same ids have the same key wherever their file is.
        also: further distributions with their weights, such as `zipf:1=0.3`. Tactics are measured under all. The main
            distribution has the weight that these leave. It is in dumps and keys only if it is set, as is `objective`.
        objective: what a choice minimizes under several distributions: the weighted `mean` of the slowdowns, the
            default, or the `worst` one. None under one distribution.
        draws: the number of sampled routings of a bucket. The default is 16, and 1 if the distribution is balanced.
        ladder, tune_max_num_tokens: these decide which row counts are tuned. In the layout `batched` the ladder is the
            capacity alone; its default is 256 tokens of each rank.
        uneven_shards: whether the first ranks hold one expert more if ep does not divide the experts (vLLM's rule).
            Without it such an ep is an error.
        rank: the rank that is measured. `workload.ranks.tuned_rank` chooses it if none is given. It is in dumps and
            keys only if it is not 0.

    Raises:
        UsageError: a value is out of range, or options exclude each other.
    """

    ep_size: int = 1
    tp_size: int = 1
    attention_dp: bool = False
    dispatch: Dispatch = "none"
    layout: Layout | None = None
    redundant_experts: int = 0
    eplb: Eplb | None = None
    distribution: Annotated[str, BeforeValidator(parse_distribution)] = "random"
    also: Annotated[tuple[str, ...], BeforeValidator(parse_also)] = ()
    objective: Objective | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    draws: int = RANDOM_DRAWS
    ladder: Annotated[Ladder, BeforeValidator(Ladder.parse), PlainSerializer(str, return_type=str)] = Ladder()
    tune_max_num_tokens: int = DEFAULT_TUNE_MAX_NUM_TOKENS
    uneven_shards: bool = False
    rank: int = 0

    @model_validator(mode="wrap")
    @classmethod
    def _resolve(cls, data: Any, handler: Any) -> Self:
        if not isinstance(data, Mapping):
            return handler(data)  # type: ignore[no-any-return]
        given = {name: value for name, value in data.items() if value is not None}
        regime = handler(with_defaults(given))
        regime.__pydantic_fields_set__.intersection_update(given)
        return regime  # type: ignore[no-any-return]

    @model_serializer(mode="wrap")
    def _without_unset(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        if not self.rank:
            dumped.pop("rank", None)
        if self.eplb is None:
            dumped.pop("eplb", None)
        if not self.also:
            dumped.pop("also", None)
            dumped.pop("objective", None)
        return dumped

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, least, most in (
            ("ep_size", 1, MOST_RANKS),
            ("tp_size", 1, MOST_RANKS),
            ("redundant_experts", 0, MOST_EXPERTS),
            ("draws", 1, MOST_DRAWS),
            ("tune_max_num_tokens", 1, MOST_ROWS),
        ):
            require_between(name, getattr(self, name), least, most)
        if self.attention_dp and self.dispatch == "none":
            raise UsageError(
                "attention_dp needs dispatch alltoall or allgather, given none.",
                "Leave dispatch out, or use --no-dp.",
            )
        if not self.attention_dp and self.dispatch != "none":
            raise UsageError(
                f"Without attention_dp the only dispatch is none, given {self.dispatch}.",
                "Use --dp, or leave the dispatch out.",
            )
        if self.layout is not None and self.dispatch != "alltoall":
            raise UsageError(
                f"A layout goes with dispatch alltoall only, given layout {self.layout} with dispatch {self.dispatch}.",
                "Leave the layout out, or use dispatch alltoall.",
            )
        if not 0 <= self.rank < self.ep_size:
            raise UsageError(f"rank must be 0 … {self.ep_size - 1}, given {quoted(self.rank)}.")
        self._check_distributions()
        sizes = self.ladder.sizes
        if self.layout == "batched" and (len(sizes) != 1 or self.ladder.divisor != 1 or sizes[0] < self.ep_size):
            raise UsageError(
                "The layout batched has one bucket, the capacity of its buffer: the most tokens of a rank times the "
                f"ranks. Given the ladder {shortened(str(self.ladder))} with ep_size = {self.ep_size}.",
                f"Give the capacity as the ladder, such as --ladder {DEFAULT_BATCHED_TOKENS * self.ep_size}.",
            )
        if sizes and sizes[-1] > self.tune_max_num_tokens:
            raise UsageError(
                f"The ladder's bucket {sizes[-1]} is above tune_max_num_tokens = {self.tune_max_num_tokens}.",
                "Raise the maximum or shorten the ladder.",
            )
        if not self.buckets:
            raise UsageError(
                f"No pool maps to a bucket of ladder {self.ladder}: its rows are multiples of {self.ep_size}.",
                "Use a ladder with larger buckets, or another layout than pool.",
            )
        return self

    def _check_distributions(self) -> None:
        if self.objective and not self.also:
            raise UsageError(
                f"The objective {self.objective} is for several distributions, and there is one.",
                "Add --also DISTRIBUTION=WEIGHT, or leave the objective out.",
            )
        skewed = [each.distribution for each in self.distributions if _skew(each.distribution)]
        if self.eplb is None and self.redundant_experts and skewed:
            raise UsageError(
                f"Under {skewed[0]} the redundant experts are placed by load, and each engine's balancer has "
                "its own rule.",
                "Name the engine: --dispatch ENGINE:NAME or --launch; in Python Regime(eplb='vllm').",
            )

    @property
    def skew(self) -> Skew | Replay | None:
        """Returns the skew of the distribution, or the recording that has it; None for `random` and `balanced`."""
        return _skew(self.distribution)

    @property
    def replay(self) -> Replay | None:
        """Returns the recording that takes the router's place; None for other distributions."""
        return replay_of(self.distribution)

    @property
    def distributions(self) -> tuple[Weighted, ...]:
        """Returns all distributions with their weights, the main one first.

        Raises:
            UsageError: a distribution is named twice, or the weights leave nothing for the main one.
        """
        return weighted(self.distribution, self.also)

    @property
    def spelled_distributions(self) -> str:
        """Returns `random`, or all distributions with their weights: `random=0.7 + zipf:1=0.3`."""
        return " + ".join(map(str, self.distributions)) if self.also else self.distribution

    @property
    def recordings(self) -> tuple[Replay, ...]:
        """Returns the recordings that the distributions name, that of the main one first."""
        return tuple(replay for each in self.distributions if (replay := replay_of(each.distribution)))

    @property
    def parts(self) -> tuple[Regime, ...]:
        """Returns a regime for each distribution alone, the main one first. They share the draws evenly.

        Each has at least two draws, because draws with even numbers have other rows than the others; see
        `workload.draws.sampled`.
        """
        if not self.also:
            return (self,)
        draws = max(min(2, self.draws), self.draws // (1 + len(self.also)))
        fields = {name: getattr(self, name) for name in Regime.model_fields}
        alone = {**fields, "also": (), "objective": None, "draws": draws}
        return tuple(Regime(**{**alone, "distribution": each.distribution}) for each in self.distributions)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Returns the row counts to tune, ascending: the ladder's buckets that some row count of a rank maps to."""
        return tuple(size for size in self.ladder.buckets(self.tune_max_num_tokens) if self._is_looked_up(size))

    @property
    def skipped_buckets(self) -> tuple[int, ...]:
        """Returns the ladder's buckets that no pool maps to, because a pool has a multiple of ep rows."""
        return tuple(size for size in self.ladder.buckets(self.tune_max_num_tokens) if not self._is_looked_up(size))

    @property
    def capacity(self) -> int:
        """Returns how many rows each expert has in the buffer of the layout `batched`, `[L, capacity, H]`.

        An engine looks this layout up by the capacity, in every step.

        Raises:
            UsageError: the layout is another one.
        """
        if self.layout != "batched":
            raise UsageError(f"Only the layout batched has a capacity, given {self.layout or self.dispatch}.")
        return self.ladder.sizes[0]

    @property
    def coarser(self) -> Regime | None:
        """Returns this regime with the ladder `Ladder.coarser`, or None if there is no such ladder."""
        if self.ladder.coarser is None:
            return None
        fields = {name: getattr(self, name) for name in Regime.model_fields}
        return Regime(**{**fields, "ladder": self.ladder.coarser})

    def can_have(self, rows: int) -> bool:
        """Returns whether a rank's kernel can have this many rows. A pool has ep equal blocks, so a multiple of ep."""
        return self.layout != "pool" or rows % self.ep_size == 0

    def served(self, bucket: int) -> range:
        """Returns the row counts of a rank's kernel that map to `bucket`; empty if none do. See `Ladder.served`.

        In the layout `batched` these are the tokens of all ranks, up to the capacity.
        """
        if self.layout == "batched":
            return range(1, self.capacity + 1)
        rows = self.ladder.served(bucket, self.tune_max_num_tokens)
        if self.layout != "pool" or not rows:
            return rows
        first = -(-rows[0] // self.ep_size) * self.ep_size
        return range(first, rows[-1] + 1, self.ep_size)

    def _is_looked_up(self, bucket: int) -> bool:
        return self.can_have(bucket) or (self.ladder.name != "list" and bool(self.served(bucket)))

    def row_top_k(self, layer: MoELayer) -> int:
        """Returns the number of ids in a row that enters a rank's kernel: k, or 1 in the slot layout."""
        return 1 if self.layout == "slot" else layer.top_k

    def intermediate_size(self, layer: MoELayer) -> int:
        """Returns the intermediate size of one expert on this rank, I/tp."""
        return layer.intermediate_size // self.tp_size

    @property
    def digest(self) -> str:
        """Returns a hash over every field except rank 0, as 16 hex digits."""
        return digest_of(self.model_dump(mode="json"))

    @property
    def slug(self) -> str:
        """Returns a readable summary: `ep8-tp1-dp-alltoall-packed-random`."""
        parts = [f"ep{self.ep_size}", f"tp{self.tp_size}", "dp" if self.attention_dp else "nodp", self.dispatch]
        parts += [self.layout] if self.layout else []
        parts += [f"r{self.redundant_experts}{self.eplb or ''}"] if self.redundant_experts else []
        unread = self.replay is not None and self.replay.digest is None
        parts += ["replay" if unread else self.distribution.replace(":", "")]
        parts += [f"also{len(self.also)}-{self.objective}"] if self.also else []
        return "-".join([*parts, f"rank{self.rank}"] if self.rank else parts)

    def __repr__(self) -> str:
        return f"Regime({self.slug})"

    def differing(self, other: Regime) -> dict[str, tuple[object, object]]:
        """Returns the fields in which `other` differs: their names, mapped to (this value, the other value)."""
        unset = {"rank": 0, "eplb": None, "objective": None}
        mine, theirs = (
            {**unset, **regime.model_dump(mode="json"), "also": ", ".join(regime.also) or None}
            for regime in (self, other)
        )
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    def with_default_distribution(self, spelled: str | None) -> Regime:
        """Returns this regime with the distribution `spelled`, unless one was given at construction.

        `spelled` is the value of `TRTLLM_GEN_MOE_AUTOTUNE_DUMMY_DISTRIBUTION` (TensorRT-LLM #13667); None or an
        empty string changes nothing.

        Raises:
            UsageError: there is no such distribution.
        """
        if not spelled:
            return self
        distribution = parse_distribution(spelled, DISTRIBUTION_VARIABLE)
        if "distribution" in self.model_fields_set:
            return self
        given = {name: getattr(self, name) for name in self.model_fields_set}
        return Regime(**{**given, "distribution": distribution})

    def shard(self, layer: MoELayer, rank: int | None = None) -> Shard:
        """Returns the contiguous physical experts of `rank`; None means the regime's own rank.

        Raises:
            UsageError: this regime does not fit the layer, or there is no such rank.
        """
        physical = layer.num_experts + self.redundant_experts
        rank = self.rank if rank is None else rank
        if not 0 <= rank < self.ep_size:
            raise UsageError(f"rank must be 0 … {self.ep_size - 1}, given {rank}.")
        if self.ep_size > physical:
            raise UsageError(
                f"ep_size = {self.ep_size} exceeds the {physical} experts of {layer.name}.",
                "Reduce ep_size, or add redundant experts.",
            )
        each, extra = divmod(physical, self.ep_size)
        if extra and not self.uneven_shards:
            raise UsageError(
                f"ep_size = {self.ep_size} does not divide the {physical} experts of {layer.name}.",
                f"Allowed: {enumerated([n for n in range(1, physical + 1) if physical % n == 0], most=32)}; "
                "or add redundant experts.",
            )
        if layer.intermediate_size % self.tp_size:
            raise UsageError(
                f"tp_size = {self.tp_size} does not divide the intermediate size {layer.intermediate_size} "
                f"of {layer.name}.",
                "Use a tp_size that divides it.",
            )
        return Shard(rank, rank * each + min(rank, extra), each + (rank < extra), physical)


def _skew(distribution: str) -> Skew | Replay | None:
    return replay_of(distribution) or skew_of(distribution)
