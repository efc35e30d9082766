"""Which versions of the environment may differ between a stored profile and the question that it answers.

A strict field is neutral to a backend if it cannot change the rank of its tactics. A profile that was measured with
another value of it answers all the same. Other fields can change ranks, but leave the meaning of a tactic as it is. A
profile that differs in these is near.

`triton`, `batched-triton`: a run launches Triton kernels, and memsets that are the same for every tactic. Triton
compiles the kernels with its own LLVM and its own ptxas. Torch provides the memory, the stream and the CUDA graph, so
neither its version nor its CUDA version matters. Triton's version and the kernel's source decide what is compiled. A
tactic has the same meaning in all of them: tile sizes, warps and stages.

`flashinfer-cutlass`, `flashinfer-trtllm`, `flashinfer-trtllm-routed`: FlashInfer's build compiles the kernels, and
torch provides their memory and their stream. `cuda` stands for the CUDA version of that build; another compiler can
change ranks. A tactic is a position in a list that is compiled into FlashInfer. So another version of FlashInfer is
not even near, because the same number can mean another kernel there.

`flashinfer-fp8-block`, `deep-gemm`, `batched-deep-gemm`, `vllm-cutlass`: rivals. FlashInfer's or vLLM's build compiles
the kernels, or they do it at run time. Their only tactic has the same meaning in all versions.

`marlin`: vLLM's build compiles the kernels, and torch provides their memory and their stream. vLLM's version decides
which kernels they are. A tactic has the same meaning in all of them: the size of a block and tile sizes.

`triton-kernels`: as for `triton`. The package triton_kernels has no version, so a digest of its sources stands for it.

`humming`: NVRTC compiles the kernels at run time, and torch provides their memory and their stream. The version of
humming-kernels decides the code of a configuration, and what its fields mean.

`torch`: the kernels are torch's own, so its version and its CUDA version change what runs. An algorithm keeps its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Versions:
    """The strict fields of one backend that may differ.

    Args:
        neutral: the fields that cannot change the rank of a tactic.
        near: the fields that can change ranks, but not what a tactic means.
    """

    neutral: frozenset[str] = frozenset()
    near: frozenset[str] = frozenset()

    def are_near(self, fields: frozenset[str]) -> bool:
        """Returns whether a profile that differs in `fields` is near a question."""
        return fields <= self.neutral | self.near


_FLASHINFER = Versions(neutral=frozenset({"torch"}), near=frozenset({"cuda"}))
_VLLM = Versions(neutral=frozenset({"torch"}), near=frozenset({"cuda", "vllm"}))
_TRITON = Versions(neutral=frozenset({"torch", "cuda"}), near=frozenset({"triton", "kernel_source"}))
_VERSIONS: Final[Mapping[str, Versions]] = {
    "triton": _TRITON,
    "batched-triton": _TRITON,
    "flashinfer-cutlass": _FLASHINFER,
    "flashinfer-trtllm": _FLASHINFER,
    "flashinfer-trtllm-routed": _FLASHINFER,
    "flashinfer-fp8-block": Versions(neutral=frozenset({"torch"}), near=frozenset({"cuda", "flashinfer"})),
    "triton-kernels": _TRITON,
    "marlin": _VLLM,
    "deep-gemm": _VLLM,
    "batched-deep-gemm": _VLLM,
    "vllm-cutlass": _VLLM,
    "humming": Versions(neutral=frozenset({"torch"}), near=frozenset({"cuda"})),
    "torch": Versions(near=frozenset({"torch", "cuda"})),
}


DEPLOYED: Final = frozenset({"torch", "cuda", "triton"})
"""The versions that only the machine of the engine decides. Another machine cannot know them."""
KERNEL_FIELDS: Final = frozenset(
    {
        "kernel", "kernel_version", "remote", "formula", "ids", "mxfp4_activations", "arrives_quantized",
        "fp8_block_layout", "hidden_dtype", "caller",
    }
)  # fmt: skip
"""The strict fields that say what a backend's kernel does. They are the same on every machine."""


def versions_of(backend: str) -> Versions:
    """Returns which versions may differ for a backend; none for a backend that is not known."""
    return _VERSIONS.get(backend, Versions())
