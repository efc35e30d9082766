import importlib
import json
from pathlib import Path

import pytest
import torch
from planted import PlantedBackend, PlantedRunner

import moetune as package
from moetune.backends import registry
from moetune.inputs.deployment import from_launch
from moetune.measure.throttling import Throttling
from moetune.spec.regime import Regime
from moetune.store.profile import Profile
from moetune.tuning import final_comparison as final

TUNE = importlib.import_module("moetune.tuning.tune")
STORE = importlib.import_module("moetune.store.store")
QUESTION = ("--ep", "4", "--dp", "--ladder", "4,8", "--draws", "1")


@pytest.fixture
def question(tiny, planted):
    return ("--model", tiny(), *QUESTION, "--backend", "planted")


def _document(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_models_lists_every_layer_with_its_source(moetune):
    document = _document(moetune("models", "--json"))
    assert document["schema_version"] == 1
    models = {entry["layer"]["name"]: entry for entry in document["models"]}
    assert models["deepseek-r1"]["layer"]["routing"]["num_groups"] == 8
    assert models["deepseek-r1"]["source"]["url"].startswith("https://")
    assert "num_experts" in models["deepseek-r1"]["source"]["fields"]
    text = moetune("models").stdout
    assert all(name in text for name in models)


def test_doctor_says_what_runs_here(moetune):
    document = _document(moetune("doctor", "--json"))
    backends = {entry["name"]: entry for entry in document["backends"]}
    assert backends["torch"] == {"name": "torch", "available": True, "reason": "", "hint": ""}
    assert "torch" in document["environment"]["strict"]
    text = moetune("doctor").stdout
    assert document["environment"]["device"] in text


def test_doctor_says_why_a_backend_cannot_run_and_what_to_do(moetune, monkeypatch):
    missing = registry.Diagnosis("elsewhere", False, "there is no GPU", "Run it where there is one")
    monkeypatch.setattr(registry, "diagnose", lambda: [registry.Diagnosis("torch", True), missing])
    text = moetune("doctor").stdout
    assert "there is no GPU" in text
    assert "Run it where there is one" in text


def test_plan_carries_plain_byte_counts_and_the_distribution(moetune):
    words = ["plan", "--model", "deepseek-r1", "--ep", "4", "--dp", "--dispatch", "allgather", "--json"]
    document = _document(moetune(*words))
    assert list(document)[:3] == ["schema_version", "layer", "regime"]
    assert document["regime"]["distribution"] == "random"
    payloads = {(way["activation"], way["routing"]): way for way in document["wire"]}
    assert payloads["bf16", "logits"]["payload_bytes_per_token"] == 15360
    assert payloads["fp4", "logits"]["payload_bytes_per_token"] == 5056
    assert payloads["fp4", "logits"]["ratio"] == 3.04
    assert payloads["fp4", "packed_topk"]["payload_bytes_per_token"] == 4064
    assert payloads["fp4", "packed_topk"]["ratio"] == 3.78
    assert [bucket["rows"] for bucket in document["buckets"]] == [1 << power for power in range(14)]
    assert all(type(bucket["received_bytes"]) is int for bucket in document["buckets"])


def test_plan_prints_its_tables(moetune):
    words = ("plan", "--model", "deepseek-r1", "--ep", "8", "--dispatch", "trtllm:attention_dp")
    text = moetune(*words).stdout
    assert "random logits through the model's routing rule, simulated: " in text
    assert "8,192" in text
    assert "packed_topk" not in text
    assert "packed_topk" in moetune(*words, "--wire").stdout


SGLANG = (
    "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --tp 16 --dp 16 --enable-dp-attention --ep 16"
)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Makes this a machine without a GPU that has the packaged profiles."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("MOETUNE_PACKAGED_PROFILES")


def test_plan_knows_a_selected_rival_and_names_no_rival_to_tune(moetune):
    words = ("plan", "--model", "deepseek-r1", "--ep", "8", "--dispatch", "vllm:allgather_reducescatter")
    words = (*words, "--ladder", "64", "--json")
    kernels = _document(moetune(*words, "--backend", "deep-gemm"))["kernels"]
    assert kernels["computing"][-1] == "deep-gemm"
    assert kernels["flags"] == {"vllm": "--moe-backend deep_gemm"}
    assert not {name for name in _document(moetune(*words))["kernels"]["computing"] if registry.backend(name).rival}


def test_plan_ends_with_what_a_new_user_needs_next(moetune, on_a_cpu):
    document = _document(moetune("plan", "--launch", SGLANG, "--json"))
    assert document["kernels"] == {
        "engine": "sglang",
        "selected": False,
        "computing": ["triton", "flashinfer-trtllm", "flashinfer-trtllm-routed"],
        "runs_here": False,
        "routed_by": "engine",
        "flags": {"vllm": "--moe-backend triton", "sglang": "--moe-runner-backend triton"},
        "preferred": {"Blackwell": "flashinfer_trtllm for many models"},
    }
    nearest = document["profile"]
    assert (nearest["packaged"], nearest["layer"], nearest["device"]) == (True, "deepseek-r1", "NVIDIA H200")
    assert nearest["differing"]["ep_size"] == {"wanted": 16, "stored": 8}
    assert moetune("show", nearest["path"]).exit_code == 0
    assert document["next_command"] == f"moetune tune --launch '{SGLANG}' --export tuned"

    shown = moetune("plan", "--launch", SGLANG, "--wire").stdout.splitlines()
    assert "read from the line: --tp-size 16, --dp-size 16, --enable-dp-attention, --ep-size 16, " in shown[2]
    assert shown[2].endswith("no --moe-a2a-backend")
    assert [line.partition(":")[0] for line in shown[-6:]] == [
        "kernels",
        "profile",
        "A profile holds the fastest tactic of each bucket for one deployment.",
        "view the nearest",
        "next, on one GPU of the kind that you deploy on (Triton takes about 2 minutes on an H200)",
        document["next_command"],
    ]


def test_a_plan_for_other_kernels_names_no_profile_of_triton(moetune, on_a_cpu):
    named = f"{SGLANG} --moe-runner-backend flashinfer_trtllm"
    assert _document(moetune("plan", "--launch", named, "--json"))["profile"] is None
    assert "profile: none measured with flashinfer-trtllm is stored.\n" in moetune("plan", "--launch", named).stdout
    assert _document(moetune("plan", "--launch", SGLANG, "--json"))["profile"] is not None


def test_a_plan_whose_rows_go_to_flashinfers_kernels_is_not_for_triton(moetune, on_a_cpu):
    pool = ("--model", "qwen3-235b-a22b", "--ep", "8", "--dispatch", "sglang:flashinfer")
    planned = _document(moetune("plan", *pool, "--json"))
    assert (planned["backend"], planned["profile"]) == ("flashinfer-trtllm-routed", None)
    named = moetune("plan", *pool, "--backend", "triton").stdout
    assert "kernels: triton. SGLang does not run them." in named


def test_a_dispatch_beside_a_line_that_cannot_be_tuned_is_another_deployment(moetune, on_a_cpu):
    line = f"{SGLANG} --moe-a2a-backend deepep"
    refused = moetune("plan", "--launch", line)
    assert refused.exit_code == 2
    assert "shows the load of that dispatcher, not of yours." in refused.stderr
    planned = moetune("plan", "--launch", line, "--dispatch", "sglang:none", "--json")
    assert planned.exit_code == 0
    assert "warning: --dispatch sglang:none replaces sglang:deepep of the launch line. " in planned.stderr
    assert "replaces" not in moetune("plan", "--launch", SGLANG, "--dispatch", "sglang:none", "--json").stderr


def test_a_frozen_tune_without_a_backend_that_runs_here_is_a_miss(moetune, on_a_cpu):
    line = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel --moe-backend triton"
    for words in (("--launch", SGLANG), ("--launch", line)):
        frozen = moetune("tune", *words, "--frozen")
        assert frozen.exit_code == 3
        assert "The nearest was measured with triton on NVIDIA H200" in frozen.stderr


VLLM = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel"


def test_a_tune_for_an_engine_whose_kernels_cannot_run_here_measures_no_others(moetune, on_a_cpu, monkeypatch):
    monkeypatch.setattr(importlib.import_module("moetune.tuning.tune_all"), "tune_all", lambda *_, **__: 1 / 0)
    for words in (
        ("--launch", VLLM),
        ("--model", "qwen3-235b-a22b", "--ep", "8", "--dispatch", "vllm:deepep_high_throughput"),
    ):
        refused = moetune("tune", *words)
        assert refused.exit_code == 2
        assert refused.stderr == (
            "error: vLLM runs these experts with triton, which cannot run here: needs a CUDA device, and torch sees "
            "none. Run this on a GPU of the kind that you deploy on, or give --backend torch for a trial of moetune.\n"
        )
    assert moetune("tune", "--launch", SGLANG).stderr.endswith(" Run this on a GPU of the kind that you deploy on.\n")
    other = moetune("tune", "--launch", VLLM, "--precision", "fp32")
    assert (other.exit_code, "none of moetune's kernels for fp32 experts" in other.stderr) == (2, True)
    assert "unexpected ZeroDivisionError" in moetune("tune", "--model", "qwen3-235b-a22b").stderr


def test_packaged_profiles_answer_a_line_without_attention_dp_on_their_ladder():
    line = "vllm serve Qwen/Qwen3-30B-A3B -tp 8 --enable-expert-parallel"
    packaged = Path(__file__).parents[2] / "profiles"
    digests = {path.parent.name.rpartition("-")[2] for path in packaged.glob("*/*/*/*.json")}
    assert from_launch(line).regime.digest not in digests
    assert from_launch(line, ladder="pow2").regime.digest in digests


ON_H200 = ("--model", "qwen3-30b-a3b", "--ep", "4", "--device-name", "nvidia h200")


def test_a_machine_without_the_gpu_looks_profiles_up_by_its_name(moetune, on_a_cpu, tmp_path):
    assert moetune("show", *ON_H200[:4]).exit_code == 3
    shown = moetune("show", *ON_H200)
    assert shown.exit_code == 0, shown.stderr
    assert "measured 2026-11-2" in shown.stdout
    exported = moetune("export", *ON_H200, "--to", "vllm", "--out", tmp_path / "out")
    assert exported.exit_code == 0, exported.stderr
    planned = _document(moetune("plan", *ON_H200, "--json"))
    assert (planned["profile"]["differing"], planned["profile"]["device"]) == ({}, "NVIDIA H200")
    other = _document(moetune("plan", "--model", "qwen3-30b-a3b", "--ep", "64", *ON_H200[4:], "--json"))
    assert other["next_command"] == "moetune tune --model qwen3-30b-a3b --ep 64"
    equals = _document(moetune("plan", "--model", "qwen3-30b-a3b", "--ep", "64", "--device-name=NVIDIA H200", "--json"))
    assert equals["next_command"] == other["next_command"]


def test_a_named_device_makes_torch_and_triton_of_this_machine_irrelevant(moetune, on_a_cpu, tmp_path):
    shown = moetune("show", *ON_H200)
    assert "measured with triton 3.6.0; check that the engine has the same" in shown.stdout
    assert "(here" not in shown.stdout
    document = _document(moetune("show", *ON_H200, "--json"))
    assert document["near"] == {"triton": {"wanted": None, "stored": "3.6.0"}}
    exported = moetune("export", *ON_H200, "--to", "vllm", "--out", tmp_path / "out")
    assert "note: measured with triton 3.6.0; check that the engine has the same." in exported.stderr.splitlines()
    assert "answers this question. Measured with triton 3.6.0; check" in moetune("plan", *ON_H200).stdout


DENSE = "vllm serve Qwen/Qwen3-30B-A3B -tp 8 --enable-expert-parallel"


def test_a_miss_of_a_device_without_a_profile_is_no_wrong_option_and_a_plan_is_printed(moetune, on_a_cpu):
    named = ("--launch", DENSE, "--device-name", "NVIDIA H100 80GB HBM3")
    missed = moetune("show", *named)
    assert missed.exit_code == 3
    error, hint, _ = missed.stderr.splitlines()
    assert error == (
        "error: No profile for NVIDIA H100 80GB HBM3. The nearest was measured with triton on NVIDIA H200. It has "
        "ladder pow2 instead of adaptive."
    )
    assert hint == "On a machine with this GPU, run `moetune tune` with the same options, without --device-name."
    planned = moetune("plan", *named)
    assert planned.exit_code == 0
    assert "was measured with triton on NVIDIA H200." in planned.stdout
    answered = ("--model", "qwen3-30b-a3b", "--ep", "4", "--device-name", "NVIDIA H100")
    assert "profile: none for NVIDIA H100. One of the same layer" in moetune("plan", *answered).stdout


def test_a_miss_and_a_plan_give_the_options_that_take_a_profile_of_other_buckets(moetune, on_a_cpu):
    named = ("--launch", DENSE, "--device-name", "NVIDIA H200")
    missed = moetune("show", *named)
    sentence = "`moetune show` and `moetune export` take the nearest with --ladder pow2."
    assert missed.exit_code == 3
    assert "The nearest has ladder pow2 instead of adaptive.\n" in missed.stderr
    assert missed.stderr.splitlines()[1].endswith(sentence)
    assert sentence in moetune("plan", *named).stdout.splitlines()
    assert _document(moetune("plan", *named, "--json"))["profile"]["taken_with"] == ["--ladder", "pow2"]
    assert moetune("show", *named, "--ladder", "pow2").exit_code == 0
    without = _document(moetune("plan", "--launch", DENSE, "--json"))["profile"]["taken_with"]
    assert without == ["--device-name", "NVIDIA H200", "--ladder", "pow2"]
    assert moetune("show", "--launch", DENSE, *without).exit_code == 0


def test_a_plan_says_why_no_profile_can_be_looked_up(moetune, on_a_cpu):
    planned = moetune("plan", "--launch", SGLANG, "--kernel", "vllm")
    assert "profile: none can be looked up here. --kernel vllm needs vllm" in planned.stdout
    assert "is stored" not in planned.stdout


def test_a_plan_prints_one_form_of_commands(moetune, on_a_cpu, monkeypatch):
    monkeypatch.setattr("moetune.report.command.program", lambda: [".venv/bin/moetune"])
    planned = moetune("plan", "--launch", DENSE).stdout
    assert "\nview the nearest: .venv/bin/moetune show " in planned
    assert "\n.venv/bin/moetune tune " in planned


@pytest.mark.parametrize("name", ["", " ", "a\nb"])
def test_a_device_has_a_name(moetune, on_a_cpu, name):
    for command in ("show", "plan"):
        refused = moetune(command, *ON_H200[:4], "--device-name", name)
        assert refused.exit_code == 2
        assert f"--device-name must be a GPU's name, given {name!r}. Give what" in refused.stderr


def test_a_device_goes_with_a_look_up(moetune, on_a_cpu):
    (path, *_) = Path(__file__).parents[2].glob("profiles/*/*/*/*.json")
    for command in (["show"], ["export", "--to", "vllm", "--out", "x"]):
        refused = moetune(*command, path, "--device-name", "NVIDIA H200")
        assert refused.exit_code == 2
        assert "a profile's path needs no look-up" in refused.stderr


def test_a_miss_without_a_gpu_does_not_ask_to_tune_here(moetune, on_a_cpu):
    missed = moetune("show", "--launch", SGLANG)
    assert missed.exit_code == 3
    error, hint, view = missed.stderr.splitlines()
    assert error.endswith("It has ep 8 instead of 16 and --remote drop instead of zero.")
    assert hint.startswith("Backend triton cannot run here: needs a CUDA device")
    assert hint.endswith("on a machine with the GPU that you deploy on.")
    assert moetune(*view.partition("moetune ")[2].split()).exit_code == 0


def test_a_line_of_an_engine_is_planned_for_kernels_that_it_runs(moetune, on_a_cpu):
    line = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel"
    document = _document(moetune("plan", "--launch", line, "--json"))
    assert (document["backend"], document["kernels"]["selected"]) == ("triton", False)
    without = _document(moetune("plan", "--model", "qwen3-235b-a22b", "--ep", "8", "--ladder", "8", "--json"))
    assert (without["backend"], without["kernels"]["engine"]) == ("torch", None)
    assert "Backend triton cannot run here" in moetune("show", "--launch", line).stderr


def test_plan_finds_the_profile_that_answers_and_shows_it_next(moetune, tiny, monkeypatch):
    monkeypatch.setattr(final, "SECONDS", 0.1)
    words = ("--model", tiny(), "--ep", "4", "--dp", "--ladder", "8", "--draws", "2")
    before = _document(moetune("plan", *words, "--json"))
    assert before["profile"] is None
    assert before["next_command"].startswith("moetune tune --model ")
    tuned = _document(moetune("tune", *words, "--backend", "torch", "--json"))
    after = _document(moetune("plan", *words, "--json", "--backend", "torch"))
    assert (after["profile"]["path"], after["profile"]["differing"]) == (tuned["path"], {})
    assert after["next_command"] == f"moetune show {tuned['path']}"
    assert moetune("plan", *words, "--backend", "torch").stdout.endswith(f"next: moetune show {tuned['path']}\n")


def test_plan_goes_on_beside_a_damaged_profile(moetune, tiny, monkeypatch):
    monkeypatch.setattr(final, "SECONDS", 0.1)
    words = ("--model", tiny(), "--ep", "4", "--dp", "--ladder", "8", "--draws", "2", "--backend", "torch")
    Path(_document(moetune("tune", *words, "--json"))["path"]).write_text("{")
    result = moetune("plan", *words, "--json")
    assert _document(result)["profile"] is None
    assert "\nwarning: " in result.stderr


def test_plan_has_no_next_command_for_a_layer_that_no_backend_computes(moetune):
    words = ("--model", "qwen3-30b-a3b", "--precision", "gptq_int8", "--ladder", "8")
    assert _document(moetune("plan", *words, "--json"))["next_command"] is None
    planned = moetune("plan", *words).stdout
    assert planned.endswith("No backend of moetune does.\n")
    assert "view the nearest" not in planned


def test_tune_measures_then_serves_then_shows_the_same_profile(moetune, question, planted, tmp_path):
    store = ("--store", tmp_path / "store")
    first = moetune("tune", *question, *store)
    assert first.exit_code == 0, first.stderr
    assert "fast" in first.stdout
    assert "[2/2] 8 rows" in first.stderr
    (path,) = (tmp_path / "store").glob("*/*/*/planted-*.json")
    assert f"profile: {path}" in first.stdout

    assert sorted(set(planted.prepared)) == [4, 8]
    planted.prepared.clear()
    second = moetune("tune", *question, *store)
    assert planted.prepared == []
    assert f"served from the store, nothing was measured: {path}" in second.stdout

    shown = moetune("show", *question, *store)
    assert shown.stdout == first.stdout
    assert moetune("show", path).stdout == first.stdout


def test_again_measures_what_the_store_has(moetune, question, planted):
    moetune("tune", *question)
    planted.prepared.clear()
    assert "profile: " in moetune("tune", *question, "--again").stdout
    assert sorted(set(planted.prepared)) == [4, 8]


def test_tune_json_is_the_profile_and_nothing_else_on_stdout(moetune, question):
    document = _document(moetune("tune", *question, "--json"))
    assert document.pop("served") is False
    assert document.pop("packaged") is False
    assert (document.pop("near"), document.pop("neutral"), document.pop("measured_ladder")) == ({}, {}, None)
    path = Path(document.pop("path"))
    profile = Profile.model_validate(document)
    assert [choice.rows for choice in profile.choices] == [4, 8]
    assert Profile.model_validate_json(path.read_text()) == profile

    again = _document(moetune("tune", *question, "--json"))
    assert (again["served"], again["path"]) == (True, str(path))
    assert _document(moetune("show", path, "--json"))["choices"] == document["choices"]


def test_frozen_never_measures_and_a_miss_exits_3_and_names_the_field(moetune, question, planted):
    empty = moetune("tune", *question, "--frozen")
    assert empty.exit_code == 3
    assert empty.stdout == ""
    assert planted.prepared == []

    moetune("tune", *question)
    planted.prepared.clear()
    other = tuple("--no-dp" if word == "--dp" else word for word in question)
    for command in (["tune", "--frozen"], ["show"]):
        missed = moetune(*command, *other)
        assert (missed.exit_code, missed.stdout) == (3, "")
        error, hint, view = missed.stderr.splitlines()[-3:]
        assert error.startswith("error: No profile ")
        assert hint == "Run `moetune tune` with the same options to measure it."
        assert view.startswith("View the nearest: moetune show ")
        document = json.loads(moetune(*command, *other, "--json").stdout)
        assert document["schema_version"] == 1
        assert document["miss"]["differing"]["attention_dp"] == {"wanted": False, "stored": True}
        assert document["miss"]["message"] in error
        assert view.endswith(document["miss"]["nearest"])
        assert moetune("show", document["miss"]["nearest"]).exit_code == 0
    assert planted.prepared == []


def test_a_store_that_cannot_be_written_is_refused_before_anything_is_measured(moetune, question, planted, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    result = moetune("tune", *question, "--store", occupied)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: The store {occupied} cannot be written")
    assert planted.prepared == []


def test_a_tactic_that_fails_is_reported_and_does_not_stop_the_run(moetune, question, planted):
    planted.milliseconds["broken"] = 0.1
    planted.raising = frozenset({"broken"})
    result = moetune("tune", *question)
    assert result.exit_code == 0
    assert "4 rows: broken failed: RuntimeError: planted failure" in result.stderr


def test_an_interrupted_run_keeps_what_is_measured_and_goes_on_from_there(moetune, question, planted, monkeypatch):
    real = PlantedBackend.prepare

    def interrupted(self, problem):
        if problem.rows == 8:
            raise KeyboardInterrupt
        return real(self, problem)

    monkeypatch.setattr(PlantedBackend, "prepare", interrupted)
    result = moetune("tune", *question)
    assert result.exit_code == 130
    assert "Finished buckets are saved: 1." in result.stderr
    assert "1/2" in moetune("store", "list").stdout

    monkeypatch.setattr(PlantedBackend, "prepare", real)
    planted.prepared.clear()
    assert moetune("tune", *question).exit_code == 0
    assert set(planted.prepared) == {8}


def test_after_an_interrupt_amid_a_search_the_next_run_says_where_it_goes_on(moetune, question, planted, monkeypatch):
    planted.milliseconds["broken"] = 0.1
    planted.raising = frozenset({"broken"})
    real = PlantedRunner.run

    def interrupted(self, tactic, draw=0):
        if tactic["algorithm"] == "broken":
            self.backend.failed = True
        elif getattr(self.backend, "failed", False):
            raise KeyboardInterrupt
        return real(self, tactic, draw)

    monkeypatch.setattr(PlantedRunner, "run", interrupted)
    result = moetune("tune", *question)
    assert result.exit_code == 130
    monkeypatch.setattr(PlantedRunner, "run", real)
    assert "Going on" not in result.stderr
    lines = moetune("tune", *question).stderr.splitlines()
    assert lines[1].startswith("tuning planted on ")
    assert lines[1].endswith(", 2 buckets")
    assert lines[2:4] == [
        "Going on at 4 rows, where a run was interrupted.",
        "Tactics that failed there are not tried again: 1. Use --again to try them.",
    ]


def test_the_time_budget_reaches_the_loop(moetune, monkeypatch):
    asked = []

    def interrupted(*question, **options):
        asked.append(options["time_budget_s"])
        raise KeyboardInterrupt

    monkeypatch.setattr(TUNE, "tune", interrupted)
    for words in (["--time-budget", "90"], []):
        assert moetune("tune", "--model", "qwen3-30b-a3b", *words).exit_code == 130
    assert asked == [90.0, None]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show"], "either a profile's path, or --model"),
        (["show", "p.json", "--model", "qwen3-30b-a3b"], "either a profile's path, or --model"),
        (["show", "no-such.json"], "There is no profile no-such.json"),
        (["show", "deepseek-r1"], "Give --model deepseek-r1 and the deployment, as in `moetune show --help`"),
        (["export", "Qwen/Qwen3-235B-A22B", "--to", "vllm", "--out", "x"], "Give --model Qwen/Qwen3-235B-A22B and"),
        (["tune", "--model", "qwen3-30b-a3b", "--frozen", "--again"], "--frozen never measures"),
        (["tune", "--model", "deepseek-r1", "--backend", "torch"], "fp8_block"),
        (["tune", "--model", "qwen3-30b-a3b", "--time-budget", "0"], "time budget must be positive"),
        (["store", "burn"], "No such command 'burn'"),
    ],
)
def test_other_bad_input_is_one_line_and_exit_2(moetune, words, said):
    result = moetune(*words)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_a_damaged_profile_is_named_listed_and_stays_where_it_is_outside_the_store(moetune, tmp_path):
    stray = tmp_path / "stray.json"
    stray.write_text("{")
    result = moetune("show", stray)
    assert result.exit_code == 1
    assert f"error: {stray} is no profile" in result.stderr
    assert stray.read_text() == "{"

    inside = tmp_path / "store" / "device" / "layer" / "regime" / "torch-0.json"
    inside.parent.mkdir(parents=True)
    inside.write_bytes(b"\x00\xff")
    assert f"{inside} is no profile" in moetune("store", "list", "--store", tmp_path / "store").stdout
    document = _document(moetune("store", "list", "--store", tmp_path / "store", "--json"))
    assert document["profiles"] == []
    assert [entry["path"] for entry in document["unreadable"]] == [str(inside)]


def test_store_list_shows_what_each_profile_answers(moetune, question):
    assert "has no profile yet" in moetune("store", "list").stdout
    tuned = _document(moetune("tune", *question, "--json"))
    (entry,) = _document(moetune("store", "list", "--json"))["profiles"]
    assert entry["path"] == tuned["path"]
    assert entry["regime"] == tuned["regime"]
    assert (entry["buckets"], entry["missing_buckets"]) == ([4, 8], [])
    text = moetune("store", "list").stdout
    assert "ep4-tp1-dp-alltoall-packed-random" in text
    assert "2/2" in text


@pytest.fixture
def packaged(moetune, question, planted, tmp_path, monkeypatch):
    """A folder of packaged profiles that has the answer to `question`, and a look at all of its files."""
    folder = tmp_path / "packaged"
    assert moetune("tune", *question, "--store", folder).exit_code == 0
    (folder / ".lock").unlink()
    planted.prepared.clear()
    monkeypatch.setattr(STORE, "packaged_root", lambda: folder)

    def files():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    assert len(files()) == 1
    return files


def test_a_packaged_profile_is_served_and_said_to_be_one(moetune, question, planted, packaged):
    before = packaged()
    (path,) = before
    told = moetune("tune", *question)
    assert f"served from the profiles that come with moetune, nothing was measured: {path}" in told.stdout
    document = _document(moetune("tune", *question, "--json", "--frozen"))
    assert (document["served"], document["packaged"], document["path"]) == (True, True, str(path))
    assert f"profile that comes with moetune: {path}" in moetune("show", *question).stdout
    assert f"profile that comes with moetune: {path}" in moetune("show", path).stdout
    assert _document(moetune("show", *question, "--json"))["packaged"] is True
    assert planted.prepared == []
    assert packaged() == before


def test_store_list_marks_the_packaged(moetune, question, packaged):
    (path,) = packaged()
    text = moetune("store", "list").stdout
    assert "has no profile yet" in text
    assert f"packaged with moetune, read-only {path.parents[3]}" in text
    moetune("tune", *question, "--again")
    listed = _document(moetune("store", "list", "--json"))["profiles"]
    assert [entry["packaged"] for entry in listed] == [False, True]
    assert listed[1]["path"] == str(path)
    assert moetune("store", "list").stdout.count("2/2") == 2


def test_again_measures_what_is_packaged_and_saves_it_in_the_store(moetune, question, planted, packaged):
    before = packaged()
    document = _document(moetune("tune", *question, "--again", "--json"))
    assert (document["served"], document["packaged"]) == (False, False)
    assert sorted(set(planted.prepared)) == [4, 8]
    assert Path(document["path"]) not in before
    assert _document(moetune("tune", *question, "--json"))["packaged"] is False
    assert packaged() == before


def test_a_damaged_packaged_profile_is_named_and_stays(moetune, question, packaged):
    (path,) = packaged()
    path.write_text("{")
    result = moetune("tune", *question)
    assert result.exit_code == 1
    assert f"{path} is no profile" in result.stderr
    assert "reinstall it, or set MOETUNE_PACKAGED_PROFILES=0" in result.stderr
    assert packaged() == {path: b"{"}
    assert f"{path} is no profile" in moetune("store", "list").stdout


def test_a_miss_points_to_the_packaged_profile_of_another_torch(moetune, question, packaged):
    (path,) = packaged()
    document = json.loads(path.read_text())
    document["environment"]["strict"]["torch"] = "2.0.0"
    path.write_text(json.dumps(document))
    missed = moetune("tune", *question, "--frozen")
    assert missed.exit_code == 3
    assert "The nearest has torch 2.0.0 instead of " in missed.stderr


def test_the_torch_backend_is_tuned_end_to_end(moetune, tiny, monkeypatch):
    monkeypatch.setattr(final, "SECONDS", 0.1)
    words = ("--model", tiny(), "--ep", "4", "--dp", "--ladder", "8", "--draws", "2", "--backend", "torch")
    document = _document(moetune("tune", *words, "--json"))
    assert document["backend"] == "torch"
    (choice,) = document["choices"]
    assert choice["default_tactic"] == {"algorithm": "eager"}
    assert sum(choice["load"]) == 2 * 8 * 2
    assert choice["tried"] >= 4
    assert document["environment"]["informative"]["moetune"] == package.__version__


@pytest.mark.parametrize(("maximum", "last"), [(None, 8192), (196608, 196608)])
def test_plan_has_a_bucket_for_every_decode_size_of_a_pool_of_24_ranks(moetune, maximum, last):
    """The pool has 24·T rows for T tokens a rank. The next larger bucket answers; above the maximum, the last one."""
    words = ["plan", "--model", "kimi-k2.5", "--ep", "24", "--dispatch", "vllm:flashinfer_nvlink_one_sided", "--json"]
    document = _document(moetune(*words, *(["--tune-max-num-tokens", maximum] if maximum else [])))
    regime = Regime.model_validate(document["regime"])
    listed = {bucket["rows"]: bucket for bucket in document["buckets"]}
    assert (regime.layout, max(listed)) == ("pool", last)
    assert all(bucket["met_rows"] % 24 == 0 for bucket in listed.values())
    answered = {tokens: regime.ladder.lookup(24 * tokens, regime.tune_max_num_tokens) for tokens in range(1, 513)}
    for tokens, rows in answered.items():
        assert rows == min((rows for rows in listed if rows >= 24 * tokens), default=last)
    decode = {rows for rows in listed if rows <= max(answered.values())}
    assert set(answered.values()) == decode
    for rows in decode:
        assert answered[int(listed[rows]["tokens_per_rank"])] == rows


def test_a_flag_that_has_no_effect_is_not_listed_as_read(moetune):
    """vLLM's rows are looked up by the nearest row count of the file, and the ladder adaptive ends at 8192."""
    line = "vllm serve Qwen/Qwen3-235B-A22B -tp 8 --enable-expert-parallel --max-num-batched-tokens"
    for tokens, listed in ((16384, False), (4096, True)):
        planned = moetune("plan", "--launch", f"{line} {tokens}").stdout
        (read,) = [line for line in planned.splitlines() if line.startswith("read from the line: ")]
        assert ("--max-num-batched-tokens" in read) == listed


def test_the_kernel_of_one_engine_for_another_is_a_warning(moetune, on_a_cpu):
    warning = "warning: --kernel vllm times vLLM's kernel. SGLang runs its own."
    for words in (("--launch", SGLANG), ("--model", "deepseek-r1", "--ep", "8", "--dispatch", "sglang:none")):
        assert warning in moetune("plan", *words, "--kernel", "vllm").stderr.splitlines()
        assert "times" not in moetune("plan", *words, "--kernel", "builtin").stderr


def test_a_gpu_that_was_slowed_down_is_reported_with_the_result(moetune, question, monkeypatch):
    states = iter([Throttling({"power brake": 0.0}), Throttling({"power brake": 2.5e6})])
    monkeypatch.setattr(TUNE, "throttling", lambda device: next(states))
    result = moetune("tune", *question, "--json")
    assert json.loads(result.stdout)["throttled"] == {"planted": ["power brake for 2.5 s"]}
    assert "planted: the GPU was slowed down while it was measured: power brake for 2.5 s." in result.stderr
    assert "throttled" not in _document(moetune("tune", *question, "--json")), "served, nothing was measured"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--model gpt-oss-120b --ep 8 --dispatch vllm:allgather_reducescatter",
            "start vLLM with --moe-backend flashinfer_trtllm. Without it vLLM prefers OpenAI's triton_kernels on "
            "Hopper.",
        ),
        (
            "--model kimi-k2.5 --ep 8 --dispatch sglang:none",
            "start SGLang with --moe-runner-backend flashinfer_trtllm. Without it SGLang prefers Marlin on Hopper.",
        ),
        (
            "--model kimi-k2.5 --ep 8 --dispatch vllm:deepep_low_latency",
            "No backend of moetune does. On Hopper vLLM runs batched Marlin; Humming if VLLM_HUMMING_MOE_GEMM_TYPE is "
            "grouped_masked.",
        ),
        (
            "--model deepseek-r1 --ep 16 --dispatch vllm:deepep_low_latency",
            "start vLLM with --moe-backend triton. Without it vLLM prefers DeepGEMM's masked kernels on Hopper",
        ),
    ],
)
def test_a_plan_names_the_kernels_that_docs_kernels_names(moetune, on_a_cpu, words, line):
    assert line in moetune("plan", *words.split()).stdout
