"""Four ranks that tune one op together, as processes of gloo. What each one does is planted: no GPU, no sleep."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from four_ranks import BUCKETS, TIMEOUT_S
from processes import GIVE_UP_S
from stand_ins import FAST, MIDDLING

from moetune.spec.tactic import Tactic
from moetune.store.store import Store

PROGRAM = Path(__file__).with_name("four_ranks.py")
TOGETHER = ["cold", "again", "warm", "partly", "raises", "memory", "slow", "broadcast", "independent", "parallel"]
TOGETHER += ["cutlass", "cutlass_broadcast", "dies"]
FAILING = ["other_cache", "default_fails", "inputs_fail", "absent", "other_op", "cold"]
LIMIT_S = 200.0
"""How long the survivors of a lost rank may take. All but a second is for a machine with other work."""


def started(folder, scenarios):
    """What became of each rank, by scenario. A rank that was killed has nothing."""
    paths = [str(PROGRAM.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"OMP_NUM_THREADS": "1", "MOETUNE_PACKAGED_PROFILES": "0", "PYTHONPATH": os.pathsep.join(paths)}
    environment = {**os.environ, **own}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(folder), *scenarios]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=GIVE_UP_S)
    assert ended.returncode == 0, ended.stderr
    files = {name: [folder / f"{name}-{rank}.json" for rank in range(4)] for name in scenarios}
    found = {name: [json.loads(path.read_text()) if path.exists() else None for path in files[name]] for name in files}
    return found, json.loads(ended.stdout.splitlines()[-1]), ended.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder):
    found, statuses, errors = started(folder, TOGETHER)
    assert statuses == [0, 0, -9, 0], errors
    return found


def each(ranks, key):
    return [rank[key] for rank in ranks]


def alike(ranks, tactic):
    """Asserts that all ranks run this tactic in all buckets."""
    assert each(ranks, "chosen") == [[tactic] * len(BUCKETS)] * len(ranks)


def profile(folder, scenario):
    """The only profile in the store of a scenario, which must be whole."""
    store = Store(folder / scenario, packaged=folder / "none")
    ((_, found),) = store.profiles()
    assert [choice.rows for choice in found.choices] == list(BUCKETS)
    return found


def test_four_ranks_measure_together_and_one_writes(ranks, folder):
    alike(ranks["cold"], FAST)
    assert each(ranks["cold"], "tuned") == [list(BUCKETS)] * 4
    assert each(ranks["cold"], "saved") == [[4], [], [], []]
    assert {choice.tactic for choice in profile(folder, "cold").choices} == {Tactic(tile_n=16, config=1)}
    assert all(each(ranks["cold"], "has_flashinfers_group")), "FlashInfer agrees on its own ops"


def test_what_all_have_stored_is_served_to_all(ranks):
    alike(ranks["again"], FAST)
    assert each(ranks["again"], "served") == [list(BUCKETS)] * 4
    assert each(ranks["again"], "runs") == [0] * 4


def test_one_rank_has_a_warm_store_and_three_do_not(ranks, folder):
    alike(ranks["warm"], FAST)
    assert each(ranks["warm"], "served") == [[]] * 4
    assert each(ranks["warm"], "tuned") == [list(BUCKETS)] * 4
    assert each(ranks["warm"], "saved") == [[4]] * 4, "each has a store of its own"
    for rank in range(4):
        assert {choice.tactic for choice in profile(folder, f"warm-store-{rank}").choices} == {
            Tactic(tile_n=16, config=1)
        }


def test_hit_or_miss_is_agreed_on_for_each_bucket(ranks):
    alike(ranks["partly"], FAST)
    assert each(ranks["partly"], "served") == [[1, 2]] * 4
    assert each(ranks["partly"], "tuned") == [[4, 8]] * 4


@pytest.mark.parametrize(
    ("scenario", "rank", "reason"),
    [
        ("raises", 2, "Rank 2 of 4: RuntimeError: planted"),
        ("memory", 1, "Rank 1 of 4: out of memory: OutOfMemoryError: CUDA out of memory."),
    ],
)
def test_a_tactic_that_fails_on_one_rank_wins_on_none_and_the_rank_is_named(ranks, folder, scenario, rank, reason):
    alike(ranks[scenario], MIDDLING)
    assert each(ranks[scenario], "tuned") == [list(BUCKETS)] * 4
    for choice in profile(folder, scenario).choices:
        (rejection,) = choice.rejected
        assert rejection.tactic == Tactic(tile_n=16, config=1)
        assert rejection.reason.startswith(reason)
    for lines in each(ranks[scenario], "lines"):
        (line,) = lines
        assert "run on some ranks only" in line
        assert reason in line


def test_a_rank_that_is_ten_times_slower_decides(ranks, folder):
    alike(ranks["slow"], MIDDLING)
    for choice in profile(folder, "slow").choices:
        assert (choice.time_us, choice.default_time_us) == (700.0, 1000.0), "the times of the slowest rank"


def test_with_broadcast_the_first_rank_alone_measures(ranks, folder):
    alike(ranks["broadcast"], MIDDLING)
    assert each(ranks["broadcast"], "runs")[1:] == [0] * 3
    assert each(ranks["broadcast"], "saved") == [[4], [], [], []]
    assert profile(folder, "broadcast").choices[0].time_us == 40.0


def test_independent_ranks_choose_for_themselves(ranks):
    assert each(ranks["independent"], "chosen") == [[MIDDLING] * 4, *[[FAST] * 4] * 3]
    assert not any(each(ranks["independent"], "has_flashinfers_group"))


def test_in_parallel_each_rank_sweeps_its_own_tactics(ranks, folder):
    alike(ranks["parallel"], FAST)
    first = [{str(tactic) for tactic in rank["swept"]} for rank in ranks["parallel"]]
    assert first == [{"[8, 1]"}, {"[8, 0]"}, {"[16, 1]"}, set()]
    merged = [{str(tactic) for tactic in rank["swept"]} for rank in ranks["cold"]]
    assert merged == [{"[8, 1]", "[8, 0]", "[16, 1]"}] * 4
    assert profile(folder, "parallel").choices[0].tried == 3
    assert each(ranks["parallel"], "saved") == [[4], [], [], []]


def test_all_ranks_time_cutlass_and_the_slowest_decides(ranks, folder):
    alike(ranks["cutlass"], [2, 12])
    assert each(ranks["cutlass"], "tuned") == [list(BUCKETS)] * 4
    assert len({*each(ranks["cutlass"], "runs")}) == 1, "all took the same times"
    assert ranks["cutlass"][0]["runs"] > 0
    assert [bool(saved) for saved in each(ranks["cutlass"], "saved")] == [True, False, False, False]
    assert {choice.time_us for choice in profile(folder, "cutlass").choices} == {700.0}


def test_with_broadcast_the_first_rank_alone_times_cutlass(ranks, folder):
    alike(ranks["cutlass_broadcast"], [1, 11])
    first, *others = each(ranks["cutlass_broadcast"], "runs")
    assert first > 0
    assert others == [0] * 3
    assert {choice.time_us for choice in profile(folder, "cutlass_broadcast").choices} == {50.0}


def survivors(ranks, dead):
    assert ranks[dead] is None
    return [found for rank, found in enumerate(ranks) if rank != dead]


def test_after_a_rank_has_died_the_others_run_the_same_tactics_and_name_it(ranks, folder):
    alive = survivors(ranks["dies"], 2)
    alike(alive, -1)
    assert each(alive, "first") == [[FAST] * 4] * 3, "what was agreed on before stays"
    assert len(set(each(alive, "lost"))) == 1
    assert alive[0]["lost"].startswith(f"Rank 2 of 4 gave no sign of life for {TIMEOUT_S:g} s")
    assert "rows of flashinfer::trtllm_bf16_moe" in alive[0]["lost"]
    for lines in each(alive, "lines"):
        assert any("FlashInfer's default on all ranks: Rank 2 of 4" in line for line in lines)
    assert TIMEOUT_S < max(each(alive, "took_s")) < TIMEOUT_S + LIMIT_S


def test_the_store_of_ranks_of_which_one_has_died_is_whole(ranks, folder):
    assert each(survivors(ranks["dies"], 2), "saved") == [[4], [], []], "one writer, of the first op"
    found = profile(folder, "dies")
    assert found.environment.strict["op"] == "flashinfer::trtllm_fp4_block_scale_moe"
    assert not [path for path in (folder / "dies").rglob("*") if path.suffix not in ("", ".json", ".lock")]


@pytest.fixture(scope="module")
def failing(folder):
    found, statuses, errors = started(folder / "failing", FAILING)
    assert statuses == [0] * 4, errors
    return found


@pytest.mark.slow
def test_ranks_whose_caches_differ_do_not_wait_for_each_other_in_flashinfers_own_ops(failing):
    alike(failing["other_cache"], FAST)
    assert not any(each(failing["other_cache"], "has_flashinfers_group"))
    for (line,) in each(failing["other_cache"], "lines"):
        assert "FlashInfer on Rank 1 of 4 has a file, or another cache or group than on Rank 0 of 4" in line


@pytest.mark.slow
def test_if_the_default_fails_on_a_rank_no_bucket_has_a_choice(failing):
    alike(failing["default_fails"], -1)
    assert each(failing["default_fails"], "missed") == [list(BUCKETS)] * 4
    for rank, (line,) in enumerate(each(failing["default_fails"], "lines")):
        assert "4 buckets of flashinfer::trtllm_fp4_block_scale_moe have no choice" in line
        assert ("Rank 3 of 4: RuntimeError: planted" if rank != 3 else "RuntimeError: planted") in line


@pytest.mark.slow
def test_a_rank_without_inputs_leaves_the_op_to_the_default_on_all(failing):
    alike(failing["inputs_fail"], -1)
    for rank, lines in enumerate(each(failing["inputs_fail"], "lines")):
        assert "FlashInfer's default on all ranks" in lines[0]
        assert ("Rank 2 of 4 failed: RuntimeError: planted." in lines[0]) == (rank != 2)


@pytest.mark.slow
def test_a_rank_that_never_calls_the_op_is_lost(failing):
    alike(failing["absent"], -1)
    for found in failing["absent"][:3]:
        assert found["lost"].startswith("Rank 3 of 4 gave no sign of life")
        assert found["took_s"] < TIMEOUT_S + LIMIT_S


@pytest.mark.slow
def test_ranks_that_call_different_ops_get_an_error_at_once(failing):
    for found in failing["other_op"]:
        assert "Rank 1 of 4 is at 'the call of flashinfer::trtllm_bf16_moe', but Rank 0 of 4" in found["lost"]
        assert found["chosen"] == [-1] * 4


@pytest.mark.slow
def test_the_next_warm_up_of_the_same_ranks_works_again(failing):
    alike(failing["cold"], FAST)


@pytest.mark.slow
def test_if_the_rank_with_the_key_value_store_dies_the_others_run_the_default(folder):
    found, statuses, errors = started(folder / "holder", ["holder_dies"])
    assert statuses == [-9, 0, 0, 0], errors
    alive = survivors(found["holder_dies"], 0)
    alike(alive, -1)
    for rank in alive:
        assert "does not reach torch.distributed's key-value store" in rank["lost"]
        assert rank["took_s"] < TIMEOUT_S + LIMIT_S
