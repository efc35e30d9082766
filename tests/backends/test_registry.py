"""The backends by name."""

import importlib.util
import subprocess
import sys

import pytest

from moetune.backends import registry
from moetune.backends.base import Backend
from moetune.backends.grouped_triton.backend import TritonBackend
from moetune.errors import UsageError
from moetune.inputs.presets import layer as preset
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime


def test_every_named_backend_is_there_and_has_its_name() -> None:
    assert registry.backends() == (
        "triton",
        "batched-triton",
        "flashinfer-trtllm",
        "flashinfer-trtllm-routed",
        "triton-kernels",
        "humming",
        "marlin",
        "flashinfer-cutlass",
        "flashinfer-fp8-block",
        "deep-gemm",
        "batched-deep-gemm",
        "vllm-cutlass",
        "torch",
    )
    for name in registry.backends():
        made = registry.backend(name)
        assert isinstance(made, Backend)
        assert made.name == name


def test_an_unknown_backend_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UsageError, match=r"'cuda'.*torch"):
        registry.backend("cuda")


def test_torch_runs_here() -> None:
    assert registry.Diagnosis("torch", True) in registry.diagnose()


def test_a_backend_that_cannot_be_imported_is_diagnosed_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CLASSES", {"gone": "moetune.no_such_module:Gone", **registry._CLASSES})
    gone, *others = registry.diagnose()
    assert (gone.name, gone.available) == ("gone", False)
    assert "no_such_module" in gone.reason
    assert gone.hint
    assert [other.name for other in others] == list(registry.backends()[1:])
    assert others[-1].available


def test_a_system_library_that_does_not_load_is_diagnosed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TritonBackend) -> None:
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(TritonBackend, "unavailable", broken)
    found = registry.diagnosis("triton")
    assert not found.available
    assert "libcudart.so" in found.reason


def test_without_triton_the_diagnosis_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else real(name))
    found = registry.diagnosis("triton")
    assert (found.available, found.reason) == (False, "triton is not installed")
    assert "moetune[triton]" in found.hint


def test_options_reach_the_backend() -> None:
    made = registry.backend("triton", kernel="sglang")
    assert isinstance(made, TritonBackend)
    assert (made.kernel, made.remote) == ("sglang", "zero")
    assert registry.backend("triton", remote="zero").remote == "zero"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("torch", {"kernel": "vllm"}, r"torch does not take kernel.*: triton"),
        ("torch", {"remote": "drop", "kernel": "vllm"}, r"torch does not take kernel or remote.*: triton"),
        ("triton", {"kernels": "vllm"}, r"triton does not take kernels.*Leave it out"),
        ("triton", {"kernel": "cutlass"}, r"'cutlass'.*builtin, vllm, sglang"),
    ],
)
def test_an_option_that_a_backend_has_not_is_an_error_that_says_which_has(
    name: str, options: dict[str, str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        registry.backend(name, **options)


def test_naming_and_making_backends_imports_neither_torch_nor_triton() -> None:
    code = (
        "import sys; from moetune.backends import registry; [registry.backend(name) for name in registry.backends()]; "
        "print(sys.modules.keys() & {'torch', 'triton'})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


class _FakeBackend:
    def __init__(self, name: str, computes: bool, rival: bool = False) -> None:
        self.name, self._computes, self.rival = name, computes, rival

    def unsupported(self, layer: MoELayer, regime: Regime) -> str | None:
        return None if self._computes else "other experts"


@pytest.mark.parametrize(
    ("available", "computing", "expected"),
    [("abc", "abc", "a"), ("bc", "abc", "b"), ("abc", "c", "c"), ("", "bc", "b"), ("a", "c", "c"), ("", "", "a")],
)
def test_the_preferred_backend_runs_here_or_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, available: str, computing: str, expected: str
) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict.fromkeys("abc", ""))
    monkeypatch.setattr(registry, "backend", lambda name: _FakeBackend(name, name in computing))
    monkeypatch.setattr(registry, "diagnosis", lambda name: registry.Diagnosis(name, name in available, "no GPU"))
    layer, regime = preset("qwen3-235b-a22b"), Regime()
    assert registry.preferred(layer, regime).name == expected
    assert registry.chosen("auto", layer, regime).name == expected
    assert registry.chosen("c", layer, regime).name == "c"
    made = _FakeBackend("made", True)
    assert registry.chosen(made, layer, regime) is made
    found, left_out = registry.able(layer, regime)
    assert [made.name for made in found] == [name for name in "abc" if name in available and name in computing]
    assert left_out.keys() == set("abc") - {made.name for made in found}


def test_a_rival_is_compared_but_never_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict.fromkeys("abc", ""))
    monkeypatch.setattr(registry, "backend", lambda name: _FakeBackend(name, name != "c", rival=name == "a"))
    monkeypatch.setattr(registry, "diagnosis", lambda name: registry.Diagnosis(name, name == "a", "no GPU"))
    layer, regime = preset("qwen3-235b-a22b"), Regime()
    assert registry.backends_computing(layer, regime) == ["b"]
    assert registry.preferred(layer, regime).name == "b"
    found, left_out = registry.able(layer, regime)
    assert (found, left_out) == ([], {"b": "no GPU", "c": "other experts"})
    found, left_out = registry.able(layer, regime, rivals=True)
    assert ([made.name for made in found], left_out) == (["a"], {"b": "no GPU", "c": "other experts"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("torch", {}),
        ("triton", {"remote": "zero"}),
        ("triton", {"kernel_version": "0.20.2"}),
        ("flashinfer-cutlass", {}),
        ("triton-kernels", {}),
        ("humming", {}),
        ("marlin", {"formula": "sglang"}),
        ("flashinfer-fp8-block", {}),
        ("deep-gemm", {}),
        ("batched-deep-gemm", {}),
        ("vllm-cutlass", {}),
        ("flashinfer-trtllm", {"quantized": False, "hidden_dtype": "float16"}),
        ("flashinfer-trtllm", {"quantized": True, "fp8_block_layout": "plain"}),
        ("flashinfer-trtllm-routed", {"packed": False}),
        ("flashinfer-trtllm-routed", {"mxfp4_activations": "mxfp8"}),
    ],
)
def test_a_backend_is_made_again_from_the_environment_that_it_writes(name, options) -> None:
    made = registry.backend(name, **options)
    again = registry.of_environment(name, made.environment())
    assert type(again) is type(made)
    assert again.environment() == made.environment()
    assert all(getattr(again, option, value) == value for option, value in options.items())
