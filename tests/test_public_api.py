import ast
import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moetune


def test_every_public_name_is_there_and_is_what_it_says():
    for name in set(moetune.__all__) - {"__version__"}:
        assert getattr(moetune, name).__name__ == name
    assert set(moetune.__all__) <= set(dir(moetune))


def test_a_function_stays_a_function_after_its_module_was_imported():
    program = (
        "import moetune.tuning.tune, moetune.tuning.plan, moetune; "
        "assert callable(moetune.tune) and callable(moetune.plan)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(moetune, "nonsense")


def test_the_package_imports_no_torch():
    program = "import sys, moetune; moetune.Regime(ep_size=8); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_type_checker_sees_every_public_name():
    tree = ast.parse(Path(moetune.__file__).read_text(encoding="utf-8"))
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in typed.body if isinstance(node, ast.ImportFrom)]
    seen = {f"{node.module}:{alias.name}" for node in imports for alias in node.names}
    assert seen == {f"{home}:{name}" for name, home in moetune._HOMES.items()}


def test_the_packages_example_is_true():
    found = doctest.testmod(moetune)
    assert found.attempted >= 5
    assert not found.failed


def test_every_error_that_a_user_can_catch_is_public():
    errors = {name for name in moetune.__all__ if name.endswith("Error")}
    assert errors >= {"MoetuneError", "UsageError", "UnsupportedError", "NoResultError", "MissError", "StoreError"}
    assert all(issubclass(getattr(moetune, name), moetune.MoetuneError) for name in errors)


def test_a_launch_line_gives_layer_regime_and_backend():
    line = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel --moe-backend triton"
    found = moetune.from_launch(line, draws=4)
    assert found.layer == moetune.layer("qwen3-235b-a22b")
    assert found.regime == moetune.regime("vllm:allgather_reducescatter", found.layer, ep_size=8, draws=4)
    assert found.backend == "triton"


def test_options_win_over_the_launch_line():
    line = "vllm serve Qwen/Qwen3-235B-A22B -dp 8 --enable-expert-parallel --moe-backend triton"
    assert moetune.from_launch(line, backend="torch").backend == "torch"
    assert moetune.from_launch(line, ep=4).regime.ep_size == 4


def test_fields_win_over_the_dispatcher():
    found = moetune.regime("vllm:deepep_high_throughput", "deepseek-r1", ep_size=8, ladder="8,16")
    assert found.layout == "deduplicated"
    assert found.buckets == (8, 16)


def test_an_unknown_dispatcher_lists_the_known_ones():
    with pytest.raises(moetune.UsageError, match=re.escape("deepep_high_throughput")):
        moetune.regime("vllm:nonsense", "deepseek-r1", ep_size=8)
