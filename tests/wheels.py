"""Single files of an engine's own sources, out of its wheel on PyPI: read by ranges, for the wheel has up to 400 MB."""

from __future__ import annotations

import io
import os
import re
import urllib.request
import zipfile
from importlib.util import find_spec
from pathlib import Path

ENGINES = {
    "vllm": ("0.33.0", ("vllm/plugins/__init__.py", "vllm/model_executor/layers/fused_moe/fused_moe.py")),
    "sglang": (
        "0.5.23",
        ("sglang/srt/plugins/__init__.py", "sglang/kernels/ops/moe/fused_moe_triton_kernels.py"),
    ),
}
"""The versions that moetune was checked against, and the files that tests read."""
TIMEOUT_S = 20
BLOCK_BYTES = 1 << 18


def engine_sources(engine: str, folder: Path) -> Path | None:
    """A folder that holds the engine's package: below `MOETUNE_ENGINE_SOURCES`, installed, else fetched into `folder`.

    None where there is no network, or the engine is not among `ENGINES`.
    """
    given, spec = os.environ.get("MOETUNE_ENGINE_SOURCES"), find_spec(engine)
    if given and (Path(given) / engine).is_dir():
        return Path(given)
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]).parent
    version, files = ENGINES[engine]
    if not all((folder / file).exists() for file in files):
        try:
            contents = members(engine, version, files)
        except OSError:
            return None
        for file, content in contents.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(content)
        (folder / engine / "__init__.py").touch()
    return folder


class RemoteFile(io.RawIOBase):
    """A file behind a URL whose server answers ranges; seekable, read block by block."""

    def __init__(self, url: str) -> None:
        self._url, self._at, self._blocks = url, 0, {}
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S) as answer:
            self._size = int(answer.headers["Content-Length"])

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer) -> int:
        number, within = divmod(self._at, BLOCK_BYTES)
        part = self._block(number)[within : within + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            first = number * BLOCK_BYTES
            wanted = {"Range": f"bytes={first}-{min(first + BLOCK_BYTES, self._size) - 1}"}
            with urllib.request.urlopen(urllib.request.Request(self._url, headers=wanted), timeout=TIMEOUT_S) as answer:
                if answer.status != 206:
                    raise OSError(f"{self._url} answers no ranges")
                self._blocks[number] = answer.read()
        return self._blocks[number]


def members(package: str, version: str, paths: tuple[str, ...]) -> dict[str, bytes]:
    """Files of one wheel.

    Raises:
        OSError: there is no network, or no such wheel.
    """
    with urllib.request.urlopen(f"https://pypi.org/simple/{package}/", timeout=TIMEOUT_S) as answer:
        listed = re.findall(r'https?://[^"#\s]+\.whl', answer.read().decode())  # an index may answer in HTML or JSON
    urls = [url for url in listed if url.rpartition("/")[2].startswith(f"{package}-{version}-")]
    if not urls:
        raise FileNotFoundError(f"no wheel of {package} {version}")
    with zipfile.ZipFile(io.BufferedReader(RemoteFile(urls[0]), BLOCK_BYTES)) as wheel:
        return {path: wheel.read(path) for path in paths}
