import json
from importlib import resources

import pytest

from moetune.errors import UsageError
from moetune.inputs import presets, repositories
from moetune.spec.enums import Precision

LISTED = json.loads(resources.files("moetune.inputs").joinpath("repositories.json").read_text("utf-8"))["repositories"]


@pytest.mark.parametrize("name", presets.names())
def test_a_presets_own_repository_is_listed_with_it(name):
    repository = presets.source(name).url.removeprefix("https://huggingface.co/")
    assert repositories.find(repository) == repositories.Repository(name, None)


@pytest.mark.parametrize("name", LISTED)
def test_every_entry_has_a_preset_a_known_precision_and_its_evidence(name):
    entry = LISTED[name]
    assert entry["preset"] in presets.names()
    assert entry.get("precision", "bf16") in (*Precision, repositories.UNKNOWN)
    assert entry["evidence"]


def test_the_owner_and_the_suffix_count():
    assert repositories.find("moonshotai/Kimi-K2-Thinking").precision == "mxint4"
    assert repositories.find("moonshotai/Kimi-K2-Instruct").precision is None
    for stranger in ("someone/Kimi-K2-Instruct", "Kimi-K2-Instruct"):
        with pytest.raises(UsageError, match="nor a repository that moetune knows"):
            repositories.find(stranger)


def test_a_name_is_found_in_any_case_and_as_an_address():
    found = repositories.find("qwen/QWEN3-235b-a22b")
    assert repositories.find("https://huggingface.co/Qwen/Qwen3-235B-A22B/") == found


@pytest.mark.parametrize(
    ("name", "preset", "precision"),
    [
        ("Qwen/Qwen3-235B-A22B", "qwen3-235b-a22b", "bf16"),
        ("deepseek-ai/DeepSeek-V3.1", "deepseek-v3", "fp8_block"),
        ("nvidia/DeepSeek-R1-0528-FP4", "deepseek-r1", "nvfp4"),
        ("moonshotai/Kimi-K2-Thinking", "kimi-k2", "mxint4"),
        ("zai-org/GLM-4.6", "glm-4.5", "bf16"),
    ],
)
def test_a_model_may_be_a_repository(name, preset, precision):
    layer = presets.layer(name)
    assert (layer.shape, layer.precision.value) == (presets.layer(preset, precision).shape, precision)
    assert presets.layer(name, "fp16").precision is Precision.FP16


def test_a_repository_of_unknown_precision_asks_for_it():
    with pytest.raises(UsageError, match="does not know how its experts are quantized"):
        presets.layer("zai-org/GLM-4.6-FP8")
    assert presets.layer("zai-org/GLM-4.6-FP8", "fp8_block").precision is Precision.FP8_BLOCK


def test_a_folder_of_that_name_is_read_instead(tmp_path, monkeypatch):
    folder = tmp_path / "Qwen" / "Qwen3-235B-A22B"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"config\.json"):
        presets.layer("Qwen/Qwen3-235B-A22B")
