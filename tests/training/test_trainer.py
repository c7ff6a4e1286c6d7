"""`SMTTrainer` end to end: it trains the blocks as stock training would, under the settings of Trainer."""

import itertools

import pytest
import tiny
import torch
import transformers
from reference import block_mask, train_only
from texts import byte_tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Seq2SeqTrainer,
    TrainerCallback,
    default_data_collator,
)

from smt_trainer import (
    BlockSelection,
    SMTConfig,
    SMTError,
    SMTTrainerMixin,
    from_delta,
    load_delta,
    merge_and_unload,
    merge_checkpoint,
)
from smt_trainer.delta.delta import DELTA_FILE, MANIFEST_FILE, Delta
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.state import is_smt_model
from smt_trainer.training.optimizers import REFUSED_OPTIMIZERS
from smt_trainer.training.trainer import SELECTION_FILE

V_PROJ = ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]


def trained(folder, model=None, smt_config=None, **overrides):
    trainer = tiny.smt_trainer(model or tiny.llama(), folder, smt_config, **overrides)
    trainer.train()
    return trainer


# ---- compared with stock training ----


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="needs torch 2.13")
def test_a_loss_in_chunks_of_tokens_trains_the_same(tmp_path):
    class Chunked(tiny.RecordingSMTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            hidden = model.get_decoder()(input_ids=inputs["input_ids"]).last_hidden_state[:, :-1].flatten(0, 1)
            head, labels = model.get_output_embeddings().weight, inputs["labels"][:, 1:].flatten()
            return torch.nn.functional.linear_cross_entropy(
                hidden, head, labels, options=torch.nn.LinearCrossEntropyOptions()
            )

    smt_config = tiny.config(selection=tiny.choose(tiny.llama()))
    chunked, plain = (
        tiny.smt_trainer(tiny.llama(), tmp_path, smt_config, kind=kind) for kind in (Chunked, tiny.RecordingSMTTrainer)
    )
    for trainer in (chunked, plain):
        trainer.train()
    assert tiny.logged(chunked, "loss") == pytest.approx(tiny.logged(plain, "loss"), rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
# Other matrix products change only the last bit of the gradients. But AdamW divides by their size, which is near zero
# for some, so in float32 a few weights drift by a thousandth of the twelve steps of at most 1e-3.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_selecting_every_block_equals_stock_training(accumulation, weight_decay, dtype, tolerance, tmp_path):
    overrides = {
        "max_steps": 12,
        "learning_rate": 1e-3,
        "weight_decay": weight_decay,
        "gradient_accumulation_steps": accumulation,
    }
    ours, stocks = tiny.llama().to(dtype), tiny.llama().to(dtype)
    selection = tiny.every_block(ours, V_PROJ)
    master_dtype = str(dtype).removeprefix("torch.")
    trainer = trained(tmp_path, ours, tiny.config(selection=selection, master_dtype=master_dtype), **overrides)

    stocks.requires_grad_(False)
    for name in V_PROJ:
        stocks.get_submodule(name).weight.requires_grad_(True)
    stock = tiny.stock_trainer(stocks, tmp_path, **overrides)
    stock.train()

    expected = stocks.state_dict()
    merged = merge_and_unload(ours).state_dict()
    assert trainer.losses == pytest.approx(stock.losses, rel=tolerance)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance)
    assert not torch.equal(merged[f"{V_PROJ[0]}.weight"], tiny.llama().state_dict()[f"{V_PROJ[0]}.weight"])


def test_a_run_equals_dense_training_with_the_gradient_masked(tmp_path):
    ours, twin = tiny.llama().double(), tiny.llama().double()
    trained(tmp_path, ours, tiny.config(master_dtype="float64"), max_steps=10)
    selection = ours.smt_state.selection
    masks = {name: block_mask(selection.grids[name], chosen) for name, chosen in selection.block_indices.items()}
    tiny.stock_trainer(train_only(twin, masks), tmp_path, max_steps=10).train()
    expected = twin.state_dict()
    for name, tensor in merge_and_unload(ours).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-10)


# ---- settings of Trainer ----

CHECKPOINTING = {
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("overrides", CHECKPOINTING.values(), ids=CHECKPOINTING)
def test_gradient_checkpointing_gives_the_same_losses(overrides, tmp_path):
    assert trained(tmp_path, **overrides).losses == trained(tmp_path).losses


@pytest.mark.parametrize(("reentrant", "asks"), [(False, False), (True, True)])
def test_only_reentrant_checkpointing_asks_for_needless_gradients(reentrant, asks, tmp_path):
    model, asked = tiny.llama(), []
    model.model.layers[0].register_forward_hook(lambda layer, inputs, output: asked.append(output.requires_grad))
    overrides = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trained(tmp_path, model, tiny.config(lowest_layer=1, score="magnitude"), **overrides)
    assert any(asked) is asks


def test_a_compiled_run_trains_like_an_uncompiled_one(tmp_path):
    compiled = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert compiled.losses == pytest.approx(trained(tmp_path).losses, rel=1e-5)
    assert type(compiled.model_wrapped).__name__ == "OptimizedModule"


OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adamw_bnb_8bit", "lion_8bit"]


@pytest.mark.parametrize("precision", ["float32", "bf16 autocast", "bf16 weights"])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_an_optimizer_trains_the_blocks_and_nothing_else(optim, precision, tmp_path):
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    model = tiny.llama().bfloat16() if precision == "bf16 weights" else tiny.llama()
    before = tiny.weights(model)
    learning_rate = {"sgd": 10.0, "lion_8bit": 1e-3}.get(optim, 1e-2)
    trainer = trained(
        tmp_path, model, optim=optim, learning_rate=learning_rate, max_steps=8, bf16=precision == "bf16 autocast"
    )
    assert trainer.losses[-1] < trainer.losses[0]
    selection = model.smt_state.selection
    for _, linear in block_modules(model):
        written = linear.grid.gather(linear.weight, linear.block_indices)
        assert torch.equal(written, linear.blocks.detach().to(written.dtype))
    for name, tensor in merge_and_unload(model).state_dict().items():
        changed = tensor != before[name]
        if (module := name.removesuffix(".weight")) in selection.block_indices:
            mask = block_mask(selection.grids[module], selection.block_indices[module])
            assert changed[mask].any() and not changed[~mask].any()
        else:
            assert not changed.any()


def test_float32_masters_of_bfloat16_weights_move_at_small_learning_rates(tmp_path):
    model = tiny.llama().bfloat16()
    base = tiny.weights(model)
    trained(tmp_path, model, max_steps=20, learning_rate=1e-5)
    moved = [
        linear.blocks.detach() != linear.grid.gather(base[f"{name}.weight"], linear.block_indices).float()
        for name, linear in block_modules(model)
    ]
    assert {linear.blocks.dtype for _, linear in block_modules(model)} == {torch.float32}
    assert torch.cat([part.flatten() for part in moved]).float().mean() > 0.99


def test_only_the_blocks_have_an_optimizer_state(tmp_path):
    trainer = trained(tmp_path)
    sizes = sum(state["exp_avg"].numel() for state in trainer.optimizer.state.values())
    assert sizes == trainer.smt_selection.trainable_parameters == 12 * 256


@pytest.mark.parametrize("optim", REFUSED_OPTIMIZERS)
def test_optimizers_that_need_whole_matrices_are_refused(optim, tmp_path):
    known = [str(name.value) for name in transformers.training_args.OptimizerNames]
    for name in (name for name in known if name.startswith(optim)):
        with pytest.raises(SMTError, match=f"optim='{name}' works on whole matrices.*Use adamw_torch"):
            tiny.smt_trainer(tiny.llama(), tmp_path, optim=name, optim_target_modules=["attn"])
    assert any(name.startswith(optim) for name in known)


def test_the_model_init_of_trainer_is_rewritten_at_each_run(tmp_path):
    trainer = tiny.RecordingSMTTrainer(
        model_init=lambda: tiny.llama(),
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.examples(),
        smt_config=tiny.config(),
    )
    trainer.train()
    first = trainer.losses.copy()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert trainer.losses == first * 2


def test_a_second_run_continues_with_the_same_blocks(tmp_path):
    trainer = trained(tmp_path)
    selection = trainer.smt_selection
    first = trainer.losses.copy()
    trainer.train()
    assert trainer.smt_selection is selection
    assert trainer.losses[len(first)] < first[0]


@pytest.mark.parametrize("call", [2, 5], ids=["in the warm-up", "in the main loop"])
def test_a_batch_size_that_does_not_fit_is_halved(call, tmp_path):
    class OutOfMemory(tiny.RecordingSMTTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            type(self).calls += 1
            if self.calls == call:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return super().compute_loss(*args, **kwargs)

    trainer = trained(tmp_path, kind=OutOfMemory, auto_find_batch_size=True, smt_config=tiny.config(smt_warmup_steps=3))
    assert trainer.state.global_step == 4 and len(trainer.inputs[-1]) < 4
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_the_mixin_extends_any_subclass_of_trainer(tmp_path):
    class SMTSeq2SeqTrainer(SMTTrainerMixin, Seq2SeqTrainer):
        pass

    model = tiny.build("T5ForConditionalGeneration", d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4,
                       decoder_start_token_id=0)  # fmt: skip
    trainer = SMTSeq2SeqTrainer(
        model=model,
        args=transformers.Seq2SeqTrainingArguments(
            str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no"
        ),
        train_dataset=tiny.examples(),
        smt_config=tiny.config(),
    )
    trainer.train()
    assert {name.rpartition(".")[2] for name in model.smt_state.selection.grids} == {"q", "k", "v"}


# ---- checkpoints ----


def test_checkpoints_hold_float32_masters_and_save_model_the_weights_dtype(tmp_path):
    trainer = trained(tmp_path, tiny.llama().bfloat16(), save_strategy="steps", save_steps=2)
    trainer.save_model(tmp_path / "out")
    checkpoint = tmp_path / "checkpoint-4"
    for folder, dtype in ((checkpoint, torch.float32), (tmp_path / "out", torch.bfloat16)):
        assert {blocks.dtype for blocks in Delta.load(folder).blocks.values()} == {dtype}
        assert [path.name for path in folder.glob("*.safetensors")] == [DELTA_FILE]
        model = load_delta(tiny.llama().bfloat16(), folder)
        assert torch.equal(tiny.logits(model), tiny.logits(trainer.model))
    assert (checkpoint / "optimizer.pt").is_file() and (checkpoint / MANIFEST_FILE).is_file()


def keeps_best(kind, folder, scores, **overrides):
    """Make a trainer that evaluates and saves after each step, and loads the model of the lowest score at the end."""
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": False}
    return kind(
        model=tiny.llama(),
        args=tiny.arguments(folder, **every_step, **best, **overrides),
        train_dataset=tiny.examples(),
        eval_dataset=tiny.examples(4),
        compute_metrics=lambda _: {"score": next(scores)},
        smt_config=tiny.config(),
    )


def test_the_best_blocks_are_loaded_at_the_end(tmp_path):
    scores = itertools.chain([3.0, 1.0, 2.0, 2.5], itertools.repeat(9.0))
    trainer = keeps_best(tiny.RecordingSMTTrainer, tmp_path, scores, save_total_limit=1)
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    best = load_delta(tiny.llama(), tmp_path / "checkpoint-2")
    assert torch.equal(tiny.logits(trainer.model), tiny.logits(best))
    eval_losses = tiny.logged(trainer, "eval_loss")
    assert trainer.evaluate()["eval_loss"] == eval_losses[1] != eval_losses[3]


def test_the_best_model_is_loaded_also_where_a_subclass_saves_whole_models(tmp_path):
    class SavesWhole(tiny.RecordingSMTTrainer):
        def save_model(self, output_dir=None, _internal_call=False):
            self.model.save_pretrained(output_dir or self.args.output_dir)

    trainer = keeps_best(SavesWhole, tmp_path, iter([3.0, 1.0, 2.0, 4.0]))
    trainer.train()
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(tiny.logits(trainer.model), tiny.logits(best))
    for _, linear in block_modules(trainer.model):
        assert torch.equal(linear.grid.gather(linear.weight, linear.block_indices), linear.blocks)


def test_the_selection_is_kept_in_the_output_folder(tmp_path):
    trainer = trained(tmp_path)
    selection = BlockSelection.load(tmp_path / SELECTION_FILE)
    assert selection.to_dict() == trainer.smt_selection.to_dict()


def test_before_training_the_whole_model_is_saved(tmp_path):
    tiny.smt_trainer(tiny.llama(), tmp_path).save_model(tmp_path / "out")
    assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), tiny.logits(tiny.llama()))


def test_a_whole_model_in_the_output_folder_is_refused_before_the_warm_up(tmp_path):
    trainer = tiny.smt_trainer(tiny.llama(), tmp_path)
    trainer.save_model()
    with pytest.raises(SMTError, match="holds a whole model"):
        trainer.train()
    assert not is_smt_model(trainer.model) and not (tmp_path / SELECTION_FILE).exists()


def test_blocks_that_a_callback_changed_are_used_by_the_next_step_of_a_compiled_run(tmp_path):
    class Halve(TrainerCallback):
        @torch.no_grad()
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for _, linear in block_modules(model):
                linear.blocks.mul_(0.5)

    plain, compiled = (
        trained(tmp_path / str(compile), callbacks=[Halve()], torch_compile=compile, torch_compile_backend="aot_eager")
        for compile in (False, True)
    )
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
    assert plain.losses != pytest.approx(trained(tmp_path / "other").losses, rel=1e-5)


def test_an_interrupted_run_says_that_its_blocks_were_chosen_in_another_model(tmp_path, warnings):
    tiny.llama().save_pretrained(tmp_path / "first")
    tiny.llama(seed=3).save_pretrained(tmp_path / "second")
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "second"))
    selection = tiny.smt_trainer(first, tmp_path / "out").select()
    trainer = tiny.smt_trainer(second, tmp_path / "out")
    trainer.train(resume_from_checkpoint=True)
    (line,) = [line for line in warnings() if "were chosen in" in line]
    assert "first; this model is" in line and "start again in another output_dir" in line
    assert (selection.base_model, trainer.smt_selection.base_model) == ("first", "second")


# ---- deltas and merged checkpoints ----


def test_the_tokenizer_of_the_collator_goes_with_the_delta_and_the_merged_model(tmp_path):
    class Collator:
        tokenizer = byte_tokenizer()

        def __call__(self, features):
            return default_data_collator(features)

    trainer = trained(tmp_path, collator=Collator())
    trainer.save_model(tmp_path / "delta")
    trainer.merge_and_save(tmp_path / "merged")
    for name in ("delta", "merged"):
        assert AutoTokenizer.from_pretrained(tmp_path / name)("a b").input_ids == byte_tokenizer()("a b").input_ids


def test_merging_a_model_that_cannot_write_itself_is_refused_saying_what_to_do(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = tiny.llama()

        def forward(self, input_ids, labels=None):
            return self.model(input_ids=input_ids, labels=labels)

    trainer = trained(tmp_path, Plain())
    with pytest.raises(SMTError, match=r"a Plain has no save_pretrained.*merge_and_unload"):
        trainer.merge_and_save(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_checkpoint_merged_delta_and_delta_on_base_all_give_the_trained_logits(tied, dtype, tmp_path):
    tiny.llama(tie_word_embeddings=tied).to(dtype).save_pretrained(tmp_path / "base")
    trainer = trained(tmp_path, AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    trainer.save_model(tmp_path / "delta")
    trainer.merge_and_save(tmp_path / "merged")
    merge_checkpoint(tmp_path / "base", tmp_path / "delta", tmp_path / "streamed")

    expected = tiny.logits(trainer.model)
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "streamed"),
        from_delta(tmp_path / "delta", base=str(tmp_path / "base")),
    ):
        assert model.dtype == dtype and torch.equal(tiny.logits(model), expected)
    merged, streamed, base = (tiny.saved_tensors(tmp_path / name) for name in ("merged", "streamed", "base"))
    assert merged.keys() == streamed.keys() == base.keys()
    assert all(torch.equal(tensor, streamed[key]) for key, tensor in merged.items())


def test_the_configuration_beside_a_delta_names_the_class_that_was_trained(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    data = [{"input_ids": example["input_ids"], "labels": torch.tensor(1)} for example in tiny.examples()]
    trained(tmp_path / "out", model, data=data).save_model(tmp_path / "delta")
    assert AutoConfig.from_pretrained(tmp_path / "delta").architectures == ["LlamaForSequenceClassification"]
    assert type(from_delta(tmp_path / "delta", base=tmp_path / "base")) is type(model)
    with pytest.raises(SMTError, match=r"auto_class must be a class.*got 'base'\. Pass a base as base="):
        from_delta(tmp_path / "delta", "base")


def test_merging_in_the_middle_does_not_change_training(tmp_path):
    class Merging(tiny.RecordingSMTTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 2 and is_smt_model(self.model):
                self.merge_and_save(tmp_path / "merged")
            return super().training_step(*args, **kwargs)

    assert trained(tmp_path, kind=Merging).losses == trained(tmp_path).losses
    assert (tmp_path / "merged").is_dir()


def test_merging_before_training_is_refused(tmp_path):
    with pytest.raises(SMTError, match="trains no blocks"):
        tiny.smt_trainer(tiny.llama(), tmp_path).merge_and_save(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_into_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path, monkeypatch):
    trainer = trained(tmp_path / "run")
    monkeypatch.setattr("smt_trainer.training.saving.plain_state_dict", lambda *_, **__: pytest.fail("gathered"))
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious.txt").write_text("precious")
    with pytest.raises(SMTError, match="exists and is not empty"):
        trainer.merge_and_save(tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["precious.txt"]


def test_a_classifier_trains_its_head_and_stores_it(tmp_path):
    def model():
        return tiny.build("BertForSequenceClassification", num_labels=3)

    data = [{"input_ids": row, "labels": torch.tensor(place % 3)} for place, row in enumerate(tiny.tokens(16))]
    trainer = trained(tmp_path, model(), data=data)
    trainer.save_model(tmp_path / "delta")
    assert sorted(Delta.load(tmp_path / "delta").whole) == ["classifier.bias", "classifier.weight"]
    assert not torch.equal(trainer.model.classifier.weight, model().classifier.weight)
    assert torch.equal(tiny.logits(load_delta(model(), tmp_path / "delta")), tiny.logits(trainer.model))


def test_print_trainable_parameters_says_what_is_trained(tmp_path, capsys):
    trainer = trained(tmp_path)
    trainer.print_trainable_parameters()
    total = trainer.smt_selection.num_parameters
    share = f"trainable parameters: 3,072 of {total:,} ({3072 / total:.3%} of the model)"
    assert f"{share}; {trainer.smt_selection.summary()}" in capsys.readouterr().out


def test_before_the_first_step_the_log_says_what_is_trained(tmp_path, caplog):
    class Watching(tiny.SMTTrainer):
        def training_step(self, *args, **kwargs):
            type(self).lines = [record.getMessage() for record in caplog.records if not self.is_in_warmup]
            return super().training_step(*args, **kwargs)

    caplog.set_level("INFO", logger="smt_trainer")
    trainer = trained(tmp_path, tiny.gpt2(), tiny.config(train_norm=True, train_bias=True), kind=Watching)
    (line,) = [line for line in Watching.lines if line.startswith("trainable parameters: ")]
    assert trainer.smt_selection.summary() in line
    biases = len(trainer.smt_selection.block_indices)
    assert line.endswith(f"; whole: ln_1 (2), ln_2 (2), ln_f (1), bias ({biases})")


# ---- bad input ----


def optimizer_for(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataset": tiny.Stream(tiny.examples(), once=True)}, "can be read only once"),
        ({"train_dataset": iter(tiny.examples())}, "can be read only once"),
        ({"smt_config": tiny.config(target_modules=["wq"])}, "matches no linear of this model"),
        ({"smt_config": tiny.config(block_size=48)}, r"block_size=48 does not divide it\. Use block_size='auto'"),
        ({"smt_config": tiny.config(budget=65)}, r"more than the targets hold \(64\)"),
        ({"smt_config": tiny.config(budget=1.0)}, "more than the targets hold"),
        ({"smt_config": tiny.config(budget=1e-9)}, "less than half a block"),
        ({"smt_config": tiny.config(modules_to_save=["score"])}, "modules_to_save names 'score'"),
        ({"smt_config": tiny.config(modules_to_save=["v_proj"])}, "which modules_to_save trains whole"),
        ({"smt_config": tiny.config(selection="nowhere.json")}, "no selection at nowhere.json"),
    ],
)
def test_bad_input_is_refused_when_the_trainer_is_made(arguments, message, tmp_path):
    defaults = {"train_dataset": tiny.examples(), "smt_config": tiny.config()}
    with pytest.raises(SMTError, match=message):
        tiny.SMTTrainer(model=tiny.llama(), args=tiny.arguments(tmp_path), **defaults | arguments)


@pytest.mark.parametrize("scheduler", [False, True])
def test_an_optimizer_bound_to_the_old_parameters_is_refused_naming_the_replacement(scheduler, tmp_path):
    model = tiny.llama()
    optimizer = optimizer_for(model)
    pair = (None, torch.optim.lr_scheduler.ConstantLR(optimizer)) if scheduler else (optimizer, None)
    with pytest.raises(SMTError, match="Pass optimizer_cls_and_kwargs="):
        tiny.SMTTrainer(model=model, args=tiny.arguments(tmp_path), train_dataset=tiny.examples(), optimizers=pair)


def test_the_replacement_works(tmp_path):
    trainer = tiny.SMTTrainer(
        model=tiny.llama(),
        args=tiny.arguments(tmp_path),
        train_dataset=tiny.examples(),
        smt_config=tiny.config(),
        optimizer_cls_and_kwargs=(torch.optim.Adagrad, {"lr": 0.1}),
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Adagrad)


@pytest.mark.parametrize("fields", [{"score": "random"}, {"selection": True}])
def test_data_that_can_be_read_only_once_suffice_without_a_warm_up(fields, tmp_path):
    model = tiny.llama()
    smt_config = tiny.config(**fields | ({"selection": tiny.choose(model)} if "selection" in fields else {}))
    trainer = trained(tmp_path, model, smt_config, data=tiny.Stream(tiny.examples(), once=True))
    assert trainer.state.global_step == 4


def test_a_selection_for_another_model_is_refused_and_the_model_left_as_it_was(tmp_path):
    selection = tiny.choose(tiny.build("GPTNeoXForCausalLM"))
    model = tiny.llama()
    with pytest.raises(SMTError, match="this model has no such module"):
        trained(tmp_path, model, tiny.config(selection=selection))
    assert not is_smt_model(model)


def test_a_configuration_of_another_type_is_refused(tmp_path):
    with pytest.raises(SMTError, match=r"smt_config must be an SMTConfig, got \{'budget': 0.1\}"):
        tiny.smt_trainer(tiny.llama(), tmp_path, {"budget": 0.1})


def test_fields_that_a_selection_leaves_without_meaning_are_named(tmp_path, warnings):
    model = tiny.llama()
    selection = tiny.choose(model)
    fields = {"budget": 5, "target_modules": "mlp", "block_size": selection.config.block_size, "train_norm": True}
    trainer = trained(tmp_path, model, SMTConfig(selection=selection, **fields))
    (line,) = [line for line in warnings() if "SMTConfig.selection fixes the blocks" in line]
    assert "budget=5" in line and "target_modules='mlp'" in line
    assert "block_size" not in line and "train_norm" not in line
    assert trainer.smt_selection.num_blocks == selection.num_blocks


def test_a_model_that_is_merged_already_is_said_to_be(tmp_path, base, delta):
    with pytest.raises(SMTError, match="merged already, as from_delta returns it unless merge=False"):
        merge_and_unload(from_delta(delta[0], base=base))
