"""Recordings that are made to run code, to cost memory, or to be taken for something else."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy
import pytest
import torch
from recording_files import calibrator, layers, response, safetensors, tokens, written

from moetune.errors import UsageError
from moetune.recordings import torch_file
from moetune.recordings.reading import read_recording

IDS = tokens(20)


class Malicious:
    """Its unpickling makes a file."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "unpickled").exists(), "code of the file has run"


def npy(header: str, data: bytes = b"", version: int = 1) -> bytes:
    text = header.encode("latin-1")
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    with io.BytesIO() as buffer:
        with zipfile.ZipFile(buffer, "w", compression) as made:
            for name, content in members.items():
                made.writestr(name, content)
        return buffer.getvalue()


def saved(content: object) -> bytes:
    with io.BytesIO() as buffer:
        torch.save(content, buffer)
        return buffer.getvalue()


def objects() -> bytes:
    with io.BytesIO() as buffer:
        numpy.save(buffer, numpy.array([[Malicious()]], dtype=object), allow_pickle=True)
        return buffer.getvalue()


INT = "{'descr': '<i4', 'fortran_order': False, 'shape': (%s), }"
CASES = {
    "objects in .npy": ("a.npy", objects, "Python objects, which only pickle reads, and moetune never unpickles"),
    "objects in .npz": ("a.npz", lambda: archive({"topk_ids.npy": objects()}), "moetune never unpickles"),
    "a pickle as .npy": ("a.npy", lambda: pickle.dumps(Malicious()), "it is no .npy file"),
    "a pickle as .npz": ("a.npz", lambda: pickle.dumps(Malicious()), "it is no ZIP archive"),
    "a pickle as .pt": ("a.pt", lambda: pickle.dumps(Malicious()), "it is no ZIP archive"),
    "a pickle as .safetensors": ("a.safetensors", lambda: pickle.dumps(Malicious()), "it is no .safetensors file"),
    "an object in .pt": ("a.pt", lambda: saved({"ids": Malicious()}), "objects that only pickle reads"),
    "an object in SGLang's records": (
        "a.pt",
        lambda: saved({"records": [Malicious()], "last_physical_to_logical_map": IDS}),
        "objects that only pickle reads",
    ),
    "a compressed .pt": ("a.pt", lambda: archive({"a/data.pkl": b"."}), "compressed, which torch never does"),
    "many objects in .pt": ("a.pt", lambda: saved([[]] * 3 + [list(range(10**6))]), "its objects have .* bytes, more"),
    "a tensor of few numbers that looks large": (
        "a.pt",
        lambda: saved(torch.zeros(1, 8, dtype=torch.int32).expand(10**8, 8)),
        "800,000,000 ids, more than",
    ),
    "a sparse tensor": ("a.pt", lambda: saved(torch.ones(4, 4).to_sparse()), "cannot be used"),
    "a zip bomb": ("a.npz", lambda: archive({"topk_ids.npy": npy(INT % "1,") + bytes(2**28)}), "more than 134,217,728"),
    "a header of a zip bomb": ("a.npz", lambda: archive({"topk_ids.npy": npy(INT % "9999999999, 8")}), "numbers, more"),
    "many members": (
        "a.npz",
        lambda: archive({f"{number}": b"" for number in range(20_000)}),
        "the directory of its archive has .* bytes, more than 65,536",
    ),
    "an archive with a comment": ("a.npz", lambda: archive({"a": b""})[:-2] + b"\1\0x", "it is no ZIP archive"),
    "a shape beyond the file": ("a.npy", lambda: npy(INT % "4000000, 8", bytes(64)), "ends before its last number"),
    "a long header": ("a.npy", lambda: npy(" " * 60_000), "its header has 60,000 bytes, more than"),
    "code in a header": ("a.npy", lambda: npy("__import__('os').mkdir('unpickled')"), "not one that numpy writes"),
    "a deep header": ("a.npy", lambda: npy("(" * 9_000), "not one that numpy writes"),
    "a magic number alone": ("a.npy", lambda: b"\x93NUMPY", "it is no .npy file"),
    "an unknown version": ("a.npy", lambda: npy(INT % "1, 1", b"1234", version=9), "it is no .npy file"),
    "a safetensors header beyond the file": ("a.safetensors", lambda: struct.pack("<Q", 2**19) + b"{}", "cannot be us"),
    "safetensors offsets beyond the file": (
        "a.safetensors",
        lambda: safetensors(topk_ids=IDS)[:-8],
        "ends before its last number",
    ),
    "a safetensors shape that does not fit": (
        "a.safetensors",
        lambda: safetensors(topk_ids=IDS).replace(b"[20,4]", b"[99,4]"),
        "has 320 bytes, its shape",
    ),
    "a deep safetensors header": (
        "a.safetensors",
        lambda: struct.pack("<Q", 100_000) + b"[" * 100_000,
        "more than 64 levels",
    ),
    "JSON of something else": ("a.json", lambda: b'{"a": 1}', "has neither all_ranks_records"),
    "NaN in JSON": ("a.json", lambda: b'{"all_ranks_records": NaN}', "NaN is no JSON number"),
    "records that are none": ("a.json", lambda: b'{"all_ranks_records": [1]}', "no metadata or no raw_data"),
    "a layer's number that is none": (
        "a.json",
        lambda: calibrator(layers(1)).replace('"layer_idx": 0', '"layer_idx": -1').encode(),
        "has no layer_idx",
    ),
    "no base64": (
        "a.json",
        lambda: calibrator(layers(1)).replace('"raw_data": "', '"raw_data": "*').encode(),
        "a text that is no base64",
    ),
    "a response without experts": ("a.json", lambda: b'{"choices": [{"text": ""}]}', "choice of it has no routed_expe"),
    "a response with other base64": (
        "a.json",
        lambda: b'{"choices": [{"routed_experts": "AAAA"}]}',
        "it is no .npy file",
    ),
    "a line of JSON that is none": ("a.jsonl", lambda: response(layers(1)).encode() + b"\nx", "cannot be used"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_recording_is_refused_and_runs_no_code(case, here):
    name, content, message = CASES[case]
    with pytest.raises(UsageError, match=message) as caught:
        read_recording(written(here, name, content()))
    assert len(str(caught.value)) < 1_000


def test_a_zlib_bomb_is_not_inflated(here):
    document = json.loads(calibrator(layers(1)))
    bomb = zlib.compress(bytes(2**27))
    document["all_ranks_records"][0][0]["raw_data"] = base64.b64encode(bomb).decode()
    with pytest.raises(UsageError, match="has not the 800 bytes that its metadata says"):
        read_recording(written(here, "a.json", json.dumps(document)))


def test_a_folder_of_many_files_and_a_fifo_are_refused(here):
    os.mkfifo(here / "a.npy")
    with pytest.raises(UsageError, match="it is a FIFO, not a regular file"):
        read_recording(here / "a.npy")
    (here / "many").mkdir()
    for number in range(4_097):
        (here / "many" / f"topk_ids_layer{number}_idx0.pt").touch()
    with pytest.raises(UsageError, match="a folder of more than 4,096 files"):
        read_recording(here / "many")


def test_torchs_reader_is_asked_for_weights_only(here, monkeypatch):
    asked = {}

    def load(file: object, **options: object) -> torch.Tensor:
        asked.update(options)
        return IDS

    monkeypatch.setattr(torch, "load", load)
    assert torch.equal(torch_file.load(io.BytesIO(saved(IDS))), IDS)
    assert asked == {"map_location": "cpu", "weights_only": True}
