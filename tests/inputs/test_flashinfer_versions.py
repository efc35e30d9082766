import ast

import pytest

from moetune.inputs import flashinfer_versions
from moetune.inputs.flashinfer_versions import VERSIONS, obstacle

PINNED = {  # by the metadata of their wheels
    "0.20.2": "0.6.8.post1",
    "0.22.0": "0.6.11.post2",
    "0.24.0": "0.6.12",
    "0.25.0": "0.6.13",
    "0.26.0": "0.6.14",
    "0.28.0": "0.6.16.post3",
    "0.29.0": "0.6.18",
    "0.30.0": "0.6.18.post1",
    "0.32.0": "0.7.0.post1",
    "0.33.0": "0.7.2.post1",
}
"""The version of FlashInfer that a version of vLLM pins."""
FIRST = (0, 29)
"""The first vLLM that pins a known one, as the docs and the reason say."""


@pytest.mark.parametrize(("vllm", "version"), PINNED.items())
def test_a_vllm_with_a_known_flashinfer_is_one_from_0_29_on(vllm, version, monkeypatch):
    monkeypatch.setattr(flashinfer_versions, "version", lambda: version)
    assert (obstacle() is None) == (tuple(map(int, vllm.split(".")[:2])) >= FIRST)


def test_too_old_a_flashinfer_is_refused_in_one_line_that_says_what_runs_and_what_to_install(monkeypatch):
    monkeypatch.setattr(flashinfer_versions, "version", lambda: "0.6.14")
    reason = obstacle()
    assert reason.startswith("flashinfer-python 0.6.14 is too old, so it tunes its MoE ops in its own way")
    assert f"Install one of {', '.join(VERSIONS)} (vLLM 0.29 and later pin one)." in reason
    assert "Triton experts do not need it" in reason
    assert len(reason) < 250


@pytest.mark.parametrize(("version", "known"), [("0.7.2+cu130", True), ("0.9.0", False), ("0.7.3", False)])
def test_any_other_unknown_version_is_not_called_old(version, known, monkeypatch):
    monkeypatch.setattr(flashinfer_versions, "version", lambda: version)
    reason = obstacle()
    assert (reason is None) == known
    if not known:
        assert f"does not know the tuner of flashinfer-python {version}" in reason


@pytest.mark.network
@pytest.mark.parametrize("post", ["0.6.18.post1", "0.7.0.post1"])
def test_a_known_post_release_has_the_tuner_and_the_moe_ops_of_its_release(post, flashinfer_version_sources):
    release = post.partition(".post")[0]
    for name in ("autotuner/autotuner.py", "fused_moe/core.py"):
        texts = [(flashinfer_version_sources(one) / "flashinfer" / name).read_text() for one in (release, post)]
        assert texts[0] == texts[1]
        assert len(texts[0]) > 10_000
    known = {flashinfer_versions.Version(name="", **_facts(one)) for one in (release, post)}
    assert len(known) == 1


def _facts(version):
    found = VERSIONS[version]
    return {name: getattr(found, name) for name in ("cutlass_ranks", "trtllm_extras", "flat_scales", "policies")}


@pytest.mark.network
@pytest.mark.parametrize("version", ["0.6.8.post1", "0.6.14", "0.6.16.post3", "0.6.17", "0.6.18"])
def test_an_older_call_says_too_little_for_moetune(version, flashinfer_version_sources):
    """Neither the layer is in FlashInfer's key, nor in the call how the routing is given. From 0.6.18 on both are."""
    tree = ast.parse((flashinfer_version_sources(version) / "flashinfer/fused_moe/core.py").read_text())
    extras = [node for node in ast.walk(tree) if getattr(node, "name", "") == "get_cache_key_extras"]
    modes = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "routing_input_mode"]
    assert bool(extras) == (version in VERSIONS)
    assert (len(modes) > 1) == (version in VERSIONS), "at most fp4 passes it"
