"""The command `moetune lookup`: its exit codes, its documents and its errors."""

import json
import shlex
from pathlib import Path

import pytest

from moetune.backends.grouped_triton import shipped
from moetune.cli import lookup as command
from moetune.spec.ladder import VLLM_BUCKETS

LINE = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel"
NAME = "E=16,N=1536,device_name=NVIDIA_H200.json"
R1 = "python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-R1 --tp 8"
R1_NAME = "E=257,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
PROFILES = sorted((Path(__file__).parents[2] / "profiles").rglob("triton-*.json"))
H200 = ("--device-name", "NVIDIA H200")


@pytest.fixture
def tuned(tmp_path):
    folder = tmp_path / "tuned"
    (folder / "configs" / "triton_3_6_0").mkdir(parents=True)
    rows = json.dumps({str(rows): {} for rows in VLLM_BUCKETS})
    (folder / NAME).write_text(rows)
    (folder / "configs" / "triton_3_6_0" / R1_NAME).write_text(rows)
    return folder


def document(result, code):
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)


def test_the_folder_of_the_line_is_looked_in_and_a_hit_ends_with_0(moetune, tuned):
    line = f"VLLM_TUNED_CONFIG_FOLDER={tuned} {LINE}"
    found = document(moetune("lookup", "--launch", line, *H200, "--json"), 0)
    assert (found["schema_version"], found["engine"], found["hit"]) == (1, "vllm", True)
    assert found["tables"][0]["file"] == str(tuned / NAME)
    assert [row["rows"] for row in found["tables"][0]["rows"]] == list(VLLM_BUCKETS)
    assert "hit: all 18 row counts" in moetune("lookup", "--launch", line, *H200).stdout


def test_a_miss_ends_with_3_and_prints_the_whole_look_up(moetune, tuned):
    words = ("lookup", "--launch", LINE, "--folder", tuned, "--device-name", "NVIDIA B200")
    found = document(moetune(*words, "--json"), 3)
    assert found["hit"] is False
    assert found["tables"][0]["rows"][0]["hit"] is False
    text = moetune(*words)
    assert (text.exit_code, text.stderr) == (3, "")
    assert "miss: 18 of 18 row counts" in text.stdout


def test_folder_wins_over_the_line(moetune, tuned, tmp_path):
    line = f"VLLM_TUNED_CONFIG_FOLDER={tmp_path / 'gone'} {LINE}"
    assert moetune("lookup", "--launch", line, "--folder", tuned, *H200).exit_code == 0
    result = moetune("lookup", "--launch", line, *H200)
    assert result.exit_code == 2
    assert f"VLLM_TUNED_CONFIG_FOLDER '{tmp_path / 'gone'}' does not exist. Give --folder with" in result.stderr
    given = moetune("lookup", "--launch", line, *H200, "--folder", tuned / NAME)
    assert given.stderr == (
        f"error: --folder '{tuned / NAME}' is no folder. Give the folder that `moetune export` prints after "
        "VLLM_TUNED_CONFIG_FOLDER=.\n"
    )


def test_what_is_exported_is_hit_by_its_own_deployment_alone(moetune, tmp_path):
    found = (path for path in PROFILES if "ep8-tp1-dp-allgather-random" in str(path))
    path = next(path for path in found if "e128-k8-h4096" in str(path))
    exported = document(moetune("export", path, "--to", "vllm", "--out", tmp_path, "--json"), 0)
    words = ("lookup", "--launch", f"{LINE} --moe-backend triton", "--folder", exported["folder"], *H200)
    assert document(moetune(*words, "--json"), 0)["hit"]
    other = f"{LINE.replace('-dp 8', '-tp 8')} --moe-backend triton"
    found = document(moetune("lookup", "--launch", other, "--folder", exported["folder"], *H200, "--json"), 3)
    assert "was tuned for another deployment" in found["tables"][0]["rows"][0]["reason"]


def test_sglangs_triton_is_the_installed_one_or_given(moetune, tuned, monkeypatch):
    words = ("lookup", "--launch", R1, "--folder", tuned, *H200)
    monkeypatch.setattr(command, "_installed_triton", lambda: "3.6.0")
    assert moetune(*words).exit_code == 0
    assert moetune(*words, "--triton-version", "3.5.1").exit_code == 3
    monkeypatch.setattr(command, "_installed_triton", lambda: None)
    assert "Give --triton-version, such as 3.6.0." in moetune(*words).stderr
    assert moetune("lookup", "--launch", LINE, "--folder", tuned, *H200).exit_code == 0


def test_the_row_counts_are_those_of_the_ladder(moetune, tuned):
    words = ("lookup", "--launch", LINE, "--folder", tuned, *H200, "--json", "--ladder")
    assert [row["rows"] for row in document(moetune(*words, "5,9"), 0)["tables"][0]["rows"]] == [5, 9]
    rows = document(moetune(*words, "pow2", "--tune-max-num-tokens", 16), 0)["tables"][0]["rows"]
    assert [row["rows"] for row in rows] == [1, 2, 4, 8, 16]


def test_a_log_alone_is_read(moetune, tmp_path):
    log = tmp_path / "server.log"
    log.write_text(f"INFO Using configuration from /tuned/{NAME} for MoE layer.\n")
    found = document(moetune("lookup", "--log", log, "--json"), 0)
    assert (found["schema_version"], found["hit"], found["log"]["files"][0]["name"]) == (1, True, NAME)
    log.write_text("INFO Application startup complete.\n")
    result = moetune("lookup", "--log", log)
    assert (result.exit_code, "names no tuned file" in result.stdout) == (3, True)


def test_a_log_beside_a_line_is_the_proof(moetune, tuned, tmp_path):
    log = tmp_path / "server.log"
    text = "Using default MoE config. Performance might be sub-optimal! Config file not found at "
    log.write_text(f"{text}/x/{NAME}\n")
    found = document(moetune("lookup", "--launch", LINE, "--folder", tuned, *H200, "--log", log, "--json"), 3)
    assert found["tables"][0]["logged"] == "default"
    assert found["log"]["files"][0]["path"] == f"/x/{NAME}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "takes --launch, --log or both; neither is given. Give --launch 'vllm serve …'"),
        (("--log", "x", "--folder", "y"), "--folder given without --launch."),
        (("--launch", "trtllm-serve deepseek-ai/DeepSeek-R1"), "reads no tuned file for Triton experts."),
        (("--launch", "ls"), "--launch finds no server in 'ls'."),
    ],
)
def test_a_wrong_question_says_what_to_give(moetune, words, message):
    result = moetune("lookup", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_without_a_gpu_the_name_must_be_given(moetune, monkeypatch):
    monkeypatch.setattr(shipped, "device_name", lambda: None)
    result = moetune("lookup", "--launch", LINE)
    assert result.exit_code == 2
    assert (
        "This machine has no GPU, and the name of a tuned file contains the GPU's. Give --device-name" in result.stderr
    )
    monkeypatch.setattr(shipped, "device_name", lambda: "NVIDIA H200")
    found = document(moetune("lookup", "--launch", LINE, "--json"), 3)
    assert found["device"] == "NVIDIA H200"


def test_a_miss_without_a_folder_is_one_reason_without_a_table(moetune):
    result = moetune("lookup", "--launch", f"{LINE} --moe-backend triton", *H200)
    assert result.exit_code == 3
    assert result.stdout.splitlines()[1:] == [
        "kernels: Triton. --moe-backend triton selects them.",
        f"miss: vLLM is not installed here and no folder is given, so there is no {NAME} to find. Give --folder DIR, "
        "as `moetune export` printed it.",
        "miss: 18 of 18 row counts",
    ]


def test_the_file_of_another_gpu_leads_to_a_tune_on_this_one(moetune, tuned):
    line = f"{LINE} --moe-backend triton"
    shown = moetune("lookup", "--launch", line, "--folder", tuned, "--device-name", "NVIDIA H100 80GB HBM3").stdout
    assert "looked for" not in shown
    assert "\n  It is for NVIDIA H200.\n" in shown
    assert shown.splitlines()[-1] == (
        f"next, on a machine with NVIDIA H100 80GB HBM3: moetune tune --launch '{line}' --export tuned"
    )


def test_an_export_ends_with_the_look_up_that_checks_it(moetune, tmp_path, monkeypatch):
    monkeypatch.delenv("MOETUNE_PACKAGED_PROFILES", raising=False)
    line = f"{LINE} --moe-backend triton"
    exported = moetune("export", "--launch", line, *H200, "--to", "vllm", "--out", tmp_path)
    check, start = exported.stdout.splitlines()[-3:-1]
    assert start == "start vLLM with --moe-backend triton and:"
    assert moetune(*shlex.split(check.removeprefix("check: moetune "))).exit_code == 0
    readme = next(tmp_path.rglob("README.vllm.md")).read_text()
    assert "`--moe-backend triton`" in readme
    assert "`moetune lookup`" in readme


def test_an_export_for_sglang_ends_with_the_look_up_that_checks_it(moetune, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_installed_triton", lambda: "3.9.0")
    path = next(
        path for path in PROFILES if "ep8-tp1-dp-allgather-random" in str(path) and "e128-k8-h4096" in str(path)
    )
    exported = moetune("export", path, "--to", "sglang", "--out", tmp_path)
    check, start = exported.stdout.splitlines()[-3:-1]
    assert start == "start SGLang with --moe-runner-backend triton and:"
    line = "python -m sglang.launch_server --model-path Qwen/Qwen3-235B-A22B --tp 8 --ep 8 --dp 8 --enable-dp-attention"
    words = [line if "…" in word else word for word in shlex.split(check.removeprefix("check: moetune "))]
    assert moetune(*words[:2], f"{line} --moe-runner-backend triton", *words[3:]).exit_code == 0
