"""Against FlashInfer itself: the installed one's code runs here, the others' keys were recorded by the same calls."""

import contextlib
import json
from pathlib import Path

import pytest
from flashinfer_spy import LaunchedError, flashinfer, recorded

from moetune.backends.flashinfer_trtllm.formats import FORMATS
from moetune.errors import UnsupportedError
from moetune.export.flashinfer_keys import cutlass_keys, trtllm_keys
from moetune.inputs.flashinfer_versions import VERSIONS
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

GOLDEN = Path(__file__).parent / "golden" / "flashinfer_keys"
LAYER = MoELayer(name="qwen3-30b-a3b", num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768)
EP8 = Regime(ep_size=8, ladder="hybrid")
CUTLASS = {
    "cutlass bf16 ep8": ("bf16", EP8),
    "cutlass fp8_tensor ep8 alltoall": ("fp8_tensor", Regime(ep_size=8, attention_dp=True, layout="pool")),
    "cutlass bf16 ep4 tp2": ("bf16", Regime(ep_size=4, tp_size=2)),
}


def of(precision, **changed):
    return MoELayer(**{**dict(LAYER), "precision": precision, **changed})


def keys(version, name):
    kernels, precision, *rest = name.split()
    if kernels == "cutlass":
        precision, regime = CUTLASS[name]
        pairs = cutlass_keys(VERSIONS[version], of(precision), regime, 512, programmatic_launch=True)
        return sorted(key for pair in pairs for key in pair)
    precision, _, activations = precision.partition("-")
    routed = rest == ["routed"]
    return sorted(trtllm_keys(VERSIONS[version], of(precision), EP8, 512, routed, activations or "bf16"))


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_are_those_that_flashinfer_was_seen_to_look_up(version):
    """0.6.18.post1 and 0.7.0.post1 have the tuner of their release: `tests/inputs/test_flashinfer_versions.py`."""
    recorded_in = {"0.6.18.post1": "0.6.18", "0.7.0.post1": "0.7.0"}.get(version, version)
    golden = json.loads((GOLDEN / f"{recorded_in}.json").read_text())
    assert len(golden) == 17
    assert {name: keys(version, name) for name in golden} == golden


def test_the_installed_flashinfer_looks_up_what_was_recorded():
    import flashinfer as installed

    with flashinfer() as core:
        now = recorded(core)
    assert now == json.loads((GOLDEN / f"{installed.__version__}.json").read_text())


def looked_up(monkeypatch, backend, precision, **options):
    """The key of the call that a trtllm backend times."""
    from flashinfer.autotuner import AutoTuner

    from moetune.backends import registry
    from moetune.backends.flashinfer_trtllm import call

    seen = []
    record = call._Recorder.choose_one

    def spy(self, op, runners, config, inputs, **more):
        shapes = tuple(tuple(one.shape) if one is not None else (0,) for one in inputs)
        extras = runners[0].get_cache_key_extras(inputs)
        seen.append(AutoTuner._get_cache_key(op, runners[0], shapes, config, extras).file_key)
        return record(self, op, runners, config, inputs, **more)

    monkeypatch.setattr(call._Recorder, "choose_one", spy)
    with flashinfer("NVIDIA B200"), contextlib.suppress(LaunchedError):
        registry.backend(backend, **options).candidates(of(precision), EP8, 512, "cpu")
    (key,) = seen
    return key


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("backend", ["flashinfer-trtllm", "flashinfer-trtllm-routed"])
def test_the_calls_that_the_trtllm_backends_time_have_these_keys(monkeypatch, backend, precision):
    key = looked_up(monkeypatch, backend, precision)
    assert key in set(trtllm_keys(VERSIONS["0.7.2.post1"], of(precision), EP8, 512, backend.endswith("-routed")))


@pytest.mark.parametrize("backend", ["flashinfer-trtllm", "flashinfer-trtllm-routed"])
def test_fp8_blocks_that_lie_otherwise_have_keys_of_their_own(monkeypatch, backend):
    found = {}
    for layout in ("blocked", "plain"):
        routed = backend.endswith("-routed")
        found[layout] = set(
            trtllm_keys(VERSIONS["0.7.2.post1"], of("fp8_block"), EP8, 512, routed, fp8_block_layout=layout)
        )
        assert looked_up(monkeypatch, backend, "fp8_block", fp8_block_layout=layout) in found[layout]
    assert not found["blocked"] & found["plain"]


def test_a_rank_has_keys_of_its_own_up_to_0_7_1():
    count = {
        version: len(list(cutlass_keys(VERSIONS[version], LAYER, EP8, 1, programmatic_launch=True)))
        for version in VERSIONS
    }
    assert count == dict.fromkeys(VERSIONS, 8) | {"0.7.2": 1, "0.7.2.post1": 1}


def test_the_slot_layout_has_one_id_a_row():
    slot = Regime(ep_size=8, attention_dp=True, layout="slot")
    (key,) = trtllm_keys(VERSIONS["0.7.2"], of("mxfp4"), slot, 64, routed=True)
    assert "(64, 1), (64, 1)" in key
    assert "('Module', 1, 16, 128" in key


def test_replicas_count_as_experts():
    redundant = Regime(ep_size=8, redundant_experts=8)
    (key,) = trtllm_keys(VERSIONS["0.7.2"], of("bf16"), redundant, 64, routed=False)
    assert "(64, 136)" in key
    assert "('Module', 8, 17, 136" in key


def test_uneven_shards_have_a_key_for_each_size():
    uneven = Regime(ep_size=6, uneven_shards=True)
    assert len(list(trtllm_keys(VERSIONS["0.7.2"], of("bf16"), uneven, 64, routed=False))) == 2
    assert len(list(trtllm_keys(VERSIONS["0.6.18"], of("bf16"), uneven, 64, routed=False))) == 1


def test_gpt_oss_is_padded_as_the_engines_pad_it():
    gpt_oss = of("mxfp4", hidden_size=2880, intermediate_size=2880, activation="swiglu_clamped", expert_bias=True)
    keys = list(trtllm_keys(VERSIONS["0.7.2"], gpt_oss, EP8, 64, routed=False))
    assert {"((64, 2880)" in key for key in keys} == {True, False}
    assert all("3072, 3072, 3072, 3" in key for key in keys)


@pytest.mark.parametrize(
    ("kernels", "changed", "said"),
    [
        ("cutlass", {"precision": "fp8_block"}, "fp8_block"),
        ("cutlass", {"precision": "nvfp4"}, "It has them for bf16, fp8_tensor, mxfp4, w4a8"),
        ("trtllm", {"precision": "fp16"}, "trtllm op has no tuned tactics for fp16"),
        ("trtllm", {"activation": "gelu"}, "silu or swiglu_clamped"),
    ],
)
def test_a_layer_that_the_op_does_not_tune_is_refused(kernels, changed, said):
    layer = MoELayer(**{**dict(LAYER), **changed})
    call = {
        "cutlass": lambda: list(cutlass_keys(VERSIONS["0.7.2"], layer, EP8, 1, programmatic_launch=True)),
        "trtllm": lambda: list(trtllm_keys(VERSIONS["0.7.2"], layer, EP8, 1, routed=False)),
    }[kernels]
    with pytest.raises(UnsupportedError, match=said):
        call()
