"""moetune's rules against humming-kernels itself, from the package index, with NVRTC and without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import humming_facts
import pytest

from moetune.backends.humming.config import Config

pytestmark = [pytest.mark.network, pytest.mark.slow]
PACKAGES = (
    "humming-kernels==0.1.19",
    "nvidia-cuda-nvrtc==13.*",
    "nvidia-cuda-runtime==13.*",
    "nvidia-cuda-cccl==13.*",
    "cuda-bindings==13.*",
    "cuda-pathfinder",
    "jinja2",
    "markupsafe",
    "filelock",
    "safetensors",
    "tabulate",
    "tqdm",
)
TIMEOUT_S = 1800


@pytest.fixture(scope="module")
def facts(pytestconfig, tmp_path_factory):
    if "network" not in str(pytestconfig.getoption("markexpr")):
        pytest.skip("only `pytest -m network` downloads humming-kernels")
    folder = tmp_path_factory.mktemp("humming")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder / "packages")]
    subprocess.run([*install, *PACKAGES], check=True, timeout=TIMEOUT_S)
    paths = [str(folder / "packages"), str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]
    places = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HUMMING_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, humming_facts.__file__],
        env=os.environ | places,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_the_known_version_and_finds_a_compiler(facts):
    assert facts["version"] == "0.1.19"
    assert facts["compiler"] is None


def test_shared_memory_and_refusals_are_the_packages_own(facts):
    assert facts["asked"] > 4000
    assert facts["other"] == []


def test_listed_configurations_compile_and_a_launch_finds_them(facts):
    assert set(facts["sizes"]) == set(humming_facts.LEGAL)
    assert min(facts["sizes"].values()) > 10_000
    assert facts["same"] == [True] * len(humming_facts.LEGAL)


def test_a_refused_configuration_does_not_compile(facts):
    assert facts["refused"].startswith("refused: NVRTCCompiler failed")


def test_the_heuristics_choices_have_the_fields_of_a_configuration(facts):
    """What it chooses for few and for many slots is of the listed kinds, with the same fields beside the tactic."""
    for kind, rows in facts["heuristic"].items():
        for fields in rows:
            config = Config(
                fields["mma_type"],
                tuple(fields["block_shape"]),
                tuple(fields["warp_shape"]),
                fields["num_stages"],
                fields["num_ctas_per_sm"],
                fields.get("use_warp_spec", False),
                fields["use_stream_k"],
                fields.get("raster_group_m", 1),
            )
            mine = config.fields(kind)
            if config.producer:
                assert {name: mine[name] for name in fields if name in mine} | {
                    "block_shape": fields["block_shape"],
                    "warp_shape": fields["warp_shape"],
                } == {name: value for name, value in fields.items() if name in mine}
                assert set(fields) - set(mine) <= {"wgmma_use_late_as"}
    assert facts["heuristic"]["indexed"][0]["mma_type"] == "mma"
