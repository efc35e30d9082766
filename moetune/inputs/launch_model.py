"""Finds the model of a launch line, and the precision that its flags set for the experts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from moetune.errors import UnsupportedError, UsageError
from moetune.inputs import presets, repositories
from moetune.inputs.launch_line import Line, known_text
from moetune.quoting import enumerated
from moetune.spec.enums import Precision
from moetune.spec.layer import MoELayer

_QUANTIZATIONS: Final[Mapping[str, Precision | None]] = {
    "fp8": Precision.FP8_TENSOR,
    "modelopt": None,
    "modelopt-fp4": Precision.NVFP4,
    "modelopt-fp8": Precision.FP8_TENSOR,
    "mxfp4": Precision.MXFP4,
    "compressed-tensors": None,
}
"""Maps values of `--quantization` to the experts' precision; None means the precision of the checkpoint."""
_DTYPES: Final = {"float16": Precision.FP16, "half": Precision.FP16, "float32": Precision.FP32, "float": Precision.FP32}
_HARMLESS_OVERRIDES: Final = (
    "architectures", "rope", "max_position", "max_model", "sliding", "index_", "use_index", "vision", "audio", "dtype",
    "torch_dtype", "bos_", "eos_", "pad_", "tie_word", "auto_map", "num_nextn", "is_matryoshka", "matryoshka",
)  # fmt: skip
"""The prefixes of config fields that do not concern the experts."""


class Model(NamedTuple):
    """A model for `presets.layer`, warnings, and the precision if it differs from the preset's."""

    model: str
    precision: str | None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Deployed:
    """The layer, the options that the user gave to moetune (`beside`), and the warnings collected so far."""

    layer: MoELayer
    beside: Mapping[str, Any]
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Adds a warning of one sentence."""
        self.warnings.append(message)


def model_named(line: Line, *, precise: bool) -> Model:
    """Returns the model that the line serves: an existing path, or a known repository.

    Args:
        precise: whether the user gave the precision. Then the repository's precision need not be known.

    Raises:
        UsageError: no model is named, or it is not known.
    """
    value = line.given("model-path", "model")
    word = value.words[0] if value and value.words else (line.positional[0] if line.positional else None)
    if word is None or not word.text:
        swallowed = (
            f" The engine has no flag {enumerated(line.unknown)}; the name may have been read as its value."
            if line.unknown
            else ""
        )
        raise UsageError(f"The launch line names no model.{swallowed}", "Pass --model as well.")
    name = known_text(word, "The model")
    if os.path.exists(name):
        return Model(name, None)
    if "/" not in name and name.lower() in presets.names():
        return Model(name.lower(), None)
    found = repositories.find(name)
    if found.precision == repositories.UNKNOWN and not precise:
        raise UsageError(
            f"The launch line's model {name} has the shape of {found.preset}, but moetune does not know how its "
            "experts are quantized.",
            "Pass --precision, or --model with the path of its config.json.",
        )
    return Model(found.preset, None if found.precision == repositories.UNKNOWN else found.precision)


def changed_precision(line: Line, own: Precision) -> Precision | None:
    """Returns the precision to which `--quantization` or `--dtype` changes experts stored as `own`, or None.

    Raises:
        UnsupportedError: the quantization is not supported.
        UsageError: `--hf-overrides` changes the experts.
    """
    _require_no_overrides(line)
    name = line.text("quantization", "quant")
    if name is not None:
        key = name.lower().replace("_", "-")
        if key not in _QUANTIZATIONS:
            raise UnsupportedError(
                f"--quantization {name} is not supported.",
                f"Pass --precision to override it. Supported: {', '.join(_QUANTIZATIONS)}.",
            )
        return None if key == "fp8" and own is not Precision.BF16 else _QUANTIZATIONS[key]
    dtype = line.text("dtype")
    if dtype is None or own not in (Precision.BF16, Precision.FP16, Precision.FP32):
        return None
    if dtype in ("bfloat16", "bf16"):
        return Precision.BF16 if own is not Precision.BF16 else None
    return _DTYPES.get(dtype)


def _require_no_overrides(line: Line) -> None:
    """Raises UsageError if a flag overrides config fields that can concern the experts."""
    for flag in ("hf-overrides", "json-model-override-args"):
        changed = line.object(flag) or {}
        deep = {key: value for key, value in changed.items() if not key.startswith(_HARMLESS_OVERRIDES)}
        if deep:
            raise UsageError(
                f"--{flag} changes {', '.join(deep)}, which moetune does not apply to the layer.",
                "Pass --model with a config.json that has these values.",
            )
