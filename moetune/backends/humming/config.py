"""`Config`: one kernel of Humming for one GEMM, its spelling in a tactic, and the fields that Humming reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, Self

Mma = Literal["mma", "wgmma"]
GemmType = Literal["indexed", "grouped_contiguous"]
Shape = tuple[int, int, int]
"""Sizes along M, N and K."""
PRODUCER: Final = "producer"
STREAM_K: Final = "streamk"
_INDEXED: Final = dict.fromkeys(("use_tma_a", "use_tma_c", "use_tma_as", "use_tma_as2"), False)
"""Rows that are gathered by their index cannot travel by TMA (`_disable_indexed_input_scale_tma`)."""


@dataclass(frozen=True, slots=True)
class Config:
    """How one GEMM is cut and pipelined.

    Attributes:
        mma: the tensor core instruction, for one warp (`mma`) or for four (`wgmma`).
        block: what a block of threads computes at a time.
        warp: what one of its warps computes.
        stages: the tiles along K that are loaded ahead.
        blocks_per_sm: the blocks of threads on a multiprocessor.
        producer: whether four warps of their own load the tiles, by TMA.
        stream_k: whether blocks share the K of a tile, so that all have the same work.
        raster: the tiles along M that are computed before the next tile along N.
    """

    mma: Mma
    block: Shape
    warp: Shape
    stages: int = 4
    blocks_per_sm: int = 1
    producer: bool = False
    stream_k: bool = False
    raster: int = 1

    @property
    def math_warps(self) -> int:
        """The warps of a block that multiply."""
        ratios = [block // warp for block, warp in zip(self.block, self.warp, strict=True)]
        return ratios[0] * ratios[1] * ratios[2]

    @property
    def threads(self) -> int:
        """The threads of a block, those of the producer too."""
        return 32 * self.math_warps + (128 if self.producer else 0)

    @property
    def overlaps(self) -> bool:
        """Whether weights are converted while the last product runs. Humming does so where one warp has all of K."""
        return self.mma == "wgmma" and self.warp[2] == self.block[2]

    def __str__(self) -> str:
        """Returns the spelling in a tactic: `wgmma-64x256x64-64x32x64-s4-b1-producer-streamk-r4`."""
        parts = [self.mma, _spelled(self.block), _spelled(self.warp), f"s{self.stages}", f"b{self.blocks_per_sm}"]
        parts += [PRODUCER] if self.producer else []
        parts += [STREAM_K] if self.stream_k else []
        parts += [f"r{self.raster}"] if self.raster != 1 else []
        return "-".join(parts)

    @classmethod
    def parse(cls, spelled: str) -> Self:
        """Returns the configuration of a spelling.

        Raises:
            ValueError: it is none.
        """
        try:
            mma, block, warp, stages, blocks, *others = spelled.split("-")
            rasters = [other for other in others if other not in (PRODUCER, STREAM_K)]
            made = cls(
                mma,  # type: ignore[arg-type]
                _sizes(block),
                _sizes(warp),
                int(stages.removeprefix("s")),
                int(blocks.removeprefix("b")),
                PRODUCER in others,
                STREAM_K in others,
                int(rasters[0].removeprefix("r")) if rasters else 1,
            )
        except ValueError:
            made = None
        if made is None or mma not in ("mma", "wgmma") or str(made) != spelled:
            raise ValueError(f"{spelled!r} is no configuration such as wgmma-64x256x64-64x32x64-s4-b1-producer-streamk")
        return made

    def fields(self, gemm_type: GemmType) -> dict[str, Any]:
        """Returns the fields of Humming's `TuningConfig`, in types of JSON.

        The fields that are no part of a tactic have the values that Humming 0.1.19 gives them for such kernels
        (`tune/sm90_policies.py`).
        """
        found: dict[str, Any] = {
            "mma_type": self.mma,
            "block_shape": list(self.block),
            "warp_shape": list(self.warp),
            "num_stages": self.stages,
            "num_ctas_per_sm": self.blocks_per_sm,
            "use_warp_spec": self.producer,
            "use_tma": self.producer,
            "use_stream_k": self.stream_k,
            "raster_group_m": self.raster,
        }
        if self.overlaps:
            found |= {"smem_reuse_mode": "none", "producer_stage_unroll": 1, "wgmma_split_issue_wait": True}
        return found | (_INDEXED if gemm_type == "indexed" else {})


def _spelled(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _sizes(spelled: str) -> Shape:
    m, n, k = map(int, spelled.split("x"))
    return m, n, k
