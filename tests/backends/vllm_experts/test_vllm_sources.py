"""The planted vLLM has the signatures of vLLM's wheels."""

import ast
import dataclasses
import inspect

import planted_vllm
import pytest

from moetune.backends.vllm_experts import engine
from moetune.backends.vllm_experts.backend import CUTLASS, BatchedDeepGemmBackend, DeepGemmBackend

FUSED_MOE = "vllm/model_executor/layers/fused_moe"
FP8_UTILS = "vllm/model_executor/layers/quantization/utils/fp8_utils.py"
FUNCTIONS = {
    "fp8_w8a8_moe_quant_config": f"{FUSED_MOE}/config.py",
    "moe_kernel_quantize_input": f"{FUSED_MOE}/utils.py",
    "prepare_fp8_moe_layer_for_deepgemm": FP8_UTILS,
}
CLASSES = (DeepGemmBackend.experts_class, BatchedDeepGemmBackend.experts_class, CUTLASS)
EXPERTS = {each.name: f"{FUSED_MOE}/experts/{each.module}.py" for each in CLASSES}


def definition(path, *names):
    """The class or function of a file; the second name is a method of the first."""
    (found,) = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == names[0]]
    return next(node for node in found.body if getattr(node, "name", "") == names[1]) if names[1:] else found


def parameters(function):
    """The names of all parameters but self, and of those without a default."""
    every = [each.arg for each in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    positional = [each.arg for each in (*function.args.posonlyargs, *function.args.args)]
    optional = set(positional[len(positional) - len(function.args.defaults) :])
    keywords = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    optional |= {each.arg for each, default in keywords if default is not None}
    return set(every) - {"self"}, set(every) - optional - {"self"}


def planted(function):
    return set(inspect.signature(function).parameters) - {"self"}


@pytest.fixture(params=["0.26.0", "0.33.0"])
def sources(request, vllm_version_sources):
    return vllm_version_sources(request.param)


@pytest.mark.network
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_takes_what_the_planted_one_takes_and_needs_no_more(sources, name):
    real, needed = parameters(definition(sources / FUNCTIONS[name], name))
    assert needed <= planted(getattr(planted_vllm, name)) <= real


@pytest.mark.network
@pytest.mark.parametrize("name", EXPERTS)
def test_an_experts_class_is_called_as_the_planted_one(sources, name):
    path, made = sources / EXPERTS[name], getattr(planted_vllm, name)
    own = definition(path, name)
    constructors = {"CutlassExpertsFp8": "CutlassExpertsFp8Base"}
    real, needed = parameters(definition(path, constructors.get(name, name), "__init__"))
    assert needed <= planted(made.__init__) <= real
    assert parameters(definition(path, own.name, "workspace_shapes"))[0] == planted(made.workspace_shapes)
    apply = parameters(definition(path, constructors.get(name, name), "apply"))[0]
    assert apply == planted(made.apply) == engine.APPLY


@pytest.mark.network
def test_a_config_needs_no_other_field_than_the_planted_one(sources):
    body = definition(sources / FUSED_MOE / "config.py", "FusedMoEConfig").body
    fields = {node.target.id: node.value is None for node in body if isinstance(node, ast.AnnAssign)}
    known = {field.name for field in dataclasses.fields(planted_vllm.FusedMoEConfig)}
    assert {name for name, required in fields.items() if required} <= known <= fields.keys()
    definition(sources / FUSED_MOE / "config.py", "FusedMoEParallelConfig", "make_no_parallel")


@pytest.mark.network
def test_the_masked_experts_ask_for_the_expected_rows_by_the_name_that_the_runner_replaces(sources):
    """And what they ask from is the engine's step, without which they take the capacity."""
    path = sources / EXPERTS["BatchedDeepGemmExperts"]
    own = definition(path, "BatchedDeepGemmExperts", "estimate_expected_m")
    assert parameters(own)[0] == planted(planted_vllm.BatchedDeepGemmExperts.estimate_expected_m)
    assert "get_forward_context().dp_metadata" in ast.unparse(own)
    assert "round_up(int(total_num_tokens_replicated // global_num_experts), 16)" in ast.unparse(own)
    apply = ast.unparse(definition(path, "BatchedDeepGemmExperts", "apply"))
    assert "expected_m = self.estimate_expected_m(" in apply
    metadata = definition(sources / FUSED_MOE / "modular_kernel.py", "ExpertTokensMetadata").body
    fields = {node.target.id: node.value is None for node in metadata if isinstance(node, ast.AnnAssign)}
    known = {field.name for field in dataclasses.fields(planted_vllm.ExpertTokensMetadata)}
    assert {name for name, required in fields.items() if required} <= known <= fields.keys()


@pytest.mark.network
def test_with_power_of_two_scales_vllm_takes_deepgemm_for_every_row_count(sources):
    """`TritonOrDeepGemmExperts` looks at the sizes only where these scales are off, and they are on by default."""
    select = definition(
        sources / FUSED_MOE / "experts/triton_deep_gemm_moe.py", "TritonOrDeepGemmExperts", "_select_experts_impl"
    )
    assert "if is_deep_gemm_e8m0_used() or _valid_deep_gemm(" in ast.unparse(select)
    assert "VLLM_USE_DEEP_GEMM_E8M0: bool = True" in (sources / "vllm/envs.py").read_text()
