"""The files are read by FlashInfer's own loader and hit through its real tuner; see flashinfer_spy."""

import json

import flashinfer_spy as spy
import pytest
from flashinfer_profiles import LAYER, profile, tactic
from flashinfer_spy import SHAPE

from moetune.errors import UnsupportedError, UsageError
from moetune.export import export as exported
from moetune.export.flashinfer import BACKENDS, TRTLLM_POLICY, buckets, export
from moetune.inputs.flashinfer_versions import VERSIONS
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PURE_EP = Regime(ep_size=8, ladder="hybrid")
DEP = Regime(ep_size=8, attention_dp=True, layout="pool", ladder="hybrid")
CUTLASS, TRTLLM, ROUTED = BACKENDS


def only_file(made, version=None):
    ((name, text),) = export(made, version).files.items()
    return name, text


def entries(made, version=None):
    document = json.loads(only_file(made, version)[1])
    document.pop("_metadata")
    return document


def loaded(core, tmp_path, made):
    from flashinfer.autotuner import AutoTuner

    name, text = only_file(made)
    (tmp_path / name).write_text(text)
    assert AutoTuner.get().load_configs(str(tmp_path / name))


@pytest.fixture
def h200():
    with spy.flashinfer("NVIDIA H200") as core:
        yield core


@pytest.fixture
def b200():
    with spy.flashinfer("NVIDIA B200") as core:
        yield core


def test_cutlass_hits_at_every_number_of_rows_with_the_bucket_s_tactics(h200, tmp_path):
    made = profile(CUTLASS, PURE_EP)
    loaded(h200, tmp_path, made)
    one_rank = {"hidden": 2048, "inner": 768, "experts": 16, "top_k": 8, "ep_size": 8}
    for rows in (1, 3, 64, 65, 257, 2049, 4097, 8192, 9000):
        for rank in (0, 7):
            first, second = spy.cutlass(h200, rows, **one_rank, ep_rank=rank)
            expected = made.tactic(rows)
            assert (first.tactic, second.tactic) == (expected["gemm1"], expected["gemm2"]), rows


@pytest.mark.parametrize("alltoall", [False, True])
def test_a_file_for_an_alltoall_hits_whether_or_not_the_engine_says_so(h200, tmp_path, alltoall):
    made = profile(CUTLASS, DEP, MoELayer(**{**dict(LAYER), "precision": "fp8_tensor"}))
    loaded(h200, tmp_path, made)
    call = {"hidden": 2048, "inner": 768, "experts": 16, "top_k": 8, "ep_size": 8, "fp8": True}
    first, _ = spy.cutlass(h200, 64, **call, enable_alltoall=alltoall)
    assert first.tactic == made.tactic(64)["gemm1"]


GPT_OSS = {"precision": "mxfp4", "activation": "swiglu_clamped", "expert_bias": True}
W4 = {"four_bits": True, "use_w4_group_scaling": True}
MIXED = {
    "mxfp4": ({"precision": "mxfp4"}, {}, {**W4, "hidden": 2048, "inner": 768}),
    "gpt-oss in vllm": (
        {**GPT_OSS, "hidden_size": 2880, "intermediate_size": 2880}, {},
        {**W4, "bias": True, "hidden": 2944, "inner": 2944},
    ),
    "gpt-oss in sglang": (
        {**GPT_OSS, "hidden_size": 2880, "intermediate_size": 2880}, {"caller": "sglang"},
        {**W4, "bias": True, "hidden": 3072, "inner": 2944, "use_fused_finalize": False},
    ),
    "gpt-oss in sglang with fp8": (
        {**GPT_OSS, "hidden_size": 2880, "intermediate_size": 2880},
        {"caller": "sglang", "mxfp4_activations": "fp8"},
        {**W4, "bias": True, "hidden": 3072, "inner": 2944, "use_fused_finalize": False, "use_wfp4afp8_humming": True},
    ),
    "deepseek-v4": ({"precision": "mxfp4", "activation": "silu_clamped"}, {}, {**W4, "hidden": 2048, "inner": 768}),
    "w4a8": ({"precision": "w4a8"}, {}, {**W4, "hidden": 2048, "inner": 768, "use_packed_weights": True}),
    "fp8_tensor in sglang": (
        {"precision": "fp8_tensor"}, {"caller": "sglang"},
        {"fp8": True, "hidden": 2048, "inner": 768, "use_fused_finalize": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_cutlass_hits_as_each_engine_calls_it_and_no_other_format_does(h200, tmp_path, name):
    fields, options, call = MIXED[name]
    made = profile(CUTLASS, PURE_EP, MoELayer(**{**dict(LAYER), **fields}))
    strict = {**made.environment.strict, **options}
    made = made.model_copy(update={"environment": made.environment.model_copy(update={"strict": strict})})
    loaded(h200, tmp_path, made)
    call = {"experts": 16, "top_k": 8, "ep_size": 8, **call}
    for rows in (1, 65, 4097):
        expected = made.tactic(rows)
        assert [answer.tactic for answer in spy.cutlass(h200, rows, **call)] == [expected["gemm1"], expected["gemm2"]]
    for differing in ("use_wfp4afp8_humming", "use_packed_weights", "use_mxfp8_act_scaling"):
        other = {**call, differing: not call.get(differing, False)}
        assert [answer.tactic for answer in spy.cutlass(h200, 65, **other)] == [-1, -1], differing


def test_another_deployment_misses(h200, tmp_path):
    loaded(h200, tmp_path, profile(CUTLASS, PURE_EP))
    first, second = spy.cutlass(h200, 64, hidden=2048, inner=768, experts=32, top_k=8, ep_size=4)
    assert (first.tactic, second.tactic) == (-1, -1)


@pytest.mark.parametrize("name", spy.TRTLLM)
@pytest.mark.parametrize(("backend", "modes"), [(TRTLLM, ("logits",)), (ROUTED, ("packed", "unpacked"))])
def test_trtllm_hits_whichever_way_the_engine_calls(b200, tmp_path, name, backend, modes):
    precision, _, activations = name.partition("-")
    made = profile(backend, PURE_EP, MoELayer(**{**dict(LAYER), "precision": precision}))
    if activations:
        environment = made.environment.model_copy(
            update={"strict": {**made.environment.strict, "mxfp4_activations": activations}}
        )
        made = made.model_copy(update={"environment": environment})
    loaded(b200, tmp_path, made)
    op, kind = spy.TRTLLM[name]
    for mode in modes:
        if (op, mode) == ("mxint4_block_scale", "unpacked"):
            continue
        for rows in (1, 300, 5000):
            (answer,) = spy.trtllm(b200, op, rows, **SHAPE, mode=mode, activations=kind)
            assert answer.tactic == tuple(made.tactic(rows).values()), (mode, rows)


@pytest.mark.parametrize(("layout", "hits"), [("blocked", True), ("plain", False)])
def test_fp8_blocks_are_found_only_as_they_were_measured(b200, tmp_path, layout, hits):
    made = profile(ROUTED, PURE_EP, MoELayer(**{**dict(LAYER), "precision": "fp8_block"}))
    strict = {**made.environment.strict, "fp8_block_layout": layout}
    environment = made.environment.model_copy(update={"strict": strict})
    loaded(b200, tmp_path, made.model_copy(update={"environment": environment}))
    (answer,) = spy.trtllm(b200, "fp8_block_scale", 300, **SHAPE, mode="unpacked")  # shuffled and blocked, as vLLM
    assert (answer.tactic == tuple(made.tactic(300).values())) is hits
    assert hits or answer.tactic == -1


def test_in_tuning_mode_nothing_is_measured_again(b200, tmp_path):
    from flashinfer.autotuner import autotune

    made = profile(ROUTED, PURE_EP)
    name, text = only_file(made)
    (tmp_path / name).write_text(text)
    with autotune(True, cache=str(tmp_path / name)):
        (answer,) = spy.trtllm(b200, "bf16", 64, **SHAPE, mode="unpacked")
    assert answer.tactic == tuple(made.tactic(64).values())


def test_the_file_is_the_one_that_flashinfer_would_save(b200, tmp_path):
    from flashinfer.autotuner import AutoTuner, ProfilingCacheKey

    made = profile(ROUTED, PURE_EP)
    tuner = AutoTuner.get()
    (answer,) = spy.trtllm(b200, "bf16", 64, **SHAPE, mode="unpacked")
    key = ProfilingCacheKey(*eval(answer.key, {})[:2], 0, *eval(answer.key, {})[2:])
    tuner.profiling_cache[key] = (tuple(made.tactic(64).values()), None)
    tuner._profiling_cache_policies[(None, key)] = TRTLLM_POLICY
    tuner.save_configs(str(tmp_path / "saved.json"))
    saved = json.loads((tmp_path / "saved.json").read_text())
    ours = json.loads(only_file(made)[1])
    assert saved[answer.key] == ours[answer.key]
    assert saved["_metadata"].keys() == ours["_metadata"].keys()
    for field in ("flashinfer_version", "cuda_version", "gpu"):
        assert saved["_metadata"][field] == ours["_metadata"][field]


def test_another_gpu_or_cuda_refuses_the_file(tmp_path):
    from flashinfer.autotuner import AutoTuner

    name, text = only_file(profile(CUTLASS, PURE_EP))
    (tmp_path / name).write_text(text)
    for device, cuda in (("NVIDIA H100", "13.0"), ("NVIDIA H200", "12.9")):
        with spy.flashinfer(device, cuda):
            assert not AutoTuner.get().load_configs(str(tmp_path / name))


@pytest.mark.parametrize(
    ("version", "count", "policy"),
    [("0.6.18", 21 * 2 * 8, 0), ("0.7.0", 21 * 2 * 8, 0), ("0.7.1", 21 * 2 * 8, 1), ("0.7.2", 21 * 2, 1)],
)
def test_each_version_has_its_own_entries_and_policies(version, count, policy):
    measured = "0.7.2.post1" if version == "0.7.2" else version
    assert len(entries(profile(CUTLASS, PURE_EP, flashinfer=measured), version)) == count
    trtllm = entries(profile(TRTLLM, PURE_EP, flashinfer=measured), version)
    assert len(trtllm) == 21
    assert {len(entry) for entry in trtllm.values()} == {2 + policy}


def test_pure_ep_and_dep_have_files_of_their_own():
    pure, dep = profile(CUTLASS, PURE_EP), profile(CUTLASS, DEP)
    files = [exported(made, "flashinfer").files for made in (pure, dep)]
    assert not set(files[0]) & set(files[1])
    assert len(entries(dep)) == 2 * len(entries(pure))


def test_buckets_that_were_not_measured_are_filled_by_the_profiles_ladder_and_named():
    made = profile(CUTLASS, Regime(ep_size=8, ladder="pow2"))
    result = export(made)
    assert len(entries(made)) == 2 * 21
    assert any("768" in note and "--ladder hybrid" in note for note in result.notes)
    assert not any("Not measured" in note for note in export(profile(CUTLASS, PURE_EP)).notes)


def test_a_ladder_that_divides_rows_is_looked_up_by_the_rows_that_were_measured(h200, tmp_path):
    made = profile(CUTLASS, Regime(ep_size=8, attention_dp=True, ladder="pow2/8"))
    loaded(h200, tmp_path, made)
    first, _ = spy.cutlass(h200, 64, hidden=2048, inner=768, experts=16, top_k=8, ep_size=8)
    measured = {choice.rows: choice.tactic for choice in made.choices}
    assert first.tactic == measured[64]["gemm1"]


def test_rows_that_flashinfer_rounds_past_the_maximum_hit_too(h200, tmp_path):
    made = profile(CUTLASS, Regime(ep_size=8, ladder="hybrid", tune_max_num_tokens=100))
    assert buckets(made)[-2:] == (100, 128)
    loaded(h200, tmp_path, made)
    call = {"hidden": 2048, "inner": 768, "experts": 16, "top_k": 8, "ep_size": 8, "tune_max_num_tokens": 100}
    for rows in (64, 65, 99, 100, 200):
        assert spy.cutlass(h200, rows, **call)[0].tactic == made.tactic(rows)["gemm1"], rows


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"gemm1": 3}, "gemm1 and gemm2"),
        ({"gemm1": 3, "gemm2": True}, "integers"),
        ({"gemm1": -2, "gemm2": 60}, "integers from −1"),
        ({"gemm1": 50, "gemm2": 60}, "cannot be of one list"),
    ],
)
def test_a_tactic_that_cannot_be_the_backends_is_refused(bad, said):
    made = profile(CUTLASS, PURE_EP)
    first, *rest = made.choices
    changed = made.model_copy(update={"choices": (first.model_copy(update={"tactic": bad}), *rest)})
    with pytest.raises(UnsupportedError, match=said):
        export(type(made).model_validate_json(changed.model_dump_json()))


def test_the_ops_own_choice_is_an_entry_too():
    made = profile(TRTLLM, PURE_EP)
    default = made.choices[0].default_tactic
    changed = made.model_copy(update={"choices": tuple(c.model_copy(update={"tactic": default}) for c in made.choices)})
    assert {tuple(entry[1]) for entry in entries(changed).values()} == {(-1, -1)}


def test_another_version_than_was_measured_is_refused():
    with pytest.raises(UnsupportedError, match=r"tactics are of FlashInfer 0\.7\.2\.post1, and 0\.6\.18 numbers"):
        export(profile(CUTLASS, PURE_EP), "0.6.18")
    with pytest.raises(UsageError, match=r"0\.5\.0.*0\.6\.18"):
        export(profile(CUTLASS, PURE_EP), "0.5.0")


def test_a_post_release_has_the_kernels_of_its_release():
    name, text = only_file(profile(CUTLASS, PURE_EP), "0.7.2")
    assert "0.7.2" in name
    assert json.loads(text)["_metadata"]["flashinfer_version"] == "0.7.2"


def test_another_backend_is_refused():
    made = profile(CUTLASS, PURE_EP).model_copy(update={"backend": "triton"})
    with pytest.raises(UnsupportedError, match="the profile's are of triton"):
        export(made)


def test_every_known_version_can_be_exported():
    for version in VERSIONS:
        assert entries(profile(ROUTED, PURE_EP, flashinfer=version))


def test_the_planted_tactics_differ_between_buckets():
    assert len({tuple(tactic(CUTLASS, index).values()) for index in range(21)}) == 21
