"""The profile that a command is about: a file's path, or the question options that look it up in the store."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moetune.cli.options import Question
from moetune.errors import MissError, UsageError

if TYPE_CHECKING:
    from moetune.store.profile import Profile
    from moetune.store.store import Store


def stored_profile(
    command: str, path: Path | None, question: Question | None, root: Path | None
) -> tuple[Path, Profile]:
    """The file and the profile in it. Nothing is measured.

    Args:
        command: who asks, for the error.
        path: a profile's file, need not be the store's.
        question: what to look up where no path is given; for `auto` the first able backend that has an answer.
        root: the store.

    Raises:
        UsageError: neither a path nor a question, or both; there is no such file.
        MissError: the store has no profile of this question.
        StoreError: the file is no profile, or is damaged.
    """
    from moetune.store.store import Store

    if (path is None) == (question is None):
        raise UsageError(f"`moetune {command}` takes either a profile's path or --model.", "See `moetune store list`.")
    folder = Store(root)
    if path is not None:
        return path, folder.read(path)
    assert question is not None
    profile = _loaded(question, folder)
    return folder.find(profile.layer, profile.regime, profile.backend, profile.environment)[0], profile


def _loaded(question: Question, folder: Store) -> Profile:
    from moetune.backends.registry import able
    from moetune.tuning.tune import load

    backends = (able(question.layer, question.regime)[0] if question.auto else []) or [question.backend]
    missed: list[MissError] = []
    for backend in backends:
        try:
            return load(question.layer, question.regime, backend, folder)
        except MissError as miss:
            missed.append(miss)
    raise missed[0]
