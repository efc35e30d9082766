"""`--also` and `--objective`: plan, tune, show, check, compare and the plugins' variable name every distribution."""

from __future__ import annotations

import importlib
import json
from functools import partial

import pytest

import moetune as library
from moetune.errors import UsageError
from moetune.inputs.options import parse

CHECK = importlib.import_module("moetune.tuning.check")
MIX = ("--also", "zipf:1=0.3", "--objective", "worst")


@pytest.fixture
def question(tiny, planted, monkeypatch):
    """The options of a question to the backend `planted`, which runs in this process."""
    monkeypatch.setattr(CHECK, "check", partial(CHECK.check, isolate=False))
    planted.milliseconds = {"default": 1.0, "fast": 0.5}
    layer = ("--model", tiny(), "--ep", "4", "--dispatch", "allgather")
    return (*layer, "--ladder", "8", "--draws", "4", "--backend", "planted")


def test_a_plan_says_under_what_tactics_are_measured(moetune, question) -> None:
    planned = moetune("plan", *question, *MIX)
    assert planned.exit_code == 0, planned.stderr
    text = " ".join(planned.stdout.split())
    assert "random=0.7 + zipf:1=0.3 × 4 draws, objective worst" in text
    assert "tactics are measured under zipf:1 too, and a choice minimizes its worst slowdown" in text
    assert "the numbers are for random" in text
    one, several = (json.loads(moetune("plan", *question, *mix, "--json").stdout) for mix in ((), MIX))
    assert several["regime"]["also"] == ["zipf:1=0.3"]
    assert several["regime"]["objective"] == "worst"
    loads = [{**document["buckets"][0], "rank": 0} for document in (one, several)]
    assert one["regime"].keys() == several["regime"].keys() - {"also", "objective", "rank"}
    assert loads[0]["local_slots"] == pytest.approx(loads[1]["local_slots"])


def test_a_tuned_profile_is_shown_checked_and_compared_under_every_distribution(moetune, question) -> None:
    tuned = moetune("tune", *question, *MIX, "--json")
    assert tuned.exit_code == 0, tuned.stderr
    document = json.loads(tuned.stdout)
    by_rows = document["choices"][0]["by_rows"]
    assert {each["distribution"] for each in by_rows} == {"random", "zipf:1"}
    assert all(each["slowdown"] >= 0.9 for each in by_rows)
    shown = moetune("show", document["path"])
    text = " ".join(shown.stdout.split())
    assert "under random: gain 2.00×, worst 2.00×; at most 0.0 % slower than the fastest tactic" in text
    assert "under zipf:1: gain 2.00×" in text
    assert moetune("tune", *question, "--frozen").exit_code == 3, "a question with one distribution is another one"
    again = moetune("tune", *question, "--also", "zipf:1=0.30", "--objective", "worst", "--frozen", "--json")
    assert json.loads(again.stdout)["path"] == document["path"]
    checked = moetune("check", *question, *MIX, "--under", "ddist:2", "--json")
    assert checked.exit_code == 0, checked.stderr
    buckets = json.loads(checked.stdout)["buckets"]
    assert [bucket["distribution"] for bucket in buckets] == ["random=0.7 + zipf:1=0.3", "ddist:2"]
    assert {each.get("distribution") for each in buckets[0]["by_rows"]} == {"random", "zipf:1"}
    assert all("distribution" not in each for each in buckets[1]["by_rows"])
    compared = moetune("compare", document["path"], document["path"], "--json")
    assert json.loads(compared.stdout)["equal"]


def test_a_profile_names_the_distributions_in_the_command_that_tunes_it_again(moetune, question) -> None:
    from moetune.report.tune_command import command
    from moetune.store.profile import Profile

    document = json.loads(moetune("tune", *question, *MIX, "--json").stdout)
    profile = Profile.model_validate({name: document[name] for name in Profile.model_fields if name in document})
    assert "--also zipf:1=0.3 --objective worst" in command(profile)


def test_the_variable_of_the_plugins_and_a_launch_line_take_further_distributions() -> None:
    model = "--model qwen3-30b-a3b --ep 4 --dispatch allgather"
    assert parse(f"{model} --also zipf:1=0.3 --also balanced=0.2").regime == library.Regime(
        ep_size=4, dispatch="allgather", also=("balanced=0.2", "zipf:1=0.3"), objective="mean"
    )
    assert parse(model).regime == library.Regime(ep_size=4, dispatch="allgather")
    line = "vllm serve Qwen/Qwen3-30B-A3B -tp 4 --enable-expert-parallel"
    launched = parse(f"--launch '{line}' --also zipf:1=0.3 --objective worst").regime
    assert (launched.also, launched.objective) == (("zipf:1=0.3",), "worst")
    assert parse(f"--launch '{line}'").regime.also == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--also", "zipf:1"), "a distribution and its weight between 0 and 1"),
        (("--objective", "worst"), "The objective worst is for several distributions"),
        (("--also", "zipf:1=0.6", "--also", "ddist:2=0.4"), "leave nothing for the distribution random"),
    ],
)
def test_weights_that_cannot_be_are_errors_of_the_command(moetune, question, words, message) -> None:
    refused = moetune("plan", *question, *words)
    assert refused.exit_code == 2
    assert message in refused.stderr


def test_strict_skew_concerns_every_distribution(moetune, question) -> None:
    refused = moetune("plan", *question, "--also", "ddist:16=0.3", "--strict-skew")
    assert refused.exit_code == 2
    assert "ddist:16 asks for" in refused.stderr
    with pytest.raises(UsageError, match="one of balanced"):
        parse("--model qwen3-30b-a3b --also uneven=0.3")


def test_a_further_recording_is_read_and_named_by_its_digest(moetune, question, tmp_path) -> None:
    import numpy as np

    path = tmp_path / "a=b.npy"
    np.save(path, np.array([[0, 3], [1, 2], [0, 5]] * 20))
    words = (*question, "--also", f"replay:{path}=0.4")
    tuned = moetune("tune", *words, "--json")
    assert tuned.exit_code == 0, tuned.stderr
    document = json.loads(tuned.stdout)
    (also,) = document["regime"]["also"]
    assert also.startswith("replay:")
    assert also.endswith("=0.4")
    assert document["recording"]["name"] == "a=b.npy"
    served = moetune(
        "tune", *question, "--also", also, "--frozen", "--json", "--rank", str(document["regime"].get("rank", 0))
    )
    assert served.exit_code == 0, served.stderr
    assert json.loads(served.stdout)["path"] == document["path"]
