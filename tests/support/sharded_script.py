"""Training runs on ranks that shard the model (FSDP2), its linears (tensor parallelism) or its optimizer and weights
(DeepSpeed ZeRO), on the CPU.

    torchrun --nproc_per_node 2 sharded_script.py FOLDER CASE...
    accelerate launch --config_file recipes/accelerate/NAME.yaml ... sharded_script.py FOLDER launched NAME

Writes the outcome of each case to `FOLDER/CASE/result-RANK.pt`. On the CPU, accelerate uses none of these: it
silently runs DDP instead of FSDP, refuses tensor parallelism, and starts DeepSpeed as one process.
`choose_fsdp_on_cpu`, `choose_slices_on_cpu` and `choose_zero_on_cpu` override these decisions. The rest is the real
code of accelerate, torch, transformers and DeepSpeed, and each run asserts that its model was sharded.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import images
import tiny
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, ParallelismConfig
from mixtures import listed, untrained
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.distributed import DistributedConfig

from smt_trainer import SMTConfig, SMTTrainer, from_delta
from smt_trainer.model.sharded import full_tensor, is_partitioned
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.plain import plain_state_dict

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
# Fields of a `DistributedConfig`.
SLICES = {"tp_size": 2}
EVERYWHERE = {"target_modules": "all-linear", "budget": 24}
MIXTURE = FSDP | {"transformer_layer_cls_to_wrap": ["Qwen3MoeDecoderLayer"]}
EXPERTS = {"target_modules": "experts"}
LISTED = {"target_modules": ["up", "down"], "budget": 16}
TOKENS = {"target_modules": ["embed_tokens", "q_proj"], "block_size": (1, 64)}
CONVOLUTIONS = {"target_modules": "all-conv", "granularity": "row", "block_size": "auto", "modules_to_save": []}


def biased(seed: int):
    """Make a model whose linears have biases other than the initial 0."""
    model = tiny.llama(seed=seed, attention_bias=True, mlp_bias=True)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(index))
    return model


MODELS = {
    "llama": tiny.llama,
    "tied": partial(tiny.llama, tie_word_embeddings=True),
    "biased": biased,
    "gpt2": partial(tiny.gpt2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "mixture": partial(untrained, "Qwen3MoeForCausalLM"),
    "mixture-eager": partial(untrained, "Qwen3MoeForCausalLM", "eager"),
    "gpt-oss": partial(untrained, "GptOssForCausalLM"),
    "listed": listed,
    "images": images.convnext,
}
CASES = {
    "fsdp": {"fsdp": FSDP},
    "fsdp-grad_signed": {"fsdp": FSDP, "smt": {"score": "grad_signed"}},
    "fsdp-grad_l2": {"fsdp": FSDP, "smt": {"score": "grad_l2", "accumulator_dtype": "bfloat16"}},
    "fsdp-grad_abs": {"fsdp": FSDP, "smt": {"score": "grad_abs"}},
    "fsdp-taylor": {"fsdp": FSDP, "smt": {"score": "taylor"}},
    "fsdp-qm_taylor": {"fsdp": FSDP, "smt": {"score": "qm_taylor"}},
    "fsdp-activation": {"fsdp": FSDP, "smt": {"score": "activation"}},
    "fsdp-magnitude": {"fsdp": FSDP, "smt": {"score": "magnitude"}},
    "fsdp-rows": {"fsdp": FSDP, "smt": {"granularity": "row", "block_size": "auto", "budget": 7}},
    "fsdp-one-rank-loads": {"fsdp": FSDP | {"cpu_ram_efficient_loading": True}},
    "fsdp-sharded-checkpoints": {"fsdp": FSDP | {"state_dict_type": "SHARDED_STATE_DICT"}},
    "fsdp-checkpointing": {"fsdp": FSDP | {"activation_checkpointing": True}},
    "fsdp-one-group": {"fsdp": {"version": 2, "auto_wrap_policy": "NO_WRAP"}},
    "fsdp-bf16": {"fsdp": FSDP, "arguments": {"bf16": True}},
    "fsdp-transposed": {"fsdp": FSDP | {"transformer_layer_cls_to_wrap": ["GPT2Block"]}, "model": "gpt2"},
    "fsdp-whole-module": {"fsdp": FSDP, "smt": {"modules_to_save": ["lm_head"]}},
    "fsdp-tied": {"fsdp": FSDP | {"cpu_ram_efficient_loading": True}, "model": "tied"},
    "fsdp-compiled": {"fsdp": FSDP, "arguments": {"torch_compile": True, "torch_compile_backend": "aot_eager"}},
    "fsdp-experts": {"fsdp": MIXTURE, "model": "mixture", "smt": EXPERTS},
    "fsdp-experts-eager": {
        "fsdp": MIXTURE | {"activation_checkpointing": True},
        "model": "mixture-eager",
        "smt": EXPERTS | {"score": "grad_signed"},
    },
    "fsdp-experts-one-rank-loads": {
        "fsdp": MIXTURE | {"cpu_ram_efficient_loading": True},
        "model": "mixture",
        "smt": {"target_modules": "mlp", "score": "taylor"},
    },
    "fsdp-experts-transposed": {
        "fsdp": FSDP | {"transformer_layer_cls_to_wrap": ["GptOssDecoderLayer"]},
        "model": "gpt-oss",
        "smt": EXPERTS | {"granularity": "column", "block_size": "auto"},
    },
    "fsdp-experts-listed": {"fsdp": FSDP, "model": "listed", "smt": LISTED},
    "fsdp-tokens": {"fsdp": FSDP, "smt": TOKENS},
    "fsdp-tokens-tied": {
        "fsdp": FSDP | {"cpu_ram_efficient_loading": True},
        "model": "tied",
        "smt": TOKENS | {"score": "grad_signed"},
    },
    "fsdp-convolutions": {
        "fsdp": FSDP | {"transformer_layer_cls_to_wrap": ["ConvNextLayer"]},
        "model": "images",
        "smt": CONVOLUTIONS,
    },
    "fsdp-convolutions-signed": {
        "fsdp": {"version": 2, "auto_wrap_policy": "NO_WRAP"},
        "model": "images",
        "smt": CONVOLUTIONS | {"score": "grad_signed"},
    },
    # On four ranks: two copies of the model, each sharded over two.
    "fsdp-hybrid": {
        "fsdp": FSDP,
        "ranks": {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)},
    },
    "tp": {"slices": SLICES, "smt": EVERYWHERE, "arguments": {"max_grad_norm": 0.1}},
    # One rank's slices hold no block.
    "tp-one-block": {"slices": SLICES, "smt": {"budget": 1}},
    "tp-rows": {"slices": SLICES, "smt": EVERYWHERE | {"granularity": "row", "block_size": "auto", "budget": 40}},
    "tp-biased": {"slices": SLICES, "smt": EVERYWHERE, "model": "biased"},
    "tp-experts": {
        "slices": SLICES | {"ep_size": 2},
        "smt": {"target_modules": "attention"},
        "model": "mixture",
    },
    "tp-columns": {"slices": SLICES, "smt": EVERYWHERE | {"granularity": "column", "block_size": "auto", "budget": 40}},
    "tp-grad_signed": {"slices": SLICES, "smt": EVERYWHERE | {"score": "grad_signed"}},
    "tp-grad_l2": {"slices": SLICES, "smt": EVERYWHERE | {"score": "grad_l2", "accumulator_dtype": "bfloat16"}},
    "tp-grad_abs": {"slices": SLICES, "smt": EVERYWHERE | {"score": "grad_abs"}},
    "tp-taylor": {"slices": SLICES, "smt": EVERYWHERE | {"score": "taylor"}},
    "tp-magnitude": {"slices": SLICES, "smt": EVERYWHERE | {"score": "magnitude"}},
    "tp-checkpointing": {"slices": SLICES, "smt": EVERYWHERE, "arguments": {"gradient_checkpointing": True}},
    "tp-bf16": {"slices": SLICES, "smt": EVERYWHERE, "arguments": {"bf16": True}},
    "tp-whole-module": {"slices": SLICES, "smt": EVERYWHERE | {"modules_to_save": ["norm"]}},
    "zero1": {"zero": 1},
    "zero2": {"zero": 2},
    "zero2-grad_signed": {"zero": 2, "smt": {"score": "grad_signed"}},
    "zero2-bf16": {"zero": 2, "arguments": {"bf16": True}},
    "zero1-experts": {"zero": 1, "model": "mixture-eager", "smt": EXPERTS},
    "zero2-experts": {"zero": 2, "model": "mixture-eager", "smt": EXPERTS | {"score": "grad_signed"}},
    "zero1-experts-listed": {"zero": 1, "model": "listed", "smt": LISTED},
    "zero2-experts-listed": {"zero": 2, "model": "listed", "smt": LISTED},
    "zero2-tokens-tied": {"zero": 2, "model": "tied", "smt": TOKENS},
    "zero2-convolutions": {"zero": 2, "model": "images", "smt": CONVOLUTIONS},
    "zero3": {"zero": 3},
    "zero3-tokens-tied": {"zero": 3, "model": "tied", "smt": TOKENS},
    "zero3-convolutions": {"zero": 3, "model": "images", "smt": CONVOLUTIONS},
    "zero3-whole-module": {"zero": 3, "smt": {"modules_to_save": ["lm_head"]}},
    "zero3-tied": {"zero": 3, "model": "tied"},
    "zero3-partitioned": {"zero": 3, "smt": {"score": "magnitude"}, "partitioned": True},
}
# Sharded as in `accelerate launch --config_file recipes/accelerate/NAME.yaml`.
LAUNCHED = {
    "fsdp2": {"launched": True, "fsdp": None},
    "zero2": {"launched": True, "zero": 2},
    "zero3": {"launched": True, "zero": 3, "smt": {"score": "magnitude"}, "partitioned": True},
}
BATCH = 4
STEPS = 6


def choose_fsdp_on_cpu() -> None:
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            if self.mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self.mixed_precision)
        if "fsdp_plugin" in vars(self):
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = init


def choose_slices_on_cpu() -> None:
    Accelerator.multi_device = property(lambda self: self.num_processes > 1)


def choose_zero_on_cpu() -> None:
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    # TrainingArguments allows bf16 on the CPU only with `use_cpu`, which would turn DeepSpeed off.
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def arguments(folder: Path, case: dict, processes: int) -> TrainingArguments:
    """Make arguments with the same global batch on any number of processes. Tensor-parallel ranks see all of it."""
    batch = BATCH if "slices" in case else BATCH // processes
    how = {"use_cpu": not torch.cuda.is_available() and (processes == 1 or "zero" not in case)}
    if processes > 1 and "fsdp" in case and "launched" not in case:
        # Older versions of transformers need this spelling; newer ones take True.
        wrapped = "auto_wrap_policy" not in case["fsdp"]
        how |= {"fsdp": "full_shard auto_wrap" if wrapped else "full_shard", "fsdp_config": dict(case["fsdp"])}
    how |= case.get("ranks", {}) if processes > 1 else {}
    if processes > 1 and "zero" in case and "launched" not in case:
        bf16 = {"bf16": {"enabled": True}} if "bf16" in case.get("arguments", ()) else {}
        how = {"deepspeed": ZERO | bf16 | {"zero_optimization": {"stage": case["zero"]}}}
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        # With this large epsilon, Adam's step is smooth in the gradient, so rounding errors stay small.
        learning_rate=1.0,
        adam_epsilon=1.0,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        **how,
        **case.get("arguments", {}),
    )


def base_model(case: dict, seed: int = 0):
    """Make the untrained model of a case."""
    return MODELS[case.get("model", "llama")](seed=seed)


def make_trainer(folder: Path, case: dict, processes: int) -> SMTTrainer:
    rank, base = int(os.environ.get("RANK", 0)), folder / "base"
    on_loading = case.get("partitioned") or ("slices" in case and processes > 1)
    if on_loading and rank == 0 and not base.exists():
        base_model(case).save_pretrained(base)
    training_arguments = arguments(folder / "run", case, processes)
    training_arguments.distributed_state.wait_for_everyone()
    if on_loading:
        slices = {"distributed_config": DistributedConfig(**case["slices"])} if "slices" in case else {}
        model = AutoModelForCausalLM.from_pretrained(base, **slices)
    else:
        one_loads = (case.get("fsdp") or {}).get("cpu_ram_efficient_loading")
        model = base_model(case, seed=rank if one_loads else 0)
    assert processes == 1 or is_partitioned(next(model.parameters())) == bool(case.get("partitioned"))
    # Images of noise can only be memorised, so the evaluation data are part of the training data.
    are_images = case.get("model") == "images"
    return SMTTrainer(
        model=model,
        args=training_arguments,
        train_dataset=images.examples(32) if are_images else tiny.examples(),
        eval_dataset=images.examples(8) if are_images else tiny.examples(8, seed=2),
        smt_config=SMTConfig(**{"block_size": 16, "budget": 12, "smt_warmup_steps": 3} | case.get("smt", {})),
    )


def outcome(trainer: SMTTrainer) -> dict:
    """Return everything that runs must agree on, gathered on every rank."""
    linears = dict(block_modules(trainer.model))
    return {
        "blocks": {
            name: full_tensor(linear.blocks)[linear.row_major_order()].float() for name, linear in linears.items()
        },
        "block_indices": {
            name: torch.from_numpy(indices) for name, indices in trainer.smt_selection.block_indices.items()
        },
        "weights": {name: tensor.clone().float() for name, tensor in plain_state_dict(trainer.model).items()},
        "losses": tiny.logged(trainer, "loss"),
        "eval_losses": tiny.logged(trainer, "eval_loss"),
    }


def assert_sharded(trainer: SMTTrainer, case: dict) -> None:
    linears = [linear for _, linear in block_modules(trainer.model)]
    if "slices" in case:
        assert all(2 * linear.weight.to_local().numel() == linear.weight.numel() for linear in linears)
    elif "fsdp" in case:
        assert all(linear.parameter.to_local().numel() < linear.parameter.numel() for linear in linears)
        assert any(linear.blocks.to_local().numel() < linear.blocks.numel() for linear in linears)
    else:
        assert trainer.model_wrapped.zero_optimization_stage() == case["zero"]
        assert all(is_partitioned(linear.blocks) == (case["zero"] == 3) for linear in linears)


def run(folder: Path, case: dict, processes: int) -> dict:
    """Train, save in every way, and resume from the first checkpoint."""
    trainer = make_trainer(folder, case, processes)
    trainer.train()
    if processes > 1:
        assert_sharded(trainer, case)
    results = {"trained": outcome(trainer), "evaluated": trainer.evaluate()["eval_loss"]}
    trainer.save_model(folder / "delta")
    trainer.merge_and_save(folder / "merged")
    checkpoint = str(folder / "run" / "checkpoint-2")
    resumed = make_trainer(folder, case, processes)
    resumed.train(resume_from_checkpoint=checkpoint)
    results["resumed"] = outcome(resumed)
    resumed.state.best_model_checkpoint = checkpoint
    resumed._load_best_model()
    if "slices" in case and processes > 1:
        slices = DistributedConfig(**case["slices"])
        loaded = from_delta(folder / "delta", base=str(folder / "base"), distributed_config=slices)
        results["loaded"] = {name: full_tensor(tensor).float() for name, tensor in loaded.state_dict().items()}
    return results | {"reloaded": outcome(resumed), "reevaluated": resumed.evaluate()["eval_loss"]}


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    cases = {name: CASES[name] for name in names} if names[0] != "launched" else {names[1]: LAUNCHED[names[1]]}
    if not torch.cuda.is_available():
        choose_fsdp_on_cpu()
        if any("slices" in case for case in cases.values()):
            choose_slices_on_cpu()
        if any("zero" in case for case in cases.values()):
            choose_zero_on_cpu()
    for name, case in cases.items():
        result = run(Path(folder, name), case, int(os.environ["WORLD_SIZE"]))
        torch.save(result, Path(folder, name, f"result-{os.environ['RANK']}.pt"))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
