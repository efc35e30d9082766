"""The builtin kernel and vLLM's own, under Triton's interpreter.

`test_batched_interpreted.py` runs it once for each version, whose package is first on the path.
"""

import sys

import pytest
import torch
from test_batched_runner import REGIME, TACTICS, TOLERANCE, error_of, layer_of, loaded, runner_of

from moetune.backends.batched_triton.backend import BatchedTritonBackend
from moetune.workload.routing import realize


@pytest.mark.parametrize("tactic", TACTICS, ids=str)
@pytest.mark.parametrize("precision", ["bf16", "fp8_block"])
def test_both_get_the_same_output(precision, tactic):
    layer = layer_of(precision)
    routings = [realize(layer, REGIME, 36), loaded(0, 11)]
    builtin, own = (runner_of(layer, REGIME, routings, kernel=name) for name in ("builtin", "vllm"))
    for draw in (0, 1):
        ours = builtin.filled(builtin.run(tactic, draw), draw).float()
        theirs = own.filled(own.run(tactic, draw), draw).float()
        assert float((ours - theirs).norm() / theirs.norm()) <= 1e-3
        assert not torch.equal(theirs, torch.zeros_like(theirs))
        assert error_of(own, tactic, draw) <= TOLERANCE[precision]
    assert "vllm" not in sys.modules


def test_the_kernels_have_digests_of_their_own():
    builtin, own = (BatchedTritonBackend(name).environment() for name in ("builtin", "vllm"))
    assert builtin["kernel_source"] != own["kernel_source"]
    assert (builtin["kernel"], own["kernel"]) == ("builtin", "vllm")
