import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SAYS = {
    "plan_a_launch_line.py": "qwen3-235b-a22b under ep8-tp1-dp-allgather-random: rank 0 has 16 experts",
    "tune_and_look_up.py": "another EP size is a miss:",
    "export_for_vllm.py": "export VLLM_TUNED_CONFIG_FOLDER=",
}


def run(name, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MOETUNE_PACKAGED_PROFILES": "1"}
    return subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_the_example_runs(name, tmp_path):
    done = run(name, tmp_path)
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout


def test_the_exported_folder_holds_the_file_that_vllm_looks_for(tmp_path):
    folder = Path(run("export_for_vllm.py", tmp_path).stdout.rpartition("=")[2].strip())
    assert (folder / "E=16,N=1536,device_name=NVIDIA_H200.json").is_file()
