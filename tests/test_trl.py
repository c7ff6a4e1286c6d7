"""TRL's trainers behind the mixin."""

import pytest
import tiny
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from smt_trainer import SMTTrainerMixin

trl = pytest.importorskip("trl")


@pytest.fixture
def tokenizer():
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(("<pad>", "<bos>", "<eos>", *alphabet))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def trained(trainer_class, tokenizer, folder, **more):
    trainer = trainer_class(
        model=tiny.llama(vocab_size=len(tokenizer)),
        args=trl.SFTConfig(
            str(folder), max_steps=3, logging_steps=1, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True
        ),
        train_dataset=Dataset.from_list([{"text": "a word" * (1 + number % 3)} for number in range(32)]),
        processing_class=tokenizer,
        **more,
    )
    trainer.train()
    return trainer


def test_the_warm_up_does_not_leak_into_the_counters_of_sft(tokenizer, tmp_path):
    class SMTSFTTrainer(SMTTrainerMixin, trl.SFTTrainer):
        pass

    stock = trained(trl.SFTTrainer, tokenizer, tmp_path / "stock")
    ours = trained(SMTSFTTrainer, tokenizer, tmp_path / "ours", smt_config=tiny.config())
    assert tiny.logged(ours, "smt_blocks") == [12]
    steps = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (ours, stock)]
    for key in ("num_tokens", "learning_rate"):
        assert [log[key] for log in steps[0]] == [log[key] for log in steps[1]]
    for key in ("loss", "entropy", "mean_token_accuracy"):
        assert steps[0][0][key] == steps[1][0][key]
