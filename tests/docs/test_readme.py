import re
import shlex

from click.testing import CliRunner
from pages import blocks, text

from moetune.backends.registry import backends
from moetune.cli.main import main

SHOWN = next(block for block in blocks("README.md") if block.startswith("$ moetune plan"))
DEPENDENCIES = r'"([\w-]+>=[\d.]+)"'


def test_the_plan_shown_is_the_plan_printed():
    command, *shown = SHOWN.splitlines()
    printed = [line.rstrip() for line in CliRunner().invoke(main, shlex.split(command)[2:]).stdout.splitlines()]
    at = 0
    for line in shown:
        if line != "…":  # lines are left out
            assert line in printed[at:], f"{line!r} is not printed; printed is:\n" + "\n".join(printed)
            at = printed.index(line, at) + 1


def test_the_dependencies_named_are_the_declared_ones():
    declared = set(
        re.findall(DEPENDENCIES, re.search(r"^dependencies = \[(.*?)\]", text("pyproject.toml"), re.S | re.M)[1])
    )
    kept = {"torch>=2.9", "flashinfer-python>=0.6.18"}
    assert kept <= declared
    assert "torch ≥ 2.9 and FlashInfer ≥ 0.6.18" in text("README.md")
    named = next(block for block in blocks("README.md") if "--no-deps dist" in block)
    assert set(re.findall(DEPENDENCIES, named)) == declared - kept


def test_the_backends_listed_are_all_there_are():
    table = text("README.md").partition("## What is supported")[2].partition("##")[0]
    assert set(re.findall(r"^\|[^|]*`([\w-]+)` \|", table.partition("|---")[2], re.M)) == set(backends())
