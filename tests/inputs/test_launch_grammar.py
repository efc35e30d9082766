"""Whatever surrounds a launch line, it is read as the bare line is, or refused."""

import json
import shlex
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.errors import MoetuneError
from moetune.inputs import launch
from moetune.inputs.flag_table import table
from moetune.inputs.launch import DECIDING, read
from moetune.inputs.options import resolve

BARE = {
    "vllm": (
        ["vllm", "serve", "Qwen/Qwen3-235B-A22B"],
        [["-dp", "8"], ["--enable-expert-parallel"], ["--max-num-batched-tokens", "4096"]],
    ),
    "sglang": (
        ["python3", "-m", "sglang.launch_server"],
        [["--model-path", "deepseek-ai/DeepSeek-R1"], ["--tp", "8"], ["--attn-dp-size", "8"], ["--ep", "8"]],
    ),
    "trtllm": (
        ["trtllm-serve", "deepseek-ai/DeepSeek-R1"],
        [["--tp_size", "8"], ["--ep_size", "8"], ["--enable_attention_dp"], ["--max_num_tokens", "2048"]],
    ),
}
PROGRAMS = {"vllm": "vllm serve", "sglang": "sglang serve", "trtllm": "trtllm-serve"}


def unrelated(engine):
    """Flags of the engine that decide nothing here, each with a value of its kind."""
    values = {"none": [], "one": ["7"], "optional": ["7"], "many": ["7"], "json": ['{"a": 1}']}
    found = [
        [f"--{flag.name}", *values[flag.value]]
        for flag in table(engine, PROGRAMS[engine]).flags.values()
        if flag.name not in DECIDING
    ]
    assert len(found) > 20
    return found


UNRELATED = {engine: unrelated(engine) for engine in BARE}
WRAPS = (
    "{}",
    "{} > log.txt 2>&1",
    "{} 2>&1 | tee log",
    "nohup {} &",
    "# use --data-parallel-size 4 -tp 2\n{}",
    "{} # or -dp 2 --ep 4 --tp_size 2",
    "{};",
    "cd /models && {} < /dev/null",
    "CUDA_VISIBLE_DEVICES=0,1 {}",
    "export A=1 B=2\n{}\n",
    "bash -c {quoted}",
    "docker run --gpus all -p 8000:8000 image bash -lc {quoted}",
    "srun -N 2 --ntasks 8 {}",
    "$ {}",
    "{} >> log &>> err",
    "sleep 1; {} & wait",
)


def answer(line):
    found = read(line).options
    backend = found.pop("backend", None)
    layer, regime, *_ = resolve(**found)
    return layer, regime, backend


@pytest.mark.parametrize("engine", BARE)
@settings(max_examples=60)
@given(data=st.data())
def test_a_wrapped_line_is_the_bare_one(engine, data):
    program, flags = BARE[engine]
    bare = answer(shlex.join([*program, *(word for flag in flags for word in flag)]))
    others = data.draw(st.lists(st.sampled_from(UNRELATED[engine]), max_size=6))
    order = data.draw(st.permutations([*flags, *others]))
    words = [*program, *(word for flag in order for word in flag)]
    joint = data.draw(st.sampled_from((" ", " \\\n  ", "  ", " \\   # said\n ")))
    spelled = joint.join(shlex.quote(word) for word in words)
    wrap = data.draw(st.sampled_from(WRAPS))
    line = wrap.format(spelled, quoted=shlex.quote(spelled))
    assert answer(line) == bare


@pytest.mark.parametrize("engine", BARE)
@settings(max_examples=60)
@given(data=st.data())
def test_a_line_with_a_flag_misspelled_is_never_another_regime(engine, data):
    """One letter of a deciding flag goes: the answer is the same (an abbreviation) or an error."""
    program, flags = BARE[engine]
    words = [*program, *(word for flag in flags for word in flag)]
    bare = answer(shlex.join(words))
    at = data.draw(st.sampled_from([i for i, word in enumerate(words) if word.startswith("--") and len(word) > 6]))
    letter = data.draw(st.integers(4, len(words[at]) - 1))
    words[at] = words[at][:letter] + words[at][letter + 1 :]
    try:
        assert answer(shlex.join(words)) == bare
    except MoetuneError:
        return


@pytest.mark.parametrize("engine", BARE)
def test_an_expansion_is_never_passed_over(engine):
    program, flags = BARE[engine]
    words = [*program, *(word for flag in flags for word in flag)]
    for at in range(len(program), len(words) + 1):
        with pytest.raises(MoetuneError):
            answer(" ".join([*words[:at], "$EXTRA", *words[at:]]))


def test_every_deciding_flag_is_one_that_an_engine_has():
    known = {
        name
        for engine in BARE
        for one in (None, *_programs(engine))
        for flag in table(engine, one).flags.values()
        for name in (flag.name, *flag.aliases, *flag.short)
    }
    known |= {name for engine in BARE for name in table(engine).removed}
    assert known >= launch.DECIDING - {"config"}


def _programs(engine):
    text = json.loads(resources.files("moetune.inputs").joinpath(f"flags/{engine}.json").read_text())
    return text.get("programs", {})
