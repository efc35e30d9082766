import io

import pytest
from rich.console import Console
from shown import FAST, PROFILES, SLOW, WON, cut, made_choice, made_profile, printed, rows_of

from moetune.report.profile import gain_line, profile_report, profile_table
from moetune.spec.regime import Regime
from moetune.store.profile import ComparedRows, Profile

GOLDEN = """\
                  time  default
rows  tactic      (µs)     (µs)   gain  95 % bounds
───────────────────────────────────────────────────
   8  eager       60.0     60.0   kept       –
  64  grouped_mm   823    1,234  1.50×   1.43–1.58"""

TRITON_GOLDEN = """\
                                         time  default
rows      M×N×K  group  warps  stages    (µs)     (µs)   gain  95 % bounds
──────────────────────────────────────────────────────────────────────────
   8  16×64×128      1      4       4    60.0     60.0   kept       –
  64  128×32×64     16      8       3  12,345   18,518  1.50×   1.43–1.58"""


def test_the_table_of_a_profile_is_as_ever():
    table = profile_table(made_profile(made_choice(8, 60.0), made_choice(64, 1234.0, **WON)))
    assert printed(table) == GOLDEN


def test_a_small_gain_has_a_third_digit_that_is_the_stored_one():
    won = {**WON, "gain": 1.0151, "gain_low": 1.0113, "gain_high": 1.0189}
    assert rows_of(printed(profile_table(made_profile(made_choice(8, 65.5, **won)))))[-1].endswith(
        " 1.015× 1.011–1.019"
    )


def test_a_triton_tactic_has_a_column_for_each_tunable_and_80_columns_hold_them():
    won = {**WON, "tactic": FAST}
    table = profile_table(made_profile(made_choice(8, 60.0, SLOW), made_choice(64, 18_518.0, SLOW, **won)))
    assert printed(table) == TRITON_GOLDEN
    assert printed(table, width=80) == TRITON_GOLDEN


def test_tactics_of_other_names_stand_in_columns_of_their_own():
    table = profile_table(made_profile(made_choice(8, 60.0, {"tile_n": 32, "config": 5})))
    assert rows_of(printed(table))[1].startswith("rows tile_n config ")
    assert rows_of(printed(table))[3].startswith("8 32 5 60.0 ")


@pytest.mark.parametrize(
    ("backend", "strict", "said"),
    [
        ("triton", {"kernel": "builtin"}, "2 configurations of vLLM's heuristic"),
        ("triton", {"kernel": "sglang"}, "2 configurations of SGLang's heuristic"),
        ("torch", {}, "2 tactics"),
    ],
)
def test_a_default_that_changes_with_the_rows_is_counted(backend, strict, said):
    profile = made_profile(made_choice(8, 60.0, SLOW), made_choice(64, 60.0, FAST), backend=backend, **strict)
    lines = printed(*profile_report(profile)).splitlines()
    assert f"the default depends on the rows: {said}" in lines
    assert max(map(len, lines)) <= 90


SHIPPED = "shipped file E=128,N=768,device_name=NVIDIA_H200.json of vllm 0.33.0"


@pytest.mark.parametrize(
    ("sources", "defaults", "said"),
    [
        (["heuristic"] * 2, (SLOW, FAST), "2 configurations of vLLM's heuristic"),
        (["heuristic (vllm is not installed)"] * 2, (SLOW, FAST), "2 configurations of vLLM's heuristic (vllm is not "),
        (["heuristic"] * 2, (SLOW, SLOW), ": 16×64×128 group=1 warps=4 stages=4 of vLLM's heuristic"),
        ([SHIPPED] * 2, (SLOW, FAST), f"2 configurations of {SHIPPED}"),
        ([SHIPPED] * 2, (SLOW, SLOW), f": 16×64×128 group=1 warps=4 stages=4 of {SHIPPED}"),
        ([SHIPPED, "heuristic"], (SLOW, FAST), f"2 configurations: {SHIPPED} (1 bucket), heuristic (1 bucket)"),
        (["", SHIPPED], (SLOW, FAST), f"2 configurations: not recorded (1 bucket), {SHIPPED} (1 bucket)"),
    ],
)
def test_the_default_is_shown_with_its_source(sources, defaults, said):
    choices = [
        made_choice(rows, 60.0, default, default_source=source)
        for rows, default, source in zip((8, 64), defaults, sources, strict=True)
    ]
    profile = made_profile(*choices, backend="triton", kernel="builtin")
    said = said if said.startswith(":") else f" depends on the rows: {said}"
    assert f"\nthe default{said}" in printed(*profile_report(profile), width=300)


def test_what_could_not_win_is_counted_by_its_reason():
    wrong = [{"tactic": FAST, "reason": f"its result is wrong by {error}"} for error in (0.5, 0.25)]
    profile = made_profile(made_choice(8, 60.0, rejected=wrong), made_choice(64, 60.0))
    text = printed(*profile_report(profile))
    assert "could not win, per bucket:\n  0–2  its result is wrong by …\n" in text
    assert "could not win" not in printed(*profile_report(made_profile(made_choice(8, 60.0))))


def test_a_time_that_was_taken_without_a_graph_is_marked():
    profile = made_profile(made_choice(8, 60.0, eager="it synchronizes"), made_choice(64, 60.0))
    text = printed(*profile_report(profile))
    assert "timed without a CUDA graph, launch overhead included, per bucket:\n  0–1  it synchronizes\n" in text
    assert "CUDA graph" not in printed(*profile_report(made_profile(made_choice(8, 60.0))))


def test_the_report_of_a_profile_says_how_it_was_measured():
    text = printed(*profile_report(made_profile(made_choice(8, 60.0), made_choice(64, 70.0)), "/store/profile.json"))
    assert "6 of 6 tactics tried per bucket\nthe default: eager\n" in text
    assert "\neager: a loop over the active experts, with two GEMMs for each\n" in text
    assert "A/A noise 0.4–3.2 %" in text
    assert "not tuned yet: 4096" in text
    assert "profile: /store/profile.json" in text
    assert "nothing was measured" not in text
    assert "busy" not in text


def test_the_columns_of_a_profile_are_explained():
    kept = made_choice(8, 60.0, SLOW)
    text = printed(*profile_report(made_profile(kept, made_choice(64, 90.0, SLOW, **{**WON, "tactic": FAST}))))
    assert "M×N×K: a block's tile; group: " in text
    assert "time: one run of this rank's experts, without the exchange between ranks" in text
    assert "kept: the default stays" in text
    text = printed(*profile_report(made_profile(made_choice(64, 90.0, **WON))))
    assert "M×N×K" not in text
    assert "kept" not in text


def test_a_busy_machine_is_reported():
    noisy = made_choice(64, 60.0, **WON).model_copy(update={"noise": 0.2})
    text = printed(*profile_report(made_profile(made_choice(8, 60.0), noisy)))
    assert "this machine was busy: A/A noise beyond 10 % at 64 rows; run --again when it is idle" in text
    kept = noisy.model_copy(update={"tactic": noisy.default_tactic})
    text = printed(*profile_report(made_profile(made_choice(8, 60.0), kept)))
    assert "beyond 10 % at 64 rows, so the default is kept there; run --again when it is idle" in text


def test_a_served_profile_says_that_nothing_was_measured_and_where_it_lay():
    text = printed(*profile_report(made_profile(made_choice(8, 60.0)), "/store/profile.json", served=True))
    assert "served from the store, nothing was measured: /store/profile.json" in text


def test_a_profile_without_choices_has_a_report():
    assert "no bucket is tuned yet" in printed(*profile_report(made_profile()))


def test_names_are_no_markup():
    assert "[red]odd[/red]" in printed(*profile_report(made_profile(name="[red]odd[/red]")))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parents[1].name[:20] + path.parent.name[:36])
def test_nothing_of_a_packaged_profile_is_cut_at_80_columns(path):
    profile = Profile.model_validate_json(path.read_text())
    assert cut(profile_report(profile, path)) == []


def test_half_the_draws_with_other_rows_are_listed_below_the_table():
    text = printed(*profile_report(made_profile(made_choice(8, 60.0), made_choice(64, 60.0, met_rows=63))))
    assert "typical rows (in parentheses): 64 (63)" in text


def test_the_smallest_gain_of_all_row_counts_and_the_regret_are_said_below_the_table():
    compared = [
        ComparedRows(rows=rows, time_us=60.0, default_tactic=SLOW, gain=gain, gain_low=gain, gain_high=gain, noise=0.01)
        for rows, gain in ((56, 1.25), (64, 1.2), (80, 0.998))
    ]
    choices = made_choice(8, 60.0), made_choice(64, 60.0, by_rows=tuple(compared), regret_high=0.013)
    text = printed(*profile_report(made_profile(*choices)))
    assert "compared at 3 row counts; the smallest gain is 1.00× at 80 rows" in text
    assert "another finalist may be faster by at most 1.3 % (95 % bound)" in text
    assert "smallest gain" not in printed(*profile_report(made_profile(made_choice(8, 60.0))))


def test_the_bottom_lines_have_gain_day_device_versions_and_the_next_command():
    profile = made_profile(made_choice(8, 60.0), made_choice(64, 90.0, **WON), backend="triton", triton="3.6.0")
    *_, gain, measured, where, command = printed(*profile_report(profile, "/store/a b.json")).splitlines()
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
    report = profile_report(made_profile(made_choice(8, 60.0), backend=backend, **strict), "/p.json")
    assert printed(*report).splitlines()[-1] == f"next: {command}"
    exported = profile_report(made_profile(made_choice(8, 60.0), backend=backend, **strict), "/p.json", exported=True)
    assert "next: " not in printed(*exported)


def test_one_bucket_has_a_gain():
    one = {rows: made_profile(made_choice(rows, 60.0), regime=Regime(ladder=str(rows))) for rows in (1, 64)}
    assert gain_line(one[64]) == "geometric mean gain 1.00× over 1 bucket; worst 1.00× at 64 rows"
    assert gain_line(one[1]).endswith("worst 1.00× at 1 row")


@pytest.mark.parametrize(("low", "style"), [(1.043, "1;32"), (1.02, "2")], ids=["beyond the noise", "within it"])
def test_only_a_gain_beyond_the_noise_is_bold_green(low, style):
    won = made_choice(64, 60.0, **{**WON, "gain_low": low})  # its noise is 0.032
    text = io.StringIO()
    Console(file=text, force_terminal=True, width=100, color_system="standard").print(profile_table(made_profile(won)))
    assert f"\x1b[{style}m1.50×" in text.getvalue()


PACKAGED = {
    path.parent.name.rpartition("-")[0]: path for path in PROFILES if path.parents[1].name.startswith("e128-k8-h4096")
}
SKIPS = "a kernel that skips non-local slots. Tune with --remote zero."


def _report(slug, remote="drop", **shown):
    profile = Profile.model_validate_json(PACKAGED[slug].read_text())
    environment = profile.environment.model_copy(update={"strict": {**profile.environment.strict, "remote": remote}})
    return printed(
        *profile_report(profile.model_copy(update={"environment": environment}), "/p.json", **shown), width=400
    ).splitlines()


@pytest.mark.parametrize(
    ("slug", "remote", "engine", "unfit", "target"),
    [
        ("ep8-tp1-nodp-none-random", "drop", None, "sglang", "vllm"),
        ("ep8-tp1-nodp-none-random", "drop", "sglang", "sglang", "vllm"),
        ("ep8-tp1-nodp-none-random", "drop", "vllm", "", "vllm"),
        ("ep8-tp1-nodp-none-random", "zero", None, "vllm", "sglang"),
        ("ep8-tp1-dp-alltoall-packed-random", "drop", None, "vllm sglang", "vllm"),
    ],
)
def test_a_profile_says_for_which_engine_it_is_not(slug, remote, engine, unfit, target):
    lines = _report(slug, remote, engine=engine)
    found = [line for line in lines if line.startswith("not for ")]
    titles = {"vllm": "vLLM", "sglang": "SGLang"}
    assert [word for word in titles if any(f"not for {titles[word]}: " in line for line in found)] == unfit.split()
    if unfit == "sglang":
        assert found[0].endswith(SKIPS)
    assert lines[-1] == f"next: moetune export /p.json --to {target} --out tuned"


def test_the_next_command_names_the_version_of_an_older_kernel():
    choice = made_choice(8, 60.0, SLOW)
    profile = made_profile(choice, backend="triton", remote="zero", kernel_version="0.19")
    line = printed(*profile_report(profile, "/p.json")).splitlines()[-1]
    assert line == "next: moetune export /p.json --to vllm --for-version 0.19 --out tuned"


@pytest.mark.parametrize("path", PROFILES[:4], ids=lambda path: path.parent.name)
def test_a_narrow_terminal_shows_the_answer_whole(path):
    profile = Profile.model_validate_json(path.read_text())
    for width in (40, 60):
        lines = printed(profile_table(profile), width=width).splitlines()
        assert all("…" not in line and len(line) <= width for line in lines)
        title = next(line for line in lines if line.lstrip().startswith("rows"))
        assert {"M×N×K", "gain"} <= set(title.split())
        assert "default" not in " ".join(lines[:2])
