"""The mixin with TRL's trainers."""

import copy

import pytest
import quantised
import tiny
import torch
import training_script
from datasets import Dataset
from reference import block_mask
from texts import byte_tokenizer
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, SMTTrainerMixin, convert_to_smt, merge_and_unload
from smt_trainer.sparse.plain import plain_state_dict
from smt_trainer.sparse.state import is_smt_model

trl = pytest.importorskip("trl")


def distinct_letters(completions, **_) -> list[float]:
    """Reward different letters."""
    return [float(len(set(completion))) for completion in completions]


TEXTS = ["a word" * (1 + number % 3) for number in range(32)]
RUN = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
}
# Trainer, its arguments, configuration class, fields of the configuration, examples.
STOCK = {
    "SFT": (trl.SFTTrainer, {}, trl.SFTConfig, {}, [{"text": text} for text in TEXTS]),
    "DPO": (
        trl.DPOTrainer,
        {},
        trl.DPOConfig,
        {},
        [{"prompt": text, "chosen": " good", "rejected": " bad"} for text in TEXTS],
    ),
    "GRPO": (
        trl.GRPOTrainer,
        {"reward_funcs": distinct_letters},
        trl.GRPOConfig,
        {"num_generations": 2, "max_completion_length": 6, "gradient_accumulation_steps": 2, "num_iterations": 2},
        [{"prompt": text} for text in TEXTS],
    ),
    "KTO": (
        trl.KTOTrainer,
        {},
        trl.KTOConfig,
        {},
        [{"prompt": text, "completion": " good", "label": number % 2 == 0} for number, text in enumerate(TEXTS)],
    ),
    "RLOO": (
        trl.RLOOTrainer,
        {"reward_funcs": distinct_letters},
        trl.RLOOConfig,
        {"num_generations": 2, "max_completion_length": 6, "gradient_accumulation_steps": 2},
        [{"prompt": text} for text in TEXTS],
    ),
}


@pytest.fixture(scope="module")
def tokenizer():
    """Make a tokenizer with one token for each byte."""
    return byte_tokenizer(("<pad>", "<bos>", "<eos>"), begins=False)


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    """Write a tiny Llama with the tokenizer's vocabulary to disk, where TRL loads its reference models."""
    folder = tmp_path_factory.mktemp("trl") / "base"
    tiny.llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def make(base, tokenizer, tmp_path):
    """Return a function that makes a TRL trainer: an `smt_config` adds the mixin; `fields` are training arguments."""

    def make(name, smt_config=None, folder="run", more=(), **fields):
        kind, arguments, config_class, settings, examples = STOCK[name]
        if smt_config is not None:
            kind = type(f"SMT{kind.__name__}", (SMTTrainerMixin, kind), {})
            arguments = arguments | {"smt_config": smt_config}
        config = config_class(str(tmp_path / folder), **RUN | settings | fields)
        defaults = {"model": AutoModelForCausalLM.from_pretrained(base), "processing_class": tokenizer}
        return kind(**defaults | arguments | dict(more), args=config, train_dataset=Dataset.from_list(examples))

    return make


def by_step(trainer) -> list[dict[str, float]]:
    """Return the trainer's log, one entry per step."""
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(("name", "score"), [("SFT", "grad_signed"), ("DPO", "grad_l1"), ("GRPO", "grad_l1")])
def test_the_warm_up_leaves_no_trace_in_what_the_trainer_logs(name, score, make):
    stock = make(name)
    stock.train()
    ours = make(name, tiny.config(score=score, smt_warmup_steps=3))
    ours.train()
    assert tiny.logged(ours, "smt_blocks") == [12] and tiny.logged(ours, "smt_warmup_steps") == [3]
    assert ours._metrics == stock._metrics
    for key in ("num_tokens", "learning_rate"):
        assert tiny.logged(ours, key) == tiny.logged(stock, key)
    # Before the first update both models are the base. The omitted keys tell of the warm-up, or depend on what is
    # trained or on the clock.
    omitted = ("smt_", "grad_norm", "step_time")
    first, expected = (
        {key: value for key, value in by_step(trainer)[0].items() if not key.startswith(omitted)}
        for trainer in (ours, stock)
    )
    assert first == expected


def test_sft_is_resumed_bit_for_bit(make, tmp_path):
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole, resumed = (make("SFT", tiny.config(), folder, **fields) for folder in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    tiny.assert_same(training_script.result(resumed), training_script.result(whole))


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_the_reference_of_dpo_stays_the_base(given, precomputed, make, base):
    reference = AutoModelForCausalLM.from_pretrained(base) if given else None
    trainer = make("DPO", tiny.config(), more={"ref_model": reference}, precompute_ref_log_probs=precomputed)
    trainer.train()
    expected = AutoModelForCausalLM.from_pretrained(base).state_dict()
    if trainer.ref_model is not None:
        assert not is_smt_model(trainer.ref_model)
        tiny.assert_same(dict(trainer.ref_model.state_dict()), dict(expected))
    rewards = tiny.logged(trainer, "rewards/margins")
    assert rewards[0] == pytest.approx(0, abs=1e-6) and rewards[2] > 0
    assert tiny.logged(trainer, "loss")[2] < tiny.logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-6)


REFERENCES = {"DPO": {}, "KTO": {}, "GRPO": {"beta": 0.1}, "RLOO": {"beta": 0.1}}


class HandsOn(trl.DPOTrainer):
    """A subclass that names none of the arguments which it hands on."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("kind", [trl.DPOTrainer, HandsOn])
def test_a_given_reference_keeps_its_values(kind, by_position, base, tokenizer, tmp_path):
    model, reference = AutoModelForCausalLM.from_pretrained(base), tiny.llama(1, vocab_size=len(tokenizer))
    expected = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    assert all(not torch.equal(expected[name], tensor) for name, tensor in model.state_dict().items() if "proj" in name)
    args = (model, reference) if by_position else ()
    kwargs = {} if by_position else {"model": model, "ref_model": reference}
    *_, examples = STOCK["DPO"]
    trainer = type("SMTDPO", (SMTTrainerMixin, kind), {})(
        *args,
        **kwargs,
        smt_config=tiny.config(),
        args=trl.DPOConfig(str(tmp_path), **RUN),
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
    )
    assert trainer.ref_model is reference
    tiny.assert_same(dict(reference.state_dict()), expected)


@pytest.mark.parametrize("trained", ["merged", "rewritten"])
@pytest.mark.parametrize("name", REFERENCES)
def test_the_reference_is_the_model_handed_over(name, trained, make, base):
    """Not the base on disk, whose name the configuration of a trained model still has."""
    model = AutoModelForCausalLM.from_pretrained(base)
    convert_to_smt(model, tiny.choose(model))
    tiny.step(model, **tiny.batch())
    expected = plain_state_dict(model)
    expected = {key: tensor.clone() for key, tensor in expected.items()}
    if trained == "merged":
        merge_and_unload(model)
    smt_config = tiny.config() if trained == "merged" else model.smt_state.selection.config
    trainer = make(name, smt_config, more={"model": model}, **REFERENCES[name])
    found = trainer.ref_model.state_dict()
    assert found.keys() >= expected.keys()
    tiny.assert_same({key: found[key] for key in expected}, expected)
    assert any(not torch.equal(found[key], tensor) for key, tensor in tiny.saved_tensors(base).items())


def test_a_reference_of_another_shape_is_refused(make, base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(300)
    with pytest.raises(SMTError, match=r"embed_tokens.weight.*ref_model=copy.deepcopy\(model\)"):
        make("DPO", tiny.config(modules_to_save=["embed_tokens", "lm_head"]), more={"model": model})


@pytest.mark.parametrize("fields", [{"selection": True}, {"score": "magnitude"}, {"score": "random"}, {}])
def test_grpo_trains_the_blocks_and_nothing_else(fields, make, base):
    before = AutoModelForCausalLM.from_pretrained(base)
    if "selection" in fields:
        fields = {"selection": tiny.choose(before)}
    trainer = make("GRPO", tiny.config(**fields), max_steps=2)
    trainer.train()
    selection, expected = trainer.smt_selection, before.state_dict()
    for name, tensor in merge_and_unload(trainer.model).state_dict().items():
        changed = tensor != expected[name]
        if (module := name.removesuffix(".weight")) in selection.block_indices:
            mask = block_mask(selection.grids[module], selection.block_indices[module])
            assert changed[mask].any() and not changed[~mask].any()
        else:
            assert not changed.any()


# ---- refusals ----


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_of_peft_are_refused(wrapped, make, base):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(base)
    arguments = {"model": peft.get_peft_model(model, lora)} if wrapped else {"peft_config": lora}
    with pytest.raises(SMTError, match=r"is a PEFT .*merge_and_unload"):
        make("SFT", tiny.config(), more=arguments)


def test_a_reference_that_follows_the_model_is_refused(make):
    with pytest.raises(SMTError, match="sync_ref_model"):
        make("DPO", tiny.config(), sync_ref_model=True)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_quantised_policy_starts_where_its_copy_is_and_leaves_it_there(kind, make, base):
    pytest.importorskip("bitsandbytes")
    model = quantised.load(base, kind)
    reference = copy.deepcopy(model)
    before = tiny.weights(reference)
    trainer = make("DPO", tiny.config(), more={"model": model, "ref_model": reference})
    trainer.train()
    rewards = tiny.logged(trainer, "rewards/margins")
    assert rewards[0] == pytest.approx(0, abs=1e-6) and rewards[2] > 0
    tiny.assert_same(dict(trainer.ref_model.state_dict()), before)


def test_a_reference_that_trl_loads_unquantised_is_refused(make, base):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SMTError, match=r"Pass ref_model=copy.deepcopy\(model\)"):
        make("DPO", tiny.config(), more={"model": quantised.load(base, "nf4")})
