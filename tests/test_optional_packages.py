"""Without FlashInfer, Triton or vLLM the test modules that need them are skipped, and the others run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from optional_packages import OPTIONAL

ABSENT = """
import importlib.util
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in {absent!r} else find_spec(name, package)
"""


def pytest_of(folder, *options):
    """What pytest prints, and its exit code, in a process with a plugin from `folder`."""
    paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "pytest", "-p", "absent", "-p", "no:cacheprovider", "-rs", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    del environment["MOETUNE_PACKAGED_PROFILES"]  # a fixture has set it for this test
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return done.stdout + done.stderr, done.returncode


def test_a_module_without_its_package_is_skipped_and_a_broken_one_is_an_error(tmp_path):
    (tmp_path / "absent.py").write_text(ABSENT.format(absent=["flashinfer"]))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text("from optional_packages import pytest_pycollect_makemodule\n")
    (tmp_path / "helper.py").write_text("import flashinfer.autotuner\n")
    (tmp_path / "test_lacking.py").write_text("import helper\n\ndef test_one(): ...\n")
    (tmp_path / "test_plain.py").write_text("def test_two(): ...\n")
    printed, code = pytest_of(tmp_path, str(tmp_path))
    assert "test_lacking.py: flashinfer is not installed" in printed
    assert "1 passed, 1 skipped" in printed
    assert code == 0
    (tmp_path / "helper.py").write_text("import json.no_such_part\n")
    printed, code = pytest_of(tmp_path, str(tmp_path))
    assert "No module named 'json.no_such_part'" in printed
    assert code == 2


@pytest.mark.slow
def test_the_gpu_tests_are_collected_without_optional_packages(tmp_path):
    """One that is missing on a GPU host must not end the whole session."""
    (tmp_path / "absent.py").write_text(ABSENT.format(absent=sorted(OPTIONAL)))
    folder = Path(__file__).parent
    printed, code = pytest_of(tmp_path, "-m", "gpu", "--collect-only", f"--rootdir={folder.parent}", str(folder))
    assert code == 0, printed[-3000:]
    assert "flashinfer is not installed" in printed
    assert "triton is not installed" in printed
    assert "test_clock.py::" in printed
