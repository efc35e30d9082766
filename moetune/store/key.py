"""Defines `Key`, which identifies a profile in a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from moetune.errors import Difference, UsageError
from moetune.spec.bounds import require_file_name_part
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Profile


class Key(NamedTuple):
    """The layer, regime, backend and environment of a profile. It is stored and found under them."""

    layer: MoELayer
    regime: Regime
    backend: str
    environment: Environment

    @classmethod
    def of(cls, profile: Profile) -> Key:
        """Returns the key of a profile."""
        return cls(profile.layer, profile.regime, profile.backend, profile.environment)

    @property
    def coarser(self) -> Key | None:
        """Returns the key whose profiles also answer this one, with fewer buckets, or None. See `Regime.coarser`."""
        regime = self.regime.coarser
        return None if regime is None else self._replace(regime=regime)

    @property
    def path(self) -> Path:
        """The profile's path, relative to the store.

        Raises:
            UsageError: the backend's name cannot be part of a file name.
        """
        try:
            require_file_name_part(self.backend)
        except ValueError as error:
            raise UsageError(str(error)) from None
        folder = Path(self.environment.device_slug, self.layer.slug, f"{self.regime.slug}-{self.regime.digest}")
        return folder / f"{self.backend}-{self.environment.digest}.json"

    def differences(self, stored: Profile) -> tuple[Difference, ...]:
        """Returns the fields in which `stored` differs from this key, except names and informative fields."""
        fields = {
            **_unequal(self.layer.shape, stored.layer.shape),
            **self.regime.differing(stored.regime),
            **_unequal({"backend": self.backend}, {"backend": stored.backend}),
            **self.environment.differing(stored.environment),
        }
        return tuple(Difference(field, wanted, found) for field, (wanted, found) in fields.items())

    def ladder_difference(self, stored: Profile) -> Difference | None:
        """Returns the difference in ladders if `stored` has that of `coarser`, else None."""
        coarser = self.regime.ladder.coarser
        if coarser is None or stored.regime.ladder != coarser:
            return None
        return Difference("ladder", str(self.regime.ladder), str(stored.regime.ladder))

    def other_differences(self, stored: Profile) -> tuple[Difference, ...]:
        """Returns the fields in which `stored` differs, except its ladder if that is the one of `coarser`."""
        coarser = None if self.ladder_difference(stored) is None else self.coarser
        return (coarser or self).differences(stored)


def _unequal(wanted: Mapping[str, object], stored: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    return {name: (wanted[name], stored[name]) for name in wanted if wanted[name] != stored[name]}
