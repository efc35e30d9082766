"""Which layers' experts a list of module names means, in every spelling that checkpoints use."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetune.errors import UsageError
from moetune.inputs.hf_experts import MATRICES, PREFIXES, ExpertModules, mentioned_layers

LAYERS = tuple(range(3, 16))
MODULES = ExpertModules(("mlp.experts", "block_sparse_moe.experts"), LAYERS)
OTHER_PARTS = (
    "self_attn", "self_attn.q_proj", "mlp.gate", "mlp.shared_experts", "mlp.shared_expert_gate", "mlp.down_proj",
    "input_layernorm", "mlp.router", "mlp.gate_up_proj",
)  # fmt: skip
UNRELATED = (
    "lm_head", "model.embed_tokens", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|down)_proj.*",
    "*mlp.gate", "model.layers.*.self_attn", "re:vision_tower.*", "visual", "*embed_tokens*",
    "mtp.layers.0.mlp.experts",
    "re:.*mlp.gate$", "re:.*lm_head", "model.layers.61*", "*gate*", "model.layers.61.mlp.experts",
)  # fmt: skip
numbers = st.sets(st.sampled_from(LAYERS))
prefixes = st.sampled_from(PREFIXES)
blocks = st.sampled_from(MODULES.experts)


@st.composite
def spellings(draw: st.DrawFn, layer: int) -> list[str]:
    """One layer's experts, in one of the spellings."""
    prefix, block = draw(prefixes), draw(blocks)
    module = f"{prefix}.{layer}.{block}"
    matrices = [f"{module}.{part}" for part in draw(st.sampled_from(MATRICES))]
    return draw(
        st.sampled_from(
            [
                [module],
                [f"{prefix}.{layer}"],
                [f"{prefix}.{layer}."],
                [f"{prefix}.{layer}*"],
                [f"{prefix}.{layer}.*"],
                [f"{module}*"],
                [f"*.{layer}.{block}*"],
                [f"*layers.{layer}.{block}", f"*blocks.{layer}.{block}"],
                [f"re:.*\\.{layer}\\.{re.escape(block)}.*"],
                [f"re:{re.escape(module)}"],
                [f"layers.{layer}.mlp", f"layers.{layer}.block_sparse_moe"],
                [f"{prefix}\\.{layer}\\.{re.escape(block)}"],
                matrices,
                [f"re:{re.escape(name)}$" for name in matrices],
            ]
        )
    )


@settings(max_examples=40)
@given(data=st.data(), layers=numbers)
def test_experts_are_found_in_every_spelling_and_no_others(data, layers):
    names = [name for layer in sorted(layers) for name in data.draw(spellings(layer))]
    assert MODULES.meant_by(names, "ignore") == layers


@settings(max_examples=40)
@given(data=st.data(), layers=numbers, extra=st.lists(st.sampled_from(UNRELATED)))
def test_order_and_unrelated_names_change_nothing(data, layers, extra):
    names = [name for layer in sorted(layers) for name in data.draw(spellings(layer))]
    shuffled = data.draw(st.permutations([*names, *extra]))
    assert MODULES.meant_by(shuffled, "ignore") == layers


@given(
    prefix=prefixes, layer=st.sampled_from(LAYERS), part=st.sampled_from(OTHER_PARTS), mark=st.sampled_from(["", "*"])
)
def test_other_parts_of_a_layer_are_not_its_experts(prefix, layer, part, mark):
    assert MODULES.meant_by([f"{prefix}.{layer}.{part}{mark}"], "ignore") == frozenset()


@pytest.mark.parametrize("name", ["mlp.experts", "experts", "re:.*mlp.experts.*", "*mlp.experts*", "*", "mlp", "re:.*"])
def test_a_name_without_a_layer_means_all(name):
    assert MODULES.meant_by([name], "ignore") == frozenset(LAYERS)


def test_layer_1_is_not_layer_10():
    modules = ExpertModules(("mlp.experts",), tuple(range(20)))
    for name in (
        "model.layers.1*",
        "model.layers.1",
        "model.layers.1.mlp*",
        "layers.1.mlp.experts",
        "re:.*layers.1\\..*",
    ):
        assert modules.meant_by([name], "ignore") == {1}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["re:.*(experts"], "not a regular expression"),
        (["model.encoder.blocks.5.experts"], "names experts, but not as"),
        (["re:.*mlp.experts.*gate_proj"], "only some of an expert's matrices"),
        (["model.layers.5.mlp.experts.up_proj"], "only some of an expert's matrices"),
    ],
)
def test_what_is_not_understood_is_an_error_that_names_it(names, said):
    with pytest.raises(UsageError, match=re.escape(said)) as error:
        MODULES.meant_by(names, "config.json: ignore")
    assert names[0] in error.value.message
    assert "config.json: ignore" in error.value.message


def test_single_experts_and_other_parts_experts_are_passed_over():
    names = ["model.layers.5.mlp.experts.17.gate_proj", "mtp.layers.0.mlp.experts", "visual.blocks.0.experts"]
    assert MODULES.meant_by(names, "ignore") == frozenset()


def test_layers_are_found_in_names():
    assert mentioned_layers(["lm_head", "model.layers.3.mlp", "re:.*layers.12*", "transformer.blocks.7.ffn"]) == {
        3,
        7,
        12,
    }
