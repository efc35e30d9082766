"""Finds the package triton_kernels and imports it, and sets the constraints under which it chooses its tiles.

The package has no version of its own. Known is the one of Triton 3.5.1, whose function is `matmul_ogs`: vLLM 0.26.0 and
0.33.0 contain the same files of it, in `vllm/third_party/triton_kernels`. vLLM takes a package that is installed by
itself first (`import_triton_kernels` in `utils/import_utils.py`), and so does moetune. What PyPI has under the name
triton-kernels is another project's.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

NAME: Final = "triton_kernels"
OPT_FLAGS: Final = "matmul_ogs_details.opt_flags"
"""The module that chooses the tiles of a call."""
_VENDORED: Final = Path("third_party", NAME)
_NEEDED: Final = ("matmul_ogs.py", "routing.py", "tensor_details/layout_details/hopper_scale.py")
"""Files of the known version. Triton 3.6 removed `routing.py`, Triton 3.8 replaced `matmul_ogs.py`."""
_HINT: Final = "Install vLLM 0.26.0 … 0.33.0, which contains it; PyPI's triton-kernels is another project's."


def folder() -> Path | None:
    """Returns the package's folder: that of an installed triton_kernels, else vLLM's; None without either."""
    imported = sys.modules.get(NAME)
    if imported is not None:
        return Path(next(iter(imported.__path__)))
    for name, below in ((NAME, Path()), ("vllm", _VENDORED)):
        spec = importlib.util.find_spec(name)
        for parent in (spec and spec.submodule_search_locations) or ():
            if (found := Path(parent) / below / "__init__.py").is_file():
                return found.parent
    return None


def obstacle() -> tuple[str, str] | None:
    """Returns why the package cannot be used, and a hint; None if it is there in the known version."""
    found = folder()
    if found is None:
        return "the package triton_kernels is not installed", _HINT
    if missing := [name for name in _NEEDED if not (found / name).is_file()]:
        return f"{found} is not triton_kernels of Triton 3.5.1: it has no {missing[0]}", _HINT
    return None


def digest() -> str:
    """Returns a digest of the package's sources, 12 hexadecimal digits; `not installed` without them."""
    found = folder()
    return "not installed" if found is None else _digest(found)


@cache
def _digest(found: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(found.rglob("*.py")):
        content.update(path.relative_to(found).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()[:12]


def module(name: str) -> Any:
    """Imports a module of the package, such as `matmul_ogs`. vLLM itself is not imported.

    The package's modules import each other by its own name. So vLLM's copy gets that name, as in vLLM.
    """
    if NAME not in sys.modules:
        found = folder()
        assert found is not None, "the caller has asked for an obstacle"
        spec = importlib.util.spec_from_file_location(
            NAME, found / "__init__.py", submodule_search_locations=[str(found)]
        )
        assert spec is not None
        assert spec.loader is not None
        package = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{NAME}.{name}")


@contextmanager
def constrained(opt_flags: Any, constraints: Mapping[str, int]) -> Iterator[None]:
    """Adds constraints for the calls in the block, and brings back those that held before.

    They hold for all calls of the process, and engines have some of their own: on Hopper vLLM sets `split_k` to 1. So
    a block must hold nothing but the call that they are meant for.

    Args:
        opt_flags: the module `OPT_FLAGS`.
        constraints: values by name, as `update_opt_flags_constraints` takes them.
    """
    before = dict(opt_flags._opt_flags_constraints)
    opt_flags.update_opt_flags_constraints(dict(constraints))
    try:
        yield
    finally:
        opt_flags.reset_opt_flags_constraints()
        opt_flags.update_opt_flags_constraints(before)
