"""The driver of `benchmarks/engine`: its cases, its processes, their order, and how a cut command goes on."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import process
import run
from arms import ARMS, Folders
from cases import CASES
from common import Journal
from engine_report import report
from engine_trees import functions, plant
from process import Measurement, Place
from processes import GIVE_UP_S, eventually, is_running

H200 = run.Device("NVIDIA H200", 143_771 * 2**20)
CHILD = """
import json, os, subprocess, sys, time
words = sys.argv[1:]
names = ("MOETUNE_REGIME", "VLLM_TUNED_CONFIG_FOLDER", "VLLM_DP_RANK", "VLLM_DP_SIZE", "CUDA_VISIBLE_DEVICES",
         "MOETUNE_BENCH_EP", "VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "VLLM_USE_DEEP_GEMM")
print("the log of", words[0], flush=True)
with open(words[words.index("--result") + 1], "a") as file:
    file.write(json.dumps({"what": "start", "words": words, "env": {n: os.environ.get(n) for n in names}}) + "\\n")
    file.flush()
    BODY
    file.write(json.dumps({"what": "end"}) + "\\n")
"""
START_A_CHILD = """
    child = subprocess.Popen(['sleep', '600'])
    with open({started!r} + '.part', 'w') as part:
        part.write(str(child.pid))
    os.rename(part.name, {started!r})
    time.sleep(600)
"""
"""Says the child's process id in the file `started`."""
WHAT = Measurement((1, 8), 1, 24, 0.9, 4, profile=False)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "out", ("2", "3"), GIVE_UP_S)


@pytest.fixture
def folders(tmp_path):
    return Folders(tmp_path / "empty", tmp_path / "shipped", tmp_path / "tuned")


def stub(monkeypatch, tmp_path, body="pass"):
    here = tmp_path / "here"
    here.mkdir()
    (here / "child.py").write_text(CHILD.replace("BODY", body))
    monkeypatch.setattr(process, "HERE", here)


def test_each_case_is_a_launch_line_that_moetune_reads():
    names = {name: case.file_name("NVIDIA H200") for name, case in CASES.items()}
    assert names == {
        "qwen3-30b": "E=128,N=768,device_name=NVIDIA_H200.json",
        "qwen3-30b-dp2": "E=64,N=768,device_name=NVIDIA_H200.json",
        "qwen3-235b-share": "E=16,N=1536,device_name=NVIDIA_H200.json",
        "deepseek-r1-share": "E=32,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
    }


def test_the_layers_are_those_that_fit(tmp_path):
    h100 = 81_559 * 2**20
    assert {name: (case.layers(H200.memory), case.layers(h100)) for name, case in CASES.items()} == {
        "qwen3-30b": (48, 48),
        "qwen3-30b-dp2": (48, 48),
        "qwen3-235b-share": (94, 82),
        "deepseek-r1-share": (61, 37),
    }
    case = CASES["qwen3-30b"]
    assert case.layers(H200.memory, 4) == 4
    case.write_model(tmp_path, 4)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 4


def test_the_weights_of_a_layer_are_those_of_its_config():
    for name, experts in (("qwen3-30b", 128), ("qwen3-30b-dp2", 64), ("qwen3-235b-share", 16)):
        config = CASES[name].config
        hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
        attention = hidden * (2 * heads + 2 * config["num_key_value_heads"] * config["head_dim"])
        weights = 2 * (experts * 3 * hidden * config["moe_intermediate_size"] + attention)
        assert CASES[name].layer_bytes == pytest.approx(weights, rel=0.01)


def test_a_process_gets_its_arms_variables_and_no_other(monkeypatch, tmp_path, place, folders):
    stub(monkeypatch, tmp_path)
    for name in ("MOETUNE_REGIME", "VLLM_TUNED_CONFIG_FOLDER", "MOETUNE_BENCH_EP"):
        monkeypatch.setenv(name, "of the caller")
    found = {
        arm: process.run(CASES["deepseek-r1-share"], ARMS[arm], 0, folders, place, WHAT)["ranks"][0][0]["env"]
        for arm in ("default", "shipped", "moetune", "plugin-triton")
    }
    assert {arm: env["VLLM_TUNED_CONFIG_FOLDER"] for arm, env in found.items()} == {
        "default": str(folders.empty),
        "shipped": None,
        "moetune": str(folders.tuned),
        "plugin-triton": None,
    }
    assert [arm for arm, env in found.items() if env["MOETUNE_REGIME"]] == ["plugin-triton"]
    for env in found.values():
        assert (env["MOETUNE_BENCH_EP"], env["VLLM_USE_DEEP_GEMM"], env["CUDA_VISIBLE_DEVICES"]) == ("8", "0", "2,3")
        assert env["VLLM_MOE_ROUTING_SIMULATION_STRATEGY"] == "uniform_random"
    assert (place.work / "plugin/moetune_bench-0.dist-info/entry_points.txt").exists()


def test_each_rank_is_a_process_and_its_log_is_kept(monkeypatch, tmp_path, place, folders):
    stub(monkeypatch, tmp_path)
    found = process.run(CASES["qwen3-30b-dp2"], ARMS["flashinfer"], 1, folders, place, WHAT)
    assert found["exit_codes"] == [0, 0]
    assert [rank[0]["env"]["VLLM_DP_RANK"] for rank in found["ranks"]] == ["0", "1"]
    assert {rank[0]["env"]["VLLM_DP_SIZE"] for rank in found["ranks"]} == {"2"}
    assert {rank[0]["env"]["MOETUNE_BENCH_EP"] for rank in found["ranks"]} == {None}
    assert found["logs"] == ["the log of qwen3-30b-dp2\n"] * 2
    for name in found["log_files"]:
        assert gzip.decompress((place.work / "logs" / name).read_bytes()) == b"the log of qwen3-30b-dp2\n"
    assert sorted(path.suffix for path in (place.work / "logs").iterdir()) == [".gz", ".gz"]


def test_a_process_out_of_time_is_ended_with_its_children(monkeypatch, tmp_path, place, folders):
    """Its time is over once it has started a child."""
    started = tmp_path / "started"
    stub(monkeypatch, tmp_path, START_A_CHILD.format(started=str(started)))
    clock = SimpleNamespace(monotonic=lambda: 2 * GIVE_UP_S if started.exists() else 0.0, sleep=time.sleep)
    monkeypatch.setattr(process, "time", clock)
    found = process.run(CASES["qwen3-30b"], ARMS["default"], 0, folders, place, WHAT)
    assert found["exit_codes"] == [None]
    assert [line["what"] for line in found["ranks"][0]] == ["start"]  # what was measured is kept
    assert eventually(lambda: not is_running(int(started.read_text())))


def test_a_signal_ends_the_engine_that_runs(monkeypatch, tmp_path, place, folders):
    started = tmp_path / "started"
    stub(monkeypatch, tmp_path, START_A_CHILD.format(started=str(started)))
    ending = threading.Thread(target=lambda: eventually(started.exists) and process.end_all())
    ending.start()
    found = process.run(CASES["qwen3-30b"], ARMS["default"], 0, folders, place, WHAT)
    ending.join()
    assert found["exit_codes"] == [-9]


def test_the_other_ranks_are_not_waited_for_after_a_failure(monkeypatch, tmp_path, place, folders):
    stub(monkeypatch, tmp_path, "sys.exit(3) if os.environ['VLLM_DP_RANK'] == '1' else time.sleep(600)")
    found = process.run(CASES["qwen3-30b-dp2"], ARMS["default"], 0, folders, place, WHAT)
    assert found["exit_codes"][1] == 3
    assert found["seconds"] < GIVE_UP_S


class PlantedRuns:
    """Stands for `process.run`: keeps what was asked for, and ends some runs early."""

    def __init__(self, failing=()):
        self.asked, self.failing = [], set(failing)

    def __call__(self, case, arm, rep, folders, place, what):
        self.asked.append((case.name, arm.name, rep, place.gpus, what.profile))
        ranks = [[{"what": "start", "seconds": 9.0, "versions": {}}] for _ in range(case.ranks)]
        if (arm.name, rep) not in self.failing:
            for rank in ranks:
                rank.append({"what": "end"})
        return {
            "seconds": 1.0,
            "exit_codes": [0] * case.ranks,
            "ranks": ranks,
            "logs": [""] * case.ranks,
            "log_files": [],
        }


@pytest.fixture
def planted(monkeypatch, tmp_path, folders):
    runs = PlantedRuns()
    folders.shipped.mkdir()
    (folders.shipped / CASES["qwen3-30b"].file_name(H200.name)).touch()
    monkeypatch.setattr(process, "run", runs)
    monkeypatch.setattr(run, "prepared", lambda *given: folders)
    monkeypatch.setattr(run, "missing_proof", lambda *given: [])
    return runs


def options(tmp_path, **given):
    values = {"out": tmp_path / "out", "cases": "qwen3-30b", "arms": "default,shipped,moetune", "reps": 2, "gpus": "0"}
    values |= {"seconds": 60.0, "process_seconds": 9.0, "running": "1,8", "passes": 1, "steps": 24, "layers": None}
    return argparse.Namespace(**{**values, "memory": 0.9, **given})


def test_the_arms_alternate_and_the_first_repetition_is_profiled(planted, tmp_path):
    assert run.measure_all(options(tmp_path), H200) == 0
    orders = (("default", "shipped", "moetune"), ("shipped", "moetune", "default"))
    wanted = [("qwen3-30b", arm, rep, ("0",), rep == 0) for rep, order in enumerate(orders) for arm in order]
    assert planted.asked == wanted


def test_a_cut_command_goes_on_and_repeats_what_failed(planted, tmp_path, capsys):
    planted.failing = {("shipped", 1)}
    assert run.measure_all(options(tmp_path), H200) == 1
    assert "qwen3-30b shipped 1: 1.0 s, exit codes [0]" in capsys.readouterr().out
    planted.asked.clear()
    planted.failing = set()
    assert run.measure_all(options(tmp_path, reps=3), H200) == 0
    assert [asked[1:3] for asked in planted.asked] == [("shipped", 1), ("moetune", 2), ("default", 2), ("shipped", 2)]


def test_no_process_starts_after_its_time_and_the_exit_code_says_that_runs_are_left(planted, tmp_path):
    assert run.measure_all(options(tmp_path, seconds=0.0), H200) == 1
    assert planted.asked == []


def test_each_repetition_runs_on_one_of_the_gpus(planted, tmp_path):
    run.measure_all(options(tmp_path, gpus="0,1", reps=4), H200)
    assert {(rep, gpus) for _, _, rep, gpus, _ in planted.asked} == {(0, ("0",)), (1, ("1",)), (2, ("0",)), (3, ("1",))}
    assert len(planted.asked) == 12
    planted.asked.clear()
    run.measure_all(options(tmp_path, cases="qwen3-30b-dp2", gpus="0,1,2,3,4", arms="default"), H200)
    assert {asked[3] for asked in planted.asked} == {("0", "1"), ("2", "3")}
    with pytest.raises(SystemExit, match="needs 2 GPUs"):
        run.measure_all(options(tmp_path, cases="qwen3-30b-dp2"), H200)


def test_the_shipped_arm_is_left_out_where_vllm_ships_no_file(planted, tmp_path):
    h100 = run.Device("NVIDIA H100 80GB HBM3", 81_559 * 2**20)
    for _ in range(2):
        run.measure_all(options(tmp_path), h100)
    assert {asked[1] for asked in planted.asked} == {"default", "moetune"}
    left_out = [line for line in Journal(tmp_path / "out/engine.jsonl").lines if line["kind"] == "left_out"]
    name = "E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3.json"
    assert [line["why"] for line in left_out] == [f"vLLM ships no {name}: it runs its heuristic"]


def test_flashinfer_arms_run_only_where_a_case_has_them(planted, tmp_path):
    run.measure_all(options(tmp_path, cases="qwen3-235b-share", arms=",".join(ARMS), reps=1), H200)
    assert [asked[1] for asked in planted.asked] == ["default", "moetune", "plugin-triton"]


def test_the_default_arms_file_has_no_configuration(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "_shipped_folder", lambda: tmp_path)
    case = CASES["qwen3-30b"]
    folders = run.prepared(case, [ARMS["default"], ARMS["flashinfer"]], tmp_path, H200, "0")
    assert json.loads((folders.empty / case.file_name(H200.name)).read_text()) == {}


def test_moetunes_folder_is_the_one_that_its_export_wrote(monkeypatch, tmp_path):
    case, commands = CASES["qwen3-30b"], []

    def tune(command, env, cwd, check):
        commands.append(command)
        folder = Path(command[command.index("--export") + 1]) / "ep1-tp1-nodp-none-random"
        folder.mkdir(parents=True)
        (folder / case.file_name(H200.name)).touch()

    monkeypatch.setattr(run, "_shipped_folder", lambda: tmp_path)
    monkeypatch.setattr(run.importlib.metadata, "version", lambda name: "0.26.0")
    monkeypatch.setattr(run.subprocess, "run", tune)
    for _ in range(2):
        folders = run.prepared(case, list(ARMS.values()), tmp_path, H200, "0")
        assert folders.tuned.name == "ep1-tp1-nodp-none-random"
    assert len(commands) == 1
    assert commands[0][-1] == "0.26.0"


VLLM = """
import os, time
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, **named):
        self.tokens = named["max_tokens"]

class Core:
    def __init__(self):
        self.messages, self.now = [], 5.0
    def get_output(self):
        return self.messages.pop(0)

class LLM:
    def __init__(self, **options):
        assert options["load_format"] == "dummy" and os.path.exists(options["model"] + "/config.json")
        folder = os.environ["VLLM_TUNED_CONFIG_FOLDER"]
        print("Using TRITON Unquantized MoE backend out of potential backends: [].")
        print(f"Using configuration from {folder}/E=128,N=768,device_name=NVIDIA_H200.json for MoE layer.")
        print("Simulating MoE routing using a uniform_random strategy. ")
        self.llm_engine = SimpleNamespace(engine_core=Core())
        self.speed = 0.004 if "tuned" in folder else 0.005
    def generate(self, prompts, parameters, use_tqdm):
        core, at_once = self.llm_engine.engine_core, len(prompts)
        if parameters.tokens == 1 and at_once > 1:
            at_once = 16
        core.now = max(core.now, time.monotonic())
        for _ in range(parameters.tokens * len(prompts) // at_once):
            core.now += self.speed
            core.messages.append(SimpleNamespace(timestamp=core.now, outputs=[0] * at_once))
        while core.messages:
            core.get_output()
    def collective_rpc(self, method, args=()):
        moe = self.speed * 500
        if method == "moetune_tactics":
            return [{"count": 42, "digest": "planted"}]
        return [{"steps": 8, "kernels_ms": 4.0, "moe_ms": moe, "moe_calls": 96.0, "longest": []}]
"""


@pytest.mark.slow
def test_from_the_driver_to_the_report_on_a_planted_vllm(monkeypatch, tmp_path):
    site, work = tmp_path / "site", tmp_path / "out"
    site.mkdir()
    (site / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), str(Path(__file__).parents[2])]))
    folders = Folders(work / "empty", work / "shipped", work / "tuned")
    monkeypatch.setattr(run, "prepared", lambda *given: folders)
    given = options(tmp_path, out=work, arms="default,moetune", reps=2, running="1,32", passes=2, layers=2)
    assert run.measure_all(given, H200) == 0
    text, failed = report(Journal(work / "engine.jsonl").lines)
    assert not failed
    assert "| 32 | 5.00 (6,400) | 4.00 (8,000) |" in text
    assert "| 32 | +25.0% [+25.0%, +25.0%] (0.0%) |" in text
    assert "| 16384 | 5.00 (3,276,800) | 4.00 (4,096,000) |" in text
    assert "| 32 | 2.50 | 50% | +25.0% | +11.1% | +25.0% [+25.0%, +25.0%] |" in text
    assert f"Using configuration from {folders.tuned}/" in text


ASKS = """
import json, sys
from vllm.model_executor.layers.fused_moe import fused_moe as module
answers = []
for folder in sys.argv[1:]:
    module.envs.VLLM_TUNED_CONFIG_FOLDER = folder or None
    module.get_moe_configs.cache_clear()
    answers.append(module.try_get_optimal_moe_config((128, 1536, 2048), (128, 2048, 768), 8, None, 64))
answers.append(module.get_default_config(64, 128, 768, 2048, 8, None))
print(json.dumps(answers))
"""


@pytest.mark.network
def test_an_empty_file_makes_vllm_run_its_heuristic_although_it_ships_a_file(vllm_version_sources, tmp_path):
    source = vllm_version_sources("0.26.0") / "vllm/model_executor/layers/fused_moe/fused_moe.py"
    names = ("get_config_file_name", "get_moe_configs", "get_default_config", "try_get_optimal_moe_config")
    plant(tmp_path / "site", "vllm", lookup=functions(source, *names))
    name, shipped = CASES["qwen3-30b"].file_name("NVIDIA H200"), {"BLOCK_SIZE_M": 1}
    configs = tmp_path / "site/vllm/model_executor/layers/fused_moe/configs"
    (configs / name).write_text(json.dumps({"64": shipped}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / name).write_text("{}")
    asked = subprocess.run(
        [sys.executable, "-c", ASKS, "", str(tmp_path / "empty")],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    stock, overridden, heuristic = json.loads(asked.stdout)
    assert stock == shipped
    assert overridden == heuristic
    assert heuristic != shipped
