import csv
import io
import json
import re
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from shown import FAST, LAYER, PROFILES, SLOW, WON, made_choice, made_profile, printed

from moetune.errors import UsageError
from moetune.report.page import html
from moetune.report.page.html import page
from moetune.report.page.numbers import csv_text, labels, shown
from moetune.report.page.roofline import PEAKS, peak_rate, roofline_line, work_by_bucket
from moetune.report.page.single import tactics_figure, time_figure
from moetune.report.page.summary import summary_report
from moetune.report.page.together import figures_together
from moetune.report.tune_command import whole_command
from moetune.spec.enums import Precision
from moetune.spec.recording import RecordingSummary
from moetune.spec.regime import Regime
from moetune.store.profile import ComparedRows, Profile

HOSTILE = "</script><script>alert(1)</script><img src=https://e.example/x onerror=alert(1)>&amp;\"'{{plotly}}%{x}"


def compared(*rows):
    return tuple(
        ComparedRows(
            rows=each, time_us=61.5, default_tactic=SLOW, gain=1.07, gain_low=1.02, gain_high=1.12, noise=0.013
        )
        for each in rows
    )


def regime(**changed):
    return Regime(**{"ep_size": 4, "attention_dp": True, "ladder": "8,64,4096", "draws": 2, **changed})


@pytest.fixture(autouse=True)
def _short_script(monkeypatch):
    """Pages without plotly's 5 MB."""
    monkeypatch.setattr(html, "plotly_js", lambda: "const Plotly = {};")


@pytest.fixture
def profiles():
    """Two profiles of one layer and regime under two distributions, and one of another regime and device."""
    won = {**WON, "tactic": FAST}
    choices = (
        made_choice(8, 61.5, SLOW, by_rows=compared(8, 11), regret_high=0.0171),
        made_choice(64, 1234.25, SLOW, **won),
    )
    h200 = made_profile(*choices, regime=regime(distribution="zipf:1"))
    return [
        ("a.json", made_profile(*choices)),
        ("b.json", h200.model_copy(update={"choices": (choices[0], made_choice(64, 999.75, SLOW, **won))})),
        ("c.json", made_profile(made_choice(8, 70.125, SLOW), regime=regime(layout="slot"))),
    ]


class Reader(HTMLParser):
    """The elements of a page, its attributes, its visible text, and the content of its scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.data, self.scripts, self.cells = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data):
        (self.scripts if self.tags and self.tags[-1] == "script" else self.data).append(data)
        if self.tags and self.tags[-1] == "td" and data.strip():
            self.cells[-1] += data


def document(text, name):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text)[1])


def numbers_in(value):
    match value:
        case bool() | str() | None:
            return []
        case int() | float():
            return [value]
        case dict():
            return [number for each in value.values() for number in numbers_in(each)]
        case _:
            return [number for each in value for number in numbers_in(each)]


def written(profiles):
    return page(shown(profiles), "moetune report a.json", "2026-01-31")


def test_the_page_holds_the_profiles_whole(profiles):
    text = written(profiles)
    assert [Profile.model_validate(each) for each in document(text, "profiles")] == [each for _, each in profiles]


def test_every_time_gain_bound_and_noise_is_in_a_figure_and_in_a_table(profiles):
    text = written(profiles)
    drawn = set(numbers_in(document(text, "figures")))
    cells = set(Reader(text).cells)
    for _, profile in profiles:
        for choice in profile.choices:
            assert {choice.rows, choice.time_us, choice.default_time_us, choice.gain} <= drawn
            fields = choice, *choice.by_rows
            for each in fields:
                values = (each.rows, each.time_us, each.gain, each.gain_low, each.gain_high, each.noise)
                assert {repr(value) for value in values} <= cells
                assert each.gain in drawn
            assert {repr(choice.tried), repr(choice.candidates), repr(choice.default_time_us)} <= cells
    assert "0.0171" in cells


def test_the_csv_has_the_rows_of_the_tables(profiles):
    given = shown(profiles)
    read = list(csv.DictReader(io.StringIO(csv_text(given))))
    rows = [asdict(row) for each in given for row in each.rows]
    assert read == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]
    assert len(read) == 5 + 2 * 2
    cells = set(Reader(written(profiles)).cells)
    for row in read:
        assert {row[name] for name in ("rows", "gain", "gain_low", "gain_high", "noise", "time_us")} <= cells


def test_a_spreadsheet_computes_no_cell():
    profile = made_profile(made_choice(8, 60.0, {"algorithm": "=1+1"}), name="@SUM(1)")
    rows = list(csv.DictReader(io.StringIO(csv_text(shown([("p", profile)])))))
    assert (rows[0]["profile"], rows[0]["tactic"]) == ("'@SUM(1)", "'=1+1")


def test_the_page_names_no_address_and_forbids_every_request(profiles):
    text = written(profiles)
    assert "http:" not in text
    assert "https:" not in text
    assert not {"src", "href", "srcset", "action", "background"} & {name for name, _ in Reader(text).attributes}
    assert not re.search(r"url\(|@import|@font-face", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert not re.search(r"script-src [^;]*unsafe", policy)


def test_hostile_names_are_text():
    tactic = {f"{HOSTILE}{at}": HOSTILE for at in range(3)}
    profile = made_profile(made_choice(8, 60.0, tactic, default_source=HOSTILE), name=HOSTILE, backend="torch")
    profile = profile.model_copy(
        update={"environment": profile.environment.model_copy(update={"device": HOSTILE, "strict": {HOSTILE: HOSTILE}})}
    )
    other = made_profile(made_choice(8, 60.0, SLOW), regime=regime(distribution="zipf:1"), name=HOSTILE)
    text = page(shown([(HOSTILE, profile), ("b", other)]), HOSTILE, "2026-01-31")
    reader = Reader(text)
    assert reader.tags.count("script") == 4
    assert not {"img", "a", "iframe", "object", "link"} & set(reader.tags)
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert HOSTILE in reader.cells
    for figure in document(text, "figures"):
        assert "<script" not in json.dumps(figure)
    assert document(text, "profiles")[0]["layer"]["name"] == HOSTILE
    assert text.count("const Plotly = {};") == 1


def test_numbers_at_the_bounds_are_written():
    extreme = {"gain": 1e15, "gain_low": -1e15, "gain_high": 1e15}
    slow = made_choice(8, 1e15, FAST, **extreme).model_copy(update={"time_us": 1e15, "stress_us": {"2": float("inf")}})
    quick = made_choice(8, 5e-324)
    pair = [("a", made_profile(quick)), ("b", made_profile(slow, regime=regime(layout="slot")))]
    assert document(written(pair), "profiles") == [json.loads(profile.model_dump_json()) for _, profile in pair]


MANY = range(1, 514)
LADDER = ",".join(map(str, MANY))


def test_a_layer_of_the_largest_size_costs_no_time():
    large = made_profile(made_choice(8, 60.0)).model_copy(
        update={"layer": LAYER.model_copy(update={"num_experts": 65_536, "top_k": 1_024})}
    )
    assert work_by_bucket(large) == {}
    assert work_by_bucket(made_profile(*(made_choice(rows, 60.0) for rows in MANY), regime=regime(ladder=LADDER))) == {}
    h200 = large.model_copy(update={"environment": large.environment.model_copy(update={"device": "NVIDIA H200"})})
    assert "no roofline: the load cannot be computed, or is too large" in written([("p", h200)])


def test_a_regime_that_does_not_fit_the_layer_has_no_roofline():
    assert work_by_bucket(made_profile(made_choice(8, 60.0), regime=regime(ep_size=3))) == {}


def test_a_missing_plotly_is_an_error_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(UsageError, match=r'not installed\. Install it: pip install "plotly>=6\.0"'):
        html.plotly_js()


def test_labels_say_what_differs_and_are_distinct():
    one, other = made_profile(), made_profile(regime=regime(distribution="zipf:1"))
    assert labels([one]) == ["small"]
    assert labels([one, other]) == ["random", "zipf:1"]
    assert labels([one, one, one]) == ["small", "small (2)", "small (3)"]
    assert labels([one, made_profile(name="large", backend="triton")]) == ["small · torch", "large · triton"]


def test_figures_of_several_profiles_need_what_they_compare(profiles):
    def titles(*at):
        return [figure.title for figure in figures_together(shown([profiles[each] for each in at]))]

    both = ["Time of all profiles", "Gain of all profiles"]
    assert titles(0) == []
    assert titles(0, 0) == both
    assert titles(0, 2) == [*both, "Regime against regime"]
    assert titles(0, 1) == [*both, "Regime against regime", "Gain by skew"]


def test_regimes_and_skews_are_compared_at_the_buckets_that_all_have(profiles):
    *_, regimes, skew = figures_together(shown(profiles))
    assert regimes.table.rows == [["8", "61.5", "61.5", "70.125", "same", "same"]]
    assert regimes.traces[2]["y"] == [70.125 / 61.5]
    bounds = ["2", repr(skew.traces[0]["y"][0]), "1.0", "1.5"]
    assert [[row[0], *row[2:]] for row in skew.table.rows] == [["random", *bounds], ["zipf:1", *bounds]]
    assert skew.traces[0]["x"] == ["random", "zipf:1"]
    assert skew.traces[0]["y"] == pytest.approx([1.5**0.5, 1.5**0.5])


def test_a_replayed_recording_is_named_and_comes_last():
    summary = RecordingSummary(name="traffic.npz", tokens=12_000, layers=3)
    spelled = ("replay:0123456789abcdef", "zipf:1", "zipf:0.5", "random", "balanced")
    made = [made_profile(made_choice(8, 60.0), regime=regime(distribution=each)) for each in spelled]
    made[0] = made[0].model_copy(update={"recording": summary})
    given = shown([(str(at), profile) for at, profile in enumerate(made)])
    assert figures_together(given)[-1].traces[0]["x"] == ["balanced", "random", "zipf:0.5", "zipf:1", spelled[0]]
    assert "recording traffic.npz: 12,000 tokens of 3 layers" in page(given, "moetune report", "2026-01-31")
    assert given[0].work == {}


def test_the_map_has_a_column_for_each_parameter_and_a_row_for_each_bucket():
    (each,) = shown(
        [("p", made_profile(made_choice(8, 60.0, SLOW), made_choice(64, 60.0, SLOW, **{**WON, "tactic": FAST})))]
    )
    (trace,) = tactics_figure(each).traces
    assert trace["x"] == ["M", "N", "K", "group", "warps", "stages"]
    assert trace["y"] == ["8", "64"]
    assert trace["text"] == [["16", "64", "128", "1", "4", "4"], ["128", "32", "64", "16", "8", "3"]]
    assert trace["z"] == [[0, 1, 1, 0, 0, 1], [1, 0, 0, 1, 1, 0]]


def test_tactics_without_common_parameters_are_shown_as_lines():
    tactics = {f"p{at}": 1 for at in range(30)}, {}
    (each,) = shown([("p", made_profile(*(made_choice(8 * 8**at, 60.0, tactic) for at, tactic in enumerate(tactics))))])
    assert tactics_figure(each).traces[0]["x"] == ["tactic"]


def test_the_roofline_is_the_larger_of_both_bounds():
    profile = Profile.model_validate_json(PROFILES[0].read_text())
    assert profile.environment.device == "NVIDIA H200"
    peak, rate = peak_rate(profile)
    work = work_by_bucket(profile)
    assert set(work) == {choice.rows for choice in profile.choices}
    for each in work.values():
        assert each.least_us == 1e6 * max(each.weight_bytes / peak.bandwidth, each.flops / rate)
    for choice in profile.choices:
        assert choice.time_us > work[choice.rows].least_us


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.parents[1].name[:20] + path.parent.name[:36])
def test_no_packaged_choice_is_faster_than_its_roofline(path):
    profile = Profile.model_validate_json(path.read_text())
    work = work_by_bucket(profile)
    assert all(choice.time_us > work[choice.rows].least_us for choice in profile.choices)


def test_an_unknown_device_has_no_roofline_and_says_so():
    profile = made_profile(made_choice(8, 60.0))
    assert (
        roofline_line(profile, work_by_bucket(profile))
        == "no roofline: the peak rates of Example GPU are not in moetune's table"
    )
    (each,) = shown([("p", profile)])
    figure = time_figure(each, html.Style(0))
    assert [trace["name"] for trace in figure.traces] == ["default", "choice"]
    assert "no roofline" in figure.text


def test_a_precision_without_a_peak_has_no_roofline():
    profile = Profile.model_validate_json(PROFILES[0].read_text())
    layer = profile.layer.model_copy(update={"precision": Precision.NVFP4})
    assert "for nvfp4 are not in" in roofline_line(profile.model_copy(update={"layer": layer}), {})
    blackwell = profile.environment.model_copy(update={"device": "NVIDIA B200"})
    assert (
        peak_rate(profile.model_copy(update={"layer": layer, "environment": blackwell}))[1]
        == PEAKS["NVIDIA B200"].flops[4]
    )


def test_the_table_on_a_terminal_has_a_row_for_each_profile(profiles):
    text = printed(*summary_report(shown([*profiles, ("d", made_profile())])))
    assert text.count("Example GPU") == 4 + 1
    assert "1.22×" in text
    assert "no roofline" in text


def test_plotly_knows_every_property_of_the_figures(profiles):
    objects = pytest.importorskip("plotly.graph_objects")
    for figure in document(written(profiles), "figures"):
        objects.Figure(figure["data"], figure["layout"])
    with pytest.raises(ValueError, match="texttemplat"):
        objects.Figure([{"type": "heatmap", "texttemplat": ""}])


def test_the_origin_has_file_command_versions_dates_and_digests():
    profile = Profile.model_validate_json(PROFILES[0].read_text())
    cells = set(Reader(written([("x/y.json", profile)])).cells)
    assert {"x/y.json", "NVIDIA H200", profile.regime.digest, profile.environment.digest} <= cells
    assert {*profile.environment.strict.values(), *profile.environment.informative.values()} <= cells
    assert whole_command(profile) in cells
    assert any(profile.choices[0].measured_at in cell for cell in cells)


def test_a_profile_without_choices_has_a_page():
    assert "No bucket is tuned yet." in written([("p", made_profile())])


def test_the_packages_files_are_data_of_the_package():
    found = {path.suffix for path in Path(html.__file__).parent.iterdir() if path.is_file()}
    assert found == {".py", ".html", ".css", ".js"}
