"""`RecordingSummary`: what a plan and a stored profile say of the recording that was replayed."""

from __future__ import annotations

from moetune.spec.bounds import Count, Name
from moetune.spec.model import FrozenModel


class RecordingSummary(FrozenModel):
    """A recording without its ids. The regime's distribution has the digest of the ids.

    Attributes:
        name: the name of its file or folder, without the path.
        tokens: the number of tokens that rows are made from; with several layers, of all layers together.
        layers: the number of layers that are pooled; 1 if one layer was chosen.
        layer: the chosen layer; None if all are pooled.
        weights: whether it has the router's weights. Otherwise weights are random.
    """

    name: Name
    tokens: Count
    layers: Count
    layer: Count | None = None
    weights: bool = False
