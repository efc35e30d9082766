"""Finds the profile that a command needs: by its path, or by a command's request."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moetune.cli.help import is_model, model_hint
from moetune.cli.options import Request
from moetune.errors import MissError, MoetuneError, UnsupportedError, UsageError
from moetune.store.match import Match

if TYPE_CHECKING:
    from moetune.backends.base import Backend
    from moetune.store.store import Store
    from moetune.tuning.question import Question


def stored_profile(
    command: str,
    path: Path | None,
    request: Request | None,
    root: Path | None,
    near: bool = False,
    vllm_version: str | None = None,
) -> Match:
    """Returns a profile, its file, and the versions in which it differs from the request's. Measures nothing.

    Args:
        command: the command's name, for the error.
        path: a profile's file. It need not be in the store.
        request: the request whose profile is looked up if there is no path. For `auto`, the first backend that has a
            profile is taken.
        root: the folder of the store.
        near: whether the request also accepts a profile of other versions. For `auto`, the first backend that has a
            profile that matches is taken before one that has a near one.
        vllm_version: with a request, the version of vLLM whose Triton kernel the profile must be of. By default the
            request's own.

    Raises:
        UsageError: neither a path nor a request is given, or both are, or there is no such file; or `vllm_version` is
            no version, or contradicts the kernel that was chosen.
        UnsupportedError: this machine lacks what the backend's environment is read from.
        MissError: the store has no profile for the request.
        StoreError: the file is damaged or is no profile.
    """
    from moetune.store.store import Store

    if (path is None) == (request is None):
        raise UsageError(
            f"`moetune {command}` takes either a profile's path, or --model with options, or --launch.",
            f"Example: moetune {command} --launch 'vllm serve …'. `moetune store list` prints the paths.",
        )
    if near and path is not None:
        raise UsageError("--near looks a profile up; a profile's path needs no look-up.", "Give --model, or no --near.")
    folder = Store(root)
    if path is not None:
        if not os.path.exists(path) and is_model(str(path)):
            raise UsageError(f"There is no profile {path}: it is the name of a model.", model_hint(str(path), command))
        return Match(path, folder.read(path))
    assert request is not None
    return _found(request, folder, near, vllm_version)


def on_device(request: Request | None, name: str | None) -> Request | None:
    """Returns the request with the device that its profile is looked up for, if one is named.

    Raises:
        UsageError: a device is named, and there is no request.
    """
    if name is None:
        return request
    if request is None:
        raise UsageError(
            "--device-name looks a profile up; a profile's path needs no look-up.",
            "Give --model with options, or --launch.",
        )
    return replace(request, device_name=name)


def question_of(request: Request, backend: Backend, folder: Store, *, near: bool) -> Question:
    """Returns the question whose answer is looked up for a request and one backend.

    Raises:
        UsageError: as `Question.of`, or the name of the device is none.
        UnsupportedError: this machine lacks what the backend's environment is read from.
    """
    from moetune.tuning.question import Question

    question = Question.of(request.layer, request.regime, backend, folder, request.device, near=near)
    return question if request.device_name is None else question.on_device(request.device_name)


def backends_of(request: Request) -> list[Backend]:
    """Returns the backends that may have a profile for a request, the one to name first.

    If the backend was left to moetune, the first is what the request's engine could run, even if it cannot run here.
    With a device's name, all that compute the layer may have one.
    """
    from moetune.backends import registry
    from moetune.cli.backend_choice import backend_of_engine, backend_with, options_of_engine

    if not request.auto:
        return [request.backend]
    of_engine = request.engine and backend_of_engine(request.engine, request.layer, request.regime)
    options = options_of_engine(request.engine)
    found = {of_engine.name: of_engine} if of_engine else {}
    if request.device_name is None:
        backends = registry.able(request.layer, request.regime)[0]
    else:
        backends = [registry.backend(name) for name in registry.backends_computing(request.layer, request.regime)]
    for backend in backends:
        if backend.name not in found:
            own = options.get(backend.name)
            found[backend.name] = backend_with(backend.name, own) if own else backend
    return list(found.values()) or [request.backend]


def backend_of_start(request: Request, start: str, folder: Store) -> Backend:
    """Returns the backend of the profile that `tune --start` names, if the backend was left to moetune.

    Raises:
        UsageError: there is no such file, or its backend cannot run here.
        MissError: `near`, and no stored profile differs in versions only.
    """
    from moetune.tuning.question import NEAR

    found = _found(request, folder, near=True).profile if start == NEAR else folder.read(start)
    for backend in backends_of(request):
        if backend.name == found.backend:
            return backend
    raise UsageError(
        f"--start: {start} is a profile of {found.backend}, which cannot run here.",
        "Give a profile of another backend.",
    )


def _found(request: Request, folder: Store, near: bool, vllm_version: str | None = None) -> Match:
    failed: list[MoetuneError] = []
    backends = [_of_version(backend, request, vllm_version) for backend in backends_of(request)]
    for accepted in (False, True) if near else (False,):
        for backend, option in backends:
            try:
                return question_of(request, backend, folder, near=accepted).match()
            except MissError as miss:
                hint = miss.hint.replace("`moetune tune", f"`moetune tune {option}") if option else miss.hint
                failed.append(miss.hinting(hint))
            except UnsupportedError as error:
                failed.append(error)
    raise next((error for error in failed if isinstance(error, MissError)), failed[0])


def _of_version(backend: Backend, request: Request, version: str | None) -> tuple[Backend, str]:
    """Returns the backend that computes like a version of vLLM, and the option with which a tune measures it.

    The option is empty if a tune with the request's own options measures it, and for other backends than Triton's.
    """
    from moetune.backends.grouped_triton.backend import TritonBackend
    from moetune.backends.grouped_triton.kernel_versions import known_version, stored_name

    if version is None or not isinstance(backend, TritonBackend):
        return backend, ""
    found = backend.for_version(version, request.layer, request.regime)
    if stored_name(found.version) != stored_name(backend.version):
        return found, f"--backend-option kernel_version={known_version('vllm', version)}"
    return found, f"--remote {found.remote}" if found.remote != backend.remote else ""
