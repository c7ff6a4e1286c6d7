"""transformers' pipelines, PEFT and llama.cpp's names on what training gives."""

import gguf
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, pipeline

from recipes.parts.prompt import prompt_text
from smt_trainer.model.checkpoint import Checkpoint


@pytest.fixture
def prompts(run):
    return [prompt_text(question) for question in run.questions[:4]]


def continuations(pipe, prompts) -> list[str]:
    found = pipe(prompts, max_new_tokens=24, do_sample=False, return_full_text=False)
    return [text["generated_text"] for (text,) in found]


def test_a_pipeline_generates_from_the_merged_folder_what_the_trained_model_does(run, prompts):
    trained = continuations(pipeline("text-generation", run.model, tokenizer=run.tokenizer), prompts)
    assert continuations(pipeline("text-generation", str(run.merged)), prompts) == trained
    assert continuations(pipeline("text-generation", str(run.base)), prompts) != trained


def test_peft_finds_the_base_of_the_adapter_and_computes_the_same(run, prompts):
    inputs = run.tokenizer(prompts, return_tensors="pt", padding=True)
    with torch.no_grad():
        adapted = AutoPeftModelForCausalLM.from_pretrained(run.lora).eval()(**inputs).logits
        merged = AutoModelForCausalLM.from_pretrained(run.merged).eval()(**inputs).logits
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)


def test_llama_cpp_has_a_name_for_each_tensor_of_the_merged_checkpoint(run):
    config = AutoModelForCausalLM.from_pretrained(run.merged).config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = Checkpoint.open(run.merged).tensors
    found = {key: names.get_name(key, try_suffixes=(".weight", ".bias")) for key in tensors}
    assert len(set(found.values())) == len(tensors) and None not in found.values()
    assert found["model.layers.1.mlp.down_proj.weight"] == "blk.1.ffn_down.weight"
