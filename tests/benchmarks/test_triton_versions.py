"""The parts of the comparison of Triton versions that need no GPU: archives, the choice of tactics, and the report."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tarfile
import zipfile
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import planted_time
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import triton_archives as archives
import triton_versions as versions
from common import Journal
from planted import LAYER, PlantedBackend, tactic
from triton_versions import Cell, Recorded

from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.measure.clock import CpuClock
from moetune.search.revalidate import steps
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.reading import load_profile

MEMBERS = {
    "triton/__init__.py": b"__version__ = '9.9.9'",
    "triton/_C/libtriton.so": b"large",
    "triton/_C/libproton.so": b"left out",
    "triton/tools/disasm.py": b"# the compiler imports it",
    "triton/backends/nvidia/bin/ptxas": b"binary",
    "triton/backends/nvidia/bin/ptxas-blackwell": b"left out",
    "triton/backends/nvidia/lib/libdevice.10.bc": b"code",
    "triton/backends/nvidia/lib/cupti/libcupti_static.a": b"left out",
    "triton/backends/nvidia/include/cuda.h": b"header",
    "triton/backends/nvidia/driver.c": b"source",
    "triton/backends/amd/compiler.py": b"# an entry point imports it",
    "triton/backends/amd/include/hip/hip_runtime.h": b"left out",
    "triton/instrumentation/libGPUInstrumentationTestLib.so": b"left out",
    "triton-9.9.9.dist-info/METADATA": b"Name: triton\nVersion: 9.9.9\n",
    "triton-9.9.9.dist-info/entry_points.txt": b"[triton.backends]\n",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "triton-9.9.9-cp312-cp312-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as file:
        for name, content in MEMBERS.items():
            file.writestr(name, content)
    return path


def test_an_archive_has_what_compiling_needs_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    archive = archives.pack(archives.found("9.9.9", "3.12", tmp_path), archives.archive_of("9.9.9", tmp_path))
    assert archive.name == "triton-9.9.9.txz"
    with tarfile.open(archive) as tar:
        assert sorted(tar.getnames()) == sorted(name for name, content in MEMBERS.items() if content != b"left out")
    assert list(tmp_path.glob("*.tar*")) == []


def test_an_unpacked_version_precedes_the_installed_one(wheel: Path, tmp_path: Path, monkeypatch) -> None:
    archives.pack(wheel, archives.archive_of("9.9.9", tmp_path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    first, second = versions.environment_with("9.9.9", tmp_path)["PYTHONPATH"].split(os.pathsep)
    assert second == "elsewhere"
    assert (Path(first) / "triton/__init__.py").read_bytes() == MEMBERS["triton/__init__.py"]
    assert os.access(Path(first) / "triton/backends/nvidia/bin/ptxas", os.X_OK)
    marker = Path(first) / "marker"
    marker.touch()
    versions.environment_with("9.9.9", tmp_path)
    assert marker.exists()
    assert versions.environment_with(versions.INSTALLED, tmp_path)["PYTHONPATH"] == "elsewhere"


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no wheel of triton 1\.2\.3 for Python 3\.12"):
        archives.found("1.2.3", "3.12", tmp_path)


def test_large_files_of_a_small_kind_are_left_out() -> None:
    assert archives.is_needed("triton/a.py", 10)
    assert not archives.is_needed("triton/a.json", archives.LARGE_BYTES)
    assert not archives.is_needed("triton/FileCheck", 10)


def test_the_tactics_of_a_cell_are_the_default_the_winners_and_their_neighbors() -> None:
    profiles = [load_profile(path) for path in sorted(versions.PROFILES.rglob("*.json"))]
    backend = TritonBackend()
    cells = versions.cells_of([128])
    assert [(cell.layer.name, cell.layer.precision.value) for cell in cells] == [
        ("qwen3-235b-a22b", "fp8_block"),
        ("qwen3-30b-a3b", "bf16"),
    ]
    for cell in cells:
        tactics = versions.tactics_of(backend, cell, profiles, "cpu", 40)
        assert len(tactics) == len(set(tactics)) == 40
        assert tactics[0] == backend.default(cell.layer, versions.REGIME, 128)
        own = [profile for profile in profiles if profile.layer.name == cell.layer.name]
        own = [profile for profile in own if profile.layer.precision is cell.layer.precision]
        candidates = backend.candidates(cell.layer, versions.REGIME, 128, "cpu").tactics
        winners = {profile.choice(128).tactic for profile in own} & set(candidates)
        assert winners <= set(tactics)
        assert set(tactics) <= set(candidates)
        if winners:
            assert set(steps(candidates, next(iter(winners)))) & set(tactics)


def test_measuring_fills_the_journal_skips_what_fails_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[PlantedBackend] = []

    def planted() -> PlantedBackend:
        made.append(PlantedBackend({"default": 2.0, "fast": 1.0, "slow": 3.0, "bad": 1.0}, raising=frozenset({"bad"})))
        return made[-1]

    monkeypatch.setattr("moetune.backends.grouped_triton.backend.TritonBackend", planted)
    monkeypatch.setattr("moetune.measure.clock.clock_for", lambda device: CpuClock(planted_time.now_ns))
    monkeypatch.setattr(versions, "cells_of", lambda rows: [Cell(LAYER, count) for count in rows])
    monkeypatch.setattr(versions, "tactics_of", lambda *question: [tactic(name) for name in made[-1].milliseconds])
    monkeypatch.setattr(versions, "REGIME", Regime(ep_size=2, attention_dp=True))
    journal = tmp_path / "versions.jsonl"
    options = argparse.Namespace(journal=journal, device="cpu", passes=2, rows="4,8", tactics=4)
    versions.measure_installed(options, end=0.0)
    assert not journal.exists()
    assert capsys.readouterr().out.count("left for the next run") == 4

    versions.measure_installed(options, end=math.inf)
    found = versions.recorded(Journal(journal).lines)
    ((version, _), _) = found
    assert found.keys() == {(version, 0), (version, 1)}
    for cells in found.values():
        assert cells.keys() == {(LAYER.name, 4), (LAYER.name, 8)}
        for each in cells.values():
            assert each.default == tactic("default")
            wanted = {tactic("default"): 2e3, tactic("fast"): 1e3, tactic("slow"): 3e3}
            assert each.times_us == pytest.approx(wanted, rel=0.01)
    assert "planted failure" in capsys.readouterr().out
    lines = journal.read_text()
    versions.measure_installed(options, end=math.inf)
    assert journal.read_text() == lines
    assert made[-1].prepared == []


def test_each_version_has_a_process_of_its_own_and_one_that_fails_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[tuple[list[str], str]] = []

    def run(command: list[str], *, env: dict[str, str], check: bool) -> SimpleNamespace:
        started.append((command, env["PYTHONPATH"]))
        return SimpleNamespace(returncode=len(started) - 1)

    monkeypatch.setattr(versions, "environment_with", lambda version, archives: {"PYTHONPATH": version})
    monkeypatch.setattr(versions.subprocess, "run", run)
    options = argparse.Namespace(
        versions="installed,3.8.0",
        archives=tmp_path,
        journal=tmp_path / "j",
        passes=2,
        rows="8",
        tactics=4,
        device="cuda",
    )
    assert versions.measure_all(options, end=1e12) == 1
    assert [path for _, path in started] == ["installed", "3.8.0"]
    assert all(command[2] == "one" for command, _ in started)
    assert capsys.readouterr().out.splitlines() == ["triton installed: done", "triton 3.8.0: exit code 1"]


A, B, C = (Tactic(x=x) for x in (1, 2, 3))
FAR = Tactic(x=9)


def cell(*times: float, default: Tactic = A) -> dict[tuple[str, int], Recorded]:
    return {("m", 8): Recorded(dict(zip((A, B, C, FAR), times, strict=False)), default)}


def test_the_old_winner_and_its_check_are_judged_by_the_second_pass() -> None:
    result = versions.moved(cell(1.0, 2.0, 3.0), cell(2.0, 1.0, 0.5), cell(2.0, 1.2, 1.0))
    assert result.kept == (2.0,)
    assert result.checked == (1.2,)
    assert result.tau == (-1.0,)


def test_tactics_that_one_version_lacks_do_not_count() -> None:
    result = versions.moved(cell(2.0, 1.0, 3.0, 0.1), cell(2.0, 1.0, 3.0), cell(2.0, 1.0, 3.0))
    assert (result.kept, result.checked, result.tau) == ((1.0,), (1.0,), (1.0,))
    assert versions.moved(cell(1.0), {}, cell(1.0)).kept == ()


def test_kendalls_tau_agrees_with_its_definition() -> None:
    for order in permutations((1.0, 2.0, 3.0, 4.0)):
        pairs = [(a, b) for a in range(4) for b in range(a)]
        wanted = sum(1 if order[a] > order[b] else -1 for a, b in pairs) / len(pairs)
        assert versions.kendall((1.0, 2.0, 3.0, 4.0), order) == pytest.approx(wanted)
    assert versions.kendall((1.0, 1.0, 2.0), (1.0, 2.0, 3.0)) == pytest.approx(2 / 3)
    assert versions.kendall((1.0,), (2.0,)) == 1.0


def line(triton: str, number: int, *times: float | None) -> dict[str, object]:
    listed = [{"tactic": dict(tactic), "us": us} for tactic, us in zip((A, B, C), times, strict=True)]
    return {"triton": triton, "pass": number, "model": "m", "rows": 8, "times": listed, "default": dict(A)}


def test_the_report_has_a_line_for_each_pair_and_each_version_beside_itself() -> None:
    lines = [line("3.6.0", 0, 1.0, 2.0, None), line("3.6.0", 1, 1.01, 2.0, 3.0)]
    lines += [line("3.10.0", 0, 2.0, 1.0, 3.0), line("3.10.0", 1, 1.5, 1.0, 3.0), line("3.5.0", 0, 1.0, 2.0, 3.0)]
    _, *rows = versions.report(versions.recorded(lines))
    assert [row.split()[:3] for row in rows] == [
        ["3.5.0", "3.6.0", "1"],
        ["3.5.0", "3.10.0", "1"],
        ["3.6.0", "3.6.0", "1"],
        ["3.6.0", "3.10.0", "1"],
        ["3.10.0", "3.6.0", "1"],
        ["3.10.0", "3.10.0", "1"],
    ]
    assert rows[3].split()[3:5] == ["50.00%", "50.0%"]
    assert rows[2].split()[3:] == ["0.00%", "0.0%", "0.00%", "0.0%", "1.000"]


def test_a_cell_is_a_named_layer_and_its_rows() -> None:
    assert all(isinstance(each, Cell) and each.rows in versions.ROWS for each in versions.cells_of(versions.ROWS))
    assert len(versions.cells_of(versions.ROWS)) == 12
