"""What lies where a file is expected, and what names and messages can hold, from the command line."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from moetune.cli.main import main

PROFILES = sorted((Path(__file__).parents[2] / "profiles").glob("*/*/*/*.json"))
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
LAUNCH = "vllm serve Qwen/Qwen3-30B-A3B -dp 8 -ep"


def run(*words: object) -> tuple[int, str]:
    """The exit code and everything that is printed, of which a terminal obeys nothing."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    text = result.stdout + result.stderr
    assert not isinstance(result.exception, Exception), result.exception
    assert "unexpected" not in text
    assert not OBEYED.search(text)
    return result.exit_code, text


def changed(tmp_path: Path, path: str = "profile.json", **fields: object) -> Path:
    """A packaged profile with other fields, as a file: `layer__name="x"` sets the layer's name."""
    document = json.loads(PROFILES[0].read_text(encoding="utf-8"))
    for name, value in fields.items():
        holder = document
        *outer, last = name.split("__")
        for part in outer:
            holder = holder[part]
        holder[last] = value
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(json.dumps(document), encoding="utf-8")
    return tmp_path / path


@pytest.mark.parametrize("kind", ["fifo", "device", "large", "binary", "loop"])
@pytest.mark.parametrize(
    "words",
    [
        ("show", "FILE"),
        ("report", "FILE", "--csv", "out.csv"),
        ("export", "FILE", "--to", "vllm", "--out", "out"),
        ("plan", "--model", "FILE"),
        ("plan", "--launch", "vllm serve FILE"),
        ("plan", "--launch", "vllm serve Qwen/Qwen3-30B-A3B --config FILE"),
        ("lookup", "--log", "FILE"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_what_is_no_readable_file_ends_a_command_at_once(words, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    match kind:
        case "fifo":
            os.mkfifo("file.json")
        case "device":
            os.symlink("/dev/zero", "file.json")
        case "large":
            with open("file.json", "wb") as file:
                file.truncate(2**41)
        case "binary":
            Path("file.json").write_bytes(bytes(range(128, 256)) * 100)
        case "loop":
            os.symlink("file.json", "file.json")
    code, text = run(*(word.replace("FILE", "./file.json") for word in words))
    assert code != 0
    assert text.startswith(("error: ", "the log ")) if kind == "binary" else text.startswith("error: ")
    assert len(text) < 1500


def test_a_store_with_other_things_in_it_lists_its_profiles(tmp_path):
    for name in ("x[/]", "[bold]y", ":warning:"):
        changed(tmp_path, f"a/b/c/{len(name)}.json", layer__name=name)
    changed(tmp_path, "a/b/c/escape.json", layer__name="\x1b[2Jz")
    os.mkfifo(tmp_path / "a/b/c/fifo.json")
    (tmp_path / "a/b/c/folder.json").mkdir()
    (tmp_path / "a/b/c/dangling.json").symlink_to("nothing")
    os.symlink("/dev/zero", os.fsencode(tmp_path) + b"/a/b/c/\xff\x1b.json")
    code, text = run("store", "list", "--store", tmp_path)
    assert code == 0
    assert all(name in text for name in ("x[/]", "[bold]y", ":warning:", "unreadable", r"\x1b[2Jz", r"\udcff\x1b.json"))
    code, text = run("store", "list", "--store", tmp_path, "--json")
    assert {entry["layer"]["name"] for entry in json.loads(text)["profiles"]} == {"x[/]", "[bold]y", ":warning:"}
    assert len(json.loads(text)["unreadable"]) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"environment__device": "../../../../escaped"},
        {"environment__device": "/escaped"},
        {"environment__device": ".."},
        {"environment__device": "a/b"},
        {"environment__strict__triton": "../../../escaped"},
        {"backend": "../escaped"},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", ["vllm", "sglang", "flashinfer", "trtllm"])
def test_an_export_writes_into_its_folder_only(changes, target, tmp_path):
    path = changed(tmp_path, "in/profile.json", **changes)
    run("export", path, "--to", target, "--out", tmp_path / "deep" / "down" / "out")
    written = {each for each in tmp_path.rglob("*") if each.is_file()} - {path}
    assert all(each.is_relative_to(tmp_path / "deep" / "down" / "out") for each in written)


@pytest.mark.parametrize(
    "words",
    [
        ("--experts", 10**9, "--top-k", 8, "--hidden", 2048, "--intermediate", 768),
        ("--experts", 128, "--top-k", 8, "--hidden", 2**40, "--intermediate", 768),
        ("--model", "qwen3-30b-a3b", "--draws", 10**6),
        ("--model", "qwen3-30b-a3b", "--redundant-experts", 10**9),
        ("--model", "qwen3-30b-a3b", "--ep", 10**30),
        ("--model", "qwen3-30b-a3b", "--tune-max-num-tokens", 10**12),
        ("--model", "qwen3-30b-a3b", "--ladder", f"1,2,{10**12}"),
        ("--model", "qwen3-30b-a3b", "--ladder", "pow2/" + "9" * 5000),
        ("--launch", "vllm serve Qwen/Qwen3-30B-A3B -ep -dp 1000000000"),
        ("--launch", "vllm serve Qwen/Qwen3-30B-A3B --max-num-batched-tokens 1000000000G"),
    ],
    ids=lambda words: str(words)[:60],
)
def test_a_number_out_of_range_is_an_error_at_once(words):
    code, text = run("plan", *words)
    assert code == 2
    assert re.search(r"must be (at most|an integer)|exceeds the|does not divide", text), text
    assert len(text) < 1500


def test_a_config_of_a_billion_experts_is_an_error_at_once(tiny):
    code, text = run("plan", "--model", tiny(num_experts=10**9))
    assert code == 2
    assert "num_experts must be at most 65,536, given 1000000000." in text


def test_a_profile_of_a_billion_experts_is_an_error_at_once(tmp_path):
    code, text = run("show", changed(tmp_path, layer__num_experts=10**9))
    assert code == 1
    assert "num_experts must be at most 65,536, given 1000000000." in text


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--model", "\x1b[31m\u202ered\x9b"),
        ("plan", "--model", "qwen3-30b-a3b", "--dispatch", "vllm:\x1b]0;title\x07"),
        ("plan", "--launch", "vllm serve \x1b[31mred"),
        ("plan", "--launch", "vllm serve Qwen/Qwen3-30B-A3B --\x1b[31mflag 1"),
        ("show", "\x1b[31m.json"),
        ("\x1b[31m",),
        ("show", "--\x1b[31m"),
        ("lookup", "--device-name", "\x1b[31m", "--launch", LAUNCH, "--folder", "."),
    ],
    ids=lambda words: str(words)[:60],
)
def test_what_a_terminal_would_obey_is_printed_as_its_escape_sequence(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = run(*words)
    assert code != 0
    assert r"\x1b" in text
