"""The builtin kernel as a version of vLLM, and that version's own kernel, under Triton's interpreter.

`test_interpreted.py` runs it once for each version, whose package is first on the path.
"""

import os

import pytest
import torch
from test_runner import REGIMES, TACTICS, layer_of, relative_error, runner_of
from triton.runtime import interpreter

VERSION = os.environ.get("MOETUNE_TEST_VLLM", "")
SWAPS = VERSION != "0.20.2"


@pytest.fixture
def dots(monkeypatch):
    """Returns a function that gives the shapes of the left operands that were multiplied since it was last called."""
    seen = set()
    create = interpreter.InterpreterBuilder.create_dot

    def recorded(self, a, b, *rest):
        seen.add((a.data.shape, b.data.shape))
        return create(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", recorded)

    def taken():
        shapes = set(seen)
        seen.clear()
        return shapes

    return taken


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_both_multiply_the_same_tiles_and_get_the_same_output(precision, tactic, dots):
    layer, regime = layer_of(precision), REGIMES["packed, L < k"]
    builtin = runner_of(layer, regime, 9, kernel_version=VERSION)
    of_vllm = runner_of(layer, regime, 9, kernel="vllm", remote=builtin_remote())
    ours = builtin.run(tactic).float()
    our_tiles = dots()
    theirs = of_vllm.run(tactic).float()
    assert our_tiles == dots()
    assert relative_error(ours, theirs) <= 1e-3
    assert not torch.equal(theirs, torch.zeros_like(theirs))
    small = tactic["BLOCK_SIZE_M"] < 64 <= tactic["BLOCK_SIZE_N"]
    depth = min(tactic["BLOCK_SIZE_K"], 128) if precision == "fp8_block" else tactic["BLOCK_SIZE_K"]
    first = tactic["BLOCK_SIZE_N" if SWAPS and small and precision == "fp8_block" else "BLOCK_SIZE_M"]
    assert {left for left, _ in our_tiles} == {(first, depth)}


def builtin_remote():
    from moetune.backends.grouped_triton.kernel_versions import kernel_version

    return kernel_version("vllm", VERSION).remote
