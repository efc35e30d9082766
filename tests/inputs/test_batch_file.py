"""The file of `moetune batch`: YAML, or a job a line."""

import time

import pytest
from processes import GIVE_UP_S

from moetune.errors import UsageError
from moetune.inputs.batch_file import MOST_JOBS, read_jobs


@pytest.fixture
def jobs(tmp_path):
    def _jobs(text, name="jobs.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return read_jobs(path)

    return _jobs


def test_a_job_is_made_of_each_combination(jobs):
    found = jobs("""
jobs:
  - model: [one, two]
    options: [--ep 8, "--ladder 1,4"]
  - launch: "vllm serve A -dp 8"
""")
    assert found == (
        ("--model", "one", "--ep", "8"),
        ("--model", "one", "--ladder", "1,4"),
        ("--model", "two", "--ep", "8"),
        ("--model", "two", "--ladder", "1,4"),
        ("--launch", "vllm serve A -dp 8"),
    )


def test_a_model_and_a_launch_line_can_be_combined(jobs):
    found = jobs("jobs: [{model: a, launch: [vllm serve x, sglang serve x], options: --seed 1}]")
    assert [words[:4] for words in found] == [
        ("--model", "a", "--launch", "vllm serve x"),
        ("--model", "a", "--launch", "sglang serve x"),
    ]
    assert {words[4:] for words in found} == {("--seed", "1")}


def test_lines_are_launch_lines_or_options(jobs):
    text = "# a night's work\n\nvllm serve A -dp 8\n  VLLM_X=1 vllm serve B \\\n  -tp 4\n--model c --launch 'd e'\n"
    assert jobs(text, "jobs.txt") == (
        ("--launch", "vllm serve A -dp 8"),
        ("--launch", "VLLM_X=1 vllm serve B    -tp 4"),
        ("--model", "c", "--launch", "d e"),
    )


@pytest.mark.parametrize(
    "text", ["# a\n\njobs:\n- model: a\n", '{"jobs": [{"model": "a"}]}', "---\njobs: [{model: a}]"]
)
def test_yaml_is_known_without_its_suffix(jobs, text):
    assert jobs(text, "jobs") == (("--model", "a"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jobs: []", "has no job"),
        ("", "a list; given None"),
        ("models: [a]", r"one key jobs, a list; given \['models'\]"),
        ("jobs: {model: a}", "one key jobs, a list"),
        ("jobs: [a]", "Entry 1 of jobs must be an object with model, launch, options or some of these, given 'a'"),
        ("jobs: [{model: a}, {}]", "Entry 2 of jobs must be"),
        ("jobs: [{model: a, modle: b}]", "Entry 1 of jobs must be"),
        ("jobs: [{model: 8}]", "model must be a text or a list of texts, given 8"),
        ("jobs: [{model: []}]", "model must be a text"),
        ('jobs: [{options: "--model \'a"}]', "cannot be split into options"),
        ("jobs: [", "not YAML"),
        ("jobs: [{model: 2026-01-01}]", "write it in quotes"),
    ],
)
def test_another_form_is_an_error_that_shows_the_right_one(jobs, text, said):
    with pytest.raises(UsageError, match=said) as error:
        jobs(text)
    assert "jobs.yaml" in error.value.message
    assert error.value.hint


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_jobs(tmp_path / "none.yaml")


def test_neither_many_jobs_nor_a_bomb_cost_time_or_memory(jobs):
    began = time.monotonic()
    several = ", ".join(["a"] * 200)
    with pytest.raises(UsageError, match="40,000 jobs or more, allowed 1,000"):
        jobs(f"jobs: [{{model: [{several}], options: [{several}]}}]")
    with pytest.raises(UsageError, match="1,001 jobs or more"):
        jobs("vllm serve a\n" * (MOST_JOBS + 1), "jobs.txt")
    aliases = "\n".join(f"x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 9)}]" for n in range(9))
    with pytest.raises(UsageError, match="values once its aliases are replaced"):
        jobs(f"x0: &x0 [a]\n{aliases}\njobs: *x9\n")
    with pytest.raises(UsageError, match="65,536 bytes"):
        jobs("#" * 70_000)
    jobs("\n" * 50_000 + "vllm serve a", "jobs.txt")
    assert time.monotonic() - began < GIVE_UP_S
