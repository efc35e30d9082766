import csv
import json
import sys
from pathlib import Path

import pytest

PROFILES = sorted((Path(__file__).parents[2] / "profiles").glob("*/*/*/*.json"))[:2]


def test_without_a_file_it_prints_a_table(moetune):
    result = moetune("report", *PROFILES)
    assert result.exit_code == 0, result.stderr
    assert "time over" in result.stdout
    assert result.stdout.count("NVIDIA H200 ") == 2 + 1


def test_the_page_and_the_csv_are_written_and_named(moetune, tmp_path):
    pytest.importorskip("plotly")
    page, table = tmp_path / "out" / "report.html", tmp_path / "report.csv"
    result = moetune("report", *PROFILES, "-o", page, "--csv", table)
    assert result.stdout == f"written: {page}\nwritten: {table}\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "Plotly" in text
    assert len(text) < 6_000_000
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    document = json.loads(moetune("report", *PROFILES, "--json").stdout)
    assert (document["schema_version"], document["written"]) == (1, [])
    assert [row["gain"] for row in rows] == [str(row["gain"]) for row in document["rows"]]
    assert [each["path"] for each in document["profiles"]] == [str(path) for path in PROFILES]


def test_without_plotly_only_the_page_is_refused(moetune, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = moetune("report", *PROFILES, "-o", tmp_path / "report.html", "--csv", tmp_path / "report.csv")
    assert result.exit_code == 2
    assert 'pip install "plotly>=6.0"' in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert moetune("report", *PROFILES, "--csv", tmp_path / "report.csv").exit_code == 0


def test_a_profile_is_not_overwritten(moetune, tmp_path):
    profile = tmp_path / "profile.json"
    profile.write_bytes(PROFILES[0].read_bytes())
    result = moetune("report", profile, "--csv", tmp_path / "." / "profile.json")
    assert result.exit_code == 2
    assert "given twice" in result.stderr
    assert profile.read_bytes() == PROFILES[0].read_bytes()
    assert moetune("report", profile, "-o", tmp_path / "x", "--csv", tmp_path / "x").exit_code == 2


def test_a_page_that_cannot_be_written_is_an_error(moetune, tmp_path):
    result = moetune("report", *PROFILES, "--csv", tmp_path)
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def test_without_a_profile_it_is_a_usage_error(moetune, tmp_path):
    assert moetune("report").exit_code == 2
    assert "There is no profile" in moetune("report", tmp_path / "none.json").stderr
