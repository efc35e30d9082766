"""Records the experts of routed tokens: a sample of whole tokens for each layer, of a bounded size."""

from __future__ import annotations

import ctypes
import io
import threading
import zipfile
from pathlib import Path
from typing import Final, Self

import torch

from moetune.errors import UsageError
from moetune.quoting import shortened, shown_path
from moetune.store.files import probe, replace

TOKENS: Final = 8_192
"""The most tokens that are kept of a layer. 64 layers of top-8 then need 17 MB."""
SAVED_EVERY_S: Final = 60.0


class _Sample:
    """A uniform sample of the tokens of one layer.

    This is algorithm R (Vitter, "Random sampling with a reservoir", ACM TOMS 11(1), 1985), for many tokens at a time.

    Attributes:
        ids: int32 `[most, k]`, of which the first `min(seen, most)` rows are set.
        seen: the number of tokens that were given.
    """

    def __init__(self, most: int, top_k: int) -> None:
        self.ids = torch.full((most, top_k), -1, dtype=torch.int32)
        self.seen = 0

    def add(self, ids: torch.Tensor, generator: torch.Generator) -> None:
        """Adds tokens. Only those that enter the sample are copied from the device."""
        most, count = len(self.ids), len(ids)
        order = torch.arange(self.seen, self.seen + count)
        place = (torch.rand(count, dtype=torch.float64, generator=generator) * (order + 1)).long()
        place = torch.where(order < most, order, place)
        self.seen += count
        entering = (place < most).nonzero().flatten()
        if not len(entering):
            return
        last = dict(zip(place[entering].tolist(), entering.tolist(), strict=True))  # of two for one place the later one
        chosen = torch.tensor(list(last.values()))
        self.ids[torch.tensor(list(last))] = ids[chosen.to(ids.device)].to("cpu", torch.int32)


class Recorder:
    """Samples the experts of tokens, and writes them as `.npz` for `replay:PATH`.

    It is a context manager that saves at its end. It can be used from several threads. While it records, a thread of
    its own saves regularly, so that a process that is killed leaves what was recorded until then.
    """

    def __init__(
        self, path: Path | str, *, tokens: int = TOKENS, every_s: float | None = SAVED_EVERY_S, seed: int = 0
    ) -> None:
        """Args are those of `record`."""
        self.path = Path(path).expanduser()
        if self.path.suffix != ".npz":
            raise UsageError(
                f"A recording is written as .npz, given {shown_path(path)}.", "Let the name end with .npz."
            )
        if tokens < 1 or (every_s is not None and not every_s > 0):
            raise UsageError(f"tokens and every_s must be positive, given {tokens} and {every_s}.")
        try:
            probe(self.path, 1)
        except OSError as error:
            raise UsageError(f"{shown_path(path)} cannot be written: {shortened(str(error))}.") from None
        self._tokens, self._every_s = tokens, every_s
        self._samples: dict[int, _Sample] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._saver: threading.Thread | None = None
        self._saved = 0

    @property
    def seen(self) -> int:
        """The number of tokens that were given, each once for each layer."""
        return sum(sample.seen for sample in list(self._samples.values()))

    def add(self, layer: int, topk_ids: torch.Tensor) -> None:
        """Adds the tokens of one layer.

        Args:
            layer: the layer's number.
            topk_ids: integers `[tokens, k]` on any device, ids of experts (not of copies).

        Raises:
            UsageError: the ids have another shape, or another k than before.
        """
        if topk_ids.dim() != 2 or topk_ids.dtype.is_floating_point:
            raise UsageError(f"topk_ids are integers [tokens, k], given {topk_ids.dtype} {list(topk_ids.shape)}.")
        with self._lock:
            known = next(iter(self._samples.values()), None)
            if known is not None and known.ids.shape[1] != topk_ids.shape[1]:
                raise UsageError(f"All layers have top-{known.ids.shape[1]}, given {topk_ids.shape[1]} ids a token.")
            if layer not in self._samples:
                self._samples[layer] = _Sample(self._tokens, topk_ids.shape[1])
            self._samples[layer].add(topk_ids, self._generator)
            if self._saver is None and self._every_s is not None:
                self._saver = threading.Thread(target=self._save_regularly, name="moetune recorder", daemon=True)
                self._saver.start()

    def save(self) -> None:
        """Writes the file as a whole: a reader sees the old content or the new one.

        Raises:
            OSError: it cannot be written.
        """
        with self._lock:
            seen = self.seen
            if seen == self._saved:
                return
            layers = sorted(self._samples)
            most = max(min(sample.seen, self._tokens) for sample in self._samples.values())
            ids = torch.stack([self._samples[layer].ids[:most] for layer in layers])
        replace(self.path, _npz(topk_ids=ids, layers=torch.tensor(layers)))
        self._saved = seen

    def close(self) -> None:
        """Saves and ends the thread that saves. Raises OSError if the file cannot be written."""
        self._ended.set()
        if self._saver is not None:
            self._saver.join()
        self.save()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _save_regularly(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self.save()
            except OSError:
                continue  # a full disk may have room later; the last save raises


def record(path: Path | str, *, tokens: int = TOKENS, every_s: float | None = SAVED_EVERY_S, seed: int = 0) -> Recorder:
    """Returns a recorder of routed tokens, to be used in a `with` statement.

    >>> with record("traffic.npz") as recorder:
    ...     recorder.add(0, torch.tensor([[3, 1], [0, 2]]))

    Args:
        path: the `.npz` file to write.
        tokens: the most tokens that are kept of each layer, a uniform sample of all.
        every_s: how often the file is written, in seconds; None writes it at the end only.
        seed: the seed of the sample.

    Raises:
        UsageError: the name does not end with `.npz`, the folder cannot be written, or a number is not positive.
    """
    return Recorder(path, tokens=tokens, every_s=every_s, seed=seed)


def _npz(**arrays: torch.Tensor) -> bytes:
    """Returns a `.npz` file of int32 and int64 arrays, as `numpy.savez` writes it."""
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                archive.writestr(f"{name}.npy", _npy(array))
        return buffer.getvalue()


def _npy(array: torch.Tensor) -> bytes:
    """Returns a `.npy` file of format 1.0 (numpy/lib/format.py): its header ends at a multiple of 64 bytes."""
    shape = ", ".join(map(str, array.shape)) + ("," if array.dim() == 1 else "")
    header = f"{{'descr': '<i{array.element_size()}', 'fortran_order': False, 'shape': ({shape}), }}"
    header += " " * (-(len(header) + 11) % 64) + "\n"
    content = ctypes.string_at(array.contiguous().data_ptr(), array.numel() * array.element_size())
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + content
