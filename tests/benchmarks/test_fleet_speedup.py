"""The table of benchmarks/fleet.py, and the runs that it compares."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fleet


def test_the_speedup_is_over_the_first_number_of_workers():
    assert fleet.lines({1: 30.0, 3: 12.0})[2:] == ["| 1 | 30.0 | 1.00× |", "| 3 | 12.0 | 2.50× |"]
    assert fleet.lines({2: 30.0, 4: 15.0})[3] == "| 4 | 15.0 | 2.00× |"


@pytest.mark.parametrize(("seconds", "enough"), [({1: 30, 3: 14}, True), ({1: 30, 3: 15}, False), ({1: 30}, True)])
def test_it_fails_if_workers_help_too_little(seconds, enough):
    assert fleet.is_enough(seconds) is enough


def test_a_batch_on_gpus_sees_only_as_many_as_asked(tmp_path, monkeypatch):
    ran = []

    class Done:
        returncode, stdout = 0, b'{"seconds": 12.5}'

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    monkeypatch.setattr(fleet.subprocess, "run", lambda words, **options: ran.append((words, options)) or Done)
    assert fleet.measured_s(2, tmp_path / "jobs.yaml") == 12.5
    ((words, options),) = ran
    assert options["env"]["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert words[3:7] == ["batch", tmp_path / "jobs.yaml", "--ray", "local"]
    with pytest.raises(SystemExit, match="4 GPUs are asked for, and 3 are here"):
        fleet.measured_s(4, tmp_path)
