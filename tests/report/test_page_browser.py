"""The page in a headless Chromium: it asks for nothing, complains of nothing, and draws every number."""

import json
from pathlib import Path

import pytest
from chromium import PROGRAM, Browser
from shown import FAST, PROFILES, SLOW, WON, made_choice, made_profile
from test_page import HOSTILE, regime

from moetune.report.page.html import page
from moetune.report.page.numbers import shown
from moetune.store.profile import Profile

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="there is no chromium on PATH")]

# For each figure: its numbers of points that are drawn and that are given, lines that are drawn, and its size.
DRAWN = """
JSON.parse(document.getElementById("figures").textContent).map((figure) => {
  const element = document.getElementById(figure.id);
  const heatmap = figure.data[0].type === "heatmap";
  const marked = figure.data.filter((trace) => (trace.mode || "").includes("markers"));
  const given = heatmap ? figure.data[0].text.flat().length : marked.map((t) => t.x.length).reduce((a, b) => a + b, 0);
  const drawn = element.querySelectorAll(heatmap ? ".heatmap-label" : ".points path.point").length;
  const bars = figure.data.filter((trace) => trace.error_y).map((t) => t.x.length).reduce((a, b) => a + b, 0);
  return {
    title: element.getAttribute("aria-label"), heatmap, given, drawn, bars,
    drawnBars: element.querySelectorAll(".cartesianlayer path.yerror").length,
    texts: [...element.querySelectorAll(".heatmap-label")].map((text) => text.textContent),
    lines: element.querySelectorAll(".cartesianlayer path.js-line").length,
    givenLines: figure.data.filter((trace) => (trace.mode || "").includes("lines")).length,
    width: element.querySelector("svg").clientWidth, room: element.clientWidth,
  };
})
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


def packaged(dispatch):
    path = next(each for each in PROFILES if each.parents[1].name.startswith("e128-k8-h4096") and dispatch in str(each))
    return path.name, Profile.model_validate_json(path.read_text())


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two packaged profiles, and a hostile one under two distributions."""
    pytest.importorskip("plotly")
    won = {**WON, "tactic": {**FAST, "num_warps": HOSTILE}}
    choices = made_choice(8, 60.0, SLOW), made_choice(64, 1234.0, SLOW, **won)
    made = [
        (HOSTILE, made_profile(*choices, name=HOSTILE, regime=regime(distribution=d))) for d in ("zipf:1", "random")
    ]
    path = tmp_path_factory.mktemp("page") / "report.html"
    given = shown([packaged("dp-allgather"), packaged("deduplicated"), *made])
    path.write_text(page(given, HOSTILE, "2026-01-31"), encoding="utf-8")
    return path, given


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_every_figure_is_drawn_and_nothing_is_requested(browser, report, width, dark):
    path, given = report
    browser.open(path, width, 800, dark=dark)
    figures = browser.evaluate(DRAWN)
    assert [figure["title"] for figure in figures] == [
        "Time of all profiles", "Gain of all profiles", *["Regime against regime"] * 2, "Gain by skew",
        *["Time against rows", "Gain over the default", "Map of tactics"] * 4,
    ]  # fmt: skip
    for figure in figures:
        assert figure["drawn"] == figure["given"] > 0, figure
        assert figure["lines"] == figure["givenLines"], figure
        assert figure["drawnBars"] == figure["bars"], figure
        assert 0 < figure["width"] <= figure["room"], figure
    maps = [figure["texts"] for figure in figures if figure["heatmap"]]
    for each, texts in zip(given, maps, strict=True):
        tiles = {str(choice.tactic["BLOCK_SIZE_M"]) for choice in each.profile.choices}
        assert tiles <= set(texts)
    assert f"{HOSTILE[:4]}…" in [text for texts in maps for text in texts]

    assert browser.requests == [path.as_uri()]
    assert browser.messages == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("document.querySelectorAll('a, img, iframe, object').length") == 0
    text, ground = browser.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    assert (brightness(text) > brightness(ground)) is dark
    fill = browser.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
    assert (brightness(fill) > brightness(ground)) is dark


def test_a_request_of_the_page_would_be_seen_and_is_refused(browser, report):
    path, _ = report
    browser.open(path, 1280, 800, dark=False)
    browser.evaluate("fetch('https://e.example/x').catch(() => 0)")
    assert any("Content Security Policy" in message for message in browser.messages)


def brightness(color):
    return sum(json.loads(f"[{color.partition('(')[2].partition(')')[0]}]")[:3])


def test_every_figure_has_a_table_of_its_numbers(browser, report):
    path: Path = report[0]
    browser.open(path, 1280, 800, dark=False)
    assert browser.evaluate("document.querySelectorAll('figure').length") == browser.evaluate(
        "document.querySelectorAll('figure > details table').length"
    )
