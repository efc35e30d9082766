"""A file is written for a version of an engine only if its kernel runs the tactics as they were measured."""

import pytest
from triton_profiles import STRICT, profile, tactic

from moetune.errors import UsageError
from moetune.export import sglang, vllm

SWAPPED, PLAIN = tactic(16, 64, 128, 1, 4, 3), tactic(64, 64, 128, 1, 4, 3)
OLD = {**STRICT, "remote": "zero", "kernel_version": "0.19"}
ZERO = {**STRICT, "remote": "zero"}


def stored(layer="deepseek-r1", chosen=SWAPPED, strict=STRICT, **regime):
    return profile(layer, {1: PLAIN, 4: chosen}, strict=strict, **{"ep_size": 1, "ladder": "1,4", **regime})


def test_a_version_without_the_swap_refuses_tactics_that_were_measured_with_it():
    with pytest.raises(UsageError) as refused:
        vllm.export(stored(), "0.20.2")
    assert refused.value.message == (
        "In fp8 on Hopper vLLM 0.20.2 does not swap the operands of the tactics of 4 rows. They were measured with the "
        "kernel of vLLM from 0.25 on, which swaps them."
    )
    assert refused.value.hint == "Run `moetune tune --backend-option kernel_version=0.20.2`."


@pytest.mark.parametrize(("export", "engine"), [(vllm.export, "vLLM 0.33.0"), (sglang.export, "SGLang 0.5.23")])
def test_the_newest_versions_refuse_what_was_measured_without_the_swap(export, engine):
    with pytest.raises(UsageError, match=rf"{engine} swaps .* vLLM before 0.25, which does not swap them") as refused:
        export(stored(strict=OLD))
    assert refused.value.hint == "Run `moetune tune` without kernel_version."
    with pytest.raises(UsageError, match="of 4 rows"):
        vllm.export(stored(strict=OLD), "0.26.0")


def test_what_was_measured_without_the_swap_is_written_for_a_version_without_it():
    exported = vllm.export(stored(strict=OLD), "0.20.2")
    assert exported.files
    assert exported.warnings == ()


@pytest.mark.parametrize("version", ["0.25.0", "0.26.0", "0.33.0", None])
def test_versions_with_the_swap_take_tactics_that_were_measured_with_it(version):
    assert vllm.export(stored(), version).warnings == ()


def test_tactics_that_no_version_swaps_are_written_with_a_warning_that_names_the_versions():
    (warning,) = vllm.export(stored(chosen=PLAIN), "0.20.2").warnings
    assert "They were chosen among all as vLLM from 0.25 on runs them." in warning
    assert "kernel_version=0.20.2" in warning
    (warning,) = vllm.export(stored(chosen=PLAIN, strict=OLD)).warnings
    assert "as vLLM before 0.25 runs them. Run `moetune tune` without kernel_version." in warning


@pytest.mark.parametrize(
    ("layer", "strict"),
    [("qwen3-30b-a3b", STRICT), ("deepseek-r1", {**STRICT, "compute_capability": "8.9"})],
    ids=["bf16", "not Hopper"],
)
def test_where_no_version_swaps_every_version_takes_every_tactic(layer, strict):
    assert vllm.export(stored(layer, strict=strict), "0.20.2").warnings == ()
    assert vllm.export(stored(layer, strict={**strict, "kernel_version": "0.19"})).warnings == ()


def test_the_default_of_another_version_is_noted_where_it_is_another_one():
    ada = {**STRICT, "compute_capability": "8.9"}
    notes = " ".join(vllm.export(stored(strict=ada), "0.20.2").notes)
    assert "Up to 8 rows the gains are over the default of vLLM from 0.25 on" in notes
    assert "default" not in " ".join(vllm.export(stored(strict=ada), "0.26.0").notes)
    assert "default" not in " ".join(vllm.export(stored("qwen3-30b-a3b"), "0.20.2").notes)


@pytest.mark.parametrize(
    ("layer", "version", "noted"),
    [("qwen3-30b-a3b", "0.26.0", False), ("qwen3-30b-a3b", "0.27.0", True), ("deepseek-r1", "0.33.0", False)],
)
def test_tensor_descriptors_are_noted_where_a_variable_turns_them_on(layer, version, noted):
    assert ("VLLM_TRITON_USE_TD" in " ".join(vllm.export(stored(layer), version).notes)) is noted


@pytest.mark.parametrize(
    ("export", "version", "known"),
    [(vllm.export, "0.34.0", "0.19 … 0.33"), (vllm.export, "0.18", "0.19 … 0.33"),
     (sglang.export, "0.5.24", "0.5.10 … 0.5.23")],
)  # fmt: skip
def test_a_version_that_was_not_read_is_warned_of(export, version, known):
    (warning,) = export(stored("qwen3-30b-a3b"), version).warnings
    assert f"was not compared with the measured one: moetune knows {known}." in warning


@pytest.mark.parametrize(
    ("strict", "version", "warned"),
    [(STRICT, "0.31.0", False), (STRICT, "0.30.0", True), (STRICT, "0.20.2", True), (ZERO, "0.30.0", False),
     (ZERO, "0.20.2", False), (ZERO, None, True)],
)  # fmt: skip
def test_vllm_skips_remote_slots_since_0_31(strict, version, warned):
    exported = vllm.export(stored("qwen3-30b-a3b", strict=strict, ep_size=8, dispatch="allgather"), version)
    assert ("non-local slots" in " ".join(exported.warnings)) is warned
