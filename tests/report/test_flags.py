import io

import pytest
from rich.console import Console

from moetune.report.flags import flags_report
from moetune.tuning.comparison import FlagAnswer, FlagCost, FlagRange, FlagResult

TRITON, CUTLASS = "--moe-backend triton", "--moe-backend flashinfer_cutlass"


def cost(mean, worst, rows):
    return FlagCost(mean=mean, worst=worst, worst_rows=rows)


ANSWER = FlagAnswer(
    decode_rows=4096,
    ranges=(
        FlagRange(first_rows=1, last_rows=256, flag=TRITON, backend="triton"),
        FlagRange(first_rows=512, last_rows=8192, flag=CUTLASS, backend="flashinfer-fp8-block"),
    ),
    flags=(
        FlagResult(flag=TRITON, backend="triton", decode=cost(1.004, 1.021, 2048), prefill=cost(1.3, 1.36, 8192)),
        FlagResult(
            flag=CUTLASS, backend="flashinfer-fp8-block", decode=cost(1.9, 2.31, 8), prefill=cost(1.0, 1.0, 8192)
        ),
    ),
    decode_flag=TRITON,
    prefill_flag=CUTLASS,
    one_flag=TRITON,
    default="flashinfer-fp8-block",
    interleaved=True,
)
GOLDEN = """
vLLM by rows: up to 256 --moe-backend triton, from 512 --moe-backend flashinfer_cutlass
                                   decode, up to
                                     4,096 rows:   prefill:
 flag                                  slower by  slower by             at worst
───────────────────────────────────────────────────────────────────────────────
 --moe-backend triton                      0.4 %     30.0 %  36.0 % (8,192 rows)
 --moe-backend flashinfer_cutlass         90.0 %      0.0 %       131 % (8 rows)
one flag for all: --moe-backend triton, slower than the fastest by 0.4 % in decode and 30.0 % in prefill on average
separate pools: decode --moe-backend triton, prefill --moe-backend flashinfer_cutlass
without a flag vLLM runs flashinfer-fp8-block on Hopper, as with --moe-backend flashinfer_cutlass
"""


def printed(answers, engine=None):
    text = io.StringIO()
    console = Console(file=text, width=130, highlight=False)
    for renderable in flags_report(answers, engine):
        console.print(renderable)
    return text.getvalue()


def lines(text):
    return [line.rstrip().lstrip() for line in text.splitlines() if line.strip()]


def test_the_answer_names_the_flags_by_rows_for_one_process_and_for_separate_pools():
    assert lines(printed({"vllm": ANSWER}, "vllm")) == lines(GOLDEN)


@pytest.mark.parametrize(("engine", "titles"), [(None, ["SGLang", "vLLM"]), ("vllm", ["vLLM"]), ("trtllm", [])])
def test_only_the_deployed_engine_is_shown_and_all_if_none_is_named(engine, titles):
    text = printed({"sglang": ANSWER, "vllm": ANSWER}, engine)
    assert [line.split(" by rows")[0] for line in text.splitlines() if " by rows" in line] == titles


def test_an_engine_with_one_flag_has_nothing_to_choose():
    assert printed({"vllm": ANSWER.model_copy(update={"flags": ANSWER.flags[:1]})}) == ""


def test_times_of_separate_runs_are_said_to_decide_little():
    assert "separate runs" in printed({"vllm": ANSWER.model_copy(update={"interleaved": False})})


def test_where_no_flag_has_all_times_none_is_advised_for_all():
    assert "no flag has a time at every row count" in printed({"vllm": ANSWER.model_copy(update={"one_flag": None})})


def test_a_flag_that_is_the_fastest_everywhere_is_said_so():
    answer = ANSWER.model_copy(update={"ranges": ANSWER.ranges[:1], "prefill_flag": None})
    text = printed({"vllm": answer})
    assert "vLLM by rows: --moe-backend triton at every row count" in text
    assert "separate pools" not in text
