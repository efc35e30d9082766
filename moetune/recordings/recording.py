"""`Recording`: the recorded experts of tokens. Imports no torch, so that a stored profile can be shown at once.

The recordings that were read in this process are kept here by their digests. A regime names a recording by its digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moetune.errors import UsageError
from moetune.quoting import printable, shortened
from moetune.spec.layer import MoELayer
from moetune.spec.recording import RecordingSummary
from moetune.spec.regime import Regime

if TYPE_CHECKING:
    import torch

_known: dict[str, Recording] = {}


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """The experts that a router chose for some tokens.

    Attributes:
        digest: a hash of the ids, 16 hex digits.
        name: the name of the file or folder.
        spelled: the distribution as it was given, `replay:PATH[@LAYER]`.
        ids: int32 `[tokens, k]`, ids of experts (not of copies), distinct in each row.
        weights: float32 `[tokens, k]`, the router's weights; None if they were not recorded.
        loads: the slots of expert 0, 1, … up to the highest recorded id.
        layers: the number of pooled layers.
        layer: the chosen layer; None if all are pooled.
        left_out: the rows that were not recorded, such as those of dense layers and of padding.
    """

    digest: str
    name: str
    spelled: str
    ids: torch.Tensor
    weights: torch.Tensor | None
    loads: tuple[int, ...]
    layers: int
    layer: int | None
    left_out: int = 0

    @property
    def summary(self) -> RecordingSummary:
        """Returns what plans and profiles say of it."""
        return RecordingSummary(
            name=shortened(printable(self.name)),
            tokens=len(self.ids),
            layers=self.layers,
            layer=self.layer,
            weights=self.weights is not None,
        )

    def require_fits(self, layer: MoELayer) -> None:
        """Checks that the recording can be of this layer.

        Raises:
            UsageError: it has another top-k, or an id that the layer does not have.
        """
        if self.ids.shape[1] != layer.top_k:
            raise UsageError(
                f"The recording {self.name} has {self.ids.shape[1]} experts a token, and {layer.name} has "
                f"top-{layer.top_k}.",
                "Give a recording of this model, without shared experts.",
            )
        if len(self.loads) > layer.num_experts:
            raise UsageError(
                f"The recording {self.name} has the id {len(self.loads) - 1}; the {layer.num_experts} experts of "
                f"{layer.name} are 0 … {layer.num_experts - 1}.",
                "Give a recording of this model, with ids of experts. Record without redundant experts, whose ids are "
                "those of copies.",
            )

    def slots(self, num_experts: int) -> list[int]:
        """Returns the recorded slots of each of `num_experts` experts."""
        return [*self.loads, *[0] * (num_experts - len(self.loads))]


def remember(recording: Recording) -> None:
    """Keeps a recording for `recording_of`."""
    _known[recording.digest] = recording


def known(regime: Regime) -> Recording | None:
    """Returns the first recording that a regime names if it was read in this process, else None."""
    return _known.get(regime.recordings[0].source) if regime.recordings else None


def recording_of(layer: MoELayer, regime: Regime) -> Recording:
    """Returns the recording of a regime.

    Raises:
        UsageError: it was not read in this process, or it does not fit the layer.
    """
    found = known(regime)
    if found is None:
        raise UsageError(
            f"The recording of {regime.distribution} is not at hand, and its tokens are needed.",
            "Give its file: --distribution replay:PATH. Stored profiles are found, shown and exported without it; if "
            "ranks differ, give the number of the rank too: --rank R.",
        )
    found.require_fits(layer)
    return found
