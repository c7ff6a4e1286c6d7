"""Safetensors files, read and written without torch."""

import itertools

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from smt_trainer import SMTError
from smt_trainer.model.checkpoint import SINGLE_FILE
from smt_trainer.tensor_header import read_header


def test_the_bytes_at_each_place_are_those_of_the_tensor(base):
    data = (base / SINGLE_FILE).read_bytes()
    tensors = load_file(base / SINGLE_FILE)
    found = read_header(base / SINGLE_FILE, "base")[0]
    assert found.keys() == tensors.keys()
    for key, stored in found.items():
        assert (stored.file, stored.shape) == (SINGLE_FILE, tuple(tensors[key].shape))
        assert data[stored.start : stored.start + stored.size] == tensors[key].numpy().tobytes()


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
        found, _ = read_header(path, "base")
    except SMTError:
        found = {}
    finally:
        path.write_bytes(original)
    ends = sorted((stored.start, stored.start + stored.size) for stored in found.values())
    assert all(8 <= start <= end <= len(original) for start, end in ends)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
