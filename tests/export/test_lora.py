"""A delta as a LoRA adapter, loaded by PEFT, beside the merged model."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import quantised
import tiny
import torch
from architectures import ARCHITECTURES, inputs_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from smt_trainer import Delta, SMTError, convert_to_smt, export_lora, merge_and_unload, merge_checkpoint, save_delta
from smt_trainer.export.lora import ADAPTER_FILE, factors
from smt_trainer.model.grid import BlockGrid
from smt_trainer.model.quantised import dequantised, is_quantised, keep_differentiable
from smt_trainer.sparse.block_module import block_modules

peft = pytest.importorskip("peft")


def changed(model, folder, selection=None, **fields):
    """Change the chosen blocks and whatever is trained whole at random, write the delta, and return the model."""
    convert_to_smt(model, selection or tiny.choose(model, tiny.config(**{"score": "random"} | fields)))
    tiny.disturb(model)
    save_delta(model, folder)
    return model


@pytest.fixture
def folders(tmp_path):
    """Return the paths of a base, a delta and an adapter."""
    return tmp_path / "base", tmp_path / "delta", tmp_path / "adapter"


def config_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


def logits(model, inputs):
    return model.eval()(**inputs).logits.detach()


CASES = {
    "llama": ("LlamaForCausalLM", "LlamaForCausalLM", {}, "CAUSAL_LM"),
    "llama in rows": (
        "LlamaForCausalLM",
        "LlamaForCausalLM",
        {"granularity": "row", "block_size": "auto"},
        "CAUSAL_LM",
    ),
    "llama in columns": (
        *("LlamaForCausalLM", "LlamaForCausalLM"),
        *({"granularity": "column", "block_size": "auto"}, "CAUSAL_LM"),
    ),
    "norms": ("LlamaForCausalLM", "LlamaForCausalLM", {"train_norm": True}, "CAUSAL_LM"),
    "untied head": ("LlamaForCausalLM", "LlamaForCausalLM", {"modules_to_save": ["lm_head"]}, "CAUSAL_LM"),
    "transposed": ("GPT2LMHeadModel", "GPT2LMHeadModel", {"block_size": (32, 16)}, "CAUSAL_LM"),
    "t5": ("T5ForConditionalGeneration", "T5ForConditionalGeneration", {}, "SEQ_2_SEQ_LM"),
    "classifier": ("BertForSequenceClassification", "BertForSequenceClassification", {}, "SEQ_CLS"),
    "new head": ("BertModel", "BertForSequenceClassification", {}, "SEQ_CLS"),
    "new head in layers": ("RobertaModel", "RobertaForSequenceClassification", {}, "SEQ_CLS"),
    "new head in two": ("DistilBertModel", "DistilBertForSequenceClassification", {}, "SEQ_CLS"),
    "new head for tokens": ("LlamaModel", "LlamaForTokenClassification", {}, "TOKEN_CLS"),
    "no head": ("BertForSequenceClassification", "BertForSequenceClassification", {"modules_to_save": []}, None),
}


@pytest.mark.parametrize(("stored", "trained", "fields", "task"), CASES.values(), ids=CASES)
def test_the_base_with_the_adapter_computes_what_the_merged_model_does(stored, trained, fields, task, folders):
    base, delta, adapter = folders
    tiny.build(stored, **ARCHITECTURES.get(trained, ({},))[0]).save_pretrained(base)
    kind = type(tiny.build(trained, **ARCHITECTURES.get(trained, ({},))[0]))
    labels = {"num_labels": 3} if "Classification" in trained else {}
    model = kind.from_pretrained(base, **labels)
    inputs = inputs_of(model) if "Token" not in trained else {"input_ids": tiny.tokens(4)}
    untrained = logits(model, inputs)
    merged = merge_and_unload(changed(model, delta, **fields))
    export_lora(base, delta, adapter)

    expected = logits(merged, inputs)
    assert (expected - untrained).abs().max() > 1e-3
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(base, **labels), adapter)
    torch.testing.assert_close(logits(adapted, inputs), expected, rtol=0, atol=1e-5)
    config = config_of(adapter)
    assert (config["task_type"], config["fan_in_fan_out"]) == (task, trained.startswith("GPT2"))
    with_adapter = logits(adapted.merge_and_unload(), inputs)
    torch.testing.assert_close(with_adapter, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_the_adapter_gives_the_merged_weights_bit_for_bit(dtype, folders):
    base, delta, adapter = folders
    model = tiny.llama().to(dtype)
    model.save_pretrained(base)
    merged = merge_and_unload(changed(model, delta, target_modules="all-linear", train_norm=True))
    export_lora(base, delta, adapter)
    plain = type(model).from_pretrained(base, dtype=dtype)
    tiny.assert_same(
        tiny.weights(peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload()), tiny.weights(merged)
    )


def test_merging_the_adapter_into_float32_gives_the_merged_weights_to_the_last_bit(folders):
    base, delta, adapter = folders
    model = tiny.llama()
    model.save_pretrained(base)
    merged = tiny.weights(merge_and_unload(changed(model, delta)))
    export_lora(base, delta, adapter)
    found = tiny.weights(peft.PeftModel.from_pretrained(type(model).from_pretrained(base), adapter).merge_and_unload())
    eps = torch.finfo(torch.float32).eps
    largest = max(weight.abs().max() for weight in merged.values())
    assert max((found[name] - weight).abs().max() for name, weight in merged.items()) <= eps * largest


def test_of_a_base_that_is_stored_in_another_dtype_the_change_is_that_of_training(folders, warnings):
    base, delta, adapter = folders
    tiny.llama().save_pretrained(base)
    trained = merge_and_unload(changed(tiny.llama().bfloat16(), delta))
    export_lora(base, delta, adapter)
    assert "The base is stored in float32 and was trained in bfloat16: load it in bfloat16" in warnings()[0]
    plain = type(trained).from_pretrained(base, dtype="bfloat16")
    tiny.assert_same(
        tiny.weights(peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload()), tiny.weights(trained)
    )


@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_ranks_are_those_of_the_touched_rows_or_columns(size, folders):
    base, delta, adapter = folders
    model = tiny.llama()
    model.save_pretrained(base, max_shard_size=size)
    selection = changed(model, delta, budget=9).smt_state.selection
    export_lora(base, delta, adapter)
    expected = {}
    for name, indices in selection.block_indices.items():
        rows, columns = (len(set(lines.tolist())) * 16 for lines in indices.T)
        expected[name] = min(rows, columns)
    assert len(set(expected.values())) > 1
    config, tensors = config_of(adapter), load_file(adapter / ADAPTER_FILE)
    assert config["r"] == config["lora_alpha"] == max(expected.values())
    assert set(config["target_modules"]) == expected.keys()
    adapted = peft.PeftModel.from_pretrained(type(model).from_pretrained(base), adapter)
    for name, rank in expected.items():
        linear = adapted.base_model.model.get_submodule(name)
        assert (linear.r["default"], linear.scaling["default"]) == (rank, 1.0)
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
        assert torch.equal(linear.lora_B["default"].weight, tensors[f"base_model.model.{name}.lora_B.weight"])
    assert len(tensors) == 2 * len(expected)


@given(st.data())
def test_the_product_of_the_factors_is_the_change(data):
    rows, columns, br, bc = (data.draw(st.integers(1, 4)) for _ in range(4))
    grid = BlockGrid(rows * br, columns * bc, br, bc)
    places = st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1))
    indices = torch.tensor(sorted(data.draw(st.sets(places, min_size=1))))
    blocks = torch.randn(len(indices), br, bc)
    b, a = (torch.from_numpy(part.copy()) for part in factors(grid, indices.numpy(), blocks.numpy()))
    expected = torch.zeros(grid.weight_shape)
    grid.scatter_(expected, indices, blocks)
    assert torch.equal(b @ a, expected)
    assert a.shape[0] == b.shape[1] == min(grid.touched(indices.numpy()))
    one_hot = b if a.shape[0] == grid.touched(indices.numpy())[0] else a.T
    assert torch.equal(one_hot.sum(0), torch.ones(a.shape[0])) and one_hot.max() == 1


def test_two_adapters_stand_side_by_side_on_one_base(tmp_path):
    base = tmp_path / "base"
    tiny.llama().save_pretrained(base)
    expected = {}
    for name, seed in (("first", 1), ("second", 2)):
        model = tiny.llama()
        selection = tiny.choose(model, seed=seed)
        expected[name] = tiny.logits(merge_and_unload(changed(model, tmp_path / f"delta {name}", selection)))
        export_lora(base, tmp_path / f"delta {name}", tmp_path / name)
    plain = type(model).from_pretrained(base)
    untrained = tiny.logits(plain)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "first", adapter_name="first")
    adapted.load_adapter(tmp_path / "second", adapter_name="second")
    for name in ("second", "first"):
        adapted.set_adapter(name)
        torch.testing.assert_close(tiny.logits(adapted), expected[name], rtol=0, atol=1e-5)
    with adapted.disable_adapter():
        assert torch.equal(tiny.logits(adapted), untrained)


def test_peft_finds_the_base_by_the_adapter_and_knows_every_field(base, delta, tmp_path):
    export_lora(base, delta[0], tmp_path / "adapter")
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(tiny.logits(adapted), tiny.logits(delta[1]), rtol=0, atol=1e-5)
    assert config_of(tmp_path / "adapter").keys() <= peft.LoraConfig().to_dict().keys()


def test_a_base_that_the_delta_knows_by_its_name_on_the_hub_is_named_so(base, tmp_path):
    model = type(tiny.llama()).from_pretrained(base)
    model.config._name_or_path, model.config._commit_hash = "someone/base", "c0ffee"
    selection = tiny.choose(model)
    object.__setattr__(selection, "base_model", "someone/base@c0ffee")
    changed(model, tmp_path / "delta", selection)
    export_lora(base, tmp_path / "delta", tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert (config["base_model_name_or_path"], config["revision"]) == ("someone/base", "c0ffee")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_log_names_ranks_sizes_and_the_rounding(dtype, base, delta, tmp_path, caplog):
    caplog.set_level(logging.INFO, "smt_trainer.export.lora")
    export_lora(base, delta[0], tmp_path / "adapter", dtype=dtype)
    tensors = load_file(tmp_path / "adapter" / ADAPTER_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    before, after = load_file(base / "model.safetensors"), delta[1].state_dict()
    largest = 0.0
    for name in Delta.load(delta[0]).block_arrays:
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        change = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        largest = max(largest, (b @ a - change).abs().max().item())
    assert largest < {"float32": 1e-7, "bfloat16": 4e-3, "float16": 5e-4}[dtype]
    said = f"{dtype} rounds the change of a weight by at most {largest:.2g}" if largest else "The change is exact"
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    message = caplog.messages[-1]
    assert said in message and f"ranks {min(ranks)} to {max(ranks)}" in message and "MiB" in message


def test_the_change_of_16_bit_weights_is_exact(folders, caplog):
    base, delta, adapter = folders
    model = tiny.llama().bfloat16()
    model.save_pretrained(base)
    changed(model, delta)
    caplog.set_level(logging.INFO, "smt_trainer.export.lora")
    export_lora(base, delta, adapter)
    assert "The change is exact." in caplog.messages[-1]


def test_a_change_too_large_for_the_dtype_is_refused(folders):
    base, delta, adapter = folders
    model = tiny.llama().bfloat16()
    model.save_pretrained(base)
    convert_to_smt(model, tiny.choose(model))
    with torch.no_grad():
        next(linear for _, linear in block_modules(model)).blocks.fill_(1e6)
    save_delta(model, delta)
    with pytest.raises(SMTError, match=r"too large for float16; use float32 or bfloat16"):
        export_lora(base, delta, adapter, dtype="float16")
    assert not adapter.exists()


def test_a_base_with_nan_under_a_block_is_refused(folders):
    base, delta, adapter = folders
    model = tiny.llama()
    name, indices = next(iter(tiny.choose(model).block_indices.items()))
    linear = model.get_submodule(name)
    with torch.no_grad():
        linear.weight[16 * indices[0][0], 16 * indices[0][1]] = torch.nan
    model.save_pretrained(base)
    convert_to_smt(model, tiny.choose(model))
    with torch.no_grad():
        linear.blocks.fill_(1)
    save_delta(model, delta)
    with pytest.raises(SMTError, match=rf"the base has NaN or infinity in `{name}`, under blocks"):
        export_lora(base, delta, adapter)
    assert not adapter.exists()


def test_a_rank_above_the_largest_is_refused_saying_what_to_do(base, delta, tmp_path):
    ranks = [min(grid.touched(delta[1].smt_state.selection.block_indices[name])) for name, grid in grids(delta).items()]
    export_lora(base, delta[0], tmp_path / "fits", max_rank=max(ranks))
    over = sum(rank > min(ranks) for rank in ranks)
    expected = (
        rf"{over} of {len(ranks)} modules need .* max_rank={min(ranks)}; the blocks of `.*` touch \d+ rows and \d+ "
    )
    with pytest.raises(
        SMTError, match=expected + rf"columns.*SMTConfig\(rank_cap={min(ranks)}\).*--max-rank.*smt merge"
    ):
        export_lora(base, delta[0], tmp_path / "adapter", max_rank=min(ranks))
    assert not (tmp_path / "adapter").exists()


def grids(delta):
    selection = delta[1].smt_state.selection
    return {name: selection.grids[name] for name in selection.block_indices}


def test_blocks_chosen_under_a_rank_cap_fit_the_same_largest_rank(folders):
    base, delta, adapter = folders
    model = tiny.llama()
    model.save_pretrained(base)
    changed(model, delta, budget=24, rank_cap=16)
    export_lora(base, delta, adapter, max_rank=16)
    assert config_of(adapter)["r"] == 16


def test_another_base_is_refused_and_nothing_written(base, delta, tmp_path):
    tiny.llama(seed=1).save_pretrained(base)
    with pytest.raises(SMTError, match="other values in"):
        export_lora(base, delta[0], tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "delta"}


@pytest.mark.parametrize(("dtype", "max_rank"), [("float64", 1), ("float32", 0), ("float32", 1.5)])
def test_odd_arguments_are_refused(dtype, max_rank, base, delta, tmp_path):
    with pytest.raises(SMTError, match=r"dtype must be one of .* and max_rank an int >= 1"):
        export_lora(base, delta[0], tmp_path / "adapter", dtype=dtype, max_rank=max_rank)


def test_the_base_is_read_and_not_written(base, delta, tmp_path):
    before = tiny.all_files(base)
    for path in base.iterdir():
        path.chmod(0o444)
    export_lora(base, delta[0], tmp_path / "adapter")
    assert tiny.all_files(base) == before


def test_files_of_the_tokenizer_of_training_come_along(base, delta, tmp_path):
    (delta[0] / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "evil.Evil"}, "a": 1}))
    (delta[0] / "chat_template.jinja").write_text("{{ messages }}")
    export_lora(base, delta[0], tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "tokenizer_config.json").read_text()) == {"a": 1}
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {ADAPTER_FILE, "adapter_config.json", "tokenizer_config.json", "chat_template.jinja"}


# ---- what PEFT has no place for ----


def biases(base, delta):
    model = tiny.build("Qwen2ForCausalLM", num_key_value_heads=2)
    model.save_pretrained(base)
    changed(model, delta, train_bias=True)
    return r"train_bias=True trains `.*\.bias` without the rest of its module\. Merge it instead"


def tied_embeddings(base, delta):
    model = tiny.llama(tie_word_embeddings=True)
    model.save_pretrained(base)
    changed(model, delta, modules_to_save=["embed_tokens"])
    return r"trains `model\.embed_tokens\.weight`, which the base may tie to its output embeddings"


def another_vocabulary(base, delta):
    tiny.llama().save_pretrained(base)
    model = type(tiny.llama()).from_pretrained(base)
    model.resize_token_embeddings(70, mean_resizing=False)
    changed(model, delta, modules_to_save=["embed_tokens", "lm_head"])
    model.config.save_pretrained(delta)
    return r"another vocabulary than the base \(`.*`: 70 rows for 64\)"


def an_ending_of_others(base, delta):
    model = tiny.llama().model
    model.save_pretrained(base)
    changed(model, delta, modules_to_save=["norm"])
    return r"would replace `layers\.0\.input_layernorm` as well as what the delta trains"


def statistics(base, delta):
    class Normed(LlamaForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.BatchNorm1d(64)

        def forward(self, *args, **kwargs):
            self.extra(torch.randn(4, 64))
            return super().forward(*args, **kwargs)

    model = Normed(tiny.llama(num_labels=3).config)
    model.save_pretrained(base)
    convert_to_smt(model, tiny.choose(model, tiny.config(score="random", modules_to_save=[])))
    model.train()(input_ids=tiny.tokens(3))
    save_delta(model, delta)
    return r"no place for `extra\.running_mean`, which forward changes"


@pytest.mark.parametrize("case", [biases, tied_embeddings, another_vocabulary, an_ending_of_others, statistics])
def test_what_peft_cannot_hold_is_refused_by_name(case, folders):
    base, delta, adapter = folders
    message = case(base, delta)
    with pytest.raises(SMTError, match=message):
        export_lora(base, delta, adapter)
    assert not adapter.exists()


# ---- a delta of a quantised base ----


class OverQuantised(NamedTuple):
    kind: str
    dtype: torch.dtype
    load: Callable
    trained: torch.nn.Module


CASES_OF_QUANTISED = {
    "nf4": ("nf4", torch.bfloat16, {"bnb_4bit_compute_dtype": torch.bfloat16}),
    "nf4 in float32": ("nf4", torch.float32, {"bnb_4bit_compute_dtype": torch.float32}),
    "fp4": ("fp4", torch.bfloat16, {"bnb_4bit_compute_dtype": torch.bfloat16}),
    "int8": ("int8", torch.bfloat16, {}),
    "nf4 in part": ("nf4", torch.bfloat16, {"llm_int8_skip_modules": ["v_proj", "up_proj", "lm_head"]}),
}


@pytest.fixture(params=CASES_OF_QUANTISED)
def over_quantised(request, folders):
    """Return what is known of a delta of a quantised base: how to load that, and the trained model."""
    pytest.importorskip("bitsandbytes")
    kind, dtype, more = CASES_OF_QUANTISED[request.param]
    base, delta, _ = folders
    tiny.llama().save_pretrained(base)

    def load():
        config = quantised.config(kind, **more)
        return AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=dtype)

    return OverQuantised(kind, dtype, load, changed(load(), delta, target_modules="all-linear"))


# Of logits up to 0.5: one rounding to bfloat16, and what inputs of 8 bits do.
NEAR = {("nf4", torch.float32): 1e-6, ("int8", torch.bfloat16): 1e-2}


def test_the_quantised_base_with_the_adapter_is_the_trained_model(over_quantised, folders, caplog):
    kind, dtype, load, trained = over_quantised
    caplog.set_level(logging.INFO, "smt_trainer.export.lora")
    export_lora(*folders, onto="dequantized")
    message = caplog.messages[-1]
    rounded = "float32 twice more, each time by at most 6e-08" if dtype == torch.float32 else "at most 0.0039"
    assert rounded in message and ("quantises their inputs to 8 bits" in message) == (kind == "int8")
    plain = load()
    keep_differentiable(plain)
    untrained, expected = tiny.logits(plain), tiny.logits(trained)
    found = tiny.logits(peft.PeftModel.from_pretrained(plain, folders[2]))
    near = NEAR.get((kind, dtype), 2**-8)
    torch.testing.assert_close(found, expected, rtol=0, atol=near)
    assert (untrained - expected).abs().max() > 20 * near


def test_its_change_is_the_difference_to_the_dequantised_weights(over_quantised, folders):
    export_lora(*folders, onto="dequantized")
    tensors, linears = load_file(folders[2] / ADAPTER_FILE), dict(block_modules(over_quantised.trained))
    assert len(tensors) == 2 * len(linears)
    plain, dtype = over_quantised.load(), over_quantised.dtype
    for name, linear in linears.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        before = plain.get_submodule(name)
        before = dequantised(before, dtype) if is_quantised(before) else before.weight.detach()
        change = linear.merged_weight().double() - before.double()
        rounding = 0 if dtype == torch.bfloat16 else 2**-24
        torch.testing.assert_close(b @ a, change, rtol=rounding, atol=0)


def test_onto_original_it_is_the_merge_onto_the_original(over_quantised, folders, tmp_path, caplog):
    base, delta, adapter = folders
    caplog.set_level(logging.INFO, "smt_trainer.export.lora")
    export_lora(base, delta, adapter, onto="original")
    assert "a model that was never trained as a whole" in caplog.messages[-1]
    merge_checkpoint(base, delta, tmp_path / "merged", onto="original")
    plain, expected = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=over_quantised.dtype)
        for folder in (base, tmp_path / "merged")
    )
    found = peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload()
    rounding = 0 if over_quantised.dtype == torch.bfloat16 else 1e-7
    torch.testing.assert_close(tiny.weights(found), tiny.weights(expected), rtol=0, atol=rounding)


def test_what_an_adapter_goes_onto_has_to_be_said(over_quantised, folders, tmp_path):
    base, delta, adapter = folders
    with pytest.raises(SMTError, match=r"Choose what the adapter goes onto: onto='dequantized' \(smt export --onto"):
        export_lora(base, delta, adapter)
    over_quantised.load().save_pretrained(tmp_path / "stored")
    with pytest.raises(SMTError, match=r"is stored quantised, but an adapter is made from the checkpoint"):
        export_lora(tmp_path / "stored", delta, adapter, onto="dequantized")
    assert not adapter.exists()


def test_onto_is_said_in_vain_for_a_plain_base(base, delta, tmp_path):
    with pytest.raises(SMTError, match="onto='original' is for deltas of a quantised base"):
        export_lora(base, delta[0], tmp_path / "adapter", onto="original")


# ---- command line ----


def test_the_command_imports_no_torch(base, delta, tmp_path):
    script = """import sys; from smt_trainer.cli import main
assert main(sys.argv[1:]) == 0
print(*{'torch', 'transformers', 'accelerate', 'huggingface_hub', 'peft'} & set(sys.modules))"""
    arguments = ["export", str(base), str(delta[0]), str(tmp_path / "adapter"), "--format", "lora"]
    command = [sys.executable, "-c", script, *arguments, "--dtype", "bfloat16", "--max-rank", "64"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [f"LoRA adapter in {tmp_path / 'adapter'}", ""]
    assert "bfloat16 rounds the change of a weight by at most" in run.stderr and run.stderr.count("\n") == 1
