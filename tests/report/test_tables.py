import io
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from moetune.backends.registry import Diagnosis
from moetune.inputs import presets
from moetune.report.lines import layer_line, regime_line, routing_line
from moetune.report.lists import backends_table, models_table, store_table
from moetune.report.plan import plan_report
from moetune.report.profile import gain_line, profile_report, profile_table
from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer, RoutingMethod
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile
from moetune.tuning.plan import plan

LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)
REGIME = Regime(ep_size=4, attention_dp=True, ladder="8,64,4096", draws=2)
WON = {"tactic": {"algorithm": "grouped_mm"}, "gain": 1.5, "gain_low": 1.43, "gain_high": 1.58}

GOLDEN = """\
                  time  default
rows  tactic      (µs)     (µs)     gain  95 % bounds
─────────────────────────────────────────────────────
   8  eager       60.0     60.0  default       –
  64  grouped_mm   823    1,234    1.50×   1.43–1.58"""

TRITON_GOLDEN = """\
                                         time  default
rows      M×N×K  group  warps  stages    (µs)     (µs)     gain  95 % bounds
────────────────────────────────────────────────────────────────────────────
   8  16×64×128      1      4       4    60.0     60.0  default       –
  64  128×32×64     16      8       3  12,345   18,518    1.50×   1.43–1.58"""

SLOW = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 4}
FAST = {
    "BLOCK_SIZE_M": 128,
    "BLOCK_SIZE_N": 32,
    "BLOCK_SIZE_K": 64,
    "GROUP_SIZE_M": 16,
    "num_warps": 8,
    "num_stages": 3,
}


def _choice(rows, default_time_us, default=None, **won):
    default = default or {"algorithm": "eager"}
    kept = {"tactic": default, "gain": 1.0, "gain_low": 1.0, "gain_high": 1.0}
    given = {**kept, **won}
    return Choice(
        rows=rows,
        **given,
        time_us=default_time_us / given["gain"],
        default_tactic=default,
        default_time_us=default_time_us,
        noise=0.004 * rows / 8,
        tried=6,
        candidates=6,
        load=(1,),
        max_load=1,
        measured_at="2026-01-31T12:00:00Z",
    )


def _profile(*choices, regime=REGIME, name="small", backend="torch", **strict):
    environment = Environment(device="Example GPU", strict={"torch": "2.13.0", **strict})
    layer = MoELayer(**{**dict(LAYER), "name": name})
    return Profile(layer=layer, regime=regime, backend=backend, environment=environment, choices=choices)


def _text(*renderables, width=160):
    text = io.StringIO()
    out = Console(file=text, width=width)
    for renderable in renderables:
        out.print(renderable)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _rows(text):
    """Each line that is not empty, its words one space apart."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_the_table_of_a_profile_is_as_ever():
    table = profile_table(_profile(_choice(8, 60.0), _choice(64, 1234.0, **WON)))
    assert _text(table) == GOLDEN


def test_a_triton_tactic_has_a_column_for_each_tunable_and_80_columns_hold_them():
    won = {**WON, "tactic": FAST}
    table = profile_table(_profile(_choice(8, 60.0, SLOW), _choice(64, 18_518.0, SLOW, **won)))
    assert _text(table) == TRITON_GOLDEN
    assert _text(table, width=80) == TRITON_GOLDEN


def test_tactics_of_other_names_stand_in_columns_of_their_own():
    table = profile_table(_profile(_choice(8, 60.0, {"tile_n": 32, "config": 5})))
    assert _rows(_text(table))[1].startswith("rows tile_n config ")
    assert _rows(_text(table))[3].startswith("8 32 5 60.0 ")


@pytest.mark.parametrize(
    ("backend", "strict", "said"),
    [
        ("triton", {"kernel": "builtin"}, "2 configurations of vLLM's heuristic"),
        ("triton", {"kernel": "sglang"}, "2 configurations of SGLang's heuristic"),
        ("torch", {}, "2 tactics, by the rows"),
    ],
)
def test_a_default_that_changes_with_the_rows_is_counted(backend, strict, said):
    profile = _profile(_choice(8, 60.0, SLOW), _choice(64, 60.0, FAST), backend=backend, **strict)
    lines = _text(*profile_report(profile)).splitlines()
    assert f"6 of 6 tactics tried per bucket; the default: {said}" in lines
    assert max(map(len, lines)) <= 90


def test_what_could_not_win_is_counted_by_its_reason():
    wrong = [{"tactic": FAST, "reason": f"its result is wrong by {error}"} for error in (0.5, 0.25)]
    profile = _profile(_choice(8, 60.0, rejected=wrong), _choice(64, 60.0))
    text = _text(*profile_report(profile))
    assert "could not win, per bucket:\n  0–2  its result is wrong by …\n" in text
    assert "could not win" not in _text(*profile_report(_profile(_choice(8, 60.0))))


def test_a_time_that_was_taken_without_a_graph_is_told():
    profile = _profile(_choice(8, 60.0, eager="it synchronizes"), _choice(64, 60.0))
    text = _text(*profile_report(profile))
    assert "timed without a CUDA graph, launch overhead included, per bucket:\n  0–1  it synchronizes\n" in text
    assert "CUDA graph" not in _text(*profile_report(_profile(_choice(8, 60.0))))


def test_numbers_of_a_column_end_below_each_other():
    lines = _text(profile_table(_profile(_choice(8, 60.0), _choice(64, 1234.0)))).splitlines()[3:]
    assert len({line.index(number) + len(number) for line, number in zip(lines, ("60.0", "1,234"), strict=True)}) == 1


def test_times_are_in_ms_where_all_are_long():
    text = _text(profile_table(_profile(_choice(8, 2_500.0), _choice(64, 150_000.0))))
    assert _rows(text)[:2] == ["time default", "rows tactic (ms) (ms) gain 95 % bounds"]
    assert _rows(text)[3:] == ["8 eager 2.50 2.50 default –", "64 eager 150 150 default –"]


def test_the_report_of_a_profile_says_what_stands_behind_it():
    text = _text(*profile_report(_profile(_choice(8, 60.0), _choice(64, 70.0)), "/store/profile.json"))
    assert "6 of 6 tactics tried per bucket; the default: eager" in text
    assert "\neager: a loop over the active experts, with two GEMMs for each\n" in text
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
    assert any(row.startswith("4,096 16,384 4,096 4.0 ") for row in _rows(text))
    assert any(
        row.startswith("fp4 packed_topk 52 3.08× hidden_states 32 + hidden_states_scale 4") for row in _rows(text)
    )


def test_tokens_a_rank_have_a_column_where_they_are_not_the_rows():
    regime = Regime(ep_size=4, attention_dp=True, dispatch="allgather", ladder="4096")
    text = _text(*plan_report(plan(LAYER, regime, device="cpu")))
    assert any(row.startswith("4,096 1,024 4,096 1,024 4.0 ") for row in _rows(text))


def test_a_plan_counts_the_tactics_left_out_by_their_reasons():
    planned = plan(LAYER, Regime(ladder="8,64"), device="cpu")
    left_out = {f"num_warps={warps}": f"needs {warps} bytes, 64 allowed" for warps in (128, 256, 512)}
    buckets = (planned.buckets[0].model_copy(update={"excluded_tactics": left_out}), planned.buckets[1])
    text = _text(*plan_report(planned.model_copy(update={"buckets": buckets})))
    assert "tactics left out, per bucket:\n  0–3  needs … bytes, … allowed" in text


def test_a_plan_in_80_columns_cuts_no_number():
    for width in (80, 160):
        text = _text(
            *plan_report(plan("qwen3-235b-a22b", Regime(ep_size=8, attention_dp=True), device="cpu")), width=width
        )
        table = text[text.index("rows =") : text.index("before the")]
        assert "…" not in table.replace("needs up to …", "").replace("… MiB allowed", "")
        assert "65,536" in table


def test_a_plan_with_typical_rows_has_one_line_a_bucket_in_80_columns():
    regime = Regime(ep_size=8, dispatch="alltoall", layout="deduplicated", ladder="vllm")
    planned = plan("qwen3-235b-a22b", regime, device="cpu")
    assert any(bucket.met_rows != bucket.rows for bucket in planned.buckets)
    rows = _rows(_text(*plan_report(planned), width=80))
    for bucket in planned.buckets:
        assert any(re.match(rf"{bucket.rows:,} {bucket.met_rows:,} \S+ .*[MG] \d+$", row) for row in rows), bucket.rows


def test_a_plan_without_a_dispatch_has_no_wire():
    text = _text(*plan_report(plan(LAYER, Regime(ladder="8"), device="cpu")))
    assert "before the exchange" not in text


def test_a_plan_says_which_buckets_a_pool_cannot_have():
    regime = Regime(ep_size=4, dispatch="alltoall", layout="pool", ladder="1,2,4")
    assert "left out, because a pool has 4 equal blocks: 1, 2 rows" in _text(*plan_report(plan(LAYER, regime)))


def test_a_plan_says_why_tactics_are_unknown():
    layer = MoELayer(**{**dict(LAYER), "precision": "nvfp4"})
    assert "tactics unknown: torch does not compute this layer" in _text(*plan_report(plan(layer, REGIME, "torch")))


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
    models = [(LAYER, "https://example.org/a")]
    assert _rows(_text(models_table(models)))[3] == "small 16 4 64 32 bf16 softmax https://example.org/a"
    assert _rows(_text(models_table(models, addresses=False)))[3] == "small 16 4 64 32 bf16 softmax"
    backends = backends_table([Diagnosis("a", True), Diagnosis("b", False, "no GPU", "Rent one")])
    assert _rows(_text(backends))[3:] == ["a yes", "b no no GPU", "Rent one"]
    stored = [(tmp_path / "x" / "p.json", _profile(_choice(8, 60.0)))]
    row = "small ep4-tp1-dp-alltoall-packed-random torch Example GPU 1/3 2026-01-31"
    assert _rows(_text(store_table(stored, tmp_path)))[2] == f"{row} x/p.json"
    assert _rows(_text(store_table(stored, tmp_path, files=False)))[2] == row


def test_an_address_without_a_column_is_a_link(tmp_path):
    text = io.StringIO()
    out = Console(file=text, force_terminal=True, width=100)
    out.print(models_table([(LAYER, "https://example.org/a")], addresses=False))
    out.print(store_table([(tmp_path / "p.json", _profile(_choice(8, 60.0)))], tmp_path, files=False))
    assert "https://example.org/a" in text.getvalue()
    assert (tmp_path / "p.json").as_uri() in text.getvalue()


PROFILES = sorted((Path(__file__).parents[2] / "profiles").glob("*/*/*/*.json"))


def _cut(renderables, width=80):
    """The lines that lost characters, or are wider than the terminal and hold no path."""
    out = Console(file=io.StringIO(), width=width, highlight=False)
    cut = []
    for renderable in renderables:
        whole = isinstance(renderable, Text) and bool(renderable.no_wrap)
        with out.capture() as captured:
            out.print(renderable, soft_wrap=whole)
        lines = captured.get().splitlines()
        cut += [line for line in lines if not whole and (len(line.rstrip()) > width or re.search(r"\w…", line))]
    return cut


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parents[1].name[:20] + path.parent.name[:36])
def test_nothing_of_a_packaged_profile_is_cut_at_80_columns(path):
    profile = Profile.model_validate_json(path.read_text())
    assert _cut(profile_report(profile, path)) == []


def test_there_are_packaged_profiles_to_look_at():
    assert len(PROFILES) >= 30


def test_lists_are_not_cut_at_80_columns():
    stored = [(path, Profile.model_validate_json(path.read_text())) for path in PROFILES]
    models = [(presets.layer(name), presets.source(name).url) for name in presets.names()]
    reason = Diagnosis("flashinfer-trtllm-routed", False, "needs " + "compute capability 10.0 or 10.3 " * 4, "Rent one")
    tables = [store_table(stored, Path("/"), files=False), models_table(models, addresses=False)]
    assert _cut([*tables, backends_table([reason])]) == []


def test_half_the_draws_with_other_rows_are_listed_below_the_table():
    text = _text(*profile_report(_profile(_choice(8, 60.0), _choice(64, 60.0, met_rows=63))))
    assert "typical rows (in parentheses): 64 (63)" in text


def test_the_bottom_lines_have_gain_day_device_versions_and_the_next_command():
    profile = _profile(_choice(8, 60.0), _choice(64, 90.0, **WON), backend="triton", triton="3.6.0")
    *_, gain, measured, where, command = _text(*profile_report(profile, "/store/a b.json")).splitlines()
    assert gain == "geometric mean gain 1.22× over 2 buckets; worst 1.00× at 8 rows"
    assert measured == "measured 2026-01-31 on Example GPU · torch 2.13.0 · triton 3.6.0"
    assert where == "profile: /store/a b.json"
    assert command == "next: moetune export '/store/a b.json' --to vllm --out tuned"


@pytest.mark.parametrize(
    ("backend", "strict", "command"),
    [
        ("triton", {"remote": "zero"}, "moetune export /p.json --to sglang --out tuned"),
        ("flashinfer-cutlass", {}, "moetune export /p.json --to flashinfer --out tuned"),
        ("flashinfer-trtllm-routed", {}, "moetune export /p.json --to trtllm --out tuned"),
        ("torch", {}, "moetune show /p.json"),
    ],
)
def test_the_next_command_is_for_an_engine_that_reads_these_kernels(backend, strict, command):
    report = profile_report(_profile(_choice(8, 60.0), backend=backend, **strict), "/p.json")
    assert _text(*report).splitlines()[-1] == f"next: {command}"
    exported = profile_report(_profile(_choice(8, 60.0), backend=backend, **strict), "/p.json", exported=True)
    assert "next: " not in _text(*exported)


def test_one_bucket_has_a_gain():
    one = {rows: _profile(_choice(rows, 60.0), regime=Regime(ladder=str(rows))) for rows in (1, 64)}
    assert gain_line(one[64]) == "geometric mean gain 1.00× over 1 bucket; worst 1.00× at 64 rows"
    assert gain_line(one[1]).endswith("worst 1.00× at 1 row")


@pytest.mark.parametrize(("low", "style"), [(1.043, "1;32"), (1.02, "2")], ids=["beyond the noise", "within it"])
def test_only_a_gain_beyond_the_noise_is_bold_green(low, style):
    won = _choice(64, 60.0, **{**WON, "gain_low": low})  # its noise is 0.032
    text = io.StringIO()
    Console(file=text, force_terminal=True, width=100, color_system="standard").print(profile_table(_profile(won)))
    assert f"\x1b[{style}m1.50×" in text.getvalue()
