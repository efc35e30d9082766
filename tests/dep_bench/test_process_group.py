import pytest
import torch

from moetune.dep_bench.process_group import Ranks, joined
from moetune.errors import RankError, UsageError


class Planted:
    """An exchange in which this is the second of two ranks, and the first one gives `first`."""

    rank, size = 1, 2

    def __init__(self, first):
        self.first = first

    def gather(self, value):
        return [self.first, value]

    def name(self, rank):
        return f"Rank {rank} of 2"


def test_one_process_is_the_first_rank_and_asks_nobody():
    with joined("cpu") as ranks:
        assert (ranks.rank, ranks.size, ranks.device, ranks.leads) == (0, 1, "cpu", True)
        assert ranks.gather(3) == [3]
        assert ranks.broadcast("x") == "x"
        assert ranks.of_first(lambda: 5) == 5


def test_the_first_ranks_answer_is_everybodys():
    calls = []
    ranks = Ranks(1, 2, "cpu", Planted((["answer"], None)))
    assert ranks.of_first(lambda: calls.append("here")) == "answer"
    assert not calls
    assert Ranks(1, 2, "cpu", Planted("first")).broadcast("second") == "first"


def test_an_error_of_the_first_rank_ends_the_others_too():
    with pytest.raises(RankError, match=r"Rank 0 of 2, which answers for all, failed: planted"):
        Ranks(1, 2, "cpu", Planted(([], "planted"))).of_first(lambda: None)

    def fails():
        raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        Ranks().of_first(fails)


@pytest.mark.parametrize(
    ("size", "device", "message"),
    [("9", None, "up to 8 ranks, given 9"), ("2", "cuda:1", "cuda:1 is one GPU")],
)
def test_what_cannot_be_started_is_refused(monkeypatch, size, device, message):
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match=message), joined(device):
        pass


def test_one_process_makes_its_gpu_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    with joined("cuda:1") as ranks:
        assert ranks.device == "cuda:1"
    assert current == ["cuda:1"]


def test_each_rank_needs_a_gpu(monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"2 ranks need a GPU each, and rank 1 sees 1\."), joined("cuda"):
        pass
