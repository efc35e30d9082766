"""Humming's kernels themselves, and the kernels around them, on a GPU."""

from pathlib import Path

import pytest
import torch
from four_bit_layers import PRECISIONS, REGIMES, tiny
from graphs import replayed_error
from planted_ops import Sorter

from moetune.backends.base import Problem
from moetune.backends.humming.backend import ACTIVATIONS, TOLERANCE, HummingBackend
from moetune.backends.humming.search import lines
from moetune.backends.humming.space import AUTO, tactic_of
from moetune.backends.reference import relative_error
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

pytestmark = pytest.mark.gpu
EACH_KIND = (
    AUTO,
    "mma-8x128x64-8x64x32-s4-b4-streamk",
    "mma-32x128x128-32x64x32-s4-b1",
    "wgmma-16x256x128-16x64x64-s4-b2",
    "wgmma-64x128x64-64x32x64-s6-b2-streamk",
    "wgmma-48x256x64-48x32x64-s4-b1-producer-streamk",
    "wgmma-64x512x64-64x32x64-s4-b1-producer",
)


@pytest.fixture(scope="module")
def backend():
    made = HummingBackend()
    if obstacle := made.unavailable():
        pytest.skip(obstacle[0])
    return made


def layer_of(precision, **others):
    sizes = {"num_experts": 64, "top_k": 8, "hidden_size": 1024, "intermediate_size": 512}
    return tiny(precision, **sizes | others)


def prepared(backend, layer, regime, rows, draws=1):
    rank = regime.ep_size - 1
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return backend.prepare(Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings), "cuda"))


@pytest.mark.parametrize("rows", [1, 3, 16, 257, 4096])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_errors_are_within_the_tolerance(backend, precision, regime, rows):
    """Of each kind of configuration. `L < k` has 4 experts for 8 ids; others have empty experts."""
    rows += rows % 2 if regime.layout == "pool" else 0
    runner = prepared(backend, layer_of(precision), regime, rows)
    reference = runner.reference()
    for spelled in EACH_KIND:
        assert relative_error(runner.run(tactic_of(spelled, spelled)), reference) <= TOLERANCE, spelled


@pytest.mark.parametrize("regime", [REGIMES["none"], REGIMES["all-gather"]], ids=["indexed", "grouped"])
def test_every_configuration_of_each_gemm_is_right(backend, regime):
    """None is refused by the launcher, none hangs. Hundreds of kernels are compiled."""
    layer = layer_of("mxfp4")
    runner = prepared(backend, layer, regime, 257)
    reference = runner.reference()
    for tactic in lines(backend.candidates(layer, regime, 257, "cuda").tactics):
        assert relative_error(runner.run(tactic), reference) <= TOLERANCE, tactic


@pytest.mark.parametrize("rows", [1, 257])
@pytest.mark.parametrize("precision", ["mxint4", "mxfp4", "nvfp4"])
def test_biases_activations_and_padded_sizes_are_right(backend, precision, rows):
    for activation in ACTIVATIONS:
        sizes = {"hidden_size": 1056, "intermediate_size": 288}
        layer = layer_of(precision, **sizes, activation=activation, expert_bias=True)
        for regime in (Regime(), Regime(ep_size=4)):
            runner = prepared(backend, layer, regime, rows)
            reference = runner.reference()
            for spelled in (AUTO, EACH_KIND[5]):
                error = relative_error(runner.run(tactic_of(spelled, spelled)), reference)
                assert error <= TOLERANCE, (activation, spelled)


def test_a_compiled_kernel_is_found_by_its_launch(backend):
    """What `compile` writes without a GPU is what `run` loads: it adds no cubin to the cache."""
    from humming.utils.jit import get_humming_cache_dir

    layer, regime, tactic = layer_of("mxint4"), REGIMES["all-gather"], tactic_of(EACH_KIND[5], EACH_KIND[5])
    runner = prepared(backend, layer, regime, 16)
    for part in (0, 1):
        backend.compile(layer, regime, 16, tactic, part, (9, 0))
    ahead = set(Path(get_humming_cache_dir()).rglob("kernel.cubin"))
    runner.run(tactic)
    assert len(ahead) >= 2
    assert set(Path(get_humming_cache_dir()).rglob("kernel.cubin")) == ahead


@pytest.mark.parametrize("regime", [REGIMES["none"], REGIMES["deduplicated"]], ids=["indexed", "grouped"])
def test_a_cuda_graph_replays_what_ran_eagerly(backend, regime):
    runner = prepared(backend, layer_of("mxint4"), regime, 33, draws=2)
    tactic = tactic_of(EACH_KIND[5], AUTO)
    assert replayed_error(runner, tactic) < 5e-3


@pytest.mark.parametrize("rows", [1, 257, 4096])
@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_slots_are_sorted_as_on_the_cpu(regime, rows):
    from moetune.backends.humming.slots import SlotSorter

    rows += rows % 2 if regime.layout == "pool" else 0
    layer = layer_of("mxint4")
    shard = regime.shard(layer, regime.ep_size - 1)
    ids = realize(layer, regime, rows, shard.rank).topk_ids.int().contiguous()
    sorter = SlotSorter(rows, ids.shape[1], shard, "cuda")
    expected, found = Sorter(shard, []).grouped(ids), sorter.grouped(ids.cuda())
    assert found.offsets.tolist() == expected.offsets.tolist()
    assert torch.equal(found.places.cpu(), expected.places)
    for block_m in (8, 24):
        aligned, blocks = Sorter(shard, []).indexed(ids, block_m), sorter.indexed(ids.cuda(), block_m)
        count = int(blocks.num_padded)
        assert torch.equal(blocks.slots[:count].cpu(), aligned.slots)
        assert torch.equal(blocks.experts[: count // block_m].cpu(), aligned.experts)


def test_products_are_summed_with_their_weights():
    from moetune.backends.humming.slots import combine

    products = torch.randn(40, 1500, device="cuda").bfloat16()
    places = torch.randint(-1, 40, (17, 3), device="cuda", dtype=torch.int32)
    weights, out = torch.rand(17, 3, device="cuda"), torch.empty(17, 1500, dtype=torch.bfloat16, device="cuda")
    combine(products, places, weights, out)
    found = products.float()[places.long().clamp(min=0)] * weights.unsqueeze(-1)
    expected = torch.where((places >= 0).unsqueeze(-1), found, 0.0).sum(1)
    assert relative_error(out, expected) < 4e-3
