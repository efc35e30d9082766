import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.inputs.settings_file import as_flags, read, setting

SPELLINGS = {
    "block": "moe_config:\n  backend: TRTLLM\n  load_balancer:\n    num_slots: 288\n",
    "flow": "moe_config: {backend: TRTLLM, load_balancer: {num_slots: 288}}\n",
    "json": '{"moe_config": {"backend": "TRTLLM", "load_balancer": {"num_slots": 288}}}',
    "quoted": "'moe_config':\n  \"backend\": 'TRTLLM'\n  'load_balancer': {'num_slots': 288}\n",
    "dashes": "moe-config:\n  backend: TRTLLM\n  load-balancer:\n    num-slots: 288\n",
    "commented": "# of ours\nmoe_config: # kernels\n  backend: TRTLLM # fast\n  load_balancer: {num_slots: 288}\n",
}


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_yaml_is_one_setting(tmp_path, spelled):
    path = tmp_path / "extra.yaml"
    path.write_text(spelled)
    found = read(str(path), "--config")
    assert setting(found, "moe_config", "backend") == "TRTLLM"
    assert setting(found, "moe_config", "load_balancer", "num_slots") == 288
    assert setting(found, "moe_config", "nothing") is None
    assert setting(found, "moe_config", "backend", "deeper") is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [1", "is not YAML"),
        (b"a: b: c", "is not YAML"),
        (b"\tx: 1", "is not YAML"),
        (b"- 1\n- 2\n", "must have settings by name, found list"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a: !!python/object/apply:os.getcwd []", "is not YAML"),
        (b"[" * 20_000, "is not YAML"),
    ],
)
def test_a_file_that_is_no_settings_file_is_a_one_line_error_that_names_it(tmp_path, content, said):
    path = tmp_path / "extra.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as error:
        read(str(path), "--config")
    assert f"--config {path}" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_absent_file_is_named_and_an_empty_one_is_empty(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.yaml: the file cannot be read"):
        read(str(tmp_path / "nowhere.yaml"), "--config")
    (tmp_path / "empty.yaml").write_text("")
    assert read(str(tmp_path / "empty.yaml"), "--config") == {}


def test_settings_become_the_words_that_the_engines_make_of_them():
    settings = {"a_b": 8, "on": True, "off": False, "none": None, "many": [1, 2], "object": {"x": 1}}
    assert [word.text for word in as_flags(settings)] == [
        "--a-b",
        "8",
        "--on",
        "--many",
        "1",
        "2",
        "--object",
        '{"x": 1}',
    ]


@given(st.dictionaries(st.text("abc_-", min_size=1, max_size=5), st.integers() | st.booleans(), max_size=4))
def test_every_setting_but_false_is_a_flag(settings):
    flags = [word.text for word in as_flags(settings) if word.text.startswith("--")]
    assert len(flags) == sum(value is not False for value in settings.values())
