"""`Store`: a folder of profiles, one JSON file each, safe for many writers.

The path is `<store>/<device>/<layer>/<regime slug>-<regime digest>/<backend>-<environment digest>.json`. A file is
replaced as a whole (temporary file, fsync, rename), under one lock for all of the store, so a reader needs no lock and
never sees half a file. What is read is parsed as JSON and checked against the schema, never unpickled or evaluated.

The profiles that come with moetune are laid out alike in a second folder, which is only ever read.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from moetune.errors import DamagedProfileError, MissError, StoreError, UsageError
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.files import moved_aside, read_profile, replace
from moetune.store.journal import Journal
from moetune.store.profile import Profile

STORE_VARIABLE = "MOETUNE_STORE"
PACKAGED_VARIABLE = "MOETUNE_PACKAGED_PROFILES"
LOCK_NAME = ".lock"
JOURNAL_SUFFIX = ".journal.jsonl"
LOCK_TIMEOUT_S = 60.0
LOCK_POLL_S = 0.01


def default_root() -> Path:
    """`MOETUNE_STORE`, else `moetune` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    if store := os.environ.get(STORE_VARIABLE):
        return _expanded(store)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else _expanded("~/.cache")) / "moetune"


def packaged_root() -> Path | None:
    """The folder of the profiles that come with moetune; None where `MOETUNE_PACKAGED_PROFILES` is 0."""
    if os.environ.get(PACKAGED_VARIABLE) == "0":
        return None
    package = importlib.util.find_spec("moetune.profiles")
    return Path(package.origin).parent if package and package.origin else None


def _expanded(path: Path | str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise UsageError(
            f"There is no home folder for the store {path}.", f"Give a folder with --store or {STORE_VARIABLE}."
        ) from None


class Store:
    """The profiles below `root`, and read-only those below `packaged`; nothing is created before the first save.

    Args:
        root: the folder; `default_root()` when not given.
        packaged: the folder of the packaged profiles; `packaged_root()` when not given.
    """

    def __init__(self, root: Path | str | None = None, packaged: Path | str | None = None) -> None:
        self.root = default_root() if root is None else _expanded(root)
        self.packaged = packaged_root() if packaged is None else _expanded(packaged)

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that are read, in this order. Only `root`, the first, is ever written."""
        if self.packaged is None or self.packaged.resolve() == self.root.resolve():
            return (self.root,)
        return (self.root, self.packaged)

    def path(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> Path:
        """Where the answer to this question is saved.

        Raises:
            UsageError: the backend's name cannot be part of a file name.
        """
        return self.root / _relative_path(layer, regime, backend, environment)

    def journal(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> Journal:
        """What has been measured for the profile at `path` and is not in it yet."""
        return Journal(self.path(layer, regime, backend, environment).with_suffix(JOURNAL_SUFFIX), self._locked)

    def is_packaged(self, path: Path) -> bool:
        """Whether a profile lies in a folder that is read and never written: it came with moetune."""
        return any(path.resolve().is_relative_to(root.resolve()) for root in self.roots[1:])

    def load(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> Profile:
        """As `find`, the profile alone."""
        return self.find(layer, regime, backend, environment)[1]

    def find(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> tuple[Path, Profile]:
        """The stored profile of exactly this question: layer, regime, backend and strict environment; and its file.

        The layer's name may differ. What counts is what the file says, not where it lies. A packaged profile answers
        where the store has none.

        Raises:
            MissError: there is none. `differing` maps the Python name of each field in which the nearest profile, a
                packaged one too, differs to (wanted, stored); empty where there is nothing at all.
            DamagedProfileError: the file is no profile; it was moved aside unharmed, or stays where it is packaged.
            NewerSchemaError: the file is of a newer moetune; it stays.
        """
        relative = _relative_path(layer, regime, backend, environment)
        for path in (root / relative for root in self.roots):
            with suppress(FileNotFoundError, NotADirectoryError):
                profile = self._read(path)
                if not _differing(layer, regime, backend, environment, profile):
                    return path, profile
        raise self._miss(layer, regime, backend, environment)

    def read(self, path: Path | str) -> Profile:
        """The profile in one file, which need not be the store's.

        Raises:
            UsageError: there is no such file, or it is a folder.
            DamagedProfileError: the file is no profile; it was moved aside if it is the store's, else it stays.
            NewerSchemaError: the file is of a newer moetune; it stays.
        """
        if Path(path).is_dir():
            raise UsageError(
                f"{path} is a folder, no profile.", "Give one of its .json files, or the folder as --store."
            )
        try:
            return self._read(Path(path))
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"There is no profile {path}.", "`moetune store list` shows what there is.") from None

    def profiles(self) -> Iterator[tuple[Path, Profile | StoreError]]:
        """Every profile file, by path, with its profile, or with the error that says why it is none. Moves nothing."""
        for root in self.roots:
            yield from _profiles(root.glob("*/*/*/*.json"))

    def save(self, profile: Profile) -> Profile:
        """The profile merged with the stored one, or where there is none with the packaged one, and written durably.

        Merging is by bucket, the later `measured_at` winning. When this returns, or raises `DamagedProfileError`,
        everything given is on disk.

        Returns:
            What the file now holds.

        Raises:
            UsageError: the store cannot be written.
            DamagedProfileError: in the way lay a file that is no profile, or one of another question. It was moved
                aside unharmed, and `profile` is saved in its place.
            NewerSchemaError: there lies a profile of a newer moetune; it stays and nothing is saved.
            StoreError: the lock cannot be had, or the disk is full.
        """
        question = (profile.layer, profile.regime, profile.backend, profile.environment)
        path = self.path(*question)
        damaged: DamagedProfileError | None = None
        with self._locked():
            try:
                stored = read_profile(path)
                if differing := _differing(*question, stored):
                    raise DamagedProfileError(f"{path} is not the profile of its place: {', '.join(differing)} differ.")
                profile = stored.merged(profile)
            except FileNotFoundError:
                profile = self._over_packaged(profile)
            except DamagedProfileError as error:
                damaged = moved_aside(path, error)
            replace(path, profile.model_dump_json(indent=1) + "\n")
        if damaged is not None:
            raise DamagedProfileError(damaged.message, f"{damaged.hint} The new measurements are saved in its place.")
        return profile

    def ensure_writable(self) -> None:
        """Tries to write in the store, before anything is measured for it.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise UsageError(
                f"The store {self.root} cannot be written: {error.strerror or error}.",
                f"Give another folder with --store or {STORE_VARIABLE}.",
            ) from None

    def _over_packaged(self, profile: Profile) -> Profile:
        """`profile` with the buckets added that only the packaged answer to its question has."""
        question = (profile.layer, profile.regime, profile.backend, profile.environment)
        for root in self.roots[1:]:
            with suppress(FileNotFoundError, NotADirectoryError, StoreError):  # what was measured is saved in any case
                packaged = read_profile(root / _relative_path(*question))
                if not _differing(*question, packaged):
                    return packaged.merged(profile)
        return profile

    def _read(self, path: Path) -> Profile:
        """The profile in `path`; a damaged file of the store is moved aside."""
        try:
            return read_profile(path)
        except DamagedProfileError as error:
            if self.is_packaged(path):
                raise DamagedProfileError(
                    error.message, f"It came with moetune: reinstall it, or set {PACKAGED_VARIABLE}=0 to do without."
                ) from None
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise
            damaged = error
        try:
            with self._locked():
                try:
                    return read_profile(path)  # a writer may have put a good one in its place by now
                except DamagedProfileError as still:
                    raise moved_aside(path, still) from None
                except FileNotFoundError:
                    raise damaged from None
        except UsageError as refused:
            raise DamagedProfileError(damaged.message, f"It could not be moved aside: {refused.message}") from None

    def _miss(self, layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> MissError:
        """The miss, and in what the nearest profile differs: one of the same layer, then the one of fewest fields."""

        def nearest(paths: Iterable[Path]) -> tuple[Path, dict[str, tuple[object, object]]] | None:
            found = [
                (path, differing)
                for path, profile in _profiles(paths)
                if isinstance(profile, Profile)
                and (differing := _differing(layer, regime, backend, environment, profile))
            ]
            return min(found, key=lambda entry: len(entry[1]), default=None)

        asked = f"{layer.name} under {regime.slug} by {backend} on {environment.device}"
        hint = "`moetune tune` measures it."
        best = nearest(path for root in self.roots for path in root.glob(f"*/{layer.slug}/*/*.json")) or nearest(
            path for root in self.roots for path in root.glob("*/*/*/*.json")
        )
        if best is None:
            return MissError(f"No profile of {asked}: the store {self.root} has none at all.", hint)
        path, differing = best
        nearest_one = f"the nearest one, {'packaged as ' if self.is_packaged(path) else ''}{path},"
        fields = ", ".join(f"{name} (wanted {wanted}, stored {stored})" for name, (wanted, stored) in differing.items())
        return MissError(f"No profile of {asked}: {nearest_one} differs in {fields}.", hint, differing)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The store's lock, which every writer holds for the milliseconds of a merge; names what the system refuses."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / LOCK_NAME, timeout=LOCK_TIMEOUT_S, poll_interval=LOCK_POLL_S):
                yield
        except Timeout:
            raise StoreError(
                f"The lock of the store {self.root} was not free within {LOCK_TIMEOUT_S:.0f} s.",
                "End the process that holds it, or give another folder with --store.",
            ) from None
        except (OSError, NotImplementedError) as error:
            self.ensure_writable()
            raise StoreError(f"The store {self.root} cannot be written: {error}.") from None


def _relative_path(layer: MoELayer, regime: Regime, backend: str, environment: Environment) -> Path:
    if not re.fullmatch(r"\w[\w.-]*", backend, re.ASCII):
        raise UsageError(f"A backend's name has letters, digits, '-', '_' and '.' only, given {backend!r}.")
    folder = Path(environment.device_slug, layer.slug, f"{regime.slug}-{regime.digest}")
    return folder / f"{backend}-{environment.digest}.json"


def _differing(
    layer: MoELayer, regime: Regime, backend: str, environment: Environment, stored: Profile
) -> dict[str, tuple[object, object]]:
    """The fields in which a stored profile does not answer the question, as Python name → (wanted, stored)."""
    return {
        **_unequal(layer.shape, stored.layer.shape),
        **regime.differing(stored.regime),
        **_unequal({"backend": backend}, {"backend": stored.backend}),
        **environment.differing(stored.environment),
    }


def _unequal(wanted: Mapping[str, object], stored: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    return {name: (wanted[name], stored[name]) for name in wanted if wanted[name] != stored[name]}


def _profiles(paths: Iterable[Path]) -> Iterator[tuple[Path, Profile | StoreError]]:
    for path in sorted(paths):
        try:
            yield path, read_profile(path)
        except FileNotFoundError:
            continue  # moved aside since it was listed
        except StoreError as error:
            yield path, error
