"""What the kernel of each version of vLLM and SGLang does, and the backend that computes like one."""

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from moetune.backends.grouped_triton import kernel_versions, space
from moetune.backends.grouped_triton.align import Alignment
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.backends.grouped_triton.defaults import default_config
from moetune.backends.grouped_triton.gemm import BuiltinKernel, Operands, two_gemms
from moetune.backends.grouped_triton.kernel_versions import NEWEST, VLLM, kernel_version, numbers, stored_name, unread
from moetune.errors import UsageError
from moetune.inputs.presets import layer as preset
from moetune.spec.regime import Regime
from moetune.spec.tactic import Tactic

R1 = {"top_k": 8, "hidden_size": 7168, "intermediate_size": 2048, "num_local": 32, "num_experts": 256}
SMALL = Tactic(dict(zip(space.VALUES, (16, 64, 128, 1, 4, 4), strict=True)))
HOPPER = space.Limits((9, 0), 232448, 255, 65536)


@pytest.mark.parametrize(
    ("version", "since"),
    [("0.10", "0.19"), ("0.20.2", "0.19"), ("0.24.0", "0.19"), ("0.25", "0.25"), ("0.26.0", "0.25"), ("0.30.1", "0.27"),
     ("0.31.0", "0.31"), ("0.33.0+cu130", "0.31"), ("1.0", "0.31")],
)  # fmt: skip
def test_a_row_holds_until_the_next_one(version, since):
    assert kernel_version("vllm", version).since == since


def test_rows_ascend_and_differ():
    for rows in (kernel_versions.VLLM, kernel_versions.SGLANG):
        assert [numbers(row.since) for row in rows] == sorted({numbers(row.since) for row in rows})
        assert all(row.source for row in rows)
    behaviors = [(r.swaps_operands, r.narrow_default, r.remote, r.descriptors, r.clamps_k) for r in VLLM]
    assert len(set(behaviors)) == len(VLLM)


def test_the_page_about_engines_has_the_table():
    text = (Path(__file__).parents[3] / "docs" / "engines.md").read_text(encoding="utf-8")
    for row in VLLM:
        cells = (
            row.since,
            "swapped operands" if row.swaps_operands else "as other tiles",
            "64 columns" if row.narrow_default else "128 columns",
            "skipped" if row.remote == "drop" else "blocks of zeros",
            "tensor descriptors" if row.descriptors else "ignored",
            "at most 128" if row.clamps_k else "as given",
            row.source,
        )
        assert f"| {' | '.join(cells)} |\n" in text


@pytest.mark.parametrize(("version", "known"), [("0.18.1", False), ("0.19.1", True), ("0.33.0", True), ("0.34", False)])
def test_versions_outside_the_ones_that_were_read_are_named(version, known):
    assert unread("vllm", version) == (None if known else "0.19 … 0.33")


def test_an_environment_names_the_kernel_of_old_versions_alone():
    assert [stored_name(row) for row in VLLM] == ["0.19", None, None, None]
    assert kernel_versions.versions_like(VLLM[0]) == "before 0.25"
    assert kernel_versions.versions_like(NEWEST) == "from 0.25 on"


def test_the_newest_version_has_the_key_that_it_had_without_the_option():
    plain = TritonBackend().environment()
    assert plain.keys() == {"triton", "kernel", "kernel_source", "remote"}
    assert TritonBackend(kernel_version="0.33.0").environment() == plain
    assert TritonBackend(kernel_version="0.26.0").environment() == {**plain, "remote": "zero"}
    older = {**plain, "remote": "zero", "kernel_version": "0.19"}
    assert TritonBackend(kernel_version="0.20.2").environment() == older
    assert TritonBackend(kernel_version="0.24").environment() == older
    assert TritonBackend(remote="drop", kernel_version="0.24").environment() == {**older, "remote": "drop"}


@pytest.mark.parametrize(
    ("version", "rows", "values"),
    [("0.20.2", 4, (16, 128, 128, 1, 4, 3)), ("0.26.0", 4, (16, 64, 128, 1, 4, 4)),
     ("0.20.2", 8, (16, 128, 128, 1, 4, 3)), ("0.33.0", 8, (16, 64, 128, 1, 4, 3)),
     ("0.20.2", 64, (16, 128, 128, 32, 4, 3)), ("0.33.0", 64, (16, 128, 128, 32, 4, 3))],
)  # fmt: skip
def test_the_default_follows_the_version(version, rows, values):
    layer, regime = preset("deepseek-r1"), Regime(ep_size=8)
    assert tuple(TritonBackend(kernel_version=version).default(layer, regime, rows).values()) == values


@pytest.mark.parametrize(("version", "swaps"), [("0.20.2", False), ("0.26.0", True), ("0.33.0", True)])
def test_the_launch_follows_the_version(version, swaps):
    shapes = space.Shapes(rows=16, **R1, fp8=True, version=kernel_version("vllm", version))
    alignment = Alignment(None, None, None, 256, 128)
    for gemm in two_gemms(shapes, False, (9, 0)):
        assert BuiltinKernel().arguments(gemm, Operands(*[None] * 4), alignment, SMALL)["SWAP_AB"] is swaps


def test_a_tile_that_is_not_swapped_keeps_one_stage_less_in_shared_memory():
    old = kernel_version("vllm", "0.20.2")
    assert space.shared_bytes(SMALL, True, (9, 0), old) * 4 == space.shared_bytes(SMALL, True, (9, 0)) * 3
    assert space.shared_bytes(SMALL, False, (9, 0), old) == space.shared_bytes(SMALL, False, (9, 0))
    large = Tactic(dict(zip(space.VALUES, (32, 256, 128, 1, 8, 5), strict=True)))
    tight = space.Limits((9, 0), 160_000, 255, 65536)
    assert space.illegal(large, True, tight, old) is None
    assert space.illegal(large, True, tight) is not None


def test_the_parts_that_are_compiled_ahead_are_those_of_the_version():
    layer, regime = preset("deepseek-r1"), Regime(ep_size=8)
    keys = {v: TritonBackend(kernel_version=v).compile_keys(layer, regime, 16, SMALL) for v in ("0.20.2", "0.33.0")}
    assert not set(keys["0.20.2"]) & set(keys["0.33.0"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kernel_version": "0.18.1"}, "does not know the kernel of vLLM 0.18.1. It knows 0.19 … 0.33."),
        ({"kernel_version": "0.34"}, "It knows 0.19 … 0.33."),
        ({"kernel_version": "latest"}, "Not a version: 'latest'"),
        ({"kernel": "sglang", "kernel_version": "0.20.2"}, "is for --kernel builtin"),
    ],
)
def test_a_version_that_cannot_be_computed_like_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        TritonBackend(**options)


@pytest.mark.parametrize(("installed", "since"), [("0.20.2", "0.19"), ("0.33.0", "0.31"), (None, "0.31")])
def test_an_installed_vllms_kernel_is_of_its_version(installed, since, monkeypatch):
    monkeypatch.setattr("moetune.backends.grouped_triton.backend._installed_vllm", lambda: installed)
    backend = TritonBackend("vllm")
    assert backend.version.since == since
    assert backend.remote == backend.version.remote
    assert TritonBackend().version is NEWEST


def test_a_backend_for_a_version_differs_only_if_the_layer_runs_otherwise():
    fp8, bf16, regime = preset("deepseek-r1"), preset("qwen3-235b-a22b"), Regime(ep_size=8, dispatch="allgather")
    assert "kernel_version" not in TritonBackend().for_version("0.20.2", bf16, regime).environment()
    assert TritonBackend().for_version("0.20.2", bf16, regime).remote == "zero"
    assert TritonBackend().for_version("0.20.2", bf16, Regime()).environment() == TritonBackend().environment()
    old = TritonBackend().for_version("0.20.2", fp8, regime)
    assert old.environment() == TritonBackend(kernel_version="0.20.2").environment()
    assert TritonBackend(remote="drop").for_version("0.20.2", fp8, regime).remote == "drop"
    assert TritonBackend().for_version("0.33.0", fp8, regime).environment() == TritonBackend().environment()
    assert TritonBackend().for_version("0.40", fp8, regime).environment() == TritonBackend().environment()


@pytest.mark.parametrize("options", [{"kernel_version": "0.33.0"}, {"kernel": "sglang"}])
def test_a_chosen_kernel_that_the_version_does_not_have_is_refused(options):
    backend = TritonBackend(**options)
    with pytest.raises(UsageError, match=r"vLLM 0.20.2 is not the one that was chosen.*kernel_version=0.20.2"):
        backend.for_version("0.20.2", preset("deepseek-r1"), Regime(ep_size=8))


@pytest.mark.network
@pytest.mark.parametrize("version", ["0.20.2", "0.26.0", "0.33.0"])
def test_the_defaults_are_those_of_the_versions_own_function(version, vllm_version_sources):
    own = _default_of(vllm_version_sources(version) / "vllm/model_executor/layers/fused_moe/fused_moe.py")
    row = kernel_version("vllm", version)
    for rows in (*range(1, 130), 512, 513, 4096, 16384):
        for dtype, block in ((None, None), ("fp8_w8a8", [128, 128])):
            expected = own(rows, 32, 4096, 7168, 8, dtype, block)
            del expected["SPLIT_K"]
            assert dict(default_config(rows, 32, block is not None, row)) == expected


def _default_of(path):
    """Returns `get_default_config` of a version's file, on CUDA and without batch invariance."""
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "get_default_config"]
    namespace = {
        "envs": SimpleNamespace(VLLM_BATCH_INVARIANT=False),
        "current_platform": SimpleNamespace(is_rocm=lambda: False),
        "os": os,
    }
    exec(compile(tree, str(path), "exec"), namespace)
    return namespace["get_default_config"]
