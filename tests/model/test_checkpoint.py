"""Where the tensors of a checkpoint lie, read without torch."""

import itertools
import json

import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from smt_trainer import SMTError
from smt_trainer.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint, read_header


def test_the_bytes_at_each_place_are_those_of_the_tensor(base):
    data = (base / SINGLE_FILE).read_bytes()
    tensors = load_file(base / SINGLE_FILE)
    places = read_header(base / SINGLE_FILE)
    assert places.keys() == tensors.keys()
    for key, place in places.items():
        assert (place.file, place.shape) == (SINGLE_FILE, tuple(tensors[key].shape))
        assert data[place.start : place.start + place.size] == tensors[key].numpy().tobytes()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_header_is_refused_or_describes_the_same_file(data, base):
    path, original = base / SINGLE_FILE, (base / SINGLE_FILE).read_bytes()
    length = 8 + int.from_bytes(original[:8], "little")
    changed = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    try:
        places = read_header(path)
    except SMTError:
        places = {}
    finally:
        path.write_bytes(original)
    ends = sorted((place.start, place.start + place.size) for place in places.values())
    assert all(8 <= start <= end <= len(original) for start, end in ends)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))


@pytest.mark.parametrize(
    "index",
    [[], {}, 7, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": SINGLE_FILE}}, {"weight_map": None}],
)
def test_an_odd_index_is_refused(index, base):
    (base / SINGLE_FILE).rename(base / "part.safetensors")
    (base / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(SMTError):
        Checkpoint.open(base)


def test_a_tensor_that_is_stored_in_two_shards_or_misplaced_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert Checkpoint.open(tmp_path).files == shards
    key = next(iter(index["weight_map"]))
    other = next(shard for shard in shards if shard != index["weight_map"][key])
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": index["weight_map"] | {key: other}}))
    with pytest.raises(SMTError, match=rf"places `{key}` in {other}, which lacks it"):
        Checkpoint.open(tmp_path)
    (tmp_path / shards[0]).write_bytes((tmp_path / shards[1]).read_bytes())
    with pytest.raises(SMTError, match="twice, in"):
        Checkpoint.open(tmp_path)
