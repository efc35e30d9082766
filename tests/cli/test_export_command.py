import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import GIVE_UP_S

from moetune.backends import registry
from moetune.inputs import presets
from moetune.measure import probe
from moetune.spec.environment import Environment
from moetune.spec.regime import Regime
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store

SLUG = "ep8-tp1-dp-alltoall-packed-random"
NAME = "E=16,N=1536,device_name=NVIDIA_H200"
TACTIC = {
    "BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 1, "num_warps": 4, "num_stages": 4,
}  # fmt: skip


@pytest.fixture
def stored(tmp_path) -> Path:
    """A profile of the Triton backend that lies outside any store."""
    choice = Choice(
        rows=8, tactic=TACTIC, time_us=8.0, default_tactic=TACTIC, default_time_us=8.0, gain=1.0, gain_low=1.0,
        gain_high=1.0, noise=0.01, tried=9, candidates=9, load=(4,), max_load=4, measured_at="2026-11-20T12:00:00Z",
    )  # fmt: skip
    profile = Profile(
        layer=presets.layer("qwen3-235b-a22b"),
        regime=Regime(ep_size=8, layout="packed", ladder="8"),
        backend="triton",
        environment=Environment(
            device="NVIDIA H200", strict={"compute_capability": "9.0", "triton": "3.6.0", "remote": "drop"}
        ),
        choices=(choice,),
    )
    path = tmp_path / "profile.json"
    path.write_text(profile.model_dump_json())
    return path


def test_a_profile_is_written_for_an_engine_and_its_variable_printed(moetune, stored, tmp_path):
    result = moetune("export", stored, "--to", "vllm", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    folder = tmp_path / "out" / SLUG
    assert json.loads((folder / f"{NAME}.json").read_text()) == {"triton_version": "3.6.0", "8": TACTIC}
    assert result.stdout.splitlines()[-1] == f"export VLLM_TUNED_CONFIG_FOLDER={folder}"
    assert "warning: No dispatcher of vLLM produces the packed load" in result.stderr
    sidecar = json.loads((folder / f"{NAME}.vllm.moetune.json").read_text())
    assert sidecar["command"] == f"moetune export {stored} --to vllm --out {tmp_path / 'out'}"


def test_two_engines_and_a_second_time(moetune, stored, tmp_path):
    for target in ("vllm", "sglang"):
        assert moetune("export", stored, "--to", target, "--out", tmp_path / "out").exit_code == 0
    again = moetune("export", stored, "--to", "sglang", "--out", tmp_path / "out")
    assert again.exit_code == 0
    assert again.stdout.count("unchanged: ") == 3
    assert (tmp_path / "out" / SLUG / "configs" / "triton_3_6_0" / f"{NAME}.json").is_file()


def test_json_is_one_document(moetune, stored, tmp_path):
    result = moetune("export", stored, "--to", "sglang", "--out", tmp_path / "out", "--json")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert (document["schema_version"], document["target"]) == (1, "sglang")
    assert document["variables"] == {"SGLANG_MOE_CONFIG_DIR": str(tmp_path / "out" / SLUG)}
    assert {entry["state"] for entry in document["files"]} == {"written"}
    assert all(Path(entry["path"]).is_file() for entry in document["files"])
    assert any("packed" in warning for warning in document["warnings"])
    documented = (Path(__file__).parents[2] / "docs" / "json-schemas.md").read_text(encoding="utf-8")
    section = documented.partition("## `moetune export --json`")[2]
    assert not [name for name in document if f"`{name}`" not in section]


def test_another_content_needs_force(moetune, stored, tmp_path):
    words = ("export", stored, "--to", "vllm", "--out", tmp_path)
    moetune(*words)
    tuned = tmp_path / SLUG / f"{NAME}.json"
    tuned.write_text("{}")
    refused = moetune(*words)
    assert (refused.exit_code, tuned.read_text()) == (2, "{}")
    assert f"{tuned} exists with other content" in refused.stderr
    assert moetune(*words, "--force").exit_code == 0
    assert "triton_version" in tuned.read_text()
    assert moetune(*words).stdout.count("unchanged: ") == 3


def test_the_version_is_passed_on(moetune, stored, tmp_path):
    result = moetune("export", stored, "--to", "vllm", "--for-version", "newest", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "Not a version: 'newest'" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "vllm"], "either a profile's path, or --model"),
        (["nowhere.json", "--to", "vllm"], "There is no profile nowhere.json"),
        ([".", "--to", "vllm"], ". is a folder, no profile"),
        (["nowhere.json"], "needs --to ENGINE"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(moetune, tmp_path, words, said):
    result = moetune("export", *words, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_an_unknown_engine_lists_the_known_ones(moetune, stored, tmp_path):
    result = moetune("export", stored, "--to", "ollama", "--out", tmp_path)
    assert result.exit_code == 2
    assert "Engines: vllm, sglang, flashinfer, trtllm" in result.stderr


def test_show_of_a_folder_is_exit_2(moetune, tmp_path):
    result = moetune("show", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path} is a folder, no profile.")


def test_the_question_options_look_the_profile_up(moetune, stored, tiny, tmp_path):
    root = tmp_path / "store"
    question = ("--model", tiny(), "--ep", "4", "--dp", "--ladder", "8", "--backend", "torch", "--store", root)
    words = ("export", *question, "--to", "vllm", "--out", tmp_path / "out")
    assert moetune(*words).exit_code == 3

    answer = {
        "layer": presets.layer(str(tiny())),
        "regime": Regime(ep_size=4, attention_dp=True, ladder="8"),
        "backend": "torch",
        "environment": probe.environment(registry.backend("torch"), "cpu"),
    }
    Store(root).save(Profile.model_validate_json(stored.read_text()).model_copy(update=answer))
    found = moetune(*words)
    assert found.exit_code == 2
    assert "reads tactics of the backend triton; the profile's are of torch" in found.stderr


def test_no_torch_is_imported_for_a_file(stored, tmp_path):
    code = (
        "import sys\nfrom moetune.cli.main import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    sys.exit(end.code or 'torch' in sys.modules)"
    )
    words = ["export", str(stored), "--to", "vllm", "--out", str(tmp_path / "out")]
    assert subprocess.run([sys.executable, "-c", code, *words], timeout=GIVE_UP_S).returncode == 0
