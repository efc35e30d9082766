"""Measures what a tactic loses under other distributions than the one that it was tuned for.

    PYTHONPATH=. python benchmarks/gain_skew.py measure OUT.jsonl [--only triton,allgather] [--tokens 256,64,1024,16]
        [--seconds 480] [--tune-seconds S] [--vllm ENGINE/vllm]
    PYTHONPATH=. python benchmarks/gain_skew.py report OUT.jsonl

A place is a load, a backend and a number of tokens a rank. In each place a bucket is tuned for random routings, for
each other distribution alone, and for the worst slowdown over all of them. The engine's own tactic is FlashInfer's pick
after its autotune, or vLLM's default. Then under each distribution these tactics are timed in interleaved rounds on
draws that no tune used: the one tuned for random, the one tuned there, the one for the worst, and the engine's.

All distributions of a place have the rows that its tokens produce for random routings, because a bucket is looked up by
its rows, so a cell differs from its neighbors in the skew alone. They have one rank, that with the load nearest the
mean over all distributions. One of them is a synthetic recording: tokens of topics that prefer some experts.

OUT is a journal: the same command continues where it stopped. Places come in the order of their tokens, so that a cut
leaves every load and backend with some of them. After `--seconds` no tune and no cell begins.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import LOADS, Journal
from every_row import by_draw, num_draws, vllm_folder
from flashinfer_common import UNSEEN, bf16_layer, ids, pair, unseen_problem, warm_flashinfer
from gain_skew_report import markdown

import moetune
from moetune.backends.base import Backend, Problem
from moetune.backends.registry import backend as backend_of
from moetune.dep_bench.flashinfer_choice import own_autotune, own_pick
from moetune.errors import MoetuneError
from moetune.measure.bench import BenchLike
from moetune.measure.compiling import Compilers, capability_of
from moetune.measure.probe import device_for, environment
from moetune.measure.worker import open_benches
from moetune.recordings.reading import with_digest
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.tuning.bucket import Bucket
from moetune.tuning.bucket_tuner import BucketTuner
from moetune.tuning.run import NOISY_TRIES
from moetune.tuning.verdict import NOISY
from moetune.workload.dispatch import rows_for_tokens
from moetune.workload.draws import as_draws
from moetune.workload.ranks import of_rank
from moetune.workload.routing import realize

DISTRIBUTIONS = ("random", "balanced", "ddist:1.5", "ddist:2", "ddist:4", "zipf:1", "powerlaw:1.2", "replay")
"""`replay` stands for the synthetic recording. The first one is the main distribution."""
TOKENS = (256, 64, 1024, 16)
DRAWS = 8
"""The search's draws of each distribution in the tune for all of them."""
TOPICS, RECORDED_TOKENS, RECORDING_SEED = 12, 8192, 5
TOPIC_SPREAD = 1.5
"""The standard deviation of a topic's logits. An expert's own noise has that of a Gumbel variable, 1.28."""


@dataclass(frozen=True, slots=True)
class Place:
    """One bucket of one deployment. The fields identify its lines in the journal."""

    model: str
    ep: int
    load: str
    backend: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.model}-ep{self.ep}-{self.load}-{self.backend}-{self.tokens}"

    def layer(self) -> MoELayer:
        """Returns the model's layer, with bf16 experts for FlashInfer's CUTLASS op."""
        return bf16_layer(self.model) if self.backend == "flashinfer-cutlass" else moetune.layer(self.model)


class TimeUpError(Exception):
    """The time that was given is over."""


def places(tokens: Sequence[int] = TOKENS, model: str = "qwen3-235b-a22b", ep: int = 8) -> list[Place]:
    """Returns all places, those of the first number of tokens first."""
    return [
        Place(model, ep, load, backend, count)
        for count in tokens
        for backend in ("triton", "flashinfer-cutlass")
        for load in ("allgather", "deduplicated")
    ]


def recording(layer: MoELayer, path: Path) -> Path:
    """Writes a synthetic recording, unless the file is there, and returns its path.

    Each token has a topic, and topics follow Zipf's law. A token's experts are the top-k of its topic's logits with
    Gumbel noise, so experts that a topic prefers are chosen together.
    """
    if not path.exists():
        chance = np.random.default_rng(RECORDING_SEED)
        share = 1 / np.arange(1, TOPICS + 1)
        topics = chance.choice(TOPICS, size=RECORDED_TOKENS, p=share / share.sum())
        preferred = chance.normal(0, TOPIC_SPREAD, size=(TOPICS, layer.num_experts))
        values = preferred[topics] + chance.gumbel(size=(RECORDED_TOKENS, layer.num_experts))
        np.save(path, np.argsort(-values, axis=1)[:, : layer.top_k].astype(np.int32))
    return path


def regimes(place: Place, recorded: Path) -> tuple[int, dict[str, Regime], Regime]:
    """Returns the rows of a place, its regime under each distribution alone, and that of all with objective `worst`.

    Args:
        place: the place.
        recorded: the file of the recording.
    """
    layer, (main, *others) = place.layer(), DISTRIBUTIONS
    fields: dict[str, Any] = {"ep_size": place.ep, "attention_dp": True, **LOADS[place.load]}
    spelled = {name: f"replay:{recorded}" if name == "replay" else name for name in others}
    weight = 1 / len(DISTRIBUTIONS)
    also = [f"{distribution}={weight}" for distribution in spelled.values()]
    several = with_digest(Regime(**fields, distribution=main, also=also, objective="worst"))
    rank = of_rank(layer, several).rank
    rows = rows_of(layer, Regime(**fields, distribution=main, rank=rank), place.tokens)
    fixed = {**fields, "ladder": str(rows), "rank": rank}
    alone = {
        name: with_digest(Regime(**fixed, distribution=distribution))
        for name, distribution in {main: main, **spelled}.items()
    }
    draws = DRAWS * len(DISTRIBUTIONS)
    worst = Regime(**fixed, distribution=main, also=several.also, objective="worst", draws=draws)
    return rows, alone, worst


class Measurement:
    """Tunes and times one place after the other, and adds a line to the journal for each tune and each cell.

    Args:
        journal: where the lines are added.
        backend: the backend.
        device: the torch device.
        bench_of: prepares a problem.
        compilers: compile tactics before they run.
        tune_s: about how long one tune may take, in seconds; None is as long as the search asks for. A budget cuts the
            first tune of a process short, which has to compile what later ones find compiled.
        end: when to begin nothing more, in seconds since the epoch.
    """

    def __init__(
        self,
        journal: Journal,
        backend: Backend,
        device: str,
        bench_of: Callable[[Problem], BenchLike],
        compilers: Compilers,
        tune_s: float | None,
        end: float,
    ) -> None:
        self._journal, self._backend, self._device = journal, backend, device
        self._bench_of, self._compilers, self._tune_s, self._end = bench_of, compilers, tune_s, end
        self._name = environment(backend, device).device

    def measure(self, place: Place, recorded: Path) -> None:
        """Measures what the journal lacks of one place. The cell of a distribution follows its tune.

        Raises:
            TimeUpError: the time is up.
            MoetuneError: a tactic that all need fails.
        """
        layer = place.layer()
        rows, alone, worst = regimes(place, recorded)
        key = {**asdict(place), "rows": rows, "rank": worst.rank, "device": self._name}
        shared = {
            "random": self._tuned(key, layer, alone["random"], "random", rows),
            "worst": self._tuned(key, layer, worst, "worst", rows),
            "engine": self._engines(key, layer, alone["random"], rows),
        }
        for name, regime in alone.items():
            here = shared["random"] if name == "random" else self._tuned(key, layer, regime, name, rows)
            self._cell(key, layer, regime, name, rows, {**shared, "here": here})

    def _tuned(self, key: dict[str, Any], layer: MoELayer, regime: Regime, name: str, rows: int) -> Tactic:
        """Returns the tactic that a tune of one bucket chooses. The tune has no warm starts, so tunes are alike."""
        line = self._journal.find(**key, kind="tuned", tuned=name)
        if line is None:
            self._require_time()
            begin = time.perf_counter()
            bucket = Bucket.of(layer, regime, self._backend, self._device, rows)
            tuner = BucketTuner(
                bucket, self._bench_of, self._compilers, self._tune_s, lambda event: None, lambda *_: None,
                self._backend.final_s,
            )  # fmt: skip
            finalists = tuner.search(bucket.search(self._backend, "auto", ()))
            for _ in range(1 + NOISY_TRIES):  # as in a tune
                choice = tuner.choose(finalists)
                if choice.noise <= NOISY:
                    break
            line = self._journal.add(
                **key, kind="tuned", tuned=name, tactic=dict(choice.tactic), gain=choice.gain, tried=choice.tried,
                noise=choice.noise, seconds=round(time.perf_counter() - begin, 1),
            )  # fmt: skip
            print(f"{_shown(key)} tuned for {name}: {line['seconds']} s, {choice.tried} tactics", flush=True)
        return Tactic(line["tactic"])

    def _engines(self, key: dict[str, Any], layer: MoELayer, regime: Regime, rows: int) -> Tactic:
        """Returns what the engine runs: FlashInfer's pick after its own autotune, or the backend's default.

        The autotune covers all buckets of FlashInfer, so it runs once for all numbers of tokens.
        """
        if self._backend.name != "flashinfer-cutlass":
            return self._backend.default(layer, regime, rows)
        of_load = {name: value for name, value in key.items() if name not in ("tokens", "rows")}
        line = self._journal.find(**of_load, kind="own")
        if line is None or str(rows) not in line["picks"]:
            self._require_time()
            counts = {rows, *(rows_of(layer, regime, tokens) for tokens in TOKENS)}
            line = self._journal.add(**of_load, kind="own", **own_picks(layer, regime, sorted(counts)))
        return pair(line["picks"][str(rows)])

    def _cell(
        self, key: dict[str, Any], layer: MoELayer, regime: Regime, name: str, rows: int, tactics: dict[str, Tactic]
    ) -> None:
        """Times the tactics under one distribution, on draws that no tune used."""
        named = {each: dict(tactic) for each, tactic in tactics.items()}
        line = self._journal.find(**key, kind="cell", distribution=name)
        if line is not None and line["tactics"] == named:
            return
        self._require_time()
        draws = as_draws(realize(layer, regime, rows, None, UNSEEN + draw) for draw in range(num_draws(rows)))
        bench = self._bench_of(Problem(layer, regime, rows, regime.shard(layer), draws, self._device))
        distinct = list(dict.fromkeys(tactics.values()))
        self._compilers.wait(layer, regime, rows, distinct)
        first, *others, again = by_draw(bench, [*distinct, distinct[0]], len(draws))
        series = dict(zip(distinct, (first, *others), strict=True))
        load = torch.stack([draw.routing.load.double() for draw in draws]).sum(0)
        self._journal.add(
            **key, kind="cell", distribution=name, spelled=regime.distribution, tactics=named,
            us={each: series[tactic] for each, tactic in tactics.items()}, again=again,
            failed={each: bench.failures[tactic] for each, tactic in tactics.items() if tactic in bench.failures},
            slots=float(load.sum()) / len(draws), max_over_mean=float(load.max() / load.mean()),
            measured_at=time.strftime("%Y-%m-%d"),
        )  # fmt: skip
        print(f"{_shown(key)} timed under {name}", flush=True)

    def _require_time(self) -> None:
        if time.time() > self._end:
            raise TimeUpError


def own_picks(layer: MoELayer, regime: Regime, counts: Sequence[int]) -> dict[str, Any]:
    """Returns what FlashInfer picks for each row count after its own autotune, and the seconds that this took."""
    backend = backend_of("flashinfer-cutlass")
    warm_flashinfer()
    seconds = own_autotune(backend.prepare(unseen_problem(layer, regime, max(*counts, 8192), 1)))
    picks = {rows: ids(own_pick(backend.prepare(unseen_problem(layer, regime, rows, 1)))) for rows in counts}
    return {"picks": picks, "seconds": round(seconds, 1)}


def rows_of(layer: MoELayer, regime: Regime, tokens: int) -> int:
    """Returns the rows that this many tokens a rank produce under the regime's distribution."""
    return max(1, round(rows_for_tokens(layer, regime, tokens)))


def _shown(key: dict[str, Any]) -> str:
    return f"{key['load']} {key['backend']} {key['tokens']} tokens ({key['rows']} rows):"


@contextmanager
def measuring(options: argparse.Namespace, name: str, end: float) -> Iterator[Measurement]:
    """Yields what measures the places of one backend."""
    device = device_for(None)
    backend = backend_of(name)
    with (
        open_benches(backend, device, isolate=True) as bench_of,
        Compilers(backend, capability_of(device)) as compilers,
    ):
        yield Measurement(Journal(options.journal), backend, device, bench_of, compilers, options.tune_seconds, end)


def measure(options: argparse.Namespace, chosen: Sequence[Place], end: float) -> dict[Place, str]:
    """Measures places of one backend, and returns those that are not complete, with the reasons."""
    left: dict[Place, str] = {}
    with measuring(options, chosen[0].backend, end) as measurement:
        for place in chosen:
            try:
                measurement.measure(place, recording(place.layer(), options.journal.with_suffix(".npy")))
            except TimeUpError:
                left[place] = "the time is up"
            except MoetuneError as error:
                left[place] = f"{error.message} {error.hint}"
            except Exception as error:
                left[place] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return left


def measure_all(options: argparse.Namespace, chosen: Sequence[Place], end: float) -> list[str]:
    """Measures the places one after the other, consecutive ones of one backend in a process of their own.

    Returns:
        A line for each place that is not complete, with the reason.
    """
    left: dict[Place, str] = {}
    for backend, group in groupby(chosen, key=lambda place: place.backend):
        together, begin = list(group), time.time()
        if begin > end:
            left |= dict.fromkeys(together, "the time is up")
            continue
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                left |= pool.submit(measure, options, together, end).result()
            except BrokenProcessPool:
                left |= dict.fromkeys(together, "their process died")
        print(f"{backend}, {together[0].tokens} tokens: {time.time() - begin:.0f} s", file=sys.stderr, flush=True)
    return [f"{place}: {reason}" for place, reason in left.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure", help="measure what the journal lacks")
    measured.add_argument("journal", type=Path)
    measured.add_argument("--only", default="", help="parts that a place's name must have, such as triton,allgather")
    measured.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="tokens a rank, in this order")
    measured.add_argument("--model", default="qwen3-235b-a22b")
    measured.add_argument("--ep", type=int, default=8)
    measured.add_argument("--vllm", type=Path, help="the folder of vLLM's package; its tuned files are the default")
    measured.add_argument("--seconds", type=float, default=480.0, help="begin nothing after this many seconds")
    measured.add_argument("--tune-seconds", type=float, help="about how long one tune may take")
    reported = commands.add_parser("report", help="print the journal as Markdown")
    reported.add_argument("journal", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "report":
        print(markdown(Journal(options.journal).lines))
        return 0
    end = time.time() + options.seconds
    vllm_folder(options.vllm)
    words = [word for word in options.only.split(",") if word]
    all_places = places([int(count) for count in options.tokens.split(",")], options.model, options.ep)
    chosen = [place for place in all_places if all(word in str(place) for word in words)]
    left = measure_all(options, chosen, end)
    print("\n".join(left) or "All is measured.", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
