"""Takes tokens of a recording in the router's place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from moetune.recordings.recording import Recording
from moetune.workload.preferences import Preferences
from moetune.workload.router import Choice

_PIECE = 2**16


class Recorded(Preferences):
    """Samples whole tokens of a recording with replacement, so that the experts of a token stay together.

    All numbers are counted in the recording.
    """

    simulated = False

    def __init__(self, recording: Recording, num_experts: int) -> None:
        self.recording = recording
        self.top_k = recording.ids.shape[1]
        tokens = len(recording.ids)
        self.chances = tuple(slots / tokens for slots in recording.slots(num_experts))

    def sample(self, generator: torch.Generator, rows: int) -> Choice:
        chosen = torch.randint(len(self.recording.ids), (rows,), generator=generator)
        weights = self.recording.weights
        return self.recording.ids[chosen].long(), None if weights is None else weights[chosen]

    def local_slots(self, local: Sequence[float]) -> tuple[float, ...]:
        chances = torch.zeros(self.top_k + 1, dtype=torch.float64)
        of_expert = torch.tensor(local, dtype=torch.float64)
        for tokens in torch.split(self.recording.ids, _PIECE):
            ways = torch.zeros(len(tokens), self.top_k + 1, dtype=torch.float64)
            ways[:, 0] = 1.0
            for column in of_expert[tokens.long()].T:
                moved = torch.nn.functional.pad(ways[:, :-1], (1, 0))
                ways += (moved - ways) * column.unsqueeze(1)
            chances += ways.sum(0)
        return tuple((chances / len(self.recording.ids)).tolist())


@lru_cache(maxsize=8)
def recorded(recording: Recording, num_experts: int) -> Recorded:
    """Returns the preferences of a recording for a layer of `num_experts` experts."""
    return Recorded(recording, num_experts)
