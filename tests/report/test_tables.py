import io

import pytest
from rich.console import Console

from moetune.backends.registry import Diagnosis
from moetune.plan import plan
from moetune.report.tables import (
    backends_table,
    layer_line,
    models_table,
    plan_report,
    profile_report,
    profile_table,
    regime_line,
    routing_line,
    store_table,
)
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile

LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)
REGIME = Regime(ep_size=4, attention_dp=True, ladder="8,64,4096", draws=2)
WON = {"tactic": {"algorithm": "grouped_mm"}, "gain": 1.5, "gain_low": 1.43, "gain_high": 1.58}

GOLDEN = """
 rows   tactic       time (µs)   default (µs)      gain   95 % bounds
 ────────────────────────────────────────────────────────────────────
    8   eager             60.0           60.0   default        –
   64   grouped_mm         823          1,234     1.50×   1.43 … 1.58
"""


def _choice(rows, default_time_us, **won):
    kept = {"tactic": {"algorithm": "eager"}, "gain": 1.0, "gain_low": 1.0, "gain_high": 1.0}
    given = {**kept, **won}
    return Choice(
        rows=rows,
        **given,
        time_us=default_time_us / given["gain"],
        default_tactic={"algorithm": "eager"},
        default_time_us=default_time_us,
        noise=0.004 * rows / 8,
        tried=6,
        candidates=6,
        load=(1,),
        max_load=1,
        measured_at="2026-01-31T12:00:00Z",
    )


def _profile(*choices, regime=REGIME, name="small"):
    environment = Environment(device="Example GPU", strict={"torch": "2.13.0"})
    layer = MoELayer(**{**dict(LAYER), "name": name})
    return Profile(layer=layer, regime=regime, backend="torch", environment=environment, choices=choices)


def _text(*renderables, width=160):
    out = Console(file=io.StringIO(), width=width)
    for renderable in renderables:
        out.print(renderable)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


def _rows(text):
    """Each line that is not empty, its words one space apart."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_the_table_of_a_profile_is_as_ever():
    table = profile_table(_profile(_choice(8, 60.0), _choice(64, 1234.0, **WON)))
    assert _text(table) == GOLDEN


def test_numbers_of_a_column_end_below_each_other():
    lines = _text(profile_table(_profile(_choice(8, 60.0), _choice(64, 1234.0)))).splitlines()
    assert (
        len({line.index(number) + len(number) for line, number in zip(lines[3:], ("60.0", "1,234"), strict=False)}) == 1
    )


def test_times_are_in_ms_where_all_are_long():
    text = _text(profile_table(_profile(_choice(8, 2_500.0), _choice(64, 150_000.0))))
    assert _rows(text)[0] == "rows tactic time (ms) default (ms) gain 95 % bounds"
    assert _rows(text)[2:] == ["8 eager 2.50 2.50 default –", "64 eager 150 150 default –"]


def test_the_report_of_a_profile_says_what_stands_behind_it():
    text = _text(*profile_report(_profile(_choice(8, 60.0), _choice(64, 70.0)), "/store/profile.json"))
    assert "6 of 6 tactics tried a bucket; the default is eager" in text
    assert "A/A noise 0.4–3.2 %" in text
    assert "not tuned yet: 4096" in text
    assert "profile: /store/profile.json" in text
    assert "nothing was measured" not in text
    assert "busy" not in text


def test_a_busy_machine_is_told():
    assert "this machine was busy" in _text(*profile_report(_profile(_choice(4096, 60.0))))


def test_a_served_profile_says_that_nothing_was_measured_and_where_it_lay():
    text = _text(*profile_report(_profile(_choice(8, 60.0)), "/store/profile.json", served=True))
    assert "served from the store, nothing was measured: /store/profile.json" in text


def test_a_profile_without_choices_has_a_report():
    assert "no bucket is tuned yet" in _text(*profile_report(_profile()))


def test_names_are_no_markup():
    assert "[red]odd[/red]" in _text(*profile_report(_profile(name="[red]odd[/red]")))


def test_a_plan_shows_each_bucket_and_each_way_to_travel():
    planned = plan(LAYER, REGIME, device="cpu")
    text = _text(*plan_report(planned))
    assert "rank 0 of 4: experts 0 … 3, 49.2 kB of weights" in text
    assert "in closed form" in text
    assert any(row.startswith("4,096 4,096 16,384 4,096 4.0 ") for row in _rows(text))
    assert any(
        row.startswith("fp4 packed_topk 52 3.08× hidden_states 32 + hidden_states_scale 4") for row in _rows(text)
    )


def test_a_plan_without_a_dispatch_has_no_wire():
    text = _text(*plan_report(plan(LAYER, Regime(ladder="8"), device="cpu")))
    assert "before the exchange" not in text


def test_a_plan_says_which_buckets_a_pool_cannot_have():
    regime = Regime(ep_size=4, dispatch="alltoall", layout="pool", ladder="1,2,4")
    assert "left out, because a pool has 4 equal blocks: 1, 2 rows" in _text(*plan_report(plan(LAYER, regime)))


def test_a_plan_says_why_tactics_are_unknown():
    layer = MoELayer(**{**dict(LAYER), "precision": "nvfp4"})
    assert "tactics unknown: torch does not compute this layer" in _text(*plan_report(plan(layer, REGIME)))


@pytest.mark.parametrize(
    ("routing", "line"),
    [
        (RoutingMethod(), "softmax"),
        (
            RoutingMethod(scoring="sigmoid", bias=True, num_groups=8, top_k_groups=4, scaling=2.5),
            "sigmoid + bias, 4 of 8 groups, × 2.5",
        ),
        (RoutingMethod(renormalize=False), "softmax, not renormalized"),
    ],
)
def test_a_routing_method_is_one_line(routing, line):
    assert routing_line(routing) == line


def test_a_layer_and_a_regime_are_one_line_each():
    assert layer_line(LAYER) == "small: 16 experts, top-4, hidden 64, intermediate 32, bf16"
    assert regime_line(Regime()) == "ep 1, tp 1, no attention DP, dispatch none, random × 16 draws, ladder pow2"
    assert (
        regime_line(Regime(ep_size=4, attention_dp=True, distribution="balanced", redundant_experts=4, seed=3))
        == "ep 4, tp 1, attention DP, alltoall packed, 4 redundant experts, balanced × 1 draw, seed 3, ladder pow2"
    )


def test_models_backends_and_the_store_have_a_row_for_each(tmp_path):
    models = models_table([(LAYER, "https://example.org/a")])
    assert _rows(_text(models))[2] == "small 16 4 64 32 bf16 softmax https://example.org/a"
    backends = backends_table([Diagnosis("a", True), Diagnosis("b", False, "no GPU", "Rent one")])
    assert _rows(_text(backends))[2:] == ["a yes", "b no no GPU Rent one"]
    profiles = store_table([(tmp_path / "x" / "p.json", _profile(_choice(8, 60.0)))], tmp_path)
    stored = "small ep4-tp1-dp-alltoall-packed-random torch Example GPU 1/3 2026-01-31 x/p.json"
    assert _rows(_text(profiles))[2] == stored
