"""Many writers merge into one profile while some of them are killed: no choice is lost and nobody waits for the dead.

Each writer has a bucket of its own and saves it again and again, numbered. A writer that is killed is started again and
goes on after the last number whose save had returned. Exits 1 if a bucket ever falls behind a number that was saved, if
a writer ends with an error, such as a lock that is not free in time, or if a file is damaged or a temporary one left.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from moetune.spec.environment import Environment
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.store.files import temporaries
from moetune.store.profile import Choice, Profile
from moetune.store.store import Store

LAYER = MoELayer(name="tiny", num_experts=8, top_k=2, hidden_size=4, intermediate_size=4, precision="fp32")
BEGAN = datetime(2026, 1, 1, tzinfo=UTC)
KILL_EVERY_S = 0.2
"""The mean time between two kills."""


def saved(writers: int, rows: int, number: int) -> Profile:
    """Returns the profile that writer `rows` saves as its merge `number`, from 1 on."""
    tactic = Tactic(number=number)
    choice = Choice(
        rows=rows,
        tactic=tactic,
        time_us=1.0,
        default_tactic=tactic,
        default_time_us=1.0,
        gain=1.0,
        gain_low=1.0,
        gain_high=1.0,
        noise=0.01,
        tried=1,
        candidates=1,
        load=(1,),
        max_load=1,
        measured_at=(BEGAN + timedelta(seconds=number)).isoformat(),
    )
    regime = Regime(ladder=list(range(1, writers + 1)), tune_max_num_tokens=writers)
    return Profile(
        layer=LAYER,
        regime=regime,
        backend="planted",
        environment=Environment(device="CPU", strict={}),
        choices=(choice,),
    )


def numbers(profile: Profile) -> dict[int, int]:
    """Returns the number of each bucket's last merge."""
    return {choice.rows: int(choice.tactic["number"]) for choice in profile.choices}


def write(folder: Path, writers: int, rows: int, merges: int) -> None:
    """Saves the merges of one writer that have not been saved, and ends this process.

    The number of the last merge whose save returned is noted in a file of the writer's own.
    """
    code, noted = 1, folder / f"{rows}.saved"
    store, seen = Store(folder / "store", folder / "none"), dict[int, int]()
    try:
        for number in range(int(noted.read_text() or 0) + 1 if noted.exists() else 1, merges + 1):
            found = numbers(store.save(saved(writers, rows, number)))
            if found[rows] < number or any(found.get(other, 0) < last for other, last in seen.items()):
                code = 2
                break
            seen = found
            noted.with_suffix(".new").write_text(str(number))
            noted.with_suffix(".new").replace(noted)
        else:
            code = 0
    except BaseException as error:
        print(f"writer {rows}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


@dataclass
class Writers:
    """Writers in forked processes.

    Attributes:
        folder: has the store and what each writer has saved.
        count: how many there are.
        merges: how many merges each makes.
        living: the bucket of each living process.
        kills, lost, failed: how many writers were killed, found an older choice than before, or ended with an error.
    """

    folder: Path
    count: int
    merges: int
    living: dict[int, int] = field(default_factory=dict)
    kills: int = 0
    lost: int = 0
    failed: int = 0

    def start(self, rows: int) -> None:
        """Starts the writer of one bucket."""
        if not (process := os.fork()):
            write(self.folder, self.count, rows, self.merges)
        self.living[process] = rows

    def run(self, kills: int, generator: random.Random) -> None:
        """Lets all writers finish, and kills some of them meanwhile."""
        for rows in range(1, self.count + 1):
            self.start(rows)
        next_s = time.monotonic() + generator.expovariate(1 / KILL_EVERY_S)
        while self.living:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                self._ended(process, status)
            elif time.monotonic() >= next_s and self.kills < kills:
                os.kill(generator.choice(list(self.living)), signal.SIGKILL)
                next_s = time.monotonic() + generator.expovariate(1 / KILL_EVERY_S)
            else:
                time.sleep(0.005)

    def _ended(self, process: int, status: int) -> None:
        rows = self.living.pop(process)
        if os.WIFSIGNALED(status):
            self.kills += 1
            self.start(rows)
        else:
            code = os.waitstatus_to_exitcode(status)
            self.lost += code == 2
            self.failed += code not in (0, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the writers and prints the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=64, help="how many writers  [default: 64]")
    parser.add_argument("--merges", type=int, default=50, help="how many merges each makes  [default: 50]")
    parser.add_argument("--kills", type=int, default=100, help="how many writers are killed at most  [default: 100]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments  [default: 0]")
    given = parser.parse_args(arguments)
    logging.getLogger("moetune").setLevel(logging.ERROR)  # all of them wait for the lock
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        writers = Writers(Path(name), given.writers, given.merges)
        writers.run(given.kills, random.Random(given.seed))
        took_s = time.monotonic() - began
        store = Store(Path(name, "store"), Path(name, "none"))
        last = store.save(saved(given.writers, 1, given.merges))
        missing = sum(numbers(last).get(rows, 0) != given.merges for rows in range(1, given.writers + 1))
        ((path, found),) = store.profiles()
        damaged = int(found != last) + len(list(path.parent.glob("*.damaged-*")))
        left = len(temporaries(path.parent))
    print(
        f"{given.writers} writers made {given.merges} merges each in {took_s:.0f} s, and {writers.kills} were killed. "
        f"Buckets without their last merge: {missing}. Writers that found an older choice: {writers.lost}. Writers "
        f"that failed: {writers.failed}. Damaged files: {damaged}. Files left over: {left}."
    )
    return int(any((missing, writers.lost, writers.failed, damaged, left)))


if __name__ == "__main__":
    sys.exit(main())
