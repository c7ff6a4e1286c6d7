"""Tensors of safetensors files as numpy arrays, beside what safetensors makes of the same files."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smt_trainer import SMTError
from smt_trainer.arrays import DTYPES, as_array, as_tensor, bits
from smt_trainer.tensor_file import load_arrays, map_bits, open_array, save_arrays
from smt_trainer.tensor_header import read_header

TENSORS = {name: torch.randint(0, 2, (3, 5)).to(getattr(torch, name)) for name in DTYPES}
TENSORS |= {"nothing": torch.empty(0, 4), "scalar": torch.tensor(2.5)}


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and as_array(ours).tobytes() == as_array(
        theirs
    ).tobytes()


def test_a_file_of_safetensors_is_read_with_all_dtypes(tmp_path):
    save_file(TENSORS, tmp_path / "file", metadata={"format": "pt"})
    arrays, metadata = load_arrays(tmp_path / "file", "file")
    assert metadata == {"format": "pt"} and arrays.keys() == TENSORS.keys()
    assert all(same(as_tensor(arrays[name]), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_a_written_file_is_the_one_that_safetensors_writes(metadata, tmp_path):
    save_file(TENSORS, tmp_path / "theirs", metadata=metadata or None)
    arrays = {name: as_array(tensor) for name, tensor in TENSORS.items()}
    arrays["bfloat16"] = np.asfortranarray(arrays["bfloat16"])
    save_arrays(arrays, tmp_path / "ours", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    with safe_open(tmp_path / "ours", "pt") as file:
        assert (file.metadata() or {}) == metadata


def test_writing_to_a_loaded_array_changes_no_file(tmp_path):
    save_file(TENSORS, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    load_arrays(tmp_path / "file", "file")[0]["float32"][:] = 7
    assert (tmp_path / "file").read_bytes() == before


@pytest.mark.parametrize("name", TENSORS)
def test_writing_to_an_open_array_changes_its_bytes_of_the_file_alone(name, tmp_path):
    save_file(TENSORS, tmp_path / "file")
    before, stored = (tmp_path / "file").read_bytes(), read_header(tmp_path / "file", "file")[0][name]
    array = open_array(tmp_path / "file", stored)
    assert same(as_tensor(array.copy()), TENSORS[name])
    array[...] = as_array(torch.ones(stored.shape).to(TENSORS[name].dtype))
    after = (tmp_path / "file").read_bytes()
    expected = TENSORS | {name: torch.ones(stored.shape).to(TENSORS[name].dtype)}
    assert all(same(tensor, expected[key]) for key, tensor in load_file(tmp_path / "file").items())
    assert after[: stored.start] == before[: stored.start]
    assert after[stored.start + stored.size :] == before[stored.start + stored.size :]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}, "has a tensor of F4; expected one of float32"),
        ({"dtype": "BF16", "shape": [3], "data_offsets": [0, 8]}, r"8 bytes cannot hold a BF16 tensor of shape \[3\]"),
    ],
)
def test_a_tensor_of_an_unknown_dtype_or_another_size_is_refused(entry, message, tmp_path):
    header = json.dumps({"weight": entry}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(SMTError, match=message):
        load_arrays(tmp_path / "file", "file")


@pytest.mark.parametrize("metadata", [[], 7, {"format": 1}, {"format": None}])
def test_metadata_that_are_no_texts_are_refused(metadata, tmp_path):
    header = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SMTError, match="its metadata are not strings"):
        load_arrays(tmp_path / "file", "file")


@pytest.mark.parametrize("name", [*DTYPES, "nothing", "scalar"])
def test_the_bits_of_a_tensor_are_those_of_its_values(name, tmp_path):
    save_file(TENSORS, tmp_path / "file")
    found = map_bits(tmp_path / "file", read_header(tmp_path / "file", "file")[0][name])
    values = as_array(TENSORS[name])
    assert found.size == values.size and found.tobytes() == values.tobytes() == bits(values).tobytes()
    assert bits(values).shape == values.shape


def test_a_tensor_of_an_unknown_dtype_has_bits(tmp_path):
    header = json.dumps({"weight": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(8)))
    found = map_bits(tmp_path / "file", read_header(tmp_path / "file", "file")[0]["weight"])
    assert found.tolist() == list(range(8))


@pytest.mark.parametrize("name", TENSORS)
def test_an_array_opened_to_read_cannot_be_written(name, tmp_path):
    save_file(TENSORS, tmp_path / "file")
    (tmp_path / "file").chmod(0o444)
    stored = read_header(tmp_path / "file", "file")[0][name]
    array = open_array(tmp_path / "file", stored, writable=False)
    assert same(as_tensor(array.copy()), TENSORS[name])
    assert not array.size or not array.flags.writeable
