from options_page import page
from pages import text

from moetune.backends import registry
from moetune.cli.backend_choice import option_types
from moetune.inputs.option_table import OPTIONS


def test_the_file_is_what_the_function_writes():
    assert text("docs/options.md") == page(), "run: make pages"


def test_the_page_has_every_option_and_every_option_of_a_backend():
    written = page()
    assert not [option.flag for option in OPTIONS if f"`{option.flag}" not in written]
    keys = {key for name in registry.backends() for key in option_types(name)}
    assert {"kernel", "fp8_block_layout", "packed"} <= keys
    assert not [key for key in keys if f"`{key}`" not in written]
    assert "`--for-version V`" in written
