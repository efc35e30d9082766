import logging
from types import SimpleNamespace

from test_exchange import run

from moetune.engine.op_tune import OpTune
from moetune.engine.strategy import RankStrategy
from moetune.engine.sweep import Sweep
from moetune.errors import RankError
from moetune.measure import clock


def test_a_rank_without_memory_for_its_clock_ends_the_comparison_on_all_ranks(monkeypatch):
    def clock_for(device):
        if device == "planted:1":
            raise MemoryError("planted")

    monkeypatch.setattr(clock, "clock_for", clock_for)
    monkeypatch.setattr(OpTune, "_sweep", lambda self, rows: Sweep({8: [((8, 1), 0.1)]}))
    session = SimpleNamespace(strategy=RankStrategy.MERGE, logger=logging.getLogger("test.moetune"))

    def choices(ranks):
        call = SimpleNamespace(op="planted", device=lambda: f"planted:{ranks.rank}")
        return OpTune(session, call, SimpleNamespace(), ranks).choices([])

    first, second = run(choices, choices)
    assert isinstance(first, RankError)
    assert "Rank 1 of 2 failed: out of memory: MemoryError: planted" in str(first)
    assert isinstance(second, MemoryError)
