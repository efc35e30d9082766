"""Two ranks that start at once choose the same tactics, if the engine has a group of them."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from processes import GIVE_UP_S
from stand_ins import FAST, MIDDLING

from moetune.engine.ranks import ENGINE_GROUPS, engine_group

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).with_name("two_ranks.py")
HYBRID = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(768, 2049, 256), *range(2560, 4097, 512), 8192]


def ranks(engine, op, folder):
    paths = [str(PROGRAM.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", str(PROGRAM)]
    started = [
        subprocess.Popen(
            [*command, str(rank), engine, op, str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=GIVE_UP_S)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_the_first_rank_tunes_cutlass_once_and_both_take_its_answer(tmp_path):
    first, second = ranks("vllm", "cutlass", tmp_path)
    assert len(HYBRID) == 21
    assert (first["measured"], second["measured"]) == (HYBRID, [])
    assert first["chosen"] == second["chosen"] == [[1, 1], [8, 8], [8192, 8192]]
    for rank in (first, second):
        assert (rank["served"], rank["tuned"], rank["missed"]) == ([], HYBRID, [])


def test_without_a_group_each_rank_tunes_by_itself(tmp_path):
    first, second = ranks("none", "cutlass", tmp_path)
    assert first["measured"] == second["measured"] == HYBRID
    assert first["chosen"] == [[1, 1], [8, 8], [8192, 8192]]
    assert second["chosen"] == [[1001, 2001], [1008, 2008], [9192, 10192]]


def test_ranks_choose_alike_by_the_times_of_the_slower_one_even_if_one_was_served_before(tmp_path):
    first, second = ranks("sglang", "trtllm", tmp_path)
    assert (first["before"], second["before"]) == ([-1] * 4, [MIDDLING] * 4)
    assert first["chosen"] == second["chosen"] == [FAST] * 4
    assert first["tuned"] == second["tuned"] == [1, 2, 4, 8]


@pytest.mark.parametrize(("engine", "name", "function", "versions"), ENGINE_GROUPS)
def test_an_engine_without_a_group_yet_has_none(engine, name, function, versions, monkeypatch):
    def raises():
        raise AssertionError("not initialized")

    module, package = types.ModuleType(name), types.ModuleType(engine)
    vars(package)["__version__"] = versions[0] + "0"
    monkeypatch.setitem(sys.modules, engine, package)
    monkeypatch.setitem(sys.modules, name, module)
    assert engine_group() is None
    setattr(module, function, raises)
    assert engine_group() is None
    setattr(module, function, lambda: types.SimpleNamespace(cpu_group="a group that torch.distributed does not know"))
    assert engine_group() is None


@pytest.mark.parametrize(
    ("version", "asked"), [("0.26.0", True), ("0.33.1", True), ("0.28.0", False), ("0.34.0", False), ("0.2.6", False)]
)
def test_a_group_is_taken_from_versions_only_in_which_all_ranks_tune(version, asked, monkeypatch):
    """In vLLM versions between them the first rank tunes alone, and would wait for the others in vain."""
    calls = []
    module, package = types.ModuleType("vllm.distributed.parallel_state"), types.ModuleType("vllm")
    vars(module)["get_ep_group"] = lambda: calls.append(version)
    vars(package)["__version__"] = version
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert engine_group() is None
    assert bool(calls) == asked


def test_no_engine_is_imported_to_look_for_its_group():
    before = set(sys.modules)
    assert engine_group() is None
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in ("vllm", "sglang")}
