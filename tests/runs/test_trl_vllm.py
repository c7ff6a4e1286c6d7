"""What TRL's trainers hand over to vLLM: after each step, the merged model."""

import copy

import pytest
import tiny
import torch
import vllm_stand_in
from datasets import Dataset
from texts import byte_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback
from weight_patches import apply_patches

from smt_trainer import SMTTrainerMixin, merge_and_unload, model_patches
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.training.vllm_weights import as_merged

trl = pytest.importorskip("trl")
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer, online_dpo_trainer  # noqa: E402
from trl.generation import vllm_generation  # noqa: E402


def random_reward(completions, **_) -> list[float]:
    """Reward anything."""
    return torch.rand(len(completions)).tolist()


GROUP = {"num_generations": 2, "max_completion_length": 6}
STOCK = {
    "GRPO": (trl.GRPOTrainer, trl.GRPOConfig, GROUP),
    "RLOO": (trl.RLOOTrainer, trl.RLOOConfig, GROUP),
    "OnlineDPO": (OnlineDPOTrainer, OnlineDPOConfig, {"max_new_tokens": 4}),
}


class Merged(TrainerCallback):
    """Keeps the parameters of the merged model after each step, and those of the base."""

    def __init__(self, base) -> None:
        # The warm-up sends the base, too.
        self.after = [dict(base.named_parameters())] * 2

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        self.after.append(dict(merge_and_unload(copy.deepcopy(model)).named_parameters()))


@pytest.fixture
def tokenizer():
    return byte_tokenizer(("<pad>", "<bos>", "<eos>"), begins=False)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """TRL sets these variables for a vLLM in its own process, and leaves them: later trainers would be distributed."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        # Undone at the end, whatever happened to it meanwhile.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def make(tokenizer, tmp_path, monkeypatch):
    """Return a function that makes a trainer of TRL's with blocks, on a stand-in for vLLM."""
    vllm_stand_in.install(monkeypatch, vllm_generation, online_dpo_trainer)

    def make(name, mode, dtype=torch.float32, mixin=SMTTrainerMixin, **smt):
        kind, config_class, settings = STOCK[name]
        tiny.llama(vocab_size=len(tokenizer), tie_word_embeddings=True).to(dtype).save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        args = config_class(
            str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            use_vllm=True,
            vllm_mode=mode,
            **settings,
        )
        with monkeypatch.context() as patch:
            # Online DPO asks for it without need, and a CPU is none.
            patch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
            trainer = type("SMT", (mixin, kind), {})(
                model,
                reward_funcs=random_reward,
                args=args,
                smt_config=tiny.config(**smt),
                processing_class=tokenizer,
                train_dataset=Dataset.from_list([{"prompt": "a word" * (1 + number % 3)} for number in range(32)]),
            )
        trainer.add_callback(Merged(copy.deepcopy(model)))
        return trainer

    return make


def receiver(trainer):
    """Return the stand-in that a trainer sends to."""
    generation = getattr(trainer, "vllm_generation", trainer)
    return generation.llm if hasattr(generation, "llm") else generation.vllm_client


def merged(trainer):
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, Merged)).after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("name", STOCK)
def test_what_is_handed_over_is_the_merged_model_after_each_step(name, mode, dtype, make):
    trainer = make(name, mode, dtype, modules_to_save=["norm"])
    trainer.train()
    sent, expected = receiver(trainer).sent, merged(trainer)[:-1]
    assert len(sent) == len(expected) == 4
    for ours, theirs in zip(sent, expected, strict=True):
        assert list(ours) == list(theirs)
        tiny.assert_same(ours, theirs)
    assert all(any(not torch.equal(sent[step][key], sent[step + 1][key]) for key in sent[0]) for step in (1, 2))
    # Afterwards the model names its blocks again.
    assert sum(name.endswith(".blocks") for name, _ in trainer.model.named_parameters()) == len(
        trainer.smt_selection.block_indices
    )


def test_blocks_that_are_ahead_of_the_weights_are_handed_over(llama):
    from smt_trainer import convert_to_smt

    model = convert_to_smt(llama.bfloat16(), tiny.choose(llama))
    for _, linear in block_modules(model):
        # `.data` leaves no trace by which forward would know.
        linear.blocks.data.add_(1.0)
    with as_merged(model):
        found = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
        assert len(list(model.parameters())) == len(found)
    tiny.assert_same(found, dict(merge_and_unload(model).named_parameters()))


def test_patches_in_place_of_whole_weights_leave_the_same_weights(make):
    class SendsPatches(SMTTrainerMixin):
        weights, sizes = None, ()

        def sync_vllm(self, sync_all) -> None:
            if self.weights is None:
                sync_all()
                self.weights = dict(receiver(self).sent[-1])
            else:
                patches = list(model_patches(self.model))
                apply_patches(self.weights, patches)
                self.sizes = (*self.sizes, sum(patch.size for patch in patches))
            self.seen = [*getattr(self, "seen", []), {key: tensor.clone() for key, tensor in self.weights.items()}]

    trainer = make("GRPO", "server", torch.bfloat16, SendsPatches)
    trainer.train()
    # What the warm-up leaves in the trainer is taken back, so all are sent in it and in the first step.
    assert len(receiver(trainer).sent) == 2
    for ours, theirs in zip(trainer.seen, merged(trainer)[1:-1], strict=True):
        tiny.assert_same(ours, theirs)
    whole = sum(tensor.nbytes for tensor in trainer.weights.values())
    assert len(trainer.sizes) == 2 and max(trainer.sizes) < whole / 3
