import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.engine.bench import EngineBench, mean_of_ranks
from moetune.engine.lookup import regime_of_buckets
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

TWO_RANKS = """
import sys, torch.distributed as dist
from moetune.engine.agree import broadcast, gather
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
group = dist.group.WORLD
assert gather({"rank": rank}, group) == [{"rank": 0}, {"rank": 1}]
assert broadcast(f"from {rank}", group) == "from 0"
dist.destroy_process_group()
"""


class Clock:
    def warm_up(self, call, draw):
        call(draw)

    def paired_samples(self, calls, draws):
        return [[call(draw) for draw in draws] for call in calls]


def test_ranks_gather_and_the_first_one_leads(tmp_path):
    command = [sys.executable, "-c", TWO_RANKS]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path / "rendezvous")]) for rank in range(2)]
    assert [process.wait(timeout=60) for process in ranks] == [0, 0]


def test_the_mean_of_ranks_is_by_sample_and_a_failure_anywhere_is_one_everywhere():
    assert mean_of_ranks([[(1.0, 2.0), (5.0,)], [(3.0, 4.0), None]]) == [(2.0, 3.0), None]


def test_a_tactic_that_raises_fails_alone():
    def raises(draw):
        raise RuntimeError("planted")

    bench = EngineBench({Tactic(config=1): lambda draw: 1.0 + draw, Tactic(config=2): raises}, Clock())
    assert bench.samples((Tactic(config=1), Tactic(config=2)), [0, 1]) == [(1.0, 2.0), None]
    assert bench.failures == {Tactic(config=2): "RuntimeError: planted"}
    assert not bench.check(Tactic(config=2), 0)


@pytest.mark.parametrize(
    ("ladder", "maximum", "buckets", "expected"),
    [
        ("hybrid", 8192, (1, 256, 8192), ("hybrid", 8192)),
        ("pow2", 8192, (1, 256, 768), ("hybrid", 8192)),
        ("pow2", 8192, (1, 2, 300), ("hybrid", 300)),
        ("pow2", 8192, (3, 100, 1000), ("3,100,1000", 1000)),
    ],
)
def test_the_engines_buckets_make_the_ladder(ladder, maximum, buckets, expected):
    regime = regime_of_buckets(Regime(ladder=ladder, tune_max_num_tokens=maximum), buckets)
    assert (str(regime.ladder), regime.tune_max_num_tokens) == expected


@given(st.sets(st.integers(1, 20000), min_size=1, max_size=8), st.sampled_from(["none", "allgather", "alltoall"]))
def test_every_bucket_of_the_engine_is_one_of_the_regime(buckets, dispatch):
    regime = Regime(ep_size=2, dispatch=dispatch)
    found = regime_of_buckets(regime, sorted(buckets))
    assert buckets <= set(found.buckets)
    assert regime.differing(found).keys() <= {"ladder", "tune_max_num_tokens"}
