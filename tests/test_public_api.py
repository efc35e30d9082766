import subprocess
import sys

import moetune


def test_every_public_name_is_there_and_is_what_it_says():
    for name in moetune.__all__:
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
