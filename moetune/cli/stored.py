"""Finds the profile that a command needs: by its path, or by the question that it answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moetune.cli.options import Question
from moetune.errors import MissError, MoetuneError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from moetune.backends.base import Backend
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
        UnsupportedError: this machine lacks what the backend's environment is read from.
        MissError: no profile answers the question.
        StoreError: the file is damaged or is no profile.
    """
    from moetune.store.store import Store

    if (path is None) == (question is None):
        raise UsageError(f"`moetune {command}` takes either a profile's path or --model.", "See `moetune store list`.")
    folder = Store(root)
    if path is not None:
        if not path.exists() and (model := _model(str(path))):
            raise UsageError(
                f"There is no profile {path}: it is the name of a model.",
                f"Give --model {model} and the deployment, as in `moetune {command} --help`.",
            )
        return path, folder.read(path)
    assert question is not None
    profile = _loaded(question, folder)
    return folder.find(profile.layer, profile.regime, profile.backend, profile.environment)[0], profile


def backends_of(question: Question) -> list[Backend]:
    """Returns the backends that may have a profile for a question, the one to name first.

    If the backend was left to moetune, the first is what the question's engine could run, even if it cannot run here.
    """
    from moetune.backends.registry import able
    from moetune.cli.backend_choice import backend_of_engine

    if not question.auto:
        return [question.backend]
    of_engine = question.engine and backend_of_engine(question.engine, question.layer, question.regime)
    found = [of_engine] if of_engine else []
    return [*found, *able(question.layer, question.regime)[0]] or [question.backend]


def _model(text: str) -> str | None:
    """Returns `text` if it is the name of a preset or of a repository that moetune knows."""
    from moetune.inputs import presets, repositories

    return text if text.lower() in presets.names() or text.lower() in repositories.known() else None


def _loaded(question: Question, folder: Store) -> Profile:
    from moetune.tuning.tune import load

    failed: list[MoetuneError] = []
    for backend in backends_of(question):
        try:
            return load(question.layer, question.regime, backend, folder, device=question.device)
        except (MissError, UnsupportedError) as error:
            failed.append(error)
    raise next((error for error in failed if isinstance(error, MissError)), failed[0])
