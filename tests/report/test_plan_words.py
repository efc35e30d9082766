"""The words of a plan that are not its numbers: what the columns mean, which kernels run, and what to run next."""

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from moetune.backends.plain_torch.algorithms import ALGORITHMS
from moetune.report.lines import regime_line
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
rows            the bucket: the row count by which the engine looks a tactic up
tokens a rank   the tokens of each rank that produce these rows
local slots     (token, expert) pairs whose expert is on this rank
active experts  this rank's experts that have a slot
received        bytes from the other ranks before the experts run
combined        bytes from the other ranks after it: results of this rank's
                tokens. Both are for the first row of the table below and a
                whole number of tokens a rank: rounded, and up to 1 if a rank
                has less
weight bytes    weights of the active experts
activ. bytes    activations that both GEMMs read and write
tactics         how many `moetune tune` would try
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


def _lines(planned, width=80):
    text = io.StringIO()
    out = Console(file=text, width=width, highlight=False)
    for renderable in plan_report(planned):
        out.print(renderable, soft_wrap=isinstance(renderable, Text) and bool(renderable.no_wrap))
    return [line.rstrip() for line in text.getvalue().splitlines()]


def _bottom(planned, **changed):
    """The lines after the wire table, each sentence whole."""
    lines = _lines(planned.model_copy(update=changed), width=400)
    return lines[next(at for at, line in enumerate(lines) if line.startswith("kernels: ")) :]


def _nearest(differing, **changed):
    fields = {"path": "/p.json", "packaged": True, "layer": "small", "backend": "triton", "device": "NVIDIA H200"}
    return NearestProfile(**{**fields, "differing": differing, **changed})


def test_the_columns_are_explained_in_80_columns(planned):
    text = "\n".join(_lines(planned)) + "\n"
    assert LEGEND in text
    assert WIRE_LEGEND in text
    assert all(len(line) <= 80 for line in _lines(planned))


def test_a_column_that_is_not_shown_is_not_explained():
    text = "\n".join(
        _lines(plan(LAYER, Regime(ladder="8"), "torch", "cpu").model_copy(update={"tactics_unknown": "x"}))
    )
    assert not re.search(r"^(received|combined|typical rows|tactics|each row) {2}", text, re.M)
    typical = plan(LAYER, Regime(ep_size=4, dispatch="alltoall", layout="deduplicated", ladder="vllm"), "torch", "cpu")
    assert "typical rows    the most likely row count" in "\n".join(_lines(typical))


def test_no_row_of_the_wire_is_claimed_for_an_engine(planned):
    text = "\n".join(_lines(planned.model_copy(update={"backend": "triton", "kernels": KERNELS})))
    assert "Which row SGLang sends is not recorded in moetune." in text


def test_a_plan_ends_with_the_kernels_the_nearest_profile_and_the_next_command(planned):
    found = {"kernels": KERNELS, "profile": _nearest(EP8), "next_command": "moetune tune --ep 16"}
    assert _bottom(planned, backend="triton", **found) == [
        "kernels: triton. The command selects none: SGLang runs these if you start it with "
        "--moe-runner-backend triton. On Blackwell SGLang prefers flashinfer_trtllm for many models.",
        "profile: none for this deployment. The nearest, packaged, was measured with triton on NVIDIA H200: "
        "ep_size 8 instead of 16.",
        "view the nearest: moetune show /p.json",
        "next, on a machine with the GPU that you deploy on: moetune tune --ep 16",
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
        ("cut", {"computing": ()}, "cut does not compute this layer. No backend of moetune does."),
    ],
)
def test_the_kernels_are_one_line(planned, backend, changed, line):
    assert _bottom(planned, backend=backend, kernels=KERNELS.model_copy(update=changed))[0] == f"kernels: {line}"


@pytest.mark.parametrize(
    ("profile", "line"),
    [
        (None, "none is stored."),
        (_nearest({}), "a packaged one answers this question."),
        (_nearest({}, packaged=False), "a stored one answers this question."),
        (
            _nearest({"torch": EP8["torch"]}),
            "none for this machine. The same layer and deployment, packaged, were measured with triton on NVIDIA H200.",
        ),
        (
            _nearest({"remote": {"wanted": "zero", "stored": "drop"}, "torch": EP8["torch"]}),
            "none for this deployment. The nearest, packaged, was measured with triton on NVIDIA H200: "
            "remote drop instead of zero.",
        ),
        (
            _nearest(
                {
                    **EP8,
                    "backend": {"wanted": "torch", "stored": "triton"},
                    "remote": {"wanted": None, "stored": "drop"},
                }
            ),
            "none for this deployment. The nearest, packaged, was measured with triton on NVIDIA H200: "
            "ep_size 8 instead of 16.",
        ),
        (
            _nearest({"top_k": {"wanted": 4, "stored": 8}, **EP8}, layer="other"),
            "none of this layer. The nearest is of other, packaged, measured with triton on NVIDIA H200.",
        ),
        (
            _nearest({"precision": {"wanted": "nvfp4", "stored": "bf16"}}),
            "none of this layer. The nearest is of small in bf16, packaged, measured with triton on NVIDIA H200.",
        ),
        (
            _nearest({name: {"wanted": 1, "stored": 2} for name in ("ep_size", "tp_size", "draws", "seed", "rank")}),
            "none for this deployment. The nearest, packaged, was measured with triton on NVIDIA H200: "
            "ep_size 2 instead of 1, tp_size 2 instead of 1, draws 2 instead of 1 and 2 more differences.",
        ),
    ],
)
def test_the_nearest_profile_is_one_line_and_a_command(planned, profile, line):
    lines = _bottom(planned, kernels=KERNELS, profile=profile, next_command="moetune show /p.json")
    assert lines[1] == f"profile: {line}"
    answers = profile is not None and profile.answers
    assert ("view the nearest: moetune show /p.json" in lines) == (profile is not None and not answers)
    assert lines[-1].startswith("next: " if answers else "next, on a machine with the GPU")


def test_without_a_next_command_none_is_printed(planned):
    assert not any(line.startswith("next") for line in _bottom(planned, kernels=KERNELS))


@pytest.mark.parametrize(
    ("ladder", "shown"),
    [
        ("vllm", "ladder vllm (the batch sizes of vLLM's tuned files)"),
        ("adaptive", "ladder adaptive (the batch sizes of vLLM's tuned files and more)"),
        ("hybrid/8", "ladder hybrid/8 (the buckets of FlashInfer's tuner)"),
        ("pow2/8", "ladder pow2/8"),
        ("1,2", "ladder 1,2"),
    ],
)
def test_a_ladder_with_an_engines_name_says_where_its_buckets_come_from(ladder, shown):
    assert regime_line(Regime(ladder=ladder)).endswith(f", {shown}")


def test_every_algorithm_of_the_torch_backend_is_explained():
    assert TORCH_ALGORITHMS.keys() == ALGORITHMS.keys()
    assert torch_lines(
        [Tactic(algorithm="dense"), Tactic(algorithm="odd"), Tactic(algorithm="dense"), Tactic(m=1)]
    ) == [f"dense: {TORCH_ALGORITHMS['dense']}"]
