"""Every reader on some hundred mutated inputs; `python -m tests.fuzz` gives them more."""

from __future__ import annotations

import os

import pytest

from fuzz.run import ANYWHERE_SECONDS, MOST_BYTES, run
from fuzz.targets import TARGETS

pytestmark = pytest.mark.no_cover

INPUTS = 150


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_raises_moetunes_own_errors_only(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.chdir(tmp_path)
    target = TARGETS[name]
    inputs = min(len(target.seeds), INPUTS // 3) + INPUTS
    report = run(target, tmp_path, seed=1, inputs=inputs, most_seconds=ANYWHERE_SECONDS)
    assert not report.findings
    assert report.grown_bytes < MOST_BYTES
    assert 0 < report.accepted <= report.inputs, "no input gets past the first check"


def test_a_reader_that_raises_something_else_is_found(tmp_path):
    from fuzz.run import Target

    def read(content: bytes, folder: object) -> None:
        {}[content]

    report = run(Target("broken", [b"a"], read), tmp_path, seed=0, inputs=3)
    assert "KeyError" in next(iter(report.findings))
