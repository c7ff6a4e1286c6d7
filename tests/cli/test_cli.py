"""The console script `smt`."""

import csv
import functools
import json
import re
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import tiny
import torch
import torch.nn.functional as F
from reference import block_scores
from texts import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from smt_trainer import BlockScores, BlockSelection, SMTError, __version__
from smt_trainer.cli import examples, main
from smt_trainer.cli.examples import load_records, make_examples, pad


def test_merge_writes_the_merged_checkpoint(base, delta, tmp_path, capsys):
    folder, trained = delta
    assert main(["merge", str(base), str(folder), str(tmp_path / "merged")]) == 0
    assert f"merged checkpoint in {tmp_path / 'merged'}" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(tiny.logits(merged), tiny.logits(trained))


def test_inspect_says_what_a_delta_holds(delta, capsys):
    folder, trained = delta
    assert main(["inspect", str(folder)]) == 0
    output = capsys.readouterr().out
    selection = trained.smt_state.selection
    assert "score=random, scope=global, budget=12" in output
    assert selection.summary() in output
    table = {line.split()[0]: line.split()[1:] for line in output.partition("\nlayers")[2].splitlines()[1:]}
    assert table["all"] == [*by_layer(selection, ""), "12", "64", "18.750%"]
    for leaf, chosen in selection.blocks_by_projection().items():
        blocks = sum(grid.num_blocks for name, grid in selection.grids.items() if name.endswith(leaf))
        assert table[leaf] == [*by_layer(selection, leaf), str(chosen), str(blocks), f"{chosen / blocks:.3%}"]


def by_layer(selection, leaf):
    """Return the number of chosen blocks of a projection in each of the two layers, as text."""
    chosen = {name: len(found) for name, found in selection.block_indices.items() if name.endswith(leaf)}
    return [str(sum(count for name, count in chosen.items() if f"layers.{layer}." in name)) for layer in range(2)]


def test_inspect_says_what_a_scores_file_and_a_selection_hold_and_draws_them(scores, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    selection = BlockScores.load(scores).select()
    selection.save(tmp_path / "selection.json")
    outputs = []
    for path, stems in ((scores, ["layers", "scores", "selection", "shares"]), (tmp_path / "selection.json", None)):
        folder = tmp_path / path.stem
        assert main(["inspect", str(path), "--plot", str(folder)]) == 0
        outputs.append(capsys.readouterr().out.partition("\n\n")[0])
        stems = stems or ["layers", "selection", "shares"]
        assert sorted(path.name for path in folder.iterdir()) == [f"{s}.{end}" for s in stems for end in ("csv", "png")]
        rows = list(csv.DictReader((folder / "layers.csv").read_text().splitlines()))
        assert sum(int(row["trained"]) for row in rows) == 12 and sum(int(row["blocks"]) for row in rows) == 64
    assert "scores       of 64 blocks" in outputs[0]
    assert outputs[1].splitlines() == [line for line in outputs[0].splitlines() if not line.startswith("scores")]


def test_inspect_of_two_artefacts_says_what_they_share(scores, delta, tmp_path, capsys):
    BlockScores.load(scores).select().save(tmp_path / "selection.json")
    for other, last in ((scores, ["12", "12", "12", "1.000", "1.000"]), (tmp_path / "selection.json", None)):
        assert main(["inspect", str(scores), str(other)]) == 0
        table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
        assert list(table) == ["projection", "q_proj", "k_proj", "v_proj", "all"]
        assert table["all"] == (last or ["12", "12", "12", "1.000"])
    # The delta's blocks were drawn with the same seed.
    assert main(["inspect", str(delta[0]), str(tmp_path / "selection.json")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["all", "12", "12", "12", "1.000"]


# ---- select ----

RECORDS = [{"prompt": f"what is {number}?", "completion": f"it is {number + 1}"} for number in range(12)]


@pytest.fixture
def checkpoint(tmp_path):
    """Write a tiny Llama and a tokenizer of bytes to disk; return their folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(("<pad>", "<bos>", "<eos>", *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    tiny.llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def chosen(path):
    return {name: found.tolist() for name, found in BlockSelection.load(path).block_indices.items()}


@pytest.mark.parametrize("checkpointing", [[], ["--checkpointing"]])
def test_select_chooses_by_the_gradients_of_the_completions(checkpointing, checkpoint, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    options = "--block-size 16 --budget q_proj=4,v_proj=3 --target-modules q_proj v_proj --smt-warmup-steps 1".split()
    command = ["select", str(checkpoint), "--data", str(tmp_path / "data.jsonl"), "--output", str(tmp_path / "out")]
    assert main([*command, *options, "--batch", "4", "--accumulation", "3", *checkpointing]) == 0
    assert "7 blocks of 16x16" in capsys.readouterr().out
    scores = BlockScores.load(tmp_path / "out" / "smt_scores.safetensors")
    assert chosen(tmp_path / "out" / "smt_selection.json") == {
        name: found.tolist() for name, found in scores.select().block_indices.items()
    }

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    loss = 0
    for record in RECORDS:
        prompt, completion = (list(map(token_of, record[key].encode())) for key in ("prompt", "completion"))
        ids = torch.tensor([prompt + completion + [2]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        loss += F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum")
    loss /= sum(len(record["completion"]) + 1 for record in RECORDS)
    loss.backward()
    expected = {
        name: block_scores(model.get_submodule(name).weight.grad, grid, lambda part: part.abs().mean())
        for name, grid in scores.grids.items()
    }
    # Early 5.x versions of transformers divide the gradients of accumulated batches once too often.
    ours, twins = (torch.cat([part[name].flatten() for name in scores.grids]) for part in (scores.scores, expected))
    torch.testing.assert_close(ours / ours.sum(), twins / twins.sum(), rtol=1e-3, atol=1e-6)


def test_select_prints_nothing_but_its_result_for_machines(checkpoint, tmp_path, capsys):
    (tmp_path / "data").write_text(json.dumps(RECORDS))
    command = ["select", str(checkpoint), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert main([*command, *"--block-size 16 --budget 7 --smt-warmup-steps 1 --accumulation 1 --json".split()]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["output"], found["selection"]["blocks"]) == (str(tmp_path / "out"), 7)


def test_select_without_enough_memory_on_a_device_says_what_to_do(checkpoint, tmp_path, monkeypatch, capsys):
    def exhaust(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")

    (tmp_path / "data").write_text(json.dumps(RECORDS))
    monkeypatch.setattr("smt_trainer.training.trainer.SMTTrainer.select", exhaust)
    command = ["select", str(checkpoint), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("smt: CUDA out of memory. Tried to allocate 2.00 GiB. Give a smaller --batch or --seq")


def padded_on_the_right(features, takes):
    """Collate as is usual in training: the loss reads the logits of all positions."""
    mask = [torch.ones_like(feature["labels"]) for feature in features]
    columns = {"attention_mask": (mask, 0)}
    columns |= {
        key: ([feature[key] for feature in features], value) for key, value in (("input_ids", 0), ("labels", -100))
    }
    return {key: torch.nn.utils.rnn.pad_sequence(rows, True, value) for key, (rows, value) in columns.items()}


UNEVEN = [{"prompt": "why " * (n % 5), "completion": "so " * (1 + n % 3)} for n in range(12)]


@pytest.mark.parametrize("score", ["grad_l1", "taylor"])
def test_only_the_logits_of_the_completions_are_computed_and_the_scores_stay(score, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "data").write_text(json.dumps(UNEVEN))
    found = {}
    for collate in (pad, padded_on_the_right):
        positions = []
        with monkeypatch.context() as context:
            context.setattr(examples, "pad", collate)
            context.setattr(LlamaForCausalLM, "forward", noting_positions(positions))
            command = ["select", str(checkpoint), "--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
            options = f"--score {score} --block-size 16 --budget 8 --smt-warmup-steps 1 --batch 4 --accumulation 3"
            assert main([*command, *options.split()]) == 0
        found[collate] = BlockScores.load(tmp_path / "out" / "smt_scores.safetensors").scores, positions
    (scores, positions), (expected, all_positions) = found.values()
    assert max(positions) == 1 + len("so so so ") + 1 < max(all_positions)
    for name in expected:
        torch.testing.assert_close(scores[name], expected[name], rtol=1e-4, atol=1e-8)


def noting_positions(positions):
    """Return the forward of a Llama that also notes how many positions it computes logits of."""
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def noting(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        positions.append(output.logits.shape[1])
        return output

    return noting


@pytest.mark.parametrize("takes", [(), ("position_ids", "logits_to_keep")])
def test_a_model_gets_only_what_its_forward_takes_and_a_text_is_read_whole(takes):
    features = [
        {"input_ids": torch.arange(1, 5), "labels": torch.tensor([-100, -100, -100, 4])},
        {"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([-100, 6])},
    ]
    batch = pad(features, takes)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [0, 0, 5, 6]]
    assert set(batch) == {"input_ids", "labels", "attention_mask", *takes}
    if takes:
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
        assert (batch["labels"].tolist(), batch["logits_to_keep"]) == ([[-100, 4], [-100, 6]], 2)
        features[0]["labels"] = torch.tensor([-100, 2, 3, 4])
        assert pad(features, takes)["logits_to_keep"] == 4


def token_of(byte):
    """Return the id of an ASCII byte in the tokenizer of `checkpoint`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return 3 + alphabet.index("\u0120" if byte == 32 else chr(byte))


def test_inspect_takes_the_folder_that_select_writes(scores, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(["select", "--scores", str(scores), "--output", str(folder)]) == 0
    assert main(["inspect", str(folder)]) == 0
    assert BlockSelection.load(folder / "smt_selection.json").summary() in capsys.readouterr().out


def test_select_chooses_again_from_scores_alone(scores, tmp_path):
    command = ["select", "--scores", str(scores), "--output", str(tmp_path / "out")]
    assert main([*command, "--budget", "3", "--target-modules", "v_proj$", "q_proj", "--layer-cap", "2"]) == 2
    assert main([*command, "--budget", "3", "--target-modules", "v_proj", "q_proj", "--layer-cap", "2"]) == 0
    own = BlockScores.load(scores)
    config = replace(own.config, budget=3, target_modules=["v_proj", "q_proj"], layer_cap=2)
    assert BlockSelection.load(tmp_path / "out" / "smt_selection.json").to_dict() == own.select(config).to_dict()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["smt_selection.json"]


@pytest.mark.parametrize("form", ["list", "lines"])
def test_a_text_is_learnt_with_its_end_token_and_a_long_one_is_cut(form, checkpoint, tmp_path):
    # In JSON lines, only a line feed ends a line.
    records = [{"text": "a b"}, {"text": "\u2028", "id": 7}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / "data").write_text("\n".join(lines) if form == "lines" else f"[{','.join(lines)}]")
    assert load_records(tmp_path / "data") == records
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    a, space, b = map(token_of, b"a b")
    for length, expected in ((5, [a, space, b, 2]), (2, [a, space])):
        first, _ = make_examples(records, tokenizer, length)
        assert first["input_ids"].tolist() == expected
        assert first["labels"].tolist() == [-100, *expected[1:]]
    batch = pad([*make_examples(records[:1], tokenizer, 5), *make_examples(records[:1], tokenizer, 2)], takes=())
    assert batch["input_ids"][1].tolist() == [0, 0, a, space]
    assert batch["labels"][1].tolist() == [-100, -100, -100, space]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


CHAT = """{% for message in messages %}<bos>{{ message.role }}: {{ message.content }}<eos>{% endfor %}
{%- if add_generation_prompt %}<bos>assistant: {% endif %}"""
TALK = [{"role": role, "content": text} for role, text in (("user", "a?"), ("assistant", "b"), ("user", "c?"))]
ANSWER = {"role": "assistant", "content": "d"}


def test_of_messages_the_last_one_is_learnt_as_the_chat_template_writes_it():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    (example,) = make_examples([{"messages": [*TALK, ANSWER]}], tokenizer, 512)
    written = tokenizer.apply_chat_template([*TALK, ANSWER], tokenize=False)
    assert example["input_ids"].tolist() == tokenizer(written, add_special_tokens=False)["input_ids"]
    learnt = example["labels"][example["labels"] != -100]
    assert tokenizer.decode(learnt) == "d<eos>"
    assert example["labels"][-len(learnt) :].tolist() == learnt.tolist()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer's chat template cannot write the messages: .*chat_template"),
        ("{{ raise_exception('no such role') }}", "cannot write the messages: no such role Give one"),
        ("{{ messages | length }}", "writes the first messages differently without and with an answer"),
    ],
)
def test_messages_that_a_template_cannot_write_are_refused(template, message):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(SMTError, match=message):
        make_examples([{"messages": [*TALK, ANSWER]}], tokenizer, 512)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, {"prompt": "b"}]', "record 2 of data should have a text, or a prompt and a completion"),
        ('{"text": "a"}\n{"text": 3}', "record 2 of data should have"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "record 1 of data .* or two or more messages"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}', "record 1 of data should have"),
        ('{"text": "a"}\n7', "record 2 of data should have .* got int"),
        ('{"text": "a"}\n{"text', "line 2 of data is not JSON"),
        ("", "data holds no records"),
        (json.dumps({"prompt": "long " * 200, "completion": "a"}), "no record has anything to learn within 512 tokens"),
    ],
)
def test_data_that_cannot_be_learnt_from_are_refused(text, message, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").write_text(text)
    assert main(["select", "checkpoint", "--data", "data", "--output", "out"]) == 2
    assert re.match(f"smt: {message}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "smt: no delta at nowhere: there is no such folder. Check the path."),
        (["merge", "base", "nowhere", "out"], "smt: no delta at nowhere"),
        (["inspect", "nowhere.json"], "smt: no selection at nowhere.json"),
        (["inspect", "nowhere.safetensors"], "smt: no scores file at"),
        (["select", "--output", "out"], "smt: give a model and --data to choose"),
        (
            ["select", "--scores", "file", "--output", "out", "--smt-warmup-steps", "9", "--class-column", "kind"],
            "smt: --class-column, --smt-warmup-steps would change the warm-up",
        ),
        (
            ["select", "--scores", "file", "--output", "out", "--seed", "9", "--batch", "2", "--dtype", "float32"],
            "smt: --batch, --dtype, --seed would change the warm-up",
        ),
        (["select", "model", "--scores", "file", "--output", "out"], "smt: give a model and --data, or --scores alone"),
        (["select", "model", "--data", "nowhere", "--output", "out"], "smt: no data at nowhere"),
        (["select", "--scores", "a", "--output", "out", "--budget", "mlp=x"], "smt: budget must be a count of blocks"),
    ],
)
def test_bad_input_gives_one_line_on_standard_error_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message) and captured.err.count("\n") == 1 and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["unmerge"], ["merge", "base"]])
def test_a_command_line_that_cannot_be_parsed_is_refused_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: smt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "merge a delta into its base checkpoint"),
        (["select", "--help"], "choose from these scores, without model and data"),
        (["merge", "--help"], "base checkpoint: a folder, or a name on the hub"),
        (["--version"], f"smt_trainer {__version__}"),
    ],
)
def test_help_and_version(arguments, expected, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert expected in capsys.readouterr().out


def test_the_console_script_is_main():
    found = [script for script in entry_points(group="console_scripts") if script.name == "smt"]
    if not found:
        pytest.skip("the package is not installed")
    assert found[0].load() is main
