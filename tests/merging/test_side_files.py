"""The files that a merged checkpoint gets beside its weights."""

import json

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, merge_and_unload, merge_checkpoint, verify_merge
from smt_trainer.model.base import base_config
from smt_trainer.model.checkpoint import SINGLE_FILE


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_folders_of_the_base_are_copied_without_weights_and_hidden_files(base, delta, tmp_path):
    write(base, {name: name for name in ("additional_chat_templates/tool.jinja", "a/b/c.txt", "README.md", "own.py")})
    write(
        base,
        {name: name for name in (".git/config", "a/.hidden", "original/model.pth", "checkpoint-5/a", "smt_x.json")},
    )
    (base / "a" / "loop").symlink_to("..")
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    found = {name for name in tiny.all_files(tmp_path / "merged") if not name.startswith("a/loop")}
    assert found == {
        *("config.json", "generation_config.json", SINGLE_FILE, "README.md", "own.py", "a/b/c.txt"),
        "additional_chat_templates/tool.jinja",
    }


def test_modules_behind_the_model_keep_their_weights(base, delta, tmp_path):
    modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "2_Dense"}, {"idx": 2, "path": "../elsewhere"}]
    write(base, {"modules.json": modules, "2_Dense/config.json": {}, "2_Dense/model.safetensors": "weights"})
    write(base, {"other/model.safetensors": "weights"})
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    found = tiny.all_files(tmp_path / "merged")
    assert {"2_Dense/config.json", "2_Dense/model.safetensors"} <= found.keys()
    assert "other/model.safetensors" not in found
    assert not verify_merge(base, delta[0], tmp_path / "merged").problems
    (tmp_path / "merged/2_Dense/model.safetensors").unlink()
    assert verify_merge(base, delta[0], tmp_path / "merged").problems


def test_a_configuration_may_hold_an_infinity(base, delta, tmp_path):
    config = json.loads((base / "config.json").read_text()) | {"time_step_limit": [0.0, float("inf")]}
    write(base, {"config.json": config})
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["time_step_limit"] == [0.0, float("inf")]
    assert base_config(AutoModelForCausalLM.from_pretrained(base))["time_step_limit"] == [0.0, float("inf")]


def test_tokenizer_template_and_generation_settings_are_those_of_training(base, delta, tmp_path):
    folder = delta[0]
    old = ("tokenizer_config.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/old.jinja")
    write(base, {name: {"of": "base"} for name in (*old, "vocab.json", "tokenizer.model", "generation_config.json")})
    new = (
        "tokenizer_config.json",
        "tokenizer.json",
        "vocab.json",
        "generation_config.json",
        "preprocessor_config.json",
    )
    write(folder, {name: {"of": "training"} for name in (*new, "additional_chat_templates/new.jinja")})
    left = ("README.md", "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    write(folder, {name: "left" for name in (*left, "modeling.py", "checkpoint-3/tokenizer.json", "runs/events")})
    merge_checkpoint(base, folder, tmp_path / "merged")
    found = tiny.all_files(tmp_path / "merged")
    for name in (*new, "additional_chat_templates/new.jinja"):
        assert json.loads(found.pop(name)) == {"of": "training"}
    assert json.loads(found.pop("tokenizer.model")) == {"of": "base"}
    assert found.keys() == {"config.json", SINGLE_FILE}


def test_the_configuration_is_that_of_training_but_for_what_describes_the_weights(base, delta, tmp_path):
    of_base = json.loads((base / "config.json").read_text()) | {"part": {"dtype": "float32", "kept": 1}}
    write(base, {"config.json": of_base})
    changed = {
        **{"pad_token_id": 7, "id2label": {"0": "good"}, "dtype": "bfloat16", "vocab_size": 3, "auto_map": {"A": "b"}},
        **{"part": {"dtype": "bfloat16", "kept": 2}, "transformers_weights": "This is a delta: call from_delta."},
    }
    write(delta[0], {"config.json": of_base | changed})
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    expected = of_base | {"pad_token_id": 7, "id2label": {"0": "good"}, "part": {"dtype": "float32", "kept": 2}}
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == expected
    assert torch.equal(
        tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), tiny.logits(merge_and_unload(delta[1]))
    )


@pytest.mark.parametrize("known", [None, {"AutoTokenizer": ["own.Tokenizer", None]}])
def test_the_delta_does_not_decide_whose_code_runs(known, base, delta, tmp_path):
    write(base, {"tokenizer_config.json": {} if known is None else {"auto_map": known}})
    write(
        delta[0],
        {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["author/code--own.Tokenizer", None]}, "a": 1}},
    )
    merge_checkpoint(base, delta[0], tmp_path / "merged")
    found = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert found == {"a": 1} | ({} if known is None else {"auto_map": known})


def test_a_delta_folder_is_no_base(base, delta, tmp_path):
    config = json.loads((base / "config.json").read_text())
    write(delta[0], {"config.json": config | {"transformers_weights": "This is a delta: call from_delta."}})
    with pytest.raises(SMTError, match=r"names 'This is a delta: call from_delta\.' as a file of weights"):
        merge_checkpoint(delta[0], delta[0], tmp_path / "merged")
