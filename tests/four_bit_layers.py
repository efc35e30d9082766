"""Small layers with weights of 4 bits, and deployments of every load, for the backends that run them."""

from moetune.backends.base import Problem
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.workload.draws import as_draws
from moetune.workload.routing import realize

REGIMES = {
    "none": Regime(),
    "EP": Regime(ep_size=4),
    "all-gather": Regime(ep_size=4, dispatch="allgather"),
    "deduplicated": Regime(ep_size=4, layout="deduplicated"),
    "slot": Regime(ep_size=4, layout="slot"),
    "pool": Regime(ep_size=2, layout="pool"),
    "TP": Regime(tp_size=2),
    "L < k": Regime(ep_size=16, attention_dp=True, layout="deduplicated"),
}
PRECISIONS = (Precision.MXINT4, Precision.INT4_G128, Precision.MXFP4, Precision.NVFP4, Precision.NVFP4_A16)


def tiny(precision, **others):
    sizes = {"num_experts": 16, "top_k": 4, "hidden_size": 128, "intermediate_size": 256, **others}
    return MoELayer(name="tiny", precision=precision, **sizes)


def problem_of(layer, regime, rows, rank, draws=1):
    routings = tuple(realize(layer, regime, rows, rank, draw) for draw in range(draws))
    return Problem(layer, regime, rows, regime.shard(layer, rank), as_draws(routings))
