"""Where the tensors of a checkpoint lie, read without torch."""

import json

import pytest
import tiny

from smt_trainer import SMTError
from smt_trainer.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint


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
