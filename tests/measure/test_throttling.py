"""What slowed a GPU down, as planted answers of nvidia-smi say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moetune.measure.throttling import Throttling, of_gpu, throttling

Answers = Callable[..., None]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Answers:
    """Plants an nvidia-smi that answers the fields that it knows, and fails for others as the real one does."""
    fake = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    def plant(**fields: str) -> None:
        cases = "\n".join(f"  *{name}*) echo '{answer}';;" for name, answer in fields.items())
        fake.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}\n  *) echo "Field is not a valid field"; exit 2;;\nesac\n')
        fake.chmod(0o755)

    return plant


def test_counters_say_for_how_long(answers: Answers) -> None:
    answers(clocks_event_reasons_counters="1000, 0, 7000000")
    before = of_gpu("GPU-1")
    answers(clocks_event_reasons_counters="3201000, 50000, 7500000")
    assert of_gpu("GPU-1").since(before) == ("software thermal slowdown for 3.2 s", "power brake for 0.5 s")
    assert before.since(before) == ()


@pytest.mark.parametrize("name", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_older_drivers_say_what_is_active_before_or_after(answers: Answers, name: str) -> None:
    answers(**{name: "0x0000000000000045"})
    hot = of_gpu("1")
    answers(**{name: "0x0000000000000004"})
    cool = of_gpu("1")
    assert hot.since(cool) == cool.since(hot) == ("hardware thermal slowdown",)
    assert cool.since(cool) == (), "a GPU at its power limit is as usual"


def test_counters_that_are_not_supported_are_left_out(answers: Answers) -> None:
    answers(clocks_event_reasons_counters="[N/A], 12, [N/A]")
    assert of_gpu("1") == Throttling({"hardware thermal slowdown": 12.0})
    answers(**{"clocks_event_reasons_counters": "[N/A], [N/A], [N/A]", "clocks_event_reasons.active": "0x20"})
    assert of_gpu("1").since(Throttling()) == ("software thermal slowdown",)


@pytest.mark.parametrize("answer", ["", "[N/A]", "0xzz", "9" * 400])
def test_a_gpu_that_gives_no_answer_is_not_reported(answers: Answers, answer: str) -> None:
    answers(clocks_event_reasons_counters=answer)
    assert of_gpu("1").since(of_gpu("1")) == ()


def test_without_nvidia_smi_and_on_a_cpu_nothing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert of_gpu("1") == throttling("cpu") == Throttling()
