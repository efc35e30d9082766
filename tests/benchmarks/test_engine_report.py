"""The proofs and the report of `benchmarks/engine`, on planted logs and timings."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks/engine"))

import engine_report
from arms import ARMS, Folders, counted, missing_proof, sweep_s, telling_lines
from cases import CASES
from engine_report import Runs, bound, report

FOLDERS = Folders(Path("/out/empty"), Path("/site/vllm/configs"), Path("/out/tuned/ep1"))
CASE, SHARE = CASES["qwen3-30b"], CASES["deepseek-r1-share"]
PREFIX = "(EngineCore pid=71) INFO 11-28 01:33:11 [fused_moe.py:1094] "
ROUTING = f"{PREFIX}Simulating MoE routing using a uniform_random strategy. This should only be used for performance."
TRITON = f"{PREFIX}Using TRITON Unquantized MoE backend out of potential backends: ['TRITON', 'FlashInfer CUTLASS']."
CUTLASS = TRITON.replace("Using TRITON", "Using FlashInfer CUTLASS")
TUNING = (
    "2026-11-28 01:33:11,250 - INFO - autotuner.py:1048 - flashinfer.jit: [Autotuner]: Autotuning process starts ...\n"
    "2026-11-28 01:33:24,500 - INFO - autotuner.py:1071 - flashinfer.jit: [Autotuner]: Autotuning process ends"
)
PLUGIN = f"{PREFIX}moetune: Triton experts E=128, N=768: profile of qwen3-30b-a3b under ep1-tp1, 36 buckets"
SERVED = (
    f"{PREFIX}moetune: qwen3-30b-a3b under ep1-tp1-nodp-none-random: buckets of flashinfer-cutlass: "
    "{} served, {} tuned, {} missed"
)


def read(folder: Path) -> str:
    return f"{PREFIX}Using configuration from {folder}/{CASE.file_name('NVIDIA H200')} for MoE layer."


LOGS = {
    "default": [TRITON, ROUTING, read(FOLDERS.empty)],
    "shipped": [TRITON, ROUTING, read(FOLDERS.shipped)],
    "moetune": [TRITON, ROUTING, read(FOLDERS.tuned)],
    "plugin-triton": [TRITON, ROUTING, PLUGIN],
    "flashinfer": [CUTLASS, ROUTING, TUNING],
    "plugin-flashinfer": [CUTLASS, ROUTING, TUNING, SERVED.format(0, 22, 0)],
}


def missing(arm: str, *logs: list[str], case=CASE) -> list[str]:
    return missing_proof(ARMS[arm], case, ["\n".join(log) for log in logs], FOLDERS)


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_has_its_proof_and_fails_without_any_line_of_it(arm):
    assert missing(arm, LOGS[arm]) == []
    for line in LOGS[arm]:
        if (arm, line) != ("plugin-flashinfer", TUNING):
            assert missing(arm, [other for other in LOGS[arm] if other != line])


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("other", ARMS)
def test_no_arms_log_proves_another_arm(arm, other):
    assert bool(missing(arm, LOGS[other])) == (arm != other)


def test_a_fallback_beside_the_right_file_is_no_proof():
    default = f"{PREFIX}Using default MoE config. Performance might be sub-optimal! Config file not found at "
    default += "/a/E=9,N=9,x.json"
    assert "('default', '/a')" in missing("moetune", [*LOGS["moetune"], default])[0]


def test_the_simulated_routing_is_proved_by_any_rank():
    case = CASES["qwen3-30b-dp2"]
    assert missing("flashinfer", LOGS["flashinfer"], [CUTLASS, TUNING], case=case) == []
    assert missing("flashinfer", [CUTLASS, TUNING], [CUTLASS, TUNING], case=case)


def test_the_report_says_whether_the_ranks_hold_the_same_tactics():
    def said(*digests: str) -> str:
        ranks = [[{"what": "tactics", "count": 44, "digest": digest}] for digest in digests]
        return "".join(engine_report._tactics({"ranks": ranks}))

    assert said("a") == "44 tactics in FlashInfer's tuner"
    assert said("a", "a").endswith("tuner, equal on all ranks")
    assert said("a", "b").endswith("tuner, **different on the ranks**")
    assert "".join(engine_report._tactics({"ranks": [[{"what": "tactics", "count": 0, "digest": "a"}]]})) == ""


def test_missed_buckets_are_no_proof_and_the_last_line_counts():
    log = [*LOGS["plugin-flashinfer"], SERVED.format(21, 0, 1)]
    assert "0 missed` on rank 0; it has {'served': 21, 'tuned': 0, 'missed': 1}" in missing("plugin-flashinfer", log)[0]
    assert counted("\n".join(log)) == {"served": 21, "tuned": 0, "missed": 1}
    assert counted("") is None


def test_the_plugin_must_answer_on_each_rank_and_a_file_is_logged_on_the_first_only():
    assert missing("moetune", LOGS["moetune"], [TRITON, ROUTING]) == []
    assert "on rank 1" in missing("plugin-triton", LOGS["plugin-triton"], [TRITON, ROUTING])[0]


def test_a_default_that_the_plugin_leaves_to_vllm_is_read_from_its_file_but_nothing_else_may_be_left():
    assert missing("plugin-triton", [*LOGS["plugin-triton"], read(FOLDERS.shipped)]) == []
    left = f"{PREFIX}moetune: Triton experts E=128, N=768: no profile, the engine's own configuration runs; `moetune …`"
    assert "that rank 0 has `moetune: Triton" in missing("plugin-triton", [*LOGS["plugin-triton"], left])[0]


def test_a_share_must_be_built_as_one():
    built = f"{PREFIX}moetune benchmark: MoE layers are built as rank 0 of expert parallelism over 8 ranks"
    assert "expert parallelism over" in missing("moetune", LOGS["moetune"], case=SHARE)[0]
    assert missing("moetune", [*LOGS["moetune"], built], case=SHARE) == []


def test_the_time_of_the_tuning_mode_is_read_out_of_the_log():
    assert sweep_s(f"{TUNING}\n{TUNING}") == 26.5
    assert sweep_s("no line") is None


def test_the_kept_lines_are_those_that_tell_once_each_without_their_prefix():
    text = "\n".join([*LOGS["moetune"], LOGS["moetune"][0], "noise", f"{PREFIX}init engine (profile) took 41.2 s"])
    assert telling_lines(text) == [line.removeprefix(PREFIX) for line in LOGS["moetune"]] + [
        "init engine (profile) took 41.2 s"
    ]


def journal(times, profiles=(), **changes):
    """Lines of runs: `times` is {arm: [[ms of each pass] of each repetition]} at 32 sequences."""
    lines = []
    for arm, reps in times.items():
        for rep, passes in enumerate(reps):
            start = {"what": "start", "seconds": 61.5, "versions": {"vllm": "0.26.0"}}
            decode = [{"what": "decode", "at": 32, "number": at, "ms": ms} for at, ms in enumerate(passes)]
            found = (
                [{"what": "profile decode", "at": 32, "moe_ms": dict(profiles)[arm]}] if arm in dict(profiles) else []
            )
            run = {
                "kind": "run",
                "case": "qwen3-30b",
                "arm": arm,
                "rep": rep,
                "ok": True,
                "date": "2026-11-28T01:00:00",
            }
            run |= {"device": "NVIDIA H200", "gpus": "0", "layers": 48, "seconds": 80.0, "exit_codes": [0]}
            run |= {"ranks": [[start, *decode, *found]], "missing": [], "counts": [None], "sweep_s": [None]}
            lines.append({**run, "lines": [["Using configuration from …"]], **changes})
    return lines


STOCK = [[16.0, 16.02], [15.8, 15.81], [16.1, 16.12]]
FASTER = [[ms * 0.97 for ms in passes] for passes in STOCK]
SLOWER = [[ms * 1.03 for ms in passes] for passes in STOCK]


def test_a_faster_arm_passes_and_its_gain_is_paired_by_repetition():
    text, failed = report(journal({"default": STOCK, "moetune": FASTER}))
    assert not failed
    assert "| 32 | 16.01 (1,999) | 15.53 (2,061) |" in text
    assert "moetune against default" in text
    assert "| 32 | +3.1% [+3.1%, +3.1%] (" in text
    assert "vllm 0.26.0" in text
    assert "NVIDIA H200" in text
    assert "2026-11-28" in text


def test_a_slower_arm_fails_by_name():
    text, failed = report(journal({"shipped": STOCK, "default": SLOWER, "moetune": SLOWER}))
    assert failed
    assert "- qwen3-30b, `moetune`: slower than `shipped` at 32 running sequences: -2.9% [-2.9%, -2.9%]" in text
    assert "| running sequences | moetune against shipped | shipped against default | moetune against default |" in text
    assert "`default`: slower" not in text  # it is no moetune arm
    assert "prefill" not in text


def test_other_experts_than_the_defaults_are_not_judged_by_it():
    text, failed = report(journal({"default": STOCK, "plugin-flashinfer": SLOWER}))
    assert failed
    assert "- qwen3-30b, `plugin-flashinfer`: no stock arm to compare it with" in text
    assert "slower than" not in text
    assert "the bound" not in text


def test_a_loss_within_the_noise_between_passes_is_none():
    noisy = [[16.0, 16.9], [15.8, 16.6], [16.1, 17.0]]
    slightly = [[ms * 1.005 for ms in passes] for passes in noisy]
    assert not report(journal({"default": noisy, "moetune": slightly}))[1]
    calm = [[passes[0], passes[0]] for passes in noisy]
    assert report(journal({"default": calm, "moetune": [[p[0] * 1.005] * 2 for p in calm]}))[1]


def test_one_common_repetition_is_shown_and_decides_nothing():
    text, failed = report(journal({"default": STOCK[:1], "moetune": SLOWER}))
    assert "-2.9% (one run)" in text
    assert not failed


def test_a_missing_proof_an_unfinished_run_and_a_failed_measurement_fail_by_name():
    lines = journal({"default": STOCK, "moetune": FASTER})
    assert (
        "`moetune` 2: no proof: `Using" in report([*lines[:-1], lines[-1] | {"missing": ["`Using configuration`"]}])[0]
    )
    text, failed = report([*lines, lines[-1] | {"ok": False, "exit_codes": [None]}])
    assert failed
    assert "`moetune` 2: exit codes [None]" in text
    error = {"what": "decode", "at": 1024, "number": 0, "error": "RuntimeError: only 3"}
    text, failed = report([*lines, lines[0] | {"ranks": [[*lines[0]["ranks"][0], error]]}])
    assert failed
    assert "`default` 0: decode 1024: RuntimeError: only 3" in text
    assert report([])[1]


def test_the_bound_is_the_share_of_the_step_times_the_kernels_gain():
    lines = journal({"default": STOCK, "moetune": FASTER}, {"default": 8.0, "moetune": 7.0})
    step = 16.01
    moe, share, gain, allowed = bound(Runs(lines, "qwen3-30b"), "moetune", "default", "decode", 32)
    assert (moe, share, gain) == (8.0, pytest.approx(8.0 / step), pytest.approx(8 / 7 - 1))
    assert allowed == pytest.approx(step / (step - 1.0) - 1)
    assert "| 32 | 8.00 | 50% | +14.3% | +6.7% | +3.1% [+3.1%, +3.1%] |" in report(lines)[0]


def test_the_slowest_rank_counts_and_both_ranks_tokens():
    lines = journal({"default": STOCK}, case="qwen3-30b-dp2")
    slow = [line | {"ms": line["ms"] * 2} if line["what"] == "decode" else line for line in lines[0]["ranks"][0]]
    lines[0] |= {"ranks": [lines[0]["ranks"][0], slow]}
    assert "| 32 | 32.02 (1,999) |" in report(lines[:1])[0]


def test_what_is_left_out_is_named():
    left_out = {"kind": "left_out", "case": "qwen3-30b", "arm": "shipped", "why": "vLLM ships no E=128"}
    assert "- `shipped` is left out: vLLM ships no E=128" in report([*journal({"default": STOCK}), left_out])[0]
