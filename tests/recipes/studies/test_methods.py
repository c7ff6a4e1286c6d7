import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from recipes.parts.collator import CompletionCollator
from recipes.parts.methods import Full, Sparse
from recipes.studies.parts.methods import METHODS

BUDGET = 0.0308


@pytest.fixture
def wide(tokenizer):
    """A Llama that is wide enough for ranks and blocks to meet a budget."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape))


@pytest.mark.parametrize("method", [name for name in METHODS if not isinstance(METHODS[name], Full)])
def test_every_method_trains_as_many_parameters_as_the_budget_says(method, wide, tmp_path):
    total = sum(parameter.numel() for parameter in wide.parameters())
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        train_sampling_strategy="sequential",
    )
    ids = list(range(3, 19))
    fields = {"smt_warmup_steps": 1}
    if isinstance(METHODS[method], Sparse) and "granularity" not in METHODS[method].fields:
        fields["block_size"] = 32
    trainer = METHODS[method].trainer(
        wide,
        BUDGET,
        seed=1,
        fields=fields,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": ids, "labels": ids}] * 2),
        data_collator=CompletionCollator(0),
    )
    trainer.train()
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    assert trained / (BUDGET * total) == pytest.approx(1, abs=0.02)
