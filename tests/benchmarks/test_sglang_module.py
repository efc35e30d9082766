"""The benchmark of SGLang's MoE module: planted parts and times here, SGLang's own module in the interpreter."""

import functools
import json
import logging
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import planted_time
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/engine"))

import sglang_cells
import sglang_module
import sglang_sources
import torch
from common import Journal
from sglang_cells import CASES, Case, Folders, local_ids, measure_case, missing_proof
from sglang_module_report import markdown, problems
from sglang_sources import CONFIGS, PARTS, Module, pack, version_of

from moetune.backends.reference import moe_reference
from moetune.measure.clock import CpuClock
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

DEVICE = "NVIDIA H200"
FOLDER = "triton_3_6_0"
LAYER = MoELayer(name="tiny", num_experts=8, top_k=2, hidden_size=32, intermediate_size=16, precision="bf16")
MILLISECONDS = {16: 1.0, 32: 2.0, 64: 3.0}
"""How long a run takes by BLOCK_SIZE_M."""


class TinyCase(Case):
    layer, regime = LAYER, Regime(ep_size=2)


TINY = TinyCase("tiny", "")
NAME = TINY.file_name(DEVICE)


# ---- the pack ----


def wheel(folder, parts=PARTS):
    path = folder / "sglang-0.5.23-cp311-cp311-manylinux_2_34_x86_64.whl"
    configs = [f"{CONFIGS}/{FOLDER}/{NAME}", f"{CONFIGS}/README.md", f"{CONFIGS}/causal_conv1d_fwd_sm_90.json"]
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*parts, *configs, "sglang/srt/server_args.py"):
            archive.writestr(name, f"# {name}\n")
    return path


def test_a_pack_has_the_parts_and_sglangs_moe_files_alone(tmp_path):
    size = pack(wheel(tmp_path), tmp_path / "pack")
    found = {str(path.relative_to(tmp_path / "pack")) for path in (tmp_path / "pack").rglob("*") if path.is_file()}
    assert found == {*PARTS, f"{CONFIGS}/{FOLDER}/{NAME}", "sglang/VERSION"}
    assert size == sum(len(name) + 3 for name in found - {"sglang/VERSION"})
    assert version_of(tmp_path / "pack") == "0.5.23"


def test_another_wheel_and_another_folder_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"has no sglang/srt/.*__init__\.py\. Give the wheel of SGLang 0\.5\.23"):
        pack(wheel(tmp_path, PARTS[1:]), tmp_path / "pack")
    with pytest.raises(SystemExit, match=r"no sglang/VERSION.*sglang_module\.py pack"):
        version_of(tmp_path)


# ---- the cases ----


@pytest.mark.parametrize(
    ("case", "experts", "size", "ep"), [("qwen3-30b-ep1", 128, 768, 1), ("qwen3-235b-ep8", 16, 1536, 8)]
)
def test_a_case_is_what_sglang_serves_by_its_launch_line(case, experts, size, ep):
    regime = CASES[case].regime
    assert (regime.ep_size, regime.attention_dp, str(regime.dispatch)) == (ep, False, "none")
    assert CASES[case].file_name(DEVICE) == f"E={experts},N={size},device_name=NVIDIA_H200.json"


def test_ids_of_other_ranks_are_minus_one():
    ids = local_ids(torch.tensor([[0, 4], [7, 3]]), 4, 4)
    assert ids.tolist() == [[-1, 0], [3, -1]]
    assert ids.dtype == torch.int32


# ---- the measurement ----


class PlantedConfig:
    """Looks files up like SGLang 0.5.23, and takes the smallest BLOCK_SIZE_M of a file for its row."""

    def __init__(self, shipped):
        self.logger, self._shipped = logging.Logger("planted"), shipped
        self.logger.addHandler(logging.NullHandler())
        self.get_moe_configs = functools.lru_cache(self._read)

    def _read(self, experts, size, dtype, block_n, block_k):
        folder = os.environ.get("SGLANG_MOE_CONFIG_DIR", str(self._shipped))
        path = Path(folder, "configs", FOLDER, f"E={experts},N={size},device_name=NVIDIA_H200.json")
        if not path.exists():
            self.logger.warning(
                "Using default MoE kernel config. Performance might be sub-optimal! Config file not found at %s, "
                "you can create them", path,
            )  # fmt: skip
            return None
        self.logger.info(f"Using MoE kernel config from {path}.")
        return {int(key): row for key, row in json.loads(path.read_text()).items()}

    def try_get_optimal_moe_config(self, w1, w2, top_k, dtype, rows, return_down_config):
        experts, _, size = w2
        found = self.get_moe_configs(experts, size, dtype, 0, 0)
        if not found:
            return {"BLOCK_SIZE_M": 64}, (None, None)
        row = found[min(found, key=lambda key: abs(key - rows))]
        return row, (None, None)


class Planted(Module):
    """A module that computes the layer in fp32. A run takes as long as its BLOCK_SIZE_M says."""

    def __init__(self, folder, wrong=0.0):
        config = PlantedConfig(folder / sglang_sources.MODULE)

        def fused_experts(x, w1, w2, routed, settings):
            weights, ids, _ = routed
            assert ids.max() < len(w1)
            assert settings.num_experts == 8

            def expert(index, rows):
                gate, up = (rows @ w1[index].float().T).chunk(2, dim=-1)
                return torch.nn.functional.silu(gate) * up @ w2[index].float().T

            row, _ = config.try_get_optimal_moe_config(w1.shape, w2.shape, 2, None, len(x), True)
            planted_time.spend(MILLISECONDS[row["BLOCK_SIZE_M"]])
            return moe_reference(x, ids, weights, range(len(w1)), expert) * (1 + wrong)

        super().__init__(folder, fused_experts, lambda **given: SimpleNamespace(**given), config)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Returns the arms' folders. SGLang ships blocks of 32 rows, and moetune's file has 16."""
    monkeypatch.setattr(sglang_cells, "clock_for", lambda device: CpuClock(planted_time.now_ns))
    found = Folders(tmp_path / "empty", tmp_path / sglang_sources.MODULE, tmp_path / "tuned")
    for folder, block in ((found.shipped, 32), (found.moetune, 16)):
        (folder / "configs" / FOLDER).mkdir(parents=True)
        (folder / "configs" / FOLDER / NAME).write_text(json.dumps({"8": {"BLOCK_SIZE_M": block}}))
    (found.default / "configs").mkdir(parents=True)
    return found


def measured(folders, module, journal, rows=(1, 8), end=math.inf):
    return measure_case(
        TINY, module, folders, journal, end, where=DEVICE, sglang="0.5.23", rows=rows, device="cpu"
    )  # fmt: skip


def test_each_arm_reads_its_file_and_is_timed_and_proved(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", "before")
    journal = Journal(tmp_path / "out.jsonl")
    assert measured(folders, Planted(tmp_path), journal) == 0
    assert os.environ["SGLANG_MOE_CONFIG_DIR"] == "before"
    assert [line["rows"] for line in journal.lines] == [1, 8]
    for line in journal.lines:
        arms = line["arms"]
        assert [of["config"]["BLOCK_SIZE_M"] for of in arms.values()] == [64, 32, 16]
        for arm, milliseconds in zip(("default", "shipped", "moetune"), (3, 2, 1), strict=True):
            assert arms[arm]["us"] == pytest.approx([1000 * milliseconds] * 16, rel=1e-2)
            assert arms[arm]["missing"] == []
            assert arms[arm]["error"] < 1e-5
        assert line["again_us"] == pytest.approx([1000] * 16, rel=1e-2)
        assert line["eager"] == []
        assert "Using MoE kernel config from" in arms["moetune"]["log"][0]
        assert len(arms["moetune"]["log"]) == 1
    assert list(problems(journal.lines, ["tiny"], [1, 8])) == []
    text = markdown(journal.lines, [])
    assert "| 8 | 3.00" in text
    assert re.search(r"- geometric mean over `default`: (2\.99|3\.00)", text)
    assert f"- `moetune`: Using MoE kernel config from {folders.moetune}/configs/{FOLDER}/{NAME}." in text
    assert text.endswith("## Problems\n\n- none")


def test_a_cut_measurement_goes_on_and_another_export_is_measured_anew(folders, tmp_path):
    path, module = tmp_path / "out.jsonl", Planted(tmp_path)
    assert measured(folders, module, Journal(path), rows=(1,)) == 0
    assert measured(folders, module, Journal(path), rows=(1, 8), end=0) == 1
    assert measured(folders, module, Journal(path), rows=(1, 8)) == 0
    assert [line["rows"] for line in Journal(path).lines] == [1, 8]
    (folders.moetune / "configs" / FOLDER / NAME).write_text(json.dumps({"4": {"BLOCK_SIZE_M": 64}}))
    assert measured(folders, module, Journal(path), rows=(1,)) == 0
    lines = Journal(path).lines
    assert [line["rows"] for line in lines] == [1, 8, 1]
    found = list(problems(lines, ["tiny"], [1, 8]))
    assert "tiny, NVIDIA H200: not measured at 8 rows" in found
    assert any("slower than `shipped`: -33" in problem for problem in found)
    assert not any("`default`" in problem for problem in found)  # the same configuration


def test_an_arm_is_left_out_if_sglang_ships_no_file(folders, tmp_path):
    (folders.shipped / "configs" / FOLDER / NAME).unlink()
    journal = Journal(tmp_path / "out.jsonl")
    assert measured(folders, Planted(tmp_path), journal, rows=(8,)) == 0
    assert list(journal.lines[0]["arms"]) == ["default", "moetune"]
    assert "- SGLang ships no file for this shape and GPU." in markdown(journal.lines, [])
    assert list(problems(journal.lines, ["tiny"], [8])) == []


def test_a_wrong_output_is_a_problem(folders, tmp_path):
    journal = Journal(tmp_path / "out.jsonl")
    measured(folders, Planted(tmp_path, wrong=0.02), journal, rows=(8,))
    found = list(problems(journal.lines, ["tiny"], [8]))
    assert len(found) == 3
    assert found[0] == "tiny, 8 rows, `default`: relative error 2.0e-02, allowed 1e-02"


def test_slower_unproved_and_eager_arms_are_problems_and_the_exit_code_says_so(folders, tmp_path, capsys):
    journal = Journal(tmp_path / "out.jsonl")
    measured(folders, Planted(tmp_path), journal, rows=(8,))
    line = journal.lines[0]
    report = ["report", str(journal.path), "--rows", "8", "--cases", "qwen3-30b-ep1"]

    def found(**changed):
        path = tmp_path / "changed.jsonl"
        path.write_text(json.dumps({**line, "case": "qwen3-30b-ep1", **changed}))
        return sglang_module.main(["report", str(path), *report[2:]]), capsys.readouterr().out

    assert sglang_module.main(report) == 1
    assert "qwen3-30b-ep1: not measured" in capsys.readouterr().out
    assert found()[0] == 0
    code, text = found(eager=["operation not permitted when stream is capturing"])
    assert code == 1
    assert "timed without a CUDA graph: operation not permitted" in text
    mine = line["arms"]["moetune"]
    code, text = found(arms={**line["arms"], "moetune": {**mine, "missing": ["that SGLang looked in tuned"]}})
    assert code == 1
    assert "8 rows, `moetune`: not proved: that SGLang looked in tuned" in text
    slower = {**line["arms"], "moetune": {**mine, "us": [2040.0 + at for at in range(16)]}}
    code, text = found(arms=slower, again_us=[2040.0 + at for at in range(16)])
    assert code == 1
    assert "8 rows: moetune's arm is slower than `shipped`: -2" in text
    assert found(arms=slower, again_us=[1990.0 + at for at in range(16)])[0] == 0  # within the noise
    code, text = found(arms=slower, again_us=[1000.0 + at for at in range(16)])
    assert code == 1
    assert "8 rows: the A/A noise is 10" in text


@pytest.mark.parametrize("arm", ["default", "shipped", "moetune"])
def test_proof_is_missing_if_sglang_read_anything_else(arm, folders):
    folder = getattr(folders, arm)
    path = f"{folder}/configs/{FOLDER}/{NAME}"
    read = f"Using MoE kernel config from {path}."
    default = (
        f"Using default MoE kernel config. Performance might be sub-optimal! Config file not found at {path}, you can"
    )
    other = f"Config file not found at {path}. Fallback to triton version 3.2.0 and use MoE kernel config from {path}."
    rows = None if arm == "default" else {8: {"BLOCK_SIZE_M": 32 if arm == "shipped" else 16}}
    right = {"default": [default], "shipped": [read, other], "moetune": [read]}[arm]
    for line in right:
        assert missing_proof(arm, NAME, [line], folder, rows) == []
        assert missing_proof(arm, NAME, [line], folder.parent / "elsewhere", rows)
        assert missing_proof(arm, NAME, [line], folder, {8: {"BLOCK_SIZE_M": 128}})
        assert missing_proof(arm, NAME, [line.replace("E=4", "E=5")], folder, rows)
    for line in {default, read, other} - set(right):
        assert missing_proof(arm, NAME, [line], folder, rows)
    assert missing_proof(arm, NAME, [], folder, rows)


# ---- the tune ----


def test_what_the_store_lacks_is_tuned_once_by_sglangs_launch_line(tmp_path, monkeypatch):
    commands = []
    case = CASES["qwen3-235b-ep8"]
    options = SimpleNamespace(out=tmp_path / "out", sglang=tmp_path / "pack", kernel="sglang")
    pack(wheel(tmp_path), options.sglang)
    monkeypatch.setattr(sglang_module.importlib.metadata, "version", lambda name: "3.6.0")

    def tune(command, env, check):
        commands.append((command, env["PYTHONPATH"].split(os.pathsep)))
        path = Path(command[command.index("--export") + 1]) / "ep8" / "configs" / FOLDER / case.file_name(DEVICE)
        path.parent.mkdir(parents=True)
        path.write_text("{}")

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="moetune has written no configs/triton_3_6_0/E=16,N=1536"):
        sglang_module.folders_of(case, options, DEVICE, tmp_path / "shipped")
    monkeypatch.setattr(subprocess, "run", tune)
    for _ in range(2):
        found = sglang_module.folders_of(case, options, DEVICE, tmp_path / "shipped")
    assert found == Folders(options.out / "empty", tmp_path / "shipped", options.out / "tuned" / case.name / "ep8")
    assert found.variable("shipped") is None
    ((command, paths),) = commands
    assert command[command.index("--launch") + 1] == case.launch
    assert command[command.index("--for-version") + 1] == "0.5.23"
    assert paths[1] == str(options.sglang)
    assert (Path(paths[0]) / "moetune").is_dir()


def test_the_command_compiles_and_measures_only_what_the_journal_lacks(folders, tmp_path, monkeypatch, capsys):
    compiled, (sglang, out) = [], (tmp_path / "pack", tmp_path / "out")
    pack(wheel(tmp_path), sglang)
    cell = functools.partial(measure_case, device="cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: DEVICE)
    monkeypatch.setattr(sglang_module, "CASES", {"tiny": TINY})
    monkeypatch.setattr(sglang_module, "load", lambda folder, device: Planted(tmp_path))
    monkeypatch.setattr(sglang_module, "folders_of", lambda *given: folders)
    monkeypatch.setattr(sglang_module, "compile_ahead", lambda *given: compiled.append(given[-1]))
    monkeypatch.setattr(sglang_module, "measure_case", cell)

    def run(*options):
        command = ["measure", str(out), "--sglang", str(sglang), "--cases", "tiny", *options]
        return sglang_module.main(command), capsys.readouterr().err

    assert run("--rows", "1", "--seconds", "-1") == (1, "tiny: the time is up\n")
    assert run("--rows", "1") == (0, "All is measured.\n")
    assert run("--rows", "1,8") == (0, "All is measured.\n")
    assert compiled == [[1], [8]]
    assert [line["rows"] for line in Journal(out / "sglang_module.jsonl").lines] == [1, 8]
    assert sglang_module.main(["report", str(out / "sglang_module.jsonl"), "--cases", "tiny", "--rows", "1,8"]) == 0
    with pytest.raises(SystemExit, match=r"No case is named small\. There are: tiny\."):
        sglang_module.main(["measure", str(out), "--sglang", str(sglang), "--cases", "small"])


# ---- SGLang's own module ----


@pytest.fixture
def packed(engine_sources, tmp_path):
    """Returns a pack of the engine's sources, without its files."""
    sources, folder = engine_sources("sglang"), tmp_path / "pack"
    for part in PARTS:
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(sources / part, folder / part)
    (folder / CONFIGS / FOLDER).mkdir(parents=True)
    (folder / "sglang" / "VERSION").write_text("0.5.23\n")
    return folder


def printed_by(script, *arguments, **variables):
    """Runs a script of this folder, and returns the JSON of its last line."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_sglangs_kernels_and_what_replaces_others_compile_for_hopper(packed):
    gemm = [["act_and_mul_kernel", False], ["fused_moe_kernel", True], ["_moe_sum_reduce_kernel", True]]
    assert printed_by("compile_sglang.py", packed) == [
        ["_moe_align_small_numel_kernel", True], ["fused_moe_kernel", True], *gemm,
        ["_count_slots", False], ["_place_slots", False], ["fused_moe_kernel", True], *gemm,
        ["_activate_sorted", False],
    ]  # fmt: skip


def test_sglangs_module_reads_each_arms_file_and_computes_the_layer(packed, tmp_path):
    """Runs SGLang's own module with its own Triton kernels; see `interpret_sglang.py`."""
    out = tmp_path / "out"
    out.mkdir()
    found = printed_by("interpret_sglang.py", packed, out, TRITON_INTERPRET="1")
    whole, shared = found["lines"]
    assert list(whole["arms"]) == ["default", "moetune"]
    assert list(shared["arms"]) == ["default", "shipped", "moetune"]
    for line in (whole, shared):
        for of in line["arms"].values():
            assert of["missing"] == []
            assert of["error"] < 1e-2
    assert shared["arms"]["default"]["config"]["BLOCK_SIZE_M"] == 64  # SGLang's heuristic for M > E
    assert "Fallback to triton version 3.4.0" in shared["arms"]["shipped"]["log"][0]
    assert shared["arms"]["shipped"]["down"]["GROUP_SIZE_M"] == 16
    assert shared["arms"]["moetune"]["log"][0].startswith(f"Using MoE kernel config from {out}/ep2/configs/")
    error, written = found["sorted"]
    assert error < 1e-2
    assert written == 0
