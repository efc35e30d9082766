"""Finds the profile that a command needs: by its path, or by the question that it answers."""

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
    """Returns a profile and its file. Measures nothing.

    Args:
        command: the command's name, for the error.
        path: a profile's file. It need not be in the store.
        question: the question to look up if there is no path. For `auto`, the first backend with a profile is taken.
        root: the folder of the store.

    Raises:
        UsageError: neither a path nor a question is given, or both are, or there is no such file.
        MissError: no profile answers the question.
        StoreError: the file is damaged or is no profile.
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
            return load(question.layer, question.regime, backend, folder, device=question.device)
        except MissError as miss:
            missed.append(miss)
    raise missed[0]
