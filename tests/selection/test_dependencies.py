"""Columns that depend on rows: finding them, and training them with the rows (`train_dependents`)."""

import logging

import images
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from reference import block_mask, recorded_inputs, with_row

from smt_trainer import BlockScores, BlockSelection, SMTConfig, SMTError, from_delta
from smt_trainer.model.targets import find_targets
from smt_trainer.selection.dependencies import find_dependencies

SMALL = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1}
GROUPED = {"num_key_value_heads": 2}


def rows_config(**fields) -> SMTConfig:
    defaults = {"granularity": "row", "block_size": "auto", "train_dependents": True, "target_modules": "all-linear"}
    return tiny.config(**defaults | fields)


def dependencies_of(model, **fields):
    config = rows_config(**fields)
    return find_dependencies(model, config, find_targets(model, config))


@pytest.mark.parametrize(
    ("architecture", "fields", "count"),
    [
        ("LlamaForCausalLM", GROUPED, 3),
        ("Qwen3ForCausalLM", GROUPED | {"head_dim": 4}, 3),
        ("Phi3ForCausalLM", GROUPED, 2),
        ("GPT2LMHeadModel", {"n_inner": 12}, 2),
        ("GPTNeoXForCausalLM", {}, 2),
        ("BertForSequenceClassification", {}, 2),
        ("DebertaForSequenceClassification", {}, 2),
        ("DebertaV2ForSequenceClassification", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, 2),
    ],
)
def test_dependent_columns_read_only_what_one_row_computes(architecture, fields, count):
    model = tiny.build(architecture, **SMALL | fields)
    inputs = {"input_ids": tiny.tokens(2)}
    before = recorded_inputs(model, inputs)
    found = dependencies_of(model)
    pairs = {(one.source, one.reader, *pair) for one in found for pair in one.pairs.tolist()}
    targets, twins = find_targets(model, rows_config()), set()
    for source in targets:
        linear = model.get_submodule(source)
        for row in range(linear.bias.shape[0] if linear.bias is not None else linear.weight.shape[0]):
            without = with_row(model, source, row, 0.0, inputs)
            dead = {name: (x == 0).all(0) & (before[name] != 0).any(0) for name, x in without.items()}
            twins |= {
                (source, reader, row, column)
                for reader in dead.keys() & targets.keys()
                for column in dead[reader].nonzero().flatten().tolist()
            }
            for reader in {one.reader for one in found if one.source == source and (one.pairs[:, 0] == row).any()}:
                changed = (with_row(model, source, row, 1.5, inputs)[reader] != before[reader]).any(0)
                assert torch.equal(changed, dead[reader])
    assert len(found) == count
    assert pairs == twins


def test_a_row_of_a_value_projection_has_a_column_for_each_query_head_of_its_group(llama):
    (found,) = [one for one in dependencies_of(llama) if one.source == "model.layers.1.self_attn.v_proj"]
    assert found.reader == "model.layers.1.self_attn.o_proj"
    # 2 key and value heads and 4 query heads, of 16 features each.
    pairs = [[16 * (head // 2) + place, 16 * head + place] for head in range(4) for place in range(16)]
    assert sorted(found.pairs.tolist()) == sorted(pairs)


def test_the_search_leaves_no_trace(llama):
    llama.train()
    llama.model.norm.eval()
    training = [module.training for module in llama.modules()]
    weights, outputs, state = tiny.weights(llama), llama(tiny.tokens(2)).logits, torch.get_rng_state()
    dependencies_of(llama)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in llama.modules()] == training
    assert torch.equal(llama(tiny.tokens(2)).logits, outputs)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize(("make", "score"), [(tiny.llama, "grad_l1"), (tiny.gpt2, "random")])
def test_rows_and_their_columns_are_trained_saved_loaded_and_merged(make, score, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "base")
    base = tiny.weights(model)
    trainer = tiny.smt_trainer(model, tmp_path / "run", rows_config(score=score, budget=40))
    trainer.train()
    selection = trainer.smt_selection

    rows = {name: indices for name, indices in selection.block_indices.items() if selection.grids[name].shape[1] == 1}
    assert sum(map(len, rows.values())) == 40
    wanted: dict[str, set[int]] = {}
    for one in dependencies_of(make()):
        chosen = set(rows.get(one.source, np.empty((0, 2), int))[:, 0].tolist())
        wanted.setdefault(one.reader, set()).update(column for row, column in one.pairs.tolist() if row in chosen)
    columns = {name: set(ind[:, 1].tolist()) for name, ind in selection.block_indices.items() if name not in rows}
    assert columns == {name: chosen for name, chosen in wanted.items() if chosen}
    assert columns

    trained = tiny.logits(model)
    trainer.save_model(tmp_path / "delta")
    trainer.merge_and_save(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    assert torch.equal(tiny.logits(merged), trained)
    assert torch.equal(tiny.logits(from_delta(tmp_path / "delta", base=str(tmp_path / "base"))), trained)
    for name, tensor in merged.state_dict().items():
        module = name.removesuffix(".weight")
        inside = torch.zeros_like(tensor, dtype=torch.bool)
        if module in selection.block_indices:
            inside = block_mask(selection.grids[module], selection.block_indices[module])
            assert not torch.equal(tensor[inside], base[name][inside])
        assert torch.equal(tensor[~inside], base[name][~inside])


def test_selection_and_scores_give_the_same_blocks_again(llama, tmp_path):
    selection = tiny.smt_trainer(llama, tmp_path, rows_config()).select()
    assert BlockSelection.load(tmp_path / "smt_selection.json").to_dict() == selection.to_dict()
    scores = BlockScores.load(tmp_path / "smt_scores.safetensors")
    assert scores.select().to_dict() == selection.to_dict()
    scores.check_model(llama, rows_config())

    given = tiny.smt_trainer(llama, tmp_path / "again", rows_config(selection=tmp_path / "smt_scores.safetensors"))
    given.train()
    assert given.smt_selection.to_dict()["modules"] == selection.to_dict()["modules"]
    without_output = scores.select(rows_config(exclude_modules=["o_proj"]))
    assert {name.rpartition(".")[2] for name in without_output.grids} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    }
    with pytest.raises(SMTError, match="train_dependents=True, which train_dependents=False does not fit"):
        scores.select(rows_config(train_dependents=False))


@pytest.mark.parametrize(
    ("target_modules", "level"), [("mlp", "INFO"), (["up_proj", "down_proj"], "WARNING"), (["up_proj"], None)]
)
def test_a_target_that_gives_columns_gives_no_rows_and_the_log_says_so(target_modules, level, llama, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="smt_trainer")
    selection = tiny.smt_trainer(llama, tmp_path, rows_config(target_modules=target_modules)).select()
    down = selection.grids["model.layers.0.mlp.down_proj"]
    assert down.block_shape == (64, 1)
    said = {record.levelname for record in caplog.records if record.getMessage().startswith("down_proj: only columns")}
    assert said == ({level} if level else set())


def test_no_dependent_columns_are_refused(llama):
    with pytest.raises(SMTError, match="no column depends on the rows"):
        dependencies_of(llama, target_modules=["q_proj", "k_proj", "o_proj", "down_proj"])
    llama.main_input_name = "input_features"
    with pytest.raises(SMTError, match="LlamaForCausalLM takes input_features"):
        dependencies_of(llama)
    with pytest.raises(SMTError, match="needs granularity='row', got 'block'"):
        SMTConfig(train_dependents=True)


def test_a_channel_of_a_convolution_goes_with_what_reads_it_through_batch_normalisation():
    model = images.ResNeXt()
    config = images.config(train_dependents=True, exclude_modules=["stem", "conv3"])
    found = find_dependencies(model, config, find_targets(model, config))
    pairs = {(one.source, one.reader): one.pairs.tolist() for one in found}
    each = [[channel, channel] for channel in range(8)]
    assert pairs == {(f"blocks.{block}.conv1", f"blocks.{block}.conv2"): each for block in range(2)}
    # In groups, only the rows of a channel's own group read it.
    assert [one.grid.block_shape for one in found] == [(4, 9), (1, 9)]


def test_the_columns_of_a_chosen_channel_are_all_that_removing_it_frees():
    model = images.ResNeXt().double()
    config = images.config(train_dependents=True, score="random", budget=8, exclude_modules=["stem"])
    dependencies = find_dependencies(model, config, find_targets(model, config))
    selection = BlockScores.of(model, config, []).select()
    assert dependencies
    chosen = dict(selection.block_indices)
    for one in dependencies:
        rows = chosen[one.source][:, 0].tolist() if one.source in chosen else []
        reader = model.get_submodule(one.reader)
        x = torch.randn(2, reader.in_channels, 6, 6, dtype=torch.float64)
        only, y = torch.zeros_like(x), reader(x)
        channels = [column for row, column in one.pairs.tolist() if row in rows]
        only[:, channels] = x[:, channels]
        weight = reader.weight.detach().clone()
        if one.reader in chosen:
            indices = torch.from_numpy(chosen[one.reader])
            one.grid.scatter_(reader.weight.data, indices, torch.zeros(len(indices), *one.grid.block_shape))
        torch.testing.assert_close(y - reader(x), F.conv2d(only, weight, padding=reader.padding, groups=reader.groups))


def test_a_resnet_is_searched_without_a_trace():
    model = images.resnet().train()
    before, config = tiny.weights(model), images.config(train_dependents=True)
    found = find_dependencies(model, config, find_targets(model, config))
    stages = {(one.source.partition("stages.")[2], one.reader.partition("stages.")[2]) for one in found}
    assert ("1.layers.1.layer.0.convolution", "1.layers.1.layer.1.convolution") in stages
    assert ("", "0.layers.0.shortcut.convolution") in stages
    # The residual stream adds the outputs of others.
    assert not any(source.endswith("layer.2.convolution") for source, _ in stages)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all("forward" not in vars(module) and module.training for module in model.modules())
