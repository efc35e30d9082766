import io

import pytest
from rich.console import Console

from moetune.inputs.engine_flags import engine_flags
from moetune.report.comparison import comparison_report, comparison_table
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile
from moetune.tuning.comparison import BackendResult, ComparedBucket, Comparison

LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)
REGIME = Regime(ep_size=4, attention_dp=True, ladder="8,64,512,4096", draws=2)

GOLDEN = """
                flash-
                infer-
       triton  cutlass                            runner-    95 %
 rows    (µs)     (µs)  fastest                  up takes   bounds
────────────────────────────────────────────────────────────────────
    8    60.0     72.0  triton                      1.20×  1.18–1.22
   64     101      100  too close to call           1.01×  0.99–1.03
  512     240      300  triton, not interleaved     1.25×      –
4,096       –    2,134  flashinfer-cutlass only         –      –
"""


def _profile(backend, buckets):
    choices = tuple(
        Choice(
            rows=rows, tactic={"number": 1}, time_us=us, default_tactic={"number": 0}, default_time_us=2 * us, gain=2.0,
            gain_low=1.9, gain_high=2.1, noise=0.01, tried=2, candidates=2, load=(1,), max_load=1,
            measured_at="2026-01-31T12:00:00Z",
        )
        for rows, us in buckets.items()
    )  # fmt: skip
    environment = Environment(device="NVIDIA H200", strict={}, informative={})
    return Profile(layer=LAYER, regime=REGIME, backend=backend, environment=environment, choices=choices)


def _result(backend, buckets, **fields):
    profile = _profile(backend, buckets) if buckets else None
    return BackendResult(backend=backend, profile=profile, flags=dict(engine_flags(backend, LAYER.precision)), **fields)


def _bucket(rows, triton, cutlass, **fields):
    times = {name: us for name, us in (("triton", triton), ("flashinfer-cutlass", cutlass)) if us}
    return ComparedBucket(rows=rows, times_us=times, **fields)


COMPARISON = Comparison(
    layer=LAYER,
    regime=REGIME,
    device="NVIDIA H200",
    families=(
        _result("triton", {8: 60.0, 64: 101.0, 512: 240.0}, failed="The default tactic failed at 4096 rows."),
        _result("flashinfer-cutlass", {8: 72.0, 64: 100.0, 512: 300.0, 4096: 2134.0}, path="/store/cutlass.json"),
        _result("torch", {}, failed="no memory"),
    ),
    left_out={"flashinfer-trtllm": "needs compute capability 10.0"},
    buckets=(
        _bucket(8, 60.0, 72.0, winner="triton", runner_up="flashinfer-cutlass", ratio=1.2, ratio_low=1.18,
                ratio_high=1.22, noise=0.01, interleaved=True, decided=True),
        _bucket(64, 101.0, 100.0, winner="flashinfer-cutlass", runner_up="triton", ratio=1.01, ratio_low=0.99,
                ratio_high=1.03, noise=0.01, interleaved=True),
        _bucket(512, 240.0, 300.0, winner="triton", runner_up="flashinfer-cutlass", ratio=1.25,
                failed={"flashinfer-cutlass": "killed by SIGKILL"}),
        _bucket(4096, None, 2134.0, winner="flashinfer-cutlass"),
    ),
)  # fmt: skip


def _printed(*renderables):
    text = io.StringIO()
    console = Console(file=text, width=200, highlight=False)
    for renderable in renderables:
        console.print(renderable)
    return text.getvalue()


def test_the_table_says_which_backend_is_fastest_by_how_much_and_where_it_is_too_close_to_call():
    printed = [line.rstrip() for line in _printed(comparison_table(COMPARISON)).splitlines() if line.strip()]
    assert printed == [line for line in GOLDEN.splitlines() if line.strip()]


@pytest.mark.parametrize(
    "said",
    [
        "of 4 buckets: triton fastest in 1, too close to call in 1",
        "at 512 rows the times come from separate runs",
        "triton: vLLM --moe-backend triton · SGLang --moe-runner-backend triton",
        "flashinfer-cutlass: vLLM --moe-backend flashinfer_cutlass · SGLang --moe-runner-backend flashinfer_cutlass",
        "triton failed: The default tactic failed at 4096 rows.",
        "torch failed: no memory",
        "512 rows: flashinfer-cutlass did not run side by side: killed by SIGKILL",
        "not here: flashinfer-trtllm: needs compute capability 10.0",
        "profile: /store/cutlass.json",
    ],
)
def test_the_report_says(said):
    assert said in _printed(*comparison_report(COMPARISON))


def test_layer_and_regime_are_shown_once_and_every_profile_has_its_table():
    printed = _printed(*comparison_report(COMPARISON))
    assert printed.count("small: 16 experts") == 1
    assert printed.count("backend ") >= 2


def test_one_backend_alone_needs_no_table_of_comparison():
    alone = COMPARISON.model_copy(update={"families": COMPARISON.families[:1], "buckets": ()})
    assert "up takes" not in _printed(*comparison_report(alone))


def test_the_document_is_read_as_it_was_written():
    assert Comparison.model_validate_json(COMPARISON.model_dump_json()) == COMPARISON


def test_five_backends_fit_in_80_columns():
    names = ("triton", "flashinfer-trtllm", "flashinfer-trtllm-routed", "flashinfer-cutlass", "torch")
    results = tuple(_result(name, {8: 60.0}) for name in names)
    times = dict.fromkeys(names, 12345.6)
    bucket = ComparedBucket(
        rows=8, times_us={**times, "torch": 60.0}, winner=names[2], runner_up=names[1], ratio=1.2, ratio_low=1.18,
        ratio_high=1.22, noise=0.01, interleaved=True, decided=True,
    )  # fmt: skip
    table = comparison_table(COMPARISON.model_copy(update={"families": results, "buckets": (bucket,)}))
    console = Console(width=80, highlight=False)
    with console.capture() as captured:
        console.print(table)
    printed = captured.get()
    assert "…" not in printed
    assert "1.18–1.22" in printed
    assert printed.count("12,346") == 4
