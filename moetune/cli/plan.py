"""Defines the command `moetune plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from moetune.cli.help import Command, typed
from moetune.cli.options import Request, device_name_option, json_option, near_option, store_option, takes_request
from moetune.cli.output import document, patience, report, show

if TYPE_CHECKING:
    from pathlib import Path

    from moetune.backends.base import Backend
    from moetune.tuning.outlook import Kernels, NearestProfile

EXAMPLE = """\
moetune plan --launch "vllm serve deepseek-ai/DeepSeek-R1 -dp 8 -ep
  --all2all-backend deepep_high_throughput\""""


@click.command(cls=Command, example=EXAMPLE)
@takes_request()
@store_option
@near_option
@device_name_option
@click.option("--wire", is_flag=True, help="Also show the formats in which a token can travel, with their bytes.")
@json_option
def plan(request: Request, store: Path | None, near: bool, device_name: str | None, wire: bool, as_json: bool) -> None:
    """Show what the kernel of one rank gets in each bucket. Needs no GPU and measures nothing.

    For each bucket: rows, tokens per rank, local slots, slots per local expert, active experts, bytes on the wire,
    bytes and FLOPs of the GEMMs, and the number of tactics that `moetune tune` would try. Then: the kernels that run
    it, the stored profile that is nearest, and the command to run next. docs/workload.md explains which rows reach a
    rank.
    """
    from moetune.cli.stored import backends_of, on_device
    from moetune.report.lines import counted
    from moetune.tuning.plan import plan as plan_of

    request = on_device(request, device_name) or request
    layer, regime = request.layer, request.regime
    with patience(f"Computing the loads of {counted(len(regime.buckets), 'bucket')} ..."):
        backends = backends_of(request)
        answer = plan_of(layer, regime, backends[0], request.device, rank=request.rank)
        kernels = _kernels(request, backends[0])
        profile, unknown = _nearest(request, backends, store, near)
        answer = answer.model_copy(
            update={
                "kernels": kernels,
                "profile": profile,
                "profile_unknown": unknown,
                "next_command": _next_command(answer.backend, kernels, profile),
            }
        )
    if as_json:
        document(answer)
    else:
        from moetune.report.plan import plan_report

        show(*plan_report(answer, wire=wire, flags=request.flags))


def _kernels(request: Request, backend: Backend) -> Kernels:
    from moetune.backends import registry
    from moetune.cli.notes import preferred_to
    from moetune.inputs.engine_flags import FROM_LOGITS, engine_flags, reaches
    from moetune.tuning.outlook import Kernels

    layer, regime, engine = request.layer, request.regime, request.engine
    flags = engine_flags(backend.name, layer.precision, regime.layout) if reaches(backend.name, regime.layout) else {}
    rivals = [name for name in registry.rivals_computing(layer, regime) if name == backend.name]
    return Kernels(
        engine=engine,
        selected=not request.auto,
        computing=(*registry.backends_computing(layer, regime), *rivals),
        runs_here=backend.unavailable() is None,
        flags=dict(flags),
        routed_by="kernel" if backend.name == FROM_LOGITS else "engine",
        preferred=preferred_to(backend, engine, layer, regime) if engine and request.auto else {},
    )


def _nearest(
    request: Request, backends: list[Backend], root: Path | None, near: bool
) -> tuple[NearestProfile | None, str]:
    """Returns the nearest stored profile, and why none can be looked up here; the reason is empty otherwise.

    A store that cannot be read is a warning: the plan needs none.
    """
    from moetune.cli.stored import question_of
    from moetune.errors import StoreError, UnsupportedError
    from moetune.store.store import Store
    from moetune.tuning.outlook import nearest_profile

    folder = Store(root)
    keys, unknown = [], ""
    for backend in backends:
        try:
            keys.append(question_of(request, backend, folder, near=near))
        except UnsupportedError as error:  # its package is not installed, so no profile is for this environment
            unknown = unknown or error.message
    try:
        return nearest_profile(keys, any_backend=request.auto and request.engine is None), "" if keys else unknown
    except StoreError as error:
        report(f"warning: {error}")
        return None, ""


def _next_command(backend: str, kernels: Kernels, profile: NearestProfile | None) -> str | None:
    """Returns the command to run next: the one that shows the profile, or the one that measures it."""
    from moetune.inputs.engine_flags import TRITON
    from moetune.report.command import command

    if profile is not None and profile.answers:
        return command("show", profile.path)
    if backend not in kernels.computing:
        return None
    start = ("--start", "near") if profile is not None and profile.near and profile.backend == backend else ()
    reads_file = backend in TRITON and kernels.engine is not None and kernels.engine in kernels.flags
    export = ("--export", "tuned") if reads_file else ()
    return command("tune", *_measuring(typed()), *export, *start)


def _measuring(words: Sequence[str]) -> Iterator[str]:
    """Yields the words of `plan` that `tune` takes too."""
    name = "--device-name"
    for before, word in zip(("", *words), words, strict=False):
        if before != name and word not in ("--near", "--wire", name) and not word.startswith(f"{name}="):
            yield word
