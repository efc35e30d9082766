"""Times the store: saving one bucket into a store of many profiles, loading a profile, and the journal.

Each profile has as many buckets as a packaged one. Saving merges a bucket into a profile that has the others: lock,
read, check, temporary file, fsync, rename, fsync of the folder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store

LAYER = MoELayer(
    name="qwen3-235b-a22b", num_experts=128, top_k=8, hidden_size=4096, intermediate_size=1536, precision="bf16"
)
ENVIRONMENT = Environment(device="NVIDIA H200", strict={"torch": "2.11.0", "triton": "3.6.0"})
LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
LIMITS_MS = {"save": 20.0, "load": 5.0}
"""The most milliseconds that the median may take."""


def tactic(number: int) -> Tactic:
    """Returns a tactic of Triton's size."""
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
    return Tactic({name: number + at for at, name in enumerate(names)})


def choice(rows: int, second: int = 0) -> Choice:
    """Returns the choice of one bucket, with the load of 32 experts."""
    return Choice(
        rows=rows,
        tactic=tactic(rows),
        time_us=100.0,
        default_tactic=tactic(1),
        default_time_us=120.0,
        gain=1.2,
        gain_low=1.1,
        gain_high=1.3,
        noise=0.01,
        tried=80,
        candidates=1600,
        load=(rows,) * 32,
        max_load=rows,
        measured_at=f"2026-01-01T00:{second // 60:02}:{second % 60:02}+00:00",
    )


def profile(seed: int, choices: Sequence[Choice]) -> Profile:
    """Returns a profile of one regime."""
    regime = Regime(ep_size=4, attention_dp=True, ladder=LADDER, seed=seed)
    return Profile(layer=LAYER, regime=regime, backend="triton", environment=ENVIRONMENT, choices=tuple(choices))


def median_ms(attempt: Callable[[int], object], count: int) -> tuple[float, float]:
    """Returns the median of `count` attempts in ms: of the time that passed, and of this process's time on a CPU."""
    passed, spent = [], []
    for number in range(count):
        began, began_here = time.perf_counter(), time.process_time()
        attempt(number)
        passed.append(1e3 * (time.perf_counter() - began))
        spent.append(1e3 * (time.process_time() - began_here))
    return statistics.median(passed), statistics.median(spent)


def times(profiles: int, attempts: int) -> dict[str, tuple[float, float]]:
    """Returns the times of each operation in a store of that many profiles, as `median_ms` does."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, Path(folder, "none"))
        whole = [choice(rows) for rows in LADDER]
        for seed in range(profiles):
            store.save(profile(seed, whole))
        journal = store.journal(LAYER, profile(0, ()).regime, "triton", ENVIRONMENT)
        batch = {tactic(number): 100.0 + number for number in range(64)}
        return {
            "save": median_ms(lambda at: store.save(profile(at % profiles, [choice(LADDER[0], 1 + at)])), attempts),
            "load": median_ms(
                lambda at: store.load(LAYER, profile(at % profiles, ()).regime, "triton", ENVIRONMENT), attempts
            ),
            "journal a batch of 64": median_ms(lambda at: journal.note(1, "auto", 4, batch, {}), attempts),
            f"read a journal of {64 * attempts} measurements": median_ms(lambda at: journal.read(), 1),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the times as a table in Markdown. Returns 1 if one is too long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profiles", type=int, default=1000, help="how many profiles the store has  [default: 1000]")
    parser.add_argument("--attempts", type=int, default=100, help="how often each is timed  [default: 100]")
    given = parser.parse_args(arguments)
    taken = times(given.profiles, given.attempts)
    print("| operation | median ms | of that on a CPU, ms | limit ms |\n|---|---|---|---|")
    for name, (passed, spent) in taken.items():
        print(f"| {name} | {passed:.2f} | {spent:.2f} | {LIMITS_MS.get(name, '')} |")
    return int(any(taken[name][0] > limit for name, limit in LIMITS_MS.items()))


if __name__ == "__main__":
    sys.exit(main())
