"""Which flag is the fastest by row count, and what one flag for all costs, from planted times."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.inputs.presets import layer as preset
from moetune.spec.enums import Precision
from moetune.spec.regime import Regime
from moetune.tuning.comparison import ComparedBucket, FlagRange
from moetune.tuning.flag_answer import decode_rows, flag_answer, flag_answers

TRITON, CUTLASS, MARLIN = "triton", "flashinfer-cutlass", "marlin"
FLAGS = {TRITON: "--moe-backend triton", CUTLASS: "--moe-backend flashinfer_cutlass", MARLIN: "--moe-backend marlin"}


def bucket(rows, noise=0.01, decided=None, **times_us):
    """A bucket whose backends are named with underscores."""
    times = {name.replace("_", "-"): float(us) for name, us in times_us.items()}
    winner, *others = sorted(times, key=times.get)
    ratio = times[others[0]] / times[winner] if others else None
    decided = ratio is not None and ratio > 1 + noise if decided is None else decided
    return ComparedBucket(
        rows=rows, times_us=times, winner=winner, runner_up=others[0] if others else None, ratio=ratio, noise=noise,
        interleaved=True, decided=decided,
    )  # fmt: skip


def answer(*buckets, decode=64, default=None):
    return flag_answer(buckets, FLAGS, decode, default)


CROSSING = (
    bucket(8, triton=10, flashinfer_cutlass=12),
    bucket(64, triton=20, flashinfer_cutlass=23),
    bucket(512, triton=110, flashinfer_cutlass=100),
    bucket(4096, triton=800, flashinfer_cutlass=500),
)


def test_each_range_of_rows_has_the_flag_that_is_fastest_there():
    assert answer(*CROSSING).ranges == (
        FlagRange(first_rows=8, last_rows=64, flag=FLAGS[TRITON], backend=TRITON),
        FlagRange(first_rows=512, last_rows=4096, flag=FLAGS[CUTLASS], backend=CUTLASS),
    )


def test_decode_and_prefill_each_have_their_cheapest_flag_and_one_for_both_is_named_with_its_cost():
    found = answer(*CROSSING)
    assert (found.decode_flag, found.prefill_flag) == (FLAGS[TRITON], FLAGS[CUTLASS])
    cutlass = found.result(FLAGS[CUTLASS])
    assert cutlass.prefill.mean == cutlass.prefill.worst == 1
    assert cutlass.decode.mean == pytest.approx(math.sqrt(1.2 * 23 / 20))
    assert (cutlass.decode.worst, cutlass.decode.worst_rows) == (1.2, 8)
    triton = found.result(FLAGS[TRITON])
    assert triton.prefill.mean == pytest.approx(math.sqrt(1.1 * 1.6))
    assert found.one_flag == FLAGS[CUTLASS]  # 1.175 in decode weighs less than 1.33 in prefill
    assert [result.backend for result in found.flags] == [CUTLASS, TRITON]


def test_decode_and_prefill_weigh_the_same_however_many_buckets_each_has():
    many = [bucket(rows, triton=10, flashinfer_cutlass=11) for rows in (1, 2, 4, 8, 16, 32)]
    assert answer(*many, bucket(512, triton=130, flashinfer_cutlass=100)).one_flag == FLAGS[CUTLASS]


def test_a_bucket_that_is_too_close_to_call_changes_no_flag():
    middle = bucket(64, noise=0.05, triton=20.4, flashinfer_cutlass=20)
    assert [each.last_rows for each in answer(CROSSING[0], middle, *CROSSING[2:]).ranges] == [64, 4096]
    undecided = bucket(64, noise=0.0, decided=False, triton=20.4, flashinfer_cutlass=20)
    assert [each.last_rows for each in answer(CROSSING[0], undecided, *CROSSING[2:]).ranges] == [64, 4096]
    decided = bucket(64, noise=0.01, triton=20.4, flashinfer_cutlass=20)
    assert [each.last_rows for each in answer(CROSSING[0], decided, *CROSSING[2:]).ranges] == [8, 4096]


def test_a_backend_that_no_flag_selects_is_left_out_even_if_it_wins():
    found = answer(bucket(8, torch=1, triton=10, flashinfer_cutlass=12))
    assert found.ranges == (FlagRange(first_rows=8, last_rows=8, flag=FLAGS[TRITON], backend=TRITON),)
    assert found.result(FLAGS[CUTLASS]).decode.mean == pytest.approx(1.2)
    assert answer(bucket(8, torch=1)) is None


def test_a_flag_without_a_time_in_a_bucket_is_no_flag_for_all():
    found = answer(bucket(8, triton=10, flashinfer_cutlass=12), bucket(512, triton=30))
    assert found.one_flag == FLAGS[TRITON]
    cutlass = found.result(FLAGS[CUTLASS])
    assert (cutlass.missing, cutlass.prefill) == ((512,), None)
    assert cutlass.decode is not None
    alone = answer(bucket(8, flashinfer_cutlass=12), bucket(512, triton=30))
    assert alone.one_flag is None
    assert (alone.decode_flag, alone.prefill_flag) == (FLAGS[CUTLASS], FLAGS[TRITON])


def test_without_prefill_buckets_there_is_no_prefill_flag():
    found = answer(*CROSSING, decode=4096)
    assert (found.decode_flag is not None, found.prefill_flag) == (True, None)
    assert all(result.prefill is None for result in found.flags)


def test_what_an_engine_runs_without_a_flag_is_named_only_if_it_has_a_time():
    assert answer(*CROSSING, default=CUTLASS).default == CUTLASS
    assert answer(*CROSSING, default=MARLIN).default is None


def test_times_of_separate_runs_are_marked():
    apart = CROSSING[0].model_copy(update={"interleaved": False, "decided": False})
    assert answer(*CROSSING).interleaved
    assert not answer(apart, *CROSSING[1:]).interleaved


times = st.floats(1, 1000)


@given(st.lists(st.tuples(times, times, times, st.floats(0, 0.2)), min_size=1, max_size=8))
def test_the_ranges_cover_all_buckets_in_order_each_flag_within_the_noise_and_no_fewer_ranges_would_do(planted):
    buckets = [
        bucket(2**at, noise, triton=a, flashinfer_cutlass=b, marlin=c) for at, (a, b, c, noise) in enumerate(planted)
    ]
    found = answer(*buckets)
    names = [each.backend for one in buckets for each in found.ranges if each.first_rows <= one.rows <= each.last_rows]
    assert len(names) == len(buckets)
    allowed = []
    for one, name in zip(buckets, names, strict=True):
        least = min(one.times_us.values())
        close = {each for each, us in one.times_us.items() if us <= least * (1 + one.noise) * (1 + 1e-9)}
        assert name in close
        allowed.append(close)
    fewest = min(
        sum(a != b for a, b in itertools.pairwise(chosen)) + 1 for chosen in itertools.product(*map(sorted, allowed))
    )
    assert len(found.ranges) == fewest
    assert all(
        cost.mean <= cost.worst * (1 + 1e-9) for each in found.flags for cost in (each.decode, each.prefill) if cost
    )


@pytest.mark.parametrize(
    ("regime", "rows"),
    [
        (Regime(), 512),
        (Regime(ep_size=8, attention_dp=True, dispatch="allgather"), 4096),
        (Regime(ep_size=8, attention_dp=True), 512),
    ],
    ids=lambda each: each.slug if isinstance(each, Regime) else str(each),
)
def test_decode_ends_with_the_rows_of_512_tokens_a_rank(regime, rows):
    assert decode_rows(preset("qwen3-235b-a22b"), regime) == rows


def test_expert_major_rows_are_all_decode():
    regime = Regime(ep_size=8, attention_dp=True, layout="batched")
    assert decode_rows(preset("qwen3-235b-a22b"), regime) >= max(regime.buckets)


def test_each_engine_has_its_flags_and_what_it_runs_without_one_is_known_on_hopper_alone():
    layer, regime = preset("deepseek-r1"), Regime(ep_size=8, attention_dp=True, dispatch="allgather")
    buckets = [bucket(8, triton=10, flashinfer_fp8_block=12, torch=90)]
    backends = ("triton", "flashinfer-fp8-block", "torch")
    answers = flag_answers(layer, regime, backends, buckets, on_a_hopper=True)
    assert set(answers) == {"vllm", "sglang"}
    assert [each.flag for each in answers["vllm"].flags] == ["--moe-backend triton", "--moe-backend flashinfer_cutlass"]
    assert [each.flag for each in answers["sglang"].flags] == ["--moe-runner-backend triton"]
    assert (answers["vllm"].default, answers["sglang"].default) == ("flashinfer-fp8-block", "triton")
    elsewhere = flag_answers(layer, regime, backends, buckets, on_a_hopper=False)
    assert all(each.default is None for each in elsewhere.values())


def test_of_several_kernels_with_one_flag_one_alone_is_an_answer():
    """SGLang has one value for mxfp4: its trtllm-gen kernels where they can run, else the CUTLASS ones."""
    layer = preset("deepseek-r1").model_copy(update={"precision": Precision.MXFP4})
    both = [bucket(8, flashinfer_cutlass=10, flashinfer_trtllm=12)]
    for buckets, kept in ((both, "flashinfer-trtllm"), ([bucket(8, flashinfer_cutlass=10)], "flashinfer-cutlass")):
        found = flag_answers(layer, Regime(), buckets[0].times_us, buckets, on_a_hopper=False)["sglang"]
        assert [(each.backend, each.flag) for each in found.flags] == [(kept, "--moe-runner-backend flashinfer_mxfp4")]


@pytest.mark.parametrize(
    ("regime", "kept"),
    [(Regime(), "flashinfer-trtllm"), (Regime(ep_size=8, attention_dp=True), "flashinfer-trtllm-routed")],
    ids=["from logits", "with ids"],
)
def test_of_two_ops_with_one_flag_the_one_that_the_engine_runs_is_taken(regime, kept):
    buckets = [bucket(8, flashinfer_trtllm=10, flashinfer_trtllm_routed=12)]
    found = flag_answers(preset("deepseek-r1"), regime, buckets[0].times_us, buckets, on_a_hopper=False)
    assert [each.backend for each in found["vllm"].flags] == [kept]
    assert len(found["sglang"].flags) == 2
