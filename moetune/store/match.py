"""`Match`: the stored profile that answers a question, and the versions in which it differs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from moetune.errors import Difference, Plain
from moetune.store.key import Key
from moetune.store.profile import Profile
from moetune.store.versions import versions_of

Differing = dict[str, dict[str, Plain]]
"""Fields, each with its `wanted` and its `stored` value."""


class Match(NamedTuple):
    """A stored profile, its file, and the strict fields in which it differs from the question that it answers.

    `neutral` are the differences that cannot change the rank of a tactic, `near` those that can, both as JSON. If there
    are near ones, the profile is near and does not match.
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
        return {each.field: each.plain() for each in self.differences if each.field not in fields}


def nearest_match(key: Key, profiles: Iterable[tuple[Path, Profile]]) -> Match | None:
    """Returns the profile that matches a key, or the one nearest to it; None if none of the profiles is near.

    Of several, the one with the fewest near fields is taken, then the one with the most buckets, then the latest.

    Args:
        key: the key that is looked up.
        profiles: profiles with their files.
    """
    versions = versions_of(key.backend)
    found = [Match(path, profile, key.differences(profile)) for path, profile in profiles if profile.choices]
    near = [match for match in found if versions.are_near(frozenset(each.field for each in match.differences))]
    return min(near, key=_order, default=None)


def _order(match: Match) -> tuple[int, int, float, str]:
    choices = match.profile.choices
    latest = max(choice.measured_time for choice in choices).timestamp()
    return len(match.near), -len(choices), -latest, str(match.path)
