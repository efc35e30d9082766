from dataclasses import dataclass, field

import pytest
from flashinfer_profiles import profile
from planted import PlantedBackend

from moetune.backends import registry
from moetune.backends.base import Candidates
from moetune.errors import UnsupportedError
from moetune.export import check as listed
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import ComparedRows

MADE = profile("flashinfer-cutlass", Regime(ep_size=8, ladder="1,2,4"))


@dataclass
class Fake(PlantedBackend):
    milliseconds: dict[str, float] = field(default_factory=dict)
    tactics: tuple[Tactic, ...] = tuple(choice.tactic for choice in MADE.choices)
    version: str = "0.7.2.post1"
    obstacle: tuple[str, str] | None = None
    asked: list[int] = field(default_factory=list)

    def unavailable(self):
        return self.obstacle

    def environment(self):
        return {"flashinfer": self.version}

    def candidates(self, layer, regime, rows, device):
        self.asked.append(rows)
        return Candidates(self.tactics)


@pytest.fixture
def here(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(listed, "DEVICES", tmp_path)

    def put(fake):
        monkeypatch.setattr(registry, "backend", lambda name: fake)
        return fake

    return put


def test_every_bucket_s_tactic_is_looked_up(here):
    fake = here(Fake())
    assert listed.check(MADE)
    assert fake.asked == [1, 2, 4]


def test_a_tactic_that_is_not_listed_is_refused(here):
    here(Fake(tactics=(MADE.choices[0].tactic,)))
    with pytest.raises(UnsupportedError, match=r"lists no tactic gemm1=1 gemm2=46 for 2 rows"):
        listed.check(MADE)


ROW = Tactic({"gemm1": 7, "gemm2": 99})
COMPARED = ComparedRows(rows=3, time_us=1.0, default_tactic=ROW, gain=1.0, gain_low=1.0, gain_high=1.0, noise=0.0)


@pytest.mark.parametrize("default", [{"default_tactic": ROW}, {"by_rows": (COMPARED,)}], ids=["bucket", "row count"])
def test_a_default_of_other_rows_is_taken_though_it_is_not_listed_for_the_bucket(here, default):
    """As with a row of a tuned file that is none of the 1920 configurations."""
    here(Fake())
    first, *others, last = MADE.choices
    last = last.model_copy(update={"tactic": ROW})
    with pytest.raises(UnsupportedError, match="lists no tactic gemm1=7 gemm2=99 for 4 rows"):
        listed.check(MADE.model_copy(update={"choices": (first, *others, last)}))
    first = first.model_copy(update=default)
    assert listed.check(MADE.model_copy(update={"choices": (first, *others, last)}))


@pytest.mark.parametrize("fake", [Fake(obstacle=("no device", "get one")), Fake(version="0.7.1")])
def test_another_version_or_a_backend_that_cannot_run_lists_no_tactics(here, fake):
    assert not listed.check(here(fake) and MADE)
    assert fake.asked == []


def test_without_a_device_no_backend_is_imported(monkeypatch, tmp_path):
    monkeypatch.setattr(listed, "DEVICES", tmp_path)
    monkeypatch.setattr(registry, "backend", lambda name: pytest.fail("asked for a backend"))
    assert not listed.check(MADE)
