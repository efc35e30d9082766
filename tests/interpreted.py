"""Runs kernels under Triton's interpreter, and stands in for its arithmetic where that is not the GPU's.

The interpreter (Triton 3.6 to 3.9) multiplies bf16 matrices as if their bits were integers, and truncates where a GPU
rounds to nearest even. Both are replaced by torch's conversions. It also lists the members of `triton.language` at each
call of a function; here they are listed once, which saves a third of the time. Everything else is Triton's own.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process runs kernels under the interpreter. Triton decides that once, when it is imported."""


def run_interpreted(folder: Path, *arguments: str) -> None:
    """Runs pytest in a process whose Triton interprets, and requires that all tests pass and none is skipped."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--basetemp", str(folder / "pytest")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def skip_in_one_process(items: list[pytest.Item], folder: Path, run_kernels: set[str]) -> None:
    """Skips a folder's tests in the process that cannot run them.

    The files `run_kernels` run in the interpreter's own process, and tests that are marked gpu on a GPU alone.
    """
    for item in items:
        if item.path.parent != folder:
            continue
        if item.get_closest_marker("gpu"):
            if INTERPRETED or not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        elif (item.path.name in run_kernels) != INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="runs in the other process; see test_interpreted.py"))


def replace_parts_of_the_interpreter() -> None:
    """Replaces what of the interpreter computes otherwise than a GPU."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
    }

    def convert(values: Any, from_dtype: Any, to_dtype: Any, rounding_mode: Any) -> Any:
        converted = torch.from_numpy(np.array(values)).view(dtypes[from_dtype]).to(dtypes[to_dtype])
        bits = {8: torch.uint8, 16: torch.uint16, 32: torch.int32}[to_dtype.primitive_bitwidth]
        return converted.view(bits).numpy().view(f"uint{to_dtype.primitive_bitwidth}")

    def dot(self: Any, a: Any, b: Any, accumulator: Any, *_: Any) -> Any:
        a_values, b_values = (convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32) for x in (a, b))
        return interpreter.TensorHandle(np.matmul(a_values, b_values) + accumulator.data, accumulator.dtype.scalar)

    @cache
    def builtins_of(package: Any) -> tuple[str, ...]:
        return tuple(name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member))

    def patch_builtin(package: Any, *rest: Any) -> None:
        for name in builtins_of(package):
            if tl.core.is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, *rest)

    interpreter._patch_builtin = patch_builtin
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
