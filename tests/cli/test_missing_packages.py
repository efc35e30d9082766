"""Every command in processes without torch, without Triton and without FlashInfer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HIDING = ROOT / "tests/hiding"
PROFILE = sorted((ROOT / "profiles").glob("*/e128-k8-h4096-*/*/triton-*.json"))[0]
QUESTION = ("--model", "qwen3-235b-a22b", "--ep", "8", "--dispatch", "vllm:allgather_reducescatter", "--draws", "1")
LAUNCH = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 -ep"
COMMANDS: dict[str, tuple[str, ...]] = {
    "version": ("--version",),
    "models": ("models", "--json"),
    "doctor": ("doctor",),
    "doctor --json": ("doctor", "--json"),
    "plan": ("plan", *QUESTION, "--ladder", "8,16"),
    "show PATH": ("show", str(PROFILE)),
    "show": ("show", *QUESTION),
    "export PATH": ("export", str(PROFILE), "--to", "vllm", "--out", "OUT"),
    "compare": ("compare", str(PROFILE), str(PROFILE)),
    "compare --measure": ("compare", str(PROFILE), str(PROFILE), "--measure"),
    "batch": ("batch", str(ROOT / "tests/data/jobs.yaml"), "--dry-run"),
    "lookup": ("lookup", "--launch", LAUNCH, "--device-name", "NVIDIA H200", "--json"),
    "store list": ("store", "list"),
    "store verify": ("store", "verify", "--json"),
    "store prune": ("store", "prune"),
    "store merge": ("store", "merge", str(ROOT / "profiles"), "--apply"),
    "tune --frozen": ("tune", *QUESTION, "--frozen"),
    "tune": ("tune", *QUESTION),
    "tune --backend triton": ("tune", *QUESTION, "--backend", "triton"),
    "tune --backend flashinfer-cutlass": ("tune", *QUESTION, "--backend", "flashinfer-cutlass"),
}
NEED_TORCH = {
    "plan", "show", "tune --frozen", "tune --backend triton", "tune --backend flashinfer-cutlass", "compare --measure",
    "batch",
}  # fmt: skip
Answers = dict[str, dict[str, Any]]


def answers(missing: str, folder: Path) -> Answers:
    commands = [[word.replace("OUT", str(folder / "out")) for word in words] for words in COMMANDS.values()]
    (folder / "out").mkdir()
    (folder / "commands.json").write_text(json.dumps(commands))
    environ = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "MOETUNE_HIDDEN": missing,
        "MOETUNE_STORE": str(folder / "store"),
        "PYTHONPATH": os.pathsep.join((str(HIDING), str(ROOT))),
    }
    environ.pop("MOETUNE_PACKAGED_PROFILES", None)
    done = subprocess.run(
        [sys.executable, str(HIDING / "commands.py"), str(folder / "commands.json")],
        env=environ, capture_output=True, text=True, timeout=500, check=True,
    )  # fmt: skip
    return dict(zip(COMMANDS, json.loads(done.stdout), strict=True))


@pytest.fixture(scope="module", params=["torch", "triton", "flashinfer"])
def missing(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def ran(missing: str, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return answers(missing, tmp_path_factory.mktemp(missing))


def test_no_command_ends_with_a_traceback_or_as_a_bug(ran: Answers) -> None:
    for name, answer in ran.items():
        text = answer["stdout"] + answer["stderr"]
        assert "Traceback" not in text, name
        assert "bug" not in text, name
        assert "ModuleNotFoundError" not in text, name


def test_what_needs_no_package_runs(ran: Answers) -> None:
    for name in ("version", "models", "doctor", "doctor --json", "show PATH", "export PATH", "store list", "compare"):
        assert ran[name]["code"] == 0, (name, ran[name]["stderr"])
    for name in ("store verify", "store prune", "store merge"):
        assert ran[name]["code"] == 0, (name, ran[name]["stderr"])
    assert ran["lookup"]["code"] in (0, 3), ran["lookup"]["stderr"]
    assert ran["lookup"]["stdout"]


def test_what_needs_torch_says_so(ran: Answers, missing: str) -> None:
    for name in NEED_TORCH:
        answer = ran[name]
        if missing == "torch":
            assert (answer["code"], answer["stdout"]) == (2, ""), name
            assert "error: This command needs torch, which is not installed. pip install torch\n" in answer["stderr"]
        else:
            assert "needs torch, which" not in answer["stderr"]
    assert ran["batch"]["code"] == (2 if missing == "torch" else 0), ran["batch"]["stderr"]
    assert (ran["plan"]["code"], ran["show"]["code"], ran["tune --frozen"]["code"]) == (
        (2, 2, 2) if missing == "torch" else (0, 3, 3)
    )


def test_doctor_says_what_is_missing(ran: Answers, missing: str) -> None:
    document = json.loads(ran["doctor --json"]["stdout"])
    named = {each["name"]: each for each in document["backends"]}
    backend = {"torch": "torch", "triton": "triton", "flashinfer": "flashinfer-cutlass"}[missing]
    assert (named[backend]["available"], named[backend]["reason"]) == (False, f"{missing} is not installed")
    assert named[backend]["hint"].startswith("pip install ")
    assert (document["environment"] is None) == (missing == "torch")
    assert f"{missing} is not installed" in " ".join(ran["doctor"]["stdout"].split())
    if missing == "torch":
        assert all(not each["available"] for each in named.values())
        assert "not installed, so the GPU is not known: pip install torch" in ran["doctor"]["stdout"]


def test_a_tune_says_which_package_its_backend_lacks(ran: Answers, missing: str) -> None:
    assert ran["tune"]["code"] == 2
    lacked = {
        "torch": "needs torch, which is not installed",
        "triton": "triton is not installed",
        "flashinfer": "needs a CUDA device",
    }
    assert lacked[missing] in ran["tune"]["stderr"]
    backend = {"triton": "triton", "flashinfer": "flashinfer-cutlass"}.get(missing)
    if backend:
        answer = ran[f"tune --backend {backend}"]
        assert answer["code"] == 2
        assert f"Backend {backend} cannot run here: {missing} is not installed. pip install " in answer["stderr"]


def test_verify_reads_every_profile_and_says_why_a_machine_is_not_known(ran: Answers, missing: str) -> None:
    files = json.loads(ran["store verify"]["stdout"])["files"]
    assert len(files) > 20
    assert {file["state"] for file in files} == {"other device" if missing == "flashinfer" else "not known"}
    if missing != "flashinfer":
        assert f"{missing} is not installed" in {file["why"] for file in files}.pop()
