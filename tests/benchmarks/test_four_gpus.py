"""The scripts that run benchmarks on four GPUs, with programs that record how they are called instead of measuring."""

import json
import os
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "four_gpus"))

from spoiled import spoiled

from moetune.cli.main import main
from moetune.store.reading import load_profile

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks" / "four_gpus").glob("*.sh") if path.name != "common.sh")
RECORDER = """#!{python}
import json, os, sys
call = [os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.path.basename(sys.argv[0]), *sys.argv[1:]]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(call) + "\\n")
sys.exit("fails" in os.environ and os.environ["fails"] in " ".join(sys.argv))
"""


def calls_of(script, folder, **variables):
    """Returns the GPUs and words of each program that a script has started, and what it printed."""
    programs, calls = folder / "bin", folder / "calls"
    programs.mkdir()
    for name in ("python3", "torchrun"):
        (programs / name).write_text(RECORDER.format(python=sys.executable))
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OUT": str(folder / "out"), "CALLS": str(calls), **variables}
    command = ["bash", f"benchmarks/four_gpus/{script}", "ENGINE/vllm"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True, timeout=120)
    assert ran.stderr == ""
    return [tuple(json.loads(line)) for line in calls.read_text().splitlines()], ran.stdout


def options_of(words):
    return [word for word in words if re.fullmatch(r"--[a-z][a-z-]*", word)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_one_that_the_program_takes(script, tmp_path):
    calls, _ = calls_of(script, tmp_path)
    assert calls
    for _, program, *words in calls:
        if "moetune" in words:
            name, *rest = words[words.index("moetune") + 1 :]
            command = main.get_command(None, name)
            command.make_context(name, rest)  # raises a UsageError for an option or a value that it does not know
        elif words[0] != "-m":
            source = (ROOT / words[0]).read_text()
            if "from formula_cells import" in source:  # it has the command line of the scripts that use it
                source = (ROOT / "benchmarks" / "formula_cells.py").read_text()
            assert all(f'"{option}"' in source for option in options_of(words)), words
        else:
            assert words[1] == "pytest"
            named = [word for word in words if word.startswith("tests")]
            assert named
            assert all((ROOT / word).exists() for word in named)
        assert (program == "torchrun") == ("--nproc-per-node" in words)


@pytest.mark.parametrize("script", SCRIPTS)
def test_lanes_that_run_at_once_share_no_gpu_and_no_process_has_fewer_gpus_than_ranks(script, tmp_path):
    text = (ROOT / "benchmarks" / "four_gpus" / script).read_text()
    at_once = [
        re.findall(r"^lane (\S+) ", part, re.MULTILINE) for part in re.split(r"^wait$", text, flags=re.MULTILINE)
    ]
    assert any(at_once)
    for lanes in at_once:
        used = ",".join(lanes).split(",")
        assert sorted(used) == sorted(set(used))
    calls, _ = calls_of(script, tmp_path)
    for gpus, program, *words in calls:
        assert gpus in chain(*at_once)
        if program == "torchrun":
            assert words[words.index("--nproc-per-node") + 1] == str(len(gpus.split(",")))
            assert words[words.index("--ep") + 1] == str(len(gpus.split(",")))


def test_the_block_is_measured_once_for_each_deployment_that_the_batch_tunes(tmp_path):
    calls, _ = calls_of("block.sh", tmp_path)
    lines = (ROOT / "benchmarks" / "four_gpus" / "block_jobs.txt").read_text().splitlines()
    deployments = [line for line in lines if "--dispatch" in line]
    measured = [" ".join(call) for call in calls]
    for line in deployments:
        assert sum(line in call for call in measured) == (3 if "--ladder 64" in line else 1)
    assert len(measured) == len(deployments) + 2
    plain = {re.sub(r" --(dispatch|layout) \S+", "", line) for line in deployments}
    assert plain == {line for line in lines if line.startswith("--model") and "--dispatch" not in line}


def test_a_job_that_fails_is_named_and_the_next_one_runs(tmp_path):
    calls, said = calls_of("one_rank.sh", tmp_path, fails="deepseek-r1 --precision bf16 --ep 8")
    assert len(calls) == 6
    assert sorted(re.sub(r"after \d+ s", "", line).strip() for line in said.splitlines()) == [
        "autotune-gpt-oss-ep4 exit 0",
        "autotune-gpt-oss-ep8 exit 0",
        "one-rank-deepseek-r1-ep32 exit 0",
        "one-rank-deepseek-r1-ep8 exit 1",
        "one-rank-qwen3-235b-a22b-ep32 exit 0",
        "one-rank-qwen3-235b-a22b-ep8 exit 0",
    ]


def test_nothing_begins_once_the_time_is_over_and_earlier_results_are_kept(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "dep.jsonl").write_text("earlier\n")
    (tmp_path / "calls").touch()
    calls, said = calls_of("block.sh", tmp_path, KEPT=str(kept), SECONDS_IN_ALL="0")
    assert calls == []
    assert said.count("not begun") == len(said.splitlines()) > 10
    assert (tmp_path / "out" / "dep.jsonl").read_text() == "earlier\n"


@pytest.mark.parametrize(("left_out", "again"), [("[]", 0), ('[[16, "random"]]', 1)])
def test_a_block_without_time_for_every_batch_size_is_measured_on(tmp_path, left_out, again):
    code = f"""
source benchmarks/four_gpus/common.sh
torchrun() {{ echo called >>"$OUT/calls"; echo '{{"left_out": {left_out}}}'; }}
export -f torchrun
timeout() {{ shift 5; "$@"; }}
block 2 --ep 2
block 2 --ep 2
"""
    environment = {**os.environ, "OUT": str(tmp_path)}
    subprocess.run(["bash", "-c", code], cwd=ROOT, env=environment, check=True, timeout=120)
    assert (tmp_path / "calls").read_text().count("called") == 1 + again


def test_a_spoiled_profile_is_one_that_moetune_reads_and_differs_in_two_buckets(tmp_path):
    path = next(ROOT.glob("profiles/NVIDIA_H200/e128-k8-h4096-*/ep8-tp1-dp-allgather-*/triton-*.json"))
    (tmp_path / "spoiled.json").write_text(json.dumps(spoiled(json.loads(path.read_text()))))
    good, bad = load_profile(path), load_profile(tmp_path / "spoiled.json")
    differing = [a.rows for a, b in zip(good.choices, bad.choices, strict=True) if a.tactic != b.tactic]
    assert differing == [64, 512]
