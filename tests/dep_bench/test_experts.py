import pytest
import torch

from moetune.backends.base import FillableRunner
from moetune.backends.plain_torch.backend import TorchBackend
from moetune.backends.registry import backend
from moetune.dep_bench.experts import Experts, require_fillable
from moetune.errors import UnsupportedError
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

LAYER = MoELayer(num_experts=8, top_k=2, hidden_size=32, intermediate_size=16, precision="fp32")
REGIME = Regime(ep_size=2, dispatch="allgather", draws=2)
EAGER = Tactic(algorithm="eager")


def test_the_kernel_reads_what_was_written_into_its_inputs():
    experts = Experts(TorchBackend(), LAYER, REGIME, 1, "cpu")
    inputs = experts.inputs(3)
    assert not experts.run(3, EAGER).any()  # no row has an expert yet
    inputs.x.copy_(torch.randn(3, 32))
    inputs.topk_ids.copy_(torch.tensor([[4, 0], [7, 5], [1, 2]]))
    inputs.topk_weights.fill_(0.5)
    out = experts.run(3, EAGER)
    torch.testing.assert_close(out, experts.reference(3))
    assert [bool(row.any()) for row in out] == [True, True, False]  # experts 4 … 7 are this rank's


def test_ranks_have_different_weights():
    outs = []
    for rank, expert in ((0, 0), (1, 4)):
        experts = Experts(TorchBackend(), LAYER, REGIME, rank, "cpu")
        inputs = experts.inputs(1)
        inputs.x.fill_(1.0)
        inputs.topk_ids.copy_(torch.tensor([[expert, -1]]))
        inputs.topk_weights.copy_(torch.tensor([[1.0, 0.0]]))
        outs.append(experts.run(1, EAGER))
    assert not torch.allclose(*outs, atol=0.01)


def test_sampled_routings_are_those_of_the_rank():
    experts = Experts(TorchBackend(), LAYER, REGIME, 1, "cpu")
    runner = experts.sampled(REGIME, 6, 3)
    assert isinstance(runner, FillableRunner)
    for draw in range(3):
        assert runner.inputs(draw).topk_ids.shape == (6, 2)
        torch.testing.assert_close(runner.run(EAGER, draw), runner.reference(draw))
    assert not torch.equal(runner.inputs(0).topk_ids, runner.inputs(1).topk_ids)


@pytest.mark.parametrize("name", ["flashinfer-trtllm", "flashinfer-trtllm-routed"])
def test_a_backend_that_makes_its_own_rows_is_refused(name):
    with pytest.raises(UnsupportedError, match="cannot give flashinfer-trtllm"):
        require_fillable(backend(name), LAYER)


def test_a_weight_on_the_input_is_refused_by_a_kernel_that_applies_it_to_the_output():
    layer = MoELayer(**{**LAYER.model_dump(), "top_k": 1, "weight_on_input": True})
    with pytest.raises(UnsupportedError, match="this layer has them on its input"):
        require_fillable(backend("flashinfer-cutlass"), layer)
    require_fillable(backend("triton"), layer)


def test_inputs_with_one_scale_a_tensor_are_refused():
    layer = MoELayer(**{**LAYER.model_dump(), "precision": "fp8_tensor"})
    with pytest.raises(UnsupportedError, match="one fp8 scale a tensor"):
        require_fillable(backend("flashinfer-cutlass"), layer)
