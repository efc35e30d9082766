"""The words of a plan that are not its numbers: what the columns mean, which kernels run, and what to run next."""

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from moetune.backends.plain_torch.algorithms import ALGORITHMS
from moetune.report.lines import field_line, regime_line
from moetune.report.plan import plan_report
from moetune.report.tactics import TORCH_ALGORITHMS, torch_lines
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic
from moetune.tuning.outlook import Kernels, NearestProfile
from moetune.tuning.plan import plan

LAYER = MoELayer(name="small", num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)
REGIME = Regime(ep_size=4, dispatch="allgather", ladder="1,8")
KERNELS = Kernels(
    engine="sglang",
    selected=False,
    computing=("triton", "torch"),
    runs_here=False,
    flags={"vllm": "--moe-backend triton", "sglang": "--moe-runner-backend triton"},
    preferred={"Blackwell": "flashinfer_trtllm for many models"},
)
EP8 = {"ep_size": {"wanted": 16, "stored": 8}, "torch": {"wanted": "2.13.0", "stored": "2.11.0"}}

LEGEND = """\
ep, tp          ranks that share the experts, and ranks that share each expert
rows            the bucket: the row count by which the engine looks a tactic up.
                Above 8 it uses that of 8
tokens a rank   the tokens of each rank that produce these rows
local slots     (token, expert) pairs whose expert is on this rank
slots/expert    local slots divided by this rank's experts
active experts  this rank's experts that have a slot
bytes in        what other ranks send before the experts run: tokens in bf16,
                and their routing
bytes back      what other ranks send after the experts have run: results of
                this rank's tokens. Both are for a whole number of tokens a
                rank, at least 1
weight bytes    weights of the active experts
activ. bytes    activations that both GEMMs read and write
GEMMs (FLOP)    floating-point operations of both GEMMs
"""
WIRE_LEGEND = """\
each row             one way in which a token can travel
before the exchange  the type to which its hidden states are converted before
                     they are sent
packed_topk          an expert's id and its weight, as bf16, in one int32
fewer by             the bytes of the first row divided by those of this row
Which row an engine sends is not recorded in moetune.
"""


@pytest.fixture(scope="module")
def planned():
    return plan(LAYER, REGIME, "torch", "cpu")


def _lines(planned, width=80, **shown):
    text = io.StringIO()
    out = Console(file=text, width=width, highlight=False)
    for renderable in plan_report(planned, **shown):
        out.print(renderable, soft_wrap=isinstance(renderable, Text) and bool(renderable.no_wrap))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _bottom(planned, **changed):
    """The lines from the kernels on, each sentence whole."""
    lines = _lines(planned.model_copy(update=changed), width=400)
    return lines[next(at for at, line in enumerate(lines) if line.startswith("kernels: ")) :]


def _nearest(differing, **changed):
    fields = {"path": "/p.json", "packaged": True, "layer": "small", "backend": "triton", "device": "NVIDIA H200"}
    return NearestProfile(**{**fields, "differing": differing, **changed})


def test_the_columns_are_explained_in_80_columns(planned):
    text = "\n".join(_lines(planned, wire=True)) + "\n"
    assert LEGEND in text
    assert WIRE_LEGEND in text
    assert all(len(line) <= 80 for line in _lines(planned, wire=True))


def test_the_wire_is_shown_only_if_it_is_asked_for(planned):
    text = "\n".join(_lines(planned))
    assert LEGEND in f"{text}\n"
    assert "before the exchange" not in text
    assert "is not recorded in moetune" not in text


def test_the_flags_that_decide_the_deployment_stand_below_it(planned):
    lines = _lines(planned, flags=("--tp-size 4", "no --moe-a2a-backend"))
    assert lines[2] == "read from the line: --tp-size 4, no --moe-a2a-backend"
    assert not any("read from the line" in line for line in _lines(planned))


def test_a_load_says_whose_logits_it_is_for(planned):
    assert "numbers are means for random logits through the model's routing rule, in closed form" in " ".join(
        _lines(planned)
    )
    balanced = plan(LAYER, Regime(ep_size=4, dispatch="allgather", ladder="8", distribution="balanced"), "torch", "cpu")
    assert any(line.startswith("numbers are means for experts with equal loads, ") for line in _lines(balanced))


def test_rows_that_are_the_tokens_of_a_rank_have_one_column():
    lines = _lines(plan(LAYER, Regime(ladder="8"), "torch", "cpu"))
    assert "a rank" not in "\n".join(lines[: lines.index("")])
    assert "as many tokens" in "\n".join(lines)


def test_no_heading_is_split_by_a_hyphen():
    regime = Regime(ep_size=8, dispatch="alltoall", layout="deduplicated", ladder="vllm")
    lines = _lines(plan("qwen3-235b-a22b", regime, "torch", "cpu"))
    rule = next(at for at, line in enumerate(lines) if line.startswith("──"))
    blank = max(at for at, line in enumerate(lines[:rule]) if not line)
    assert [" ".join(line.split()) for line in lines[blank + 1 : rule]] == [
        "typ. tokens local slots/ active bytes bytes weight activ. GEMMs",
        "rows rows a rank slots expert experts in back bytes bytes (FLOP)",
    ]


def test_a_column_that_is_not_shown_is_not_explained():
    text = "\n".join(
        _lines(plan(LAYER, Regime(ladder="8"), "torch", "cpu").model_copy(update={"tactics_unknown": "x"}))
    )
    assert not re.search(r"^(bytes in|bytes back|typ. rows|tokens a rank|each row) {2}", text, re.M)
    typical = plan(LAYER, Regime(ep_size=4, dispatch="alltoall", layout="deduplicated", ladder="vllm"), "torch", "cpu")
    assert "typ. rows       the typical (most likely) row count that maps to the bucket" in "\n".join(_lines(typical))


def test_the_typical_rows_of_the_ladder_adaptive_are_said_to_lie_near_the_bucket():
    """They can lie nearer to another bucket, because a tune adds buckets where the choices of two neighbors differ."""
    regime = Regime(ep_size=8, dispatch="alltoall", layout="deduplicated", ladder="adaptive")
    shown = plan(LAYER, regime, "torch", "cpu")
    assert all(1 / 1.12 <= each.met_rows / each.rows <= 1.12 for each in shown.buckets if each.rows >= 8)
    text = " ".join(" ".join(_lines(shown)).split())
    assert "typ. rows the typical (most likely) row count within 12 % of the bucket; " in text


def test_no_row_of_the_wire_is_claimed_for_an_engine(planned):
    text = "\n".join(_lines(planned.model_copy(update={"backend": "triton", "kernels": KERNELS}), wire=True))
    assert "Which row SGLang sends is not recorded in moetune." in text


def test_a_plan_ends_with_the_kernels_the_nearest_profile_and_the_next_command(planned):
    found = {"kernels": KERNELS, "profile": _nearest(EP8), "next_command": "moetune tune --ep 16"}
    assert _bottom(planned, backend="triton", **found) == [
        "kernels: triton. The command selects none: start SGLang with --moe-runner-backend triton. Without it SGLang "
        "runs these on Hopper and prefers flashinfer_trtllm for many models on Blackwell.",
        "profile: none for this deployment. The nearest comes with moetune and was measured with triton on NVIDIA "
        "H200. It is for a deployment with ep 8; yours has ep 16.",
        "A profile holds the fastest tactic of each bucket for one deployment.",
        "view the nearest: moetune show /p.json",
        "next, on one GPU of the kind that you deploy on (Triton takes about 2 minutes on an H200):",
        "moetune tune --ep 16",
    ]


@pytest.mark.parametrize(
    ("backend", "changed", "line"),
    [
        (
            "triton",
            {"selected": True},
            "triton, as the command selects. SGLang runs them with --moe-runner-backend triton.",
        ),
        ("triton", {"engine": "trtllm"}, "triton. TensorRT-LLM does not run them."),
        (
            "triton",
            {"engine": None},
            "triton, moetune's first choice here. An engine's flag: "
            "vLLM --moe-backend triton · SGLang --moe-runner-backend triton.",
        ),
        ("torch", {"engine": None, "flags": {}}, "torch, moetune's first choice here. No engine runs them."),
        ("cut", {}, "cut does not compute this layer. Choose one that does with --backend: triton, torch."),
        (
            "cut",
            {"computing": ()},
            "cut does not compute this layer. No backend of moetune does. On Hopper SGLang runs Triton.",
        ),
    ],
)
def test_the_kernels_are_one_line(planned, backend, changed, line):
    assert _bottom(planned, backend=backend, kernels=KERNELS.model_copy(update=changed))[0] == f"kernels: {line}"


def test_a_plan_says_what_chooses_the_experts_where_both_can(planned):
    computing = ("flashinfer-trtllm", "flashinfer-trtllm-routed", "triton")
    kernels = KERNELS.model_copy(update={"computing": computing})

    def routing(backend, routed_by, regime=planned.regime):
        found = kernels.model_copy(update={"routed_by": routed_by})
        lines = _bottom(planned, backend=backend, kernels=found, regime=regime)
        return [line for line in lines if line.startswith("routing: ")]

    (line,) = routing("flashinfer-trtllm", "kernel")
    assert line == (
        "routing: the kernel chooses the experts itself, from the router's logits. Where the engine must choose them, "
        "as for rollouts whose routing is returned or replayed, it runs flashinfer-trtllm-routed, which is tuned "
        "apart: --backend flashinfer-trtllm-routed."
    )
    replayed = planned.regime.model_copy(update={"distribution": "replay:0123456789abcdef"})
    (line,) = routing("flashinfer-trtllm", "kernel", replayed)
    assert "For a recording, logits are made from which it chooses the recorded experts." in line
    (line,) = routing("flashinfer-trtllm-routed", "engine")
    assert line.startswith("routing: the engine chooses the experts and passes their ids")
    assert routing("triton", "engine") == []


@pytest.mark.parametrize(
    ("profile", "line"),
    [
        (None, "none measured with torch is stored."),
        (_nearest({}), "one that comes with moetune answers this question."),
        (_nearest({}, packaged=False), "one that is in your store answers this question."),
        (
            _nearest({"torch": EP8["torch"]}),
            "none for this machine. One of the same layer and deployment comes with moetune and was measured with "
            "triton on NVIDIA H200.",
        ),
        (
            _nearest({"remote": {"wanted": "zero", "stored": "drop"}, "torch": EP8["torch"]}),
            "none for this deployment. The nearest comes with moetune and was measured with triton on NVIDIA H200. "
            "It is for a deployment with --remote drop; yours has --remote zero.",
        ),
        (
            _nearest(
                {
                    **EP8,
                    "backend": {"wanted": "torch", "stored": "triton"},
                    "remote": {"wanted": None, "stored": "drop"},
                }
            ),
            "none for this deployment. The nearest comes with moetune and was measured with triton on NVIDIA H200. "
            "It is for a deployment with ep 8; yours has ep 16.",
        ),
        (
            _nearest({"top_k": {"wanted": 4, "stored": 8}, **EP8}, layer="other"),
            "none of this layer. The nearest is of other; it comes with moetune and was measured with triton on NVIDIA "
            "H200.",
        ),
        (
            _nearest({"precision": {"wanted": "nvfp4", "stored": "bf16"}}),
            "none of this layer. The nearest is of small in bf16; it comes with moetune and was measured with triton "
            "on NVIDIA H200.",
        ),
        (
            _nearest({name: {"wanted": 1, "stored": 2} for name in ("ep_size", "tp_size", "draws", "seed", "rank")}),
            "none for this deployment. The nearest comes with moetune and was measured with triton on NVIDIA H200. "
            "It is for a deployment with ep 2, tp 2 and draws 2; yours has ep 1, tp 1 and draws 1. "
            "--json lists 2 more differences.",
        ),
    ],
)
def test_the_nearest_profile_is_one_line_and_a_command(planned, profile, line):
    lines = _bottom(planned, kernels=KERNELS, profile=profile, next_command="moetune show /p.json")
    assert lines[1] == f"profile: {line}"
    answers = profile is not None and profile.answers
    assert ("view the nearest: moetune show /p.json" in lines) == (profile is not None and not answers)
    assert lines[-1] == ("next: moetune show /p.json" if answers else "moetune show /p.json")
    assert lines[-2].startswith("next, on one GPU of the kind that you deploy on:") == (not answers)


def test_without_a_next_command_none_is_printed(planned):
    assert not any(line.startswith("next") for line in _bottom(planned, kernels=KERNELS))


@pytest.mark.parametrize(
    ("ladder", "shown"),
    [
        ("vllm", "ladder vllm (the batch sizes of vLLM's and SGLang's tuned files)"),
        ("adaptive", "ladder adaptive (the batch sizes of vLLM's and SGLang's tuned files and more)"),
        ("hybrid/8", "ladder hybrid/8 (the buckets of FlashInfer's tuner)"),
        ("pow2/8", "ladder pow2/8"),
        ("1,2", "ladder 1,2"),
    ],
)
def test_a_ladder_with_an_engines_name_says_where_its_buckets_come_from(ladder, shown):
    assert regime_line(Regime(ladder=ladder)).endswith(f", {shown}")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("ep_size", 8, "ep 8"),
        ("attention_dp", True, "attention DP"),
        ("attention_dp", False, "no attention DP"),
        ("layout", None, "no layout"),
        ("tune_max_num_tokens", 8192, "largest bucket 8192"),
        ("ladder", "pow2", "ladder pow2"),
    ],
)
def test_a_field_of_a_deployment_has_a_readers_name(name, value, line):
    assert field_line(name, value) == line


@pytest.mark.parametrize(
    ("engine", "precision", "preferred", "without"),
    [
        ("vllm", "fp8_block", {"Hopper": "A", "Blackwell": "B"}, "prefers A on Hopper and prefers B on Blackwell"),
        ("vllm", "bf16", {"Blackwell": "B"}, "runs these on Hopper and prefers B on Blackwell"),
        ("sglang", "bf16", {}, "runs these on Hopper"),
    ],
)
def test_the_kernels_line_says_what_the_engine_does_without_the_flag(planned, engine, precision, preferred, without):
    layer = MoELayer(**{**dict(LAYER), "precision": precision})
    kernels = KERNELS.model_copy(update={"engine": engine, "preferred": preferred})
    line = _bottom(planned, backend="triton", layer=layer, kernels=kernels)[0]
    assert line.endswith(f" {without}.")


def test_every_algorithm_of_the_torch_backend_is_explained():
    assert TORCH_ALGORITHMS.keys() == ALGORITHMS.keys()
    assert torch_lines(
        [Tactic(algorithm="dense"), Tactic(algorithm="odd"), Tactic(algorithm="dense"), Tactic(m=1)]
    ) == [f"dense: {TORCH_ALGORITHMS['dense']}"]
