"""`Store`: a folder of profiles, one JSON file each, safe for concurrent writers.

The path is `<store>/<device>/<layer>/<regime slug>-<regime digest>/<backend>-<environment digest>.json`. Writers
replace a file as a whole (temporary file, fsync, rename) and hold one lock for the whole store. Readers need no lock.
Files are parsed as JSON and checked against the schema, never unpickled or evaluated.

Shared stores and the packaged profiles have the same layout in other folders, which are only read.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moetune.errors import DamagedProfileError, StoreError, UsageError
from moetune.quoting import shown_path
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.files import make_folder, move_aside, probe, remove, replace, sweep
from moetune.store.folders import PACKAGED_VARIABLE, default_roots, expanded, packaged_root, roots_of
from moetune.store.journal import Journal
from moetune.store.key import Key
from moetune.store.lock import LOCK_NAME, held
from moetune.store.match import Match, nearest_match
from moetune.store.miss import miss
from moetune.store.obstacles import obstacle
from moetune.store.profile import Profile
from moetune.store.reading import read_profile

JOURNAL_SUFFIX = ".journal.jsonl"
PROBED_BYTES = 1 << 16
"""How many bytes are written and synced before a tune. Most profiles and journals are not larger."""


class Store:
    """A folder of profiles, and others that are only read. Nothing is created before the store is written.

    Args:
        root: the folder, or several joined by `os.pathsep`, such as `own:shared`; `default_roots()` if not given.
        packaged: the folder of the packaged profiles; `packaged_root()` if not given.

    Attributes:
        root: the folder that is read first, and the only one that is written.
        shared: the others, in the order in which they are read.
        packaged: the folder of the packaged profiles, which is read last, or None.
    """

    def __init__(self, root: Path | str | None = None, packaged: Path | str | None = None) -> None:
        self.root, *shared = default_roots() if root is None else roots_of(root)
        self.shared = tuple(shared)
        self.packaged = packaged_root() if packaged is None else expanded(packaged)

    def __str__(self) -> str:
        return os.pathsep.join(map(str, (self.root, *self.shared)))

    def __repr__(self) -> str:
        return f"Store({str(self)!r})"

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that are read, in this order. Only the first, `root`, is written."""
        roots = (self.root, *self.shared)
        if self.packaged is None or self.packaged.resolve() in {root.resolve() for root in roots}:
            return roots
        return (*roots, self.packaged)

    def path(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> Path:
        """Returns the file in which the profile of this question is saved.

        Raises:
            UsageError: the backend's name cannot be part of a file name.
        """
        return self.root / Key(layer, regime, backend, environment).path

    def journal(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> Journal:
        """Returns the journal of an unfinished tune for the profile at `path`."""
        return Journal(self.path(layer, regime, backend, environment).with_suffix(JOURNAL_SUFFIX), self._locked)

    def may_hold(self, layer: MoELayer, backend: str) -> bool:
        """Returns whether there is a file of this layer and backend, of whatever regime and environment. Reads none."""
        pattern = f"*/{layer.slug}/*/{glob.escape(backend)}-*.json"
        return any(True for root in self.roots for _ in root.glob(pattern))

    def is_packaged(self, path: Path) -> bool:
        """Returns whether a profile file is a packaged one."""
        packaged = self.roots[1 + len(self.shared) :]
        return any(path.resolve().is_relative_to(root.resolve()) for root in packaged)

    def load(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> Profile:
        """Returns the stored profile of a question. Raises the errors of `find`."""
        return self.find(layer, regime, backend, environment)[1]

    def find(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> tuple[Path, Profile]:
        """Returns the stored profile of a question, and its file. Raises the errors of `match`."""
        found = self.match(layer, regime, backend, environment)
        return found.path, found.profile

    def match(
        self,
        layer: MoELayer,
        regime: Regime,
        backend: str,
        environment: Environment,
        *,
        near: bool = False,
        exact: bool = False,
    ) -> Match:
        """Returns the stored profile of a question. The first of `roots` that has one answers.

        Layer, regime and backend must be equal to those in the file, wherever the file lies. The layer's name may
        differ. A profile of equal strict environment is taken before one that differs in neutral fields (see
        `store.versions`). If there is neither, one with the ladder `vllm` answers a question with `adaptive`, which has
        all its buckets and more.

        Args:
            layer, regime, backend, environment: the question.
            near: a profile that differs in versions is also taken, if none matches.
            exact: neither a strict field nor the ladder may differ.

        Raises:
            MissError: no profile matches. Its `differences` to the nearest profile are empty if there is no profile.
            DamagedProfileError: the file is not a valid profile. It was moved aside, unless it is a packaged one.
            NewerSchemaError: a newer moetune wrote the file, which stays.

        A shared store's file that cannot be read is logged and left out, because others have to repair it.
        """
        key = Key(layer, regime, backend, environment)
        for root in self.roots:
            path = root / key.path
            try:
                profile = self._read(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except StoreError as error:
                if root not in self.shared:
                    raise
                logging.getLogger("moetune").warning("%s It is in a shared store, and left out.", error)
                continue
            if not key.differences(profile):
                return Match(path, profile)
        beside = None if exact else nearest_match(key, self._beside(key))
        if beside is not None and (near or not beside.near):
            return beside
        raise miss(key, self._profiles(), self.root, beside)

    def read(self, path: Path | str) -> Profile:
        """Returns the profile in one file, of this store or elsewhere.

        Raises:
            UsageError: there is no such file, or it is a folder.
            DamagedProfileError: the file is not a valid profile. It was moved aside if it is in this store.
            NewerSchemaError: a newer moetune wrote the file, which stays.
        """
        if os.path.isdir(path):
            raise UsageError(
                f"{path} is a folder, no profile.", "Give one of its .json files, or the folder as --store."
            )
        try:
            return self._read(Path(path))
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(
                f"There is no profile {shown_path(path)}.", "`moetune store list` shows the stored ones."
            ) from None

    def profiles(self) -> Iterator[tuple[Path, Profile | StoreError]]:
        """Yields every profile file with its profile, or with the error of reading it. Moves no file."""
        for root in self.roots:
            yield from read_all(root.glob("*/*/*/*.json"))

    def save(self, profile: Profile, *, replacing: bool = False) -> Profile:
        """Merges a profile into the stored one, or else into a shared or packaged one, and writes it durably.

        Of two choices for one bucket the one with the later `measured_at` is kept. When this returns, or raises
        `DamagedProfileError`, everything given is on disk.

        Args:
            profile: the choices to save.
            replacing: they replace what is stored for their buckets, whenever that was measured. The choices of other
                buckets are kept in any case, because another process may have just saved them.

        Returns:
            The profile that the file now holds.

        Raises:
            UsageError: the store cannot be written.
            DamagedProfileError: the file held no valid profile, or one of another question. It was moved aside, and
                `profile` is saved in its place.
            NewerSchemaError: a newer moetune wrote the file. It stays, and nothing is saved.
            StoreError: the lock is not free in time, or the disk is full.
        """
        key = Key.of(profile)
        path = self.root / key.path
        damaged: DamagedProfileError | None = None
        with self._locked():
            try:
                stored = self.merged_into(profile)
                profile = profile if stored is None else stored.merged(profile, replacing=replacing)
            except DamagedProfileError as error:
                damaged = _moved_aside(path, error)
            sweep(path.parent)
            replace(path, f"{profile.model_dump_json(indent=1)}\n".encode())
        if damaged is not None:
            raise DamagedProfileError(damaged.message, f"{damaged.hint} The new measurements are saved in its place.")
        return profile

    def ensure_writable(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> None:
        """Checks that the profile of a question can be saved, so that this is known before anything is measured.

        Takes the lock, writes and syncs `PROBED_BYTES` in the profile's own folder, and deletes what killed writers
        have left there.

        Raises:
            UsageError: the store cannot be written, such as on a read-only mount or with another user's files.
            StoreError: the lock is not free in time, or the disk is full.
        """
        path = self.path(layer, regime, backend, environment)
        with self._locked():
            sweep(path.parent)
            probe(path, PROBED_BYTES)
            with suppress(FileNotFoundError):
                path.with_suffix(JOURNAL_SUFFIX).open("r+b").close()

    def merged_into(self, profile: Profile) -> Profile | None:
        """Returns the stored profile that `save` would merge one into: its own, else a shared or packaged one, or None.

        Raises:
            DamagedProfileError: the store's own file is no valid profile, or one of another question. It stays.
            NewerSchemaError: a newer moetune wrote the store's own file.
            StoreError: it cannot be read.
        """
        key = Key.of(profile)
        path = self.root / key.path
        with suppress(FileNotFoundError, NotADirectoryError):
            stored = read_profile(path)
            if differences := key.differences(stored):
                names = ", ".join(difference.field for difference in differences)
                raise DamagedProfileError(f"{path} holds the profile of another question: {names} differ.")
            return stored
        for root in self.roots[1:]:
            with suppress(FileNotFoundError, NotADirectoryError, StoreError):  # new measurements are saved in any case
                found = read_profile(root / key.path)
                if not key.differences(found):
                    return found
        return None

    def delete(self, path: Path, profile: Profile, by: Path) -> bool:
        """Deletes a profile's file that another one has replaced. Returns False if that is no longer so.

        Nothing is deleted if a writer has changed the file since, or tunes it, or the other one lacks a bucket of it.

        Args:
            path: the file.
            profile: what it held when it was found to be replaced.
            by: the file of the profile that has replaced it.

        Raises:
            UsageError: the store cannot be written.
            StoreError: the lock is not free in time.
        """
        with self._locked():
            try:
                unchanged = read_profile(path) == profile and profile.rows <= read_profile(by).rows
            except (FileNotFoundError, NotADirectoryError, StoreError):
                return False
            if not unchanged or path.with_suffix(JOURNAL_SUFFIX).exists():
                return False
            remove(path)
            return True

    def _read(self, path: Path) -> Profile:
        """Returns the profile in `path`. A damaged file of the store is moved aside."""
        try:
            return read_profile(path)
        except DamagedProfileError as error:
            if self.is_packaged(path):
                raise DamagedProfileError(
                    error.message,
                    f"It is packaged with moetune: reinstall it, or set {PACKAGED_VARIABLE}=0 to do without.",
                ) from None
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise
            damaged = error
        try:
            with self._locked():
                try:
                    return read_profile(path)  # a writer may have replaced it by now
                except DamagedProfileError as still:
                    raise _moved_aside(path, still) from None
                except FileNotFoundError:
                    raise damaged from None
        except UsageError as refused:
            raise DamagedProfileError(damaged.message, f"It could not be moved aside: {refused.message}") from None

    def _beside(self, key: Key) -> Iterator[tuple[Path, Profile]]:
        """Yields every valid profile of a key's device, layer, regime (or the coarser one) and backend."""
        keys = (key,) if key.coarser is None else (key, key.coarser)
        for folder in ((root / each.path).parent for each in keys for root in self.roots):
            paths = folder.glob(f"{key.backend}-*.json")
            yield from ((path, found) for path, found in read_all(paths) if isinstance(found, Profile))

    def _profiles(self) -> Iterator[tuple[Path, Profile]]:
        """Yields every valid profile with its file."""
        for path, profile in self.profiles():
            if isinstance(profile, Profile):
                yield path, profile

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the store's lock while it is written.

        Raises:
            UsageError: the store cannot be written.
            StoreError: the lock is not free in time, or the disk is full.
        """
        try:
            make_folder(self.root)
            with held(self.root / LOCK_NAME):
                yield
        except OSError as error:
            raise obstacle(self.root, error) from None


def _moved_aside(path: Path, error: DamagedProfileError) -> DamagedProfileError:
    return DamagedProfileError(error.message, f"It was moved, unharmed, to {move_aside(path)}.")


def read_all(paths: Iterable[Path]) -> Iterator[tuple[Path, Profile | StoreError]]:
    """Yields profile files in the order of their names, each with its profile or with the error of reading it."""
    for path in sorted(paths):
        try:
            yield path, read_profile(path)
        except FileNotFoundError:
            continue  # moved aside since it was listed
        except StoreError as error:
            yield path, error
