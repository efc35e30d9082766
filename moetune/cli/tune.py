"""Defines the command `moetune tune`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moetune.cli.help import Command
from moetune.cli.options import Request, json_option, near_option, store_option, takes_request
from moetune.cli.output import document, show
from moetune.errors import NotSavedError, UsageError
from moetune.spec.enums import STRATEGIES, Strategy

if TYPE_CHECKING:
    from moetune.cli.progress import Progress

EXAMPLE = """\
moetune tune --launch "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep"
  --export tuned"""


@click.command(cls=Command, example=EXAMPLE)
@takes_request()
@store_option
@click.option("--frozen", is_flag=True, help="Never measure. A miss ends with exit code 3.")
@near_option
@click.option(
    "--start",
    metavar="PROFILE|near",
    help="Check the tactics of an older profile and their neighbors here, instead of a search: a file, or near for the "
    "nearest stored one.",
)
@click.option("--again", is_flag=True, help="Measure every bucket again, and replace what is stored for it.")
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="auto",
    help="auto uses the backend's own search; exhaustive times every tactic.  [default: auto]",
)
@click.option(
    "--export",
    "out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Also write the files that the engine of --launch or --dispatch reads, like `moetune export`.",
)
@click.option(
    "--for-version",
    metavar="V",
    help="With --export: the engine's version. vLLM's also decides which kernel is measured.  [default: the newest "
    "known]",
)
@click.option("--time-budget", type=float, metavar="S", help="Stop after about S seconds.  [default: no limit]")
@json_option
def tune(
    request: Request,
    store: Path | None,
    frozen: bool,
    near: bool,
    start: str | None,
    again: bool,
    strategy: Strategy,
    out: Path | None,
    for_version: str | None,
    time_budget: float | None,
    as_json: bool,
) -> None:
    """Measure the fastest tactic of each bucket, or take it from the store or from the packaged profiles.

    With --backend auto, every backend that can run here is tuned. Their choices are then timed side by side. The
    result names the fastest backend of each bucket and its lead. It says which flag of the engine to start with: by
    rows, for one process, and for separate pools of decode and prefill. If one backend fails, the others go on.

    Each bucket is saved as soon as it is known, and an interrupted run resumes. A tactic replaces the default only if
    it is faster beyond the noise. Each gain is shown with its 95 % bounds.
    """
    from moetune.cli.backend_choice import options_of_engine, require_kernels_of
    from moetune.cli.progress import Progress
    from moetune.cli.stored import backend_of_start
    from moetune.cli.streams import stdout_on_stderr
    from moetune.cli.written import request_for_engine, say, write_for
    from moetune.store.match import Match
    from moetune.store.profile import Profile
    from moetune.store.store import Store
    from moetune.tuning.comparison import Comparison
    from moetune.tuning.tune import tune as tune_of
    from moetune.tuning.tune_all import tune_all

    if out is not None:
        request = request_for_engine(request, for_version)
    elif for_version is not None:
        raise UsageError("--for-version needs --export.", "Give --export DIR, or leave --for-version out.")
    elif request.auto and request.engine and not frozen:
        require_kernels_of(request.engine, request.layer, request.regime)
    folder = Store(store)
    if start is not None and request.auto:
        request = replace(request, backend=backend_of_start(request, start, folder), auto=False)
    answer: object
    unsaved: NotSavedError | None = None
    with stdout_on_stderr(), Progress() as progress:
        of_engine = options_of_engine(request.engine)
        tune_all_request = partial(tune_all, options=of_engine) if of_engine else tune_all
        tune_request = tune_all_request if request.auto else partial(tune_of, backend=request.backend, start=start)
        try:
            answer = tune_request(
                request.layer,
                request.regime,
                store=folder,
                device=request.device,
                frozen=frozen,
                near=near,
                again=again,
                strategy=strategy,
                time_budget_s=time_budget,
                on_event=progress,
            )
        except NotSavedError as error:
            answer, unsaved = error.answer, error
    if isinstance(answer, Comparison):
        from moetune.report.comparison import comparison_report

        fields = {**_unsaved_field(unsaved), **_throttled_field(progress)}
        document(answer, **fields) if as_json else show(*comparison_report(answer, request.engine))
        _raise(unsaved)
        return
    assert isinstance(answer, Profile)
    served = progress.served
    path = served.path if served else folder.path(answer.layer, answer.regime, answer.backend, answer.environment)
    found = Match(path, answer, served.differences if served else ())
    written = None
    if out is not None:
        written = write_for(str(request.engine), found, out, for_version=for_version, launch=request.launch)
    state: dict[str, Any] = {"served": served is not None, "packaged": bool(served and served.packaged)}
    state |= {"near": found.near, "neutral": found.neutral, "measured_ladder": found.measured_ladder}
    if as_json:
        exported = {} if written is None else {"exported": written.document()}
        document(answer, path=str(path), **state, **exported, **_unsaved_field(unsaved), **_throttled_field(progress))
    else:
        from moetune.report.profile import profile_report

        show(*profile_report(answer, path, exported=written is not None, engine=request.engine, **state))
        if written is not None:
            say(written)
    _raise(unsaved)


def _unsaved_field(unsaved: NotSavedError | None) -> dict[str, Any]:
    """Returns the field of the document that names the buckets that are not saved, if there are any."""
    return {} if unsaved is None else {"unsaved": {backend: list(rows) for backend, rows in unsaved.rows.items()}}


def _throttled_field(progress: Progress) -> dict[str, Any]:
    """Returns the field of the document that says what slowed the GPU down, if anything did."""
    return {"throttled": {name: list(each) for name, each in progress.throttled.items()}} if progress.throttled else {}


def _raise(error: NotSavedError | None) -> None:
    if error is not None:
        raise error
