"""`Match`: the stored profile that answers a question, and the versions in which it differs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from moetune.errors import Difference, Plain
from moetune.spec.ladder import Ladder
from moetune.store.key import Key
from moetune.store.profile import Profile
from moetune.store.versions import versions_of

Differing = dict[str, dict[str, Plain]]
"""Fields, each with its `wanted` and its `stored` value."""


class Match(NamedTuple):
    """A stored profile, its file, and the fields in which it differs from the question that it answers.

    `neutral` are the strict fields that cannot change the rank of a tactic, `near` those that can, both as JSON. If
    there are near ones, the profile is near and does not match. `measured_ladder` is the profile's ladder if it has
    fewer buckets than that of the question.
    """

    path: Path
    profile: Profile
    differences: tuple[Difference, ...] = ()

    @property
    def neutral(self) -> Differing:
        """The differences that cannot change the rank of a tactic."""
        fields = versions_of(self.profile.backend).neutral
        return {each.field: each.plain() for each in self.differences if each.field in fields}

    @property
    def near(self) -> Differing:
        """The differences that can change it."""
        fields = versions_of(self.profile.backend).neutral
        ladder = self._ladder
        return {
            each.field: each.plain() for each in self.differences if each.field not in fields and each is not ladder
        }

    @property
    def measured_ladder(self) -> str | None:
        """The profile's ladder, if it answers a question with another; see `Ladder.coarser`."""
        return None if self._ladder is None else str(self._ladder.stored)

    @property
    def _ladder(self) -> Difference | None:
        """The difference in the ladder, if the profile answers the question all the same."""
        for each in self.differences:
            if each.field == "ladder" and Ladder.parse(each.wanted).coarser == Ladder.parse(each.stored):
                return each
        return None


def nearest_match(key: Key, profiles: Iterable[tuple[Path, Profile]]) -> Match | None:
    """Returns the profile that matches a key, or the one nearest to it; None if none of the profiles is near.

    Of several, the one with the fewest near fields is taken, then one with the ladder of the key, then the one with the
    most buckets, then the latest. Of those with another ladder and as many buckets, one of equal environment is taken.

    Args:
        key: the key that is looked up.
        profiles: profiles with their files.
    """
    versions = versions_of(key.backend)
    near: list[Match] = []
    for path, profile in profiles:
        differences = key.other_differences(profile)
        if profile.choices and versions.are_near(frozenset(each.field for each in differences)):
            ladder = key.ladder_difference(profile)
            near.append(Match(path, profile, differences if ladder is None else (ladder, *differences)))
    return min(near, key=_order, default=None)


def _order(match: Match) -> tuple[int, bool, int, bool, float, str]:
    choices = match.profile.choices
    latest = max(choice.measured_time for choice in choices).timestamp()
    has_other = match.measured_ladder is not None
    return len(match.near), has_other, -len(choices), has_other and bool(match.neutral), -latest, str(match.path)
