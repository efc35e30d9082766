from __future__ import annotations

import hashlib

import numpy
import pytest
import torch
from recording_files import calibrator, layers, response, safetensors, tokens, written

from moetune.errors import UsageError
from moetune.recordings.reading import read_recording, with_digest
from moetune.recordings.recording import known, recording_of
from moetune.spec.layer import MoELayer
from moetune.spec.regime import Regime

LAYERS = layers(3)


def saved(folder, suffix, ids=LAYERS):
    path = folder / f"traffic{suffix}"
    if suffix == ".npy":
        numpy.save(path, ids.numpy())
    elif suffix == ".npz":
        numpy.savez(path, topk_ids=ids.numpy())
    elif suffix == ".safetensors":
        path.write_bytes(safetensors(topk_ids=ids))
    elif suffix == ".pt":
        torch.save(ids, path)
    elif suffix == ".json":
        path.write_text(calibrator(ids))
    else:
        path.write_text(response(ids) + "\n")
    return path


SUFFIXES = [".npy", ".npz", ".safetensors", ".pt", ".json", ".jsonl"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_format_has_the_same_ids_and_so_the_same_digest(suffix, tmp_path):
    found = read_recording(saved(tmp_path, suffix))
    assert torch.equal(found.ids, LAYERS.flatten(0, 1))
    assert (found.layers, found.layer, found.left_out, found.weights) == (3, None, 0, None)
    content = b"150x4 int32\n" + LAYERS.numpy().tobytes()
    assert found.digest == hashlib.sha256(content).hexdigest()[:16]
    assert sum(found.loads) == LAYERS.numel()
    of_layer = read_recording(saved(tmp_path, suffix), 1)
    assert torch.equal(of_layer.ids, LAYERS[1])
    assert (of_layer.layers, of_layer.layer, of_layer.name) == (1, 1, f"traffic{suffix}")


@pytest.mark.parametrize("dtype", [numpy.int8, numpy.uint8, numpy.int16, numpy.uint16, numpy.int64, numpy.uint32])
def test_ids_can_be_any_integers(dtype, tmp_path):
    numpy.save(tmp_path / "a.npy", LAYERS.numpy().astype(dtype))
    assert torch.equal(read_recording(tmp_path / "a.npy").ids, LAYERS.flatten(0, 1))


def test_an_array_in_fortrans_order_is_read(tmp_path):
    numpy.save(tmp_path / "a.npy", numpy.asfortranarray(LAYERS.numpy()))
    assert torch.equal(read_recording(tmp_path / "a.npy").ids, LAYERS.flatten(0, 1))


def test_a_compressed_archive_with_weights_and_the_numbers_of_layers_is_read(tmp_path):
    weights = torch.rand(LAYERS.shape)
    numpy.savez_compressed(
        tmp_path / "a.npz", topk_ids=LAYERS.numpy(), topk_weights=weights.numpy(), layers=numpy.array([3, 4, 60])
    )
    found = read_recording(tmp_path / "a.npz", 60)
    assert torch.equal(found.ids, LAYERS[2])
    assert found.weights is not None
    assert torch.equal(found.weights, weights[2])
    assert read_recording(tmp_path / "a.npz").summary.weights


def test_vllms_own_name_has_vllms_own_order(tmp_path):
    numpy.savez(tmp_path / "a.npz", routed_experts=LAYERS.transpose(0, 1).numpy())
    assert torch.equal(read_recording(tmp_path / "a.npz", 2).ids, LAYERS[2])


def test_rows_and_columns_that_were_not_recorded_are_left_out(tmp_path):
    ids = torch.full((3, 60, 8), -1, dtype=torch.int32)
    ids[1:, :50, :4] = LAYERS[1:]
    numpy.save(tmp_path / "a.npy", ids.numpy())
    found = read_recording(tmp_path / "a.npy")
    assert torch.equal(found.ids, LAYERS[1:].flatten(0, 1))
    assert (found.layers, found.left_out) == (2, 80)
    zeros = LAYERS.clone()
    zeros[0] = 0
    numpy.save(tmp_path / "b.npy", zeros.numpy())
    assert read_recording(tmp_path / "b.npy").digest == found.digest


def test_the_digest_is_of_the_ids_and_not_of_the_path(tmp_path):
    (tmp_path / "sub").mkdir()
    first, second = saved(tmp_path, ".npy"), saved(tmp_path / "sub", ".npz")
    assert read_recording(first).digest == read_recording(second).digest
    assert read_recording(first, 0).digest != read_recording(first).digest
    one, two = (with_digest(Regime(distribution=f"replay:{path}")) for path in (first, second))
    assert one == two
    assert (one.digest, one.slug) == (two.digest, f"ep1-tp1-nodp-none-{one.distribution.replace(':', '')}")
    assert with_digest(one) is one
    found = known(one)
    assert found is not None
    assert found.name == "traffic.npz"


LAYER = MoELayer(num_experts=16, top_k=4, hidden_size=64, intermediate_size=32)


def test_a_recording_of_another_model_is_an_error(tmp_path):
    regime = with_digest(Regime(distribution=f"replay:{saved(tmp_path, '.npy')}"))
    assert recording_of(LAYER, regime).layers == 3
    with pytest.raises(UsageError, match="has 4 experts a token, and x has top-2"):
        recording_of(LAYER.model_copy(update={"top_k": 2, "name": "x"}), regime)
    with pytest.raises(UsageError, match=r"has the id 1[0-5]; the 8 experts of x are 0 … 7"):
        recording_of(LAYER.model_copy(update={"num_experts": 8, "name": "x"}), regime)


def test_a_recording_that_was_not_read_is_an_error_that_says_what_to_give():
    with pytest.raises(UsageError, match=r"recording of replay:0123456789abcdef is not at hand.*replay:PATH"):
        recording_of(LAYER, Regime(distribution="replay:0123456789abcdef"))


def of(folder, ids, **more):
    numpy.savez(folder / "a.npz", topk_ids=numpy.asarray(ids), **more)
    return folder / "a.npz"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 3], [4, -1, 5]], "negative id: 4, -1, 5. −1 stands for a whole row"),
        ([[1, 2, 3], [4, -2, 5]], "negative id: 4, -2, 5"),
        ([[1, 2, 3], [4, 5, 4]], "a row of layer 0 has one expert twice: 4, 5, 4"),
        ([[1, 2, 3], [4, 5, 70000]], "has the id 70000; there are at most 65,536 experts"),
        ([[1, 2, 3], [4, 5, 2**40]], "an id is out of the range of 32 bits"),
        ([[1.0, 2.0]], "the numbers of 'topk_ids' are floating-point numbers; ids are integers"),
        ([[float("nan"), 2.0]], "ids are integers"),
        ([1, 2, 3], "its ids have 1 dimensions; they are"),
        ([[[[1, 2]]]], "its ids have 4 dimensions; they are"),
        (numpy.zeros((0, 4), dtype=numpy.int64), "has no routed token"),
        (numpy.zeros((4, 0), dtype=numpy.int64), r"have the shape \[4, 0\]"),
        (numpy.full((5, 4), -1), "has no routed token"),
        (numpy.zeros((5, 4), dtype=numpy.int32), "has no routed token"),
        (numpy.array([["a", "b"]]), "its numbers are of the type '<U1'; integers are needed"),
        (numpy.array([[1, 2]], dtype=">i4"), "its numbers are of the type '>i4'"),
        (numpy.array([[1, 2]], dtype=complex), "its numbers are of the type '<c16'"),
        (numpy.array([[True, False]]), "its numbers are of the type"),
        (numpy.array([(1, 2)], dtype=[("a", "i4"), ("b", "i4")]), "its numbers are of the type"),
    ],
)
def test_ids_that_cannot_be_routed_are_an_error_that_says_why(ids, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        read_recording(of(tmp_path, ids))
    assert "a.npz" in caught.value.message
    assert "docs/workload.md" in caught.value.hint


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"topk_weights": numpy.ones((2, 4), numpy.float32)},
            r"its weights have the shape \[2, 4\], its ids \[3, 50, 4\]",
        ),
        ({"topk_weights": numpy.full((3, 50, 4), numpy.nan)}, "a weight is NaN or infinite"),
        ({"topk_weights": numpy.ones((3, 50, 4), int)}, "are integers; weights are floating-point"),
        ({"layers": numpy.arange(2)}, "has the numbers of 2 layers and the ids of 3"),
        ({"a": numpy.arange(2), "b": numpy.arange(2), "c": numpy.arange(2)}, "has more arrays than"),
    ],
)
def test_what_is_beside_the_ids_must_fit_them(more, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        read_recording(of(tmp_path, LAYERS.numpy(), **more))


def test_a_layer_that_is_not_there_is_an_error_that_lists_the_layers(tmp_path):
    with pytest.raises(UsageError, match="has no layer 3; its layers with routed tokens are 0, 1, 2"):
        read_recording(saved(tmp_path, ".npy"), 3)


def test_layers_of_different_widths_are_not_pooled(tmp_path):
    for number, top_k in enumerate((4, 2)):
        torch.save(tokens(5, top_k=top_k), tmp_path / f"topk_ids_layer{number}_idx0.pt")
    with pytest.raises(UsageError, match="different numbers of experts a token: 2, 4"):
        read_recording(tmp_path)
    assert read_recording(tmp_path, 1).ids.shape == (5, 2)


@pytest.mark.parametrize("name", ["none.npy", "none", "none.pt"])
def test_a_missing_file_is_an_error(name, tmp_path):
    with pytest.raises(UsageError, match=r"cannot be read: .*No such file"):
        read_recording(tmp_path / name)


def test_an_unknown_suffix_and_an_empty_folder_are_errors_that_list_what_is_read(tmp_path):
    with pytest.raises(UsageError, match=r"ends with '.txt'; known are .npz, .npy"):
        read_recording(written(tmp_path, "a.txt", "1 2"))
    with pytest.raises(UsageError, match="folder without files named topk_ids_layer"):
        read_recording(tmp_path)
