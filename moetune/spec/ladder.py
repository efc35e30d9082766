"""Defines `Ladder`: the row counts that are tuned, and the rule by which an engine maps a row count to one of them.

Each rule was checked against the engine's source:

- `pow2`: `round_rule` of TensorRT-LLM (TensorRT-LLM #13667). It divides the rows by ep under attention DP, then rounds
  them down to a power of two. If the maximum is larger than 8192, it maps all rows above 8192 to the maximum.
- `hybrid`: `get_hybrid_num_tokens_buckets` and `map_to_hybrid_bucket` of FlashInfer (0.6.18 … 0.7.2.post1).
- `vllm`: `try_get_optimal_moe_config` of vLLM. It takes the nearest key, and the smaller one of two equally near.
- `adaptive`: the same rule. A file's keys may be any row counts, also in SGLang's `try_get_optimal_moe_config`.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import model_validator

from moetune.errors import UsageError
from moetune.quoting import quoted, shortened
from moetune.spec.bounds import MOST_BUCKETS, MOST_RANKS, MOST_ROWS, require_between
from moetune.spec.model import FrozenModel

Rounding = Literal["floor", "ceil", "nearest"]
MOST_DIGITS = 20
"""Number of digits of a number that are read. It is out of range if it has more."""
POW2_LAST = 8192
"""The largest power of two among the buckets of `pow2`."""
VLLM_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
BETWEEN_BUCKETS = (3, 6, 12, 20, 28, 40, 56, 80, 112, 184, 360, 728, 1280, 1792, 2560, 3584, 6144, 8192)
"""The buckets of `adaptive` between and above those of `vllm`."""
ADAPTIVE_STEP = 1.25
"""Two neighboring buckets of a profile with the ladder `adaptive` that have different choices are at most this factor
apart."""
SPELLINGS = "pow2, hybrid, vllm, adaptive or a list of row counts like 1,2,4"


_ROUNDING: dict[str, Rounding] = {
    "pow2": "floor", "hybrid": "ceil", "vllm": "nearest", "adaptive": "nearest", "list": "ceil",
}  # fmt: skip


class Ladder(FrozenModel):
    """Buckets and look-up rule.

    `sizes` are the buckets of a `list`, in rows, ascending; empty for the others. `adaptive` begins with the buckets of
    `vllm` and those between them; a profile adds buckets where the choices of two neighbors differ.
    """

    name: Literal["pow2", "hybrid", "vllm", "adaptive", "list"] = "pow2"
    sizes: tuple[int, ...] = ()
    divisor: int = 1

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if (self.name == "list") != bool(self.sizes):
            raise UsageError(f"A ladder is one of {SPELLINGS}.")
        if any(size < 1 for size in self.sizes) or list(self.sizes) != sorted(set(self.sizes)):
            raise UsageError(f"A ladder's buckets must be positive and ascending, given {shortened(str(self))}.")
        require_between("The number of a ladder's buckets", len(self.sizes), 0, MOST_BUCKETS)
        require_between("A ladder's bucket", self.sizes[-1] if self.sizes else 1, 1, MOST_ROWS)
        require_between("A ladder's divisor", self.divisor, 1, MOST_RANKS)
        return self

    @classmethod
    def parse(cls, spelled: object) -> Ladder:
        """Returns the ladder that is spelled like `"pow2"`, `"pow2/8"` or `"1,2,4"`, or given as ints or a `Ladder`.

        Raises:
            UsageError: the spelling is none of these.
        """
        if isinstance(spelled, Ladder):
            return spelled
        if isinstance(spelled, Sequence) and not isinstance(spelled, str | bytes):
            return cls(name="list", sizes=tuple(spelled))
        text, slash, divisor = str(spelled).strip().lower().partition("/")
        if slash and not (divisor.isascii() and divisor.isdecimal()):
            raise UsageError(f"Unknown ladder {quoted(spelled)}.", f"A ladder is one of {SPELLINGS}.")
        share = int(divisor[:MOST_DIGITS] or 1)
        match text:
            case "pow2" | "hybrid" | "vllm" | "adaptive":
                return cls(name=text, divisor=share)
            case _:
                pass
        require_between("The number of a ladder's buckets", text.count(",") + 1, 1, MOST_BUCKETS)
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isascii() and part.removeprefix("-").isdecimal() for part in parts):
            raise UsageError(f"Unknown ladder {quoted(spelled)}.", f"A ladder is one of {SPELLINGS}.")
        return cls(name="list", sizes=tuple(int(part[:MOST_DIGITS]) for part in parts), divisor=share)

    def __str__(self) -> str:
        text = ",".join(map(str, self.sizes)) if self.name == "list" else self.name
        return text if self.divisor == 1 else f"{text}/{self.divisor}"

    @property
    def rounding(self) -> Rounding:
        """The rule for rows between two buckets. `pow2` does not apply it to rows above 8192; see `lookup`."""
        return _ROUNDING[self.name]

    @property
    def coarser(self) -> Ladder | None:
        """The ladder whose profiles also answer a question with this one: `vllm` for `adaptive`, else None.

        `adaptive` has all buckets of `vllm`, and both have the same look-up rule.
        """
        return Ladder(name="vllm", divisor=self.divisor) if self.name == "adaptive" else None

    def buckets(self, tune_max_num_tokens: int) -> tuple[int, ...]:
        """Returns the row counts to tune, ascending, none above `tune_max_num_tokens`."""
        match self.name:
            case "pow2":
                powers = _powers_of_two(min(tune_max_num_tokens, POW2_LAST))
                return powers if tune_max_num_tokens <= POW2_LAST else (*powers, tune_max_num_tokens)
            case "hybrid":
                steps = (
                    *_powers_of_two(256),
                    *range(512, 2049, 256),
                    *range(2560, 4097, 512),
                    *_powers_of_two(tune_max_num_tokens)[13:],
                )
                return tuple(sorted({size for size in steps if size <= tune_max_num_tokens} | {tune_max_num_tokens}))
            case "vllm":
                return tuple(size for size in VLLM_BUCKETS if size <= tune_max_num_tokens)
            case "adaptive":
                return tuple(size for size in sorted((*VLLM_BUCKETS, *BETWEEN_BUCKETS)) if size <= tune_max_num_tokens)
            case "list":
                return tuple(size for size in self.sizes if size <= tune_max_num_tokens)

    def is_searched(self, bucket: int) -> bool:
        """Returns whether a bucket has a search of its own. Else its neighbors' fast tactics are compared."""
        return self.name != "adaptive" or bucket in VLLM_BUCKETS

    def lookup(self, rows: int, tune_max_num_tokens: int) -> int:
        """Returns the bucket to which the engine maps `rows` rows.

        As in FlashInfer, `hybrid` can return a row count that is no bucket, so that FlashInfer finds no entry: with a
        maximum of 100, it maps 65 to 99 rows to 128.
        """
        rows = max(1, rows // self.divisor)
        if self.name == "hybrid":
            return _hybrid_bucket(rows, tune_max_num_tokens)
        buckets = self.buckets(tune_max_num_tokens)
        if self.name == "pow2" and rows > POW2_LAST:
            return buckets[-1]
        match self.rounding:
            case "floor":
                return buckets[bisect.bisect_right(buckets, rows) - 1]
            case "ceil":
                return buckets[min(bisect.bisect_left(buckets, rows), len(buckets) - 1)]
            case "nearest":
                return min(buckets, key=lambda size: abs(size - rows))

    def served(self, bucket: int, tune_max_num_tokens: int) -> range:
        """Returns the rows in the kernel that map to `bucket`; empty if none do.

        The last bucket of `vllm` ends as far above as it begins below, though all larger rows go there. Any row count
        can be a bucket of `adaptive`; then it serves the rows within half of `ADAPTIVE_STEP`.
        """
        if self.name == "adaptive":
            half = math.sqrt(ADAPTIVE_STEP)
            last = bucket if bucket == BETWEEN_BUCKETS[-1] else math.floor(bucket * half)
            return range(math.ceil(bucket / half), min(last, tune_max_num_tokens) + 1)

        def looked_up(rows: int) -> int:
            return self.lookup(rows * self.divisor, tune_max_num_tokens)

        rows = range(1, tune_max_num_tokens)  # `hybrid` can map these above the maximum, so the maximum comes below
        first = bisect.bisect_left(rows, bucket, key=looked_up)
        found = rows[first : bisect.bisect_right(rows, bucket, key=looked_up)]
        if looked_up(tune_max_num_tokens) == bucket:
            found = range(found.start if found else tune_max_num_tokens, tune_max_num_tokens + 1)
        if self.rounding == "nearest" and found and bucket == self.buckets(tune_max_num_tokens)[-1]:
            return found[: 2 * (bucket - found[0]) + 1]
        return found


def _powers_of_two(last: int) -> tuple[int, ...]:
    return tuple(1 << exponent for exponent in range(last.bit_length()))


def _hybrid_bucket(rows: int, maximum: int) -> int:
    if rows >= maximum:
        return maximum
    if rows <= 256:
        return 1 << (rows - 1).bit_length()
    if rows <= 2048:
        return min(-(-rows // 256) * 256, maximum)
    if rows <= 4096:
        return min(-(-rows // 512) * 512, maximum)
    return min(1 << (rows - 1).bit_length(), maximum)
