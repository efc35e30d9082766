"""Defines `Places`: the folders in which an engine looks for a tuned file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moetune.backends.grouped_triton.engine_files import sglang_folder
from moetune.backends.grouped_triton.shipped import triton_folders


@dataclass(frozen=True, slots=True)
class Places:
    """Where the engine looks.

    Attributes:
        own: the folder that the user names; None if there is none. For SGLang, `configs/` lies in it.
        shipped: the folder of the engine's own files; None if the engine is not installed here.
        triton: Triton's version; SGLang sorts files by it.
        source: what names `own`, for sentences: `--folder`, or a variable.
    """

    own: Path | None
    shipped: Path | None
    triton: str
    source: str

    def folders(self, engine: str) -> tuple[Path, ...]:
        """Returns the folders in which the engine looks for a name, in order."""
        if engine == "vllm":
            return tuple(folder for folder in (self.own, self.shipped) if folder is not None)
        root = self.root
        if root is None:
            return ()
        return triton_folders(root, self.triton) if root.is_dir() else (root / sglang_folder(self.triton),)

    @property
    def root(self) -> Path | None:
        """The folder that has SGLang's folders of Triton's versions."""
        return self.shipped if self.own is None else self.own / "configs"
