"""Presets carry the model cards' figures, each with its source."""

import json
from importlib import resources
from pathlib import Path

import pytest

from moetune.errors import UsageError
from moetune.inputs import presets
from moetune.inputs.hf import layer_from_config
from moetune.spec.enums import Precision
from moetune.spec.layer import Activation, MoELayer, RoutingMethod

CONFIGS = Path(__file__).parent.parent / "data" / "hf"
# (experts, top-k, hidden, intermediate, precision, shared experts)
FIGURES = {
    "deepseek-r1": (256, 8, 7168, 2048, "fp8_block", 1),
    "deepseek-v2": (160, 6, 5120, 1536, "bf16", 2),
    "deepseek-v3": (256, 8, 7168, 2048, "fp8_block", 1),
    "deepseek-v3.2": (256, 8, 7168, 2048, "fp8_block", 1),
    "ernie-4.5-21b-a3b": (64, 6, 2560, 1536, "bf16", 2),
    "glm-4.5": (160, 8, 5120, 1536, "bf16", 1),
    "glm-4.5-air": (128, 8, 4096, 1408, "bf16", 1),
    "glm-4.7": (160, 8, 5120, 1536, "bf16", 1),
    "glm-5": (256, 8, 6144, 2048, "bf16", 1),
    "gpt-oss-120b": (128, 4, 2880, 2880, "mxfp4", 0),
    "gpt-oss-20b": (32, 4, 2880, 2880, "mxfp4", 0),
    "kimi-k2": (384, 8, 7168, 2048, "fp8_block", 1),
    "kimi-k2.5": (384, 8, 7168, 2048, "mxint4", 1),
    "llama4-maverick": (128, 1, 5120, 8192, "bf16", 1),
    "llama4-scout": (16, 1, 5120, 8192, "bf16", 1),
    "mimo-v2-flash": (256, 8, 4096, 2048, "fp8_block", 0),
    "minimax-m2.5": (256, 8, 3072, 1536, "fp8_block", 0),
    "minimax-m2.7": (256, 8, 3072, 1536, "fp8_block", 0),
    "mixtral-8x22b": (8, 2, 6144, 16384, "bf16", 0),
    "mixtral-8x7b": (8, 2, 4096, 14336, "bf16", 0),
    "qwen3-235b-a22b": (128, 8, 4096, 1536, "bf16", 0),
    "qwen3-30b-a3b": (128, 8, 2048, 768, "bf16", 0),
    "qwen3-coder-480b-a35b": (160, 8, 6144, 2560, "bf16", 0),
    "qwen3-next-80b-a3b": (512, 10, 2048, 512, "bf16", 1),
    "qwen3.5-122b-a10b": (256, 8, 3072, 1024, "bf16", 1),
    "qwen3.5-397b-a17b": (512, 10, 4096, 1024, "bf16", 1),
}
SIGMOID_BIAS = RoutingMethod(scoring="sigmoid", bias=True)
ROUTINGS = {
    "deepseek-r1": RoutingMethod(scoring="sigmoid", bias=True, num_groups=8, top_k_groups=4, scaling=2.5),
    "deepseek-v3": RoutingMethod(scoring="sigmoid", bias=True, num_groups=8, top_k_groups=4, scaling=2.5),
    "deepseek-v2": RoutingMethod(num_groups=8, top_k_groups=3, group_score="max", renormalize=False, scaling=16.0),
    "ernie-4.5-21b-a3b": RoutingMethod(bias=True),
    "glm-4.5-air": SIGMOID_BIAS,
    "glm-4.5": SIGMOID_BIAS.model_copy(update={"scaling": 2.5}),
    "gpt-oss-120b": RoutingMethod(),
    "kimi-k2": SIGMOID_BIAS.model_copy(update={"scaling": 2.827}),
    "llama4-maverick": RoutingMethod(scoring="sigmoid", renormalize=False),
    "mimo-v2-flash": SIGMOID_BIAS,
    "minimax-m2.5": SIGMOID_BIAS,
    "mixtral-8x7b": RoutingMethod(),
    "qwen3-235b-a22b": RoutingMethod(),
    "qwen3-next-80b-a3b": RoutingMethod(),
}


def test_every_preset_has_its_figures_here():
    assert presets.names() == tuple(sorted(FIGURES))


@pytest.mark.parametrize("name", FIGURES)
def test_a_preset_has_the_model_cards_figures(name):
    layer = presets.preset(name)
    assert layer.name == name
    assert (
        layer.num_experts,
        layer.top_k,
        layer.hidden_size,
        layer.intermediate_size,
        layer.precision.value,
        layer.num_shared_experts,
    ) == FIGURES[name]


@pytest.mark.parametrize("name", ROUTINGS)
def test_a_preset_routes_as_its_model(name):
    assert presets.preset(name).routing == ROUTINGS[name]


def test_only_gpt_oss_has_biased_experts_and_a_clamped_swiglu():
    biased = {name for name in presets.names() if presets.preset(name).expert_bias}
    clamped = {name for name in presets.names() if presets.preset(name).activation is Activation.SWIGLU_CLAMPED}
    assert biased == clamped == {"gpt-oss-120b", "gpt-oss-20b"}


def test_only_llama4_weights_the_input():
    weighted = {name for name in presets.names() if presets.preset(name).weight_on_input}
    assert weighted == {"llama4-maverick", "llama4-scout"}


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_what_the_models_own_config_says(name):
    assert layer_from_config(CONFIGS / f"{name}.json") == presets.preset(name)


@pytest.mark.parametrize("name", presets.names())
def test_every_given_field_has_a_source(name):
    file = resources.files("moetune.inputs").joinpath("models", f"{name}.json")
    layer = json.loads(file.read_text())["layer"]
    given = {field for field in layer if field != "routing"} | {f"routing.{field}" for field in layer["routing"]}
    source = presets.source(name)
    assert set(source.fields) == given
    assert source.url.startswith("https://huggingface.co/")


@pytest.mark.parametrize("name", presets.names())
def test_a_source_in_the_config_names_a_field_that_is_there(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text())
    for source in presets.source(name).fields.values():
        kind, _, path = source.partition(": ")
        if kind == "config.json":
            found = config
            for key in path.split("."):
                found = found[key]


def test_case_is_ignored():
    assert presets.preset("Qwen3-30B-A3B") == presets.preset("qwen3-30b-a3b")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("qwen3-30b", "qwen3-30b-a3b"),
        ("deepseek", "deepseek-r1"),
        ("mixtral8x7b", "mixtral-8x7b"),
        ("gpt-oss-120", "gpt-oss-120b"),
        ("llama-4-maverick", "llama4-maverick"),
    ],
)
def test_a_prefix_or_a_misspelling_is_an_error_with_the_nearest_names(name, nearest):
    with pytest.raises(UsageError) as error:
        presets.layer(name)
    assert nearest in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "   ", "zzz", "..", "a b"])
def test_a_name_like_nothing_is_a_one_line_usage_error(name):
    with pytest.raises(UsageError) as error:
        presets.layer(name)
    assert "\n" not in str(error.value)


def test_a_precision_replaces_the_weights_own():
    layer = presets.layer("deepseek-r1", precision="nvfp4")
    assert layer.precision is Precision.NVFP4
    assert layer.digest != presets.preset("deepseek-r1").digest
    assert layer.routing == presets.preset("deepseek-r1").routing


@pytest.mark.parametrize("name", ["deepseek-r1", str(CONFIGS / "deepseek-r1.json")])
def test_a_bad_precision_is_a_one_line_usage_error_that_lists_them(name):
    with pytest.raises(UsageError, match="fp8_block") as error:
        presets.layer(name, precision="fp9")
    assert "\n" not in str(error.value)


def test_a_path_a_folder_and_a_bare_folder_name_are_read(tmp_path, monkeypatch):
    folder = tmp_path / "My-Model"
    folder.mkdir()
    (folder / "config.json").write_text((CONFIGS / "mixtral-8x7b.json").read_text())
    monkeypatch.chdir(tmp_path)
    expected = MoELayer(**{**dict(presets.preset("mixtral-8x7b")), "name": "My-Model"})
    for given in (folder, str(folder), "My-Model", str(folder / "config.json"), folder / "config.json"):
        assert presets.layer(given) == expected


def test_a_folder_of_a_presets_name_does_not_hide_the_preset(tmp_path, monkeypatch):
    (tmp_path / "mixtral-8x7b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert presets.layer("mixtral-8x7b") == presets.preset("mixtral-8x7b")


def test_what_a_config_says_beside_its_layer_is_a_warning():
    path = Path(__file__).parent.parent / "data" / "configs" / "dtype-float8.json"
    with pytest.warns(UserWarning, match="vLLM loads it as bf16"):
        layer = presets.layer(path)
    found = presets.read(path)
    assert found.layer == layer
    assert len(found.notes) == 1
    assert presets.read("deepseek-r1").notes == ()
