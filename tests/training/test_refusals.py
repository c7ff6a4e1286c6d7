"""Ways of running that are refused at construction; stand-ins pretend to be accelerate's state."""

import re
from types import SimpleNamespace

import pytest
import quantised
import tiny
import torch
import transformers
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.training_args import OptimizerNames

from smt_trainer import SMTError, SMTTrainerMixin, convert_to_smt, select_tokens
from smt_trainer.sparse.state import get_state


@pytest.fixture
def construct(tmp_path):
    """Return a function that makes a trainer which sees other arguments or another state of accelerate, or has more
    attributes."""

    def construct(model=None, smt_config=None, state=None, arguments=None, attributes=None):
        class Elsewhere(transformers.Trainer):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.accelerator.state = SimpleNamespace(**state or {})
                vars(self.args).update(arguments or {})
                vars(self).update(attributes or {})

        class SMTTrainer(SMTTrainerMixin, Elsewhere):
            pass

        return SMTTrainer(
            model=model or tiny.llama(),
            args=tiny.arguments(tmp_path),
            train_dataset=tiny.examples(),
            smt_config=smt_config or tiny.config(),
        )

    return construct


def test_several_gpus_in_one_process_are_refused(construct):
    with pytest.raises(SMTError, match=r"one process sees 2 GPUs.*accelerate launch"):
        construct(arguments={"_n_gpu": 2})


def test_fsdp_1_is_refused(construct):
    with pytest.raises(SMTError, match="fsdp_version: 2"):
        construct(state={"fsdp_plugin": SimpleNamespace(fsdp_version=1)})
    construct(state={"fsdp_plugin": SimpleNamespace(fsdp_version=2)})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cp", r"asks for context parallelism \(cp_size\).*not known to be exact"),
        ("sp", r"asks for sequence parallelism \(sp_size\).*not known to be exact"),
        ("tp", r"tp_size=2, but no linear of the model is cut.*distributed_config=DistributedConfig\(tp_size=2\)"),
    ],
)
def test_parallelism_of_a_whole_model_is_refused(kind, message, construct):
    sizes = {"tp_size": 1, "cp_size": 1, "sp_size": 1, "dp_shard_size": 2}
    with pytest.raises(SMTError, match=message):
        construct(arguments={"parallelism_config": SimpleNamespace(**sizes | {f"{kind}_size": 2})})
    construct(arguments={"parallelism_config": SimpleNamespace(**sizes)})


@pytest.mark.parametrize(
    "zero",
    [{"offload_param": {"device": "nvme"}}, {"zero_quantized_weights": True}, {"zero_hpz_partition_size": 8}],
    ids=lambda zero: next(iter(zero)),
)
def test_weights_that_deepspeed_hides_are_refused(zero, construct):
    def plugin(zero):
        return {"deepspeed_plugin": SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3} | zero})}

    with pytest.raises(SMTError, match="where blocks cannot be written back"):
        construct(state=plugin(zero))
    construct(state=plugin({"offload_param": {"device": "cpu"}}))


def test_a_warm_up_on_partitioned_weights_is_refused(construct):
    model = tiny.llama()
    model.lm_head.weight.ds_id = 0
    model.lm_head.weight.ds_shape = model.lm_head.weight.shape
    with pytest.raises(SMTError, match=r"already partitioned the weights.*SMTConfig\(selection=...\)"):
        construct(model=model)
    construct(model=model, smt_config=tiny.config(score="magnitude"))


def test_weights_sharded_on_loading_are_refused(construct, tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny.llama()
        weight = distribute_tensor(model.lm_head.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        model.lm_head.weight = torch.nn.Parameter(weight)
        with pytest.raises(SMTError, match="sharded when it was loaded, but not by tensor parallelism"):
            construct(model=model)
    finally:
        torch.distributed.destroy_process_group()


def test_handing_weights_over_in_an_unknown_way_is_refused(construct):
    message = r"sends weights to vLLM in another way than .*use_vllm=False"
    with pytest.raises(SMTError, match=message):
        construct(arguments={"use_vllm": True})
    with pytest.raises(SMTError, match=message):
        construct(attributes={"_sync_weight": lambda: None})


class Generation:
    """Hands weights over as TRL's does."""

    def sync_weights(self) -> None:
        """Send nothing."""


def test_handing_over_weights_that_are_not_the_merged_ones_is_refused(construct, base):
    vllm = {"arguments": {"use_vllm": True}, "attributes": {"vllm_generation": Generation()}}
    sharded = {"distributed_type": DistributedType.FSDP}
    with pytest.raises(SMTError, match=r"use_vllm=True with FSDP2.*SMTConfig\(selection=...\)"):
        construct(state=sharded, **vllm)
    construct(state=sharded, smt_config=tiny.config(score="magnitude"), **vllm)
    single = {"distributed_type": DistributedType.NO}
    construct(state=single, **vllm)
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SMTError, match=r"use_vllm=True sends weights to vLLM.*without quantization_config"):
        construct(model=quantised.load(base, "nf4"), state=single, **vllm)


@pytest.mark.parametrize("sharding", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_a_quantised_base_that_would_be_sharded_is_refused(sharding, construct, base):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(SMTError, match=r"the base is quantised, and FSDP2 and DeepSpeed cut.*Use DDP"):
        construct(model=quantised.load(base, "nf4"), state={"distributed_type": sharding})
    construct(model=quantised.load(base, "nf4"), state={"distributed_type": DistributedType.NO})


OF_BITSANDBYTES = [
    optim.value for optim in OptimizerNames if re.search("bnb|paged|ademamix|lion|^adamw_8bit", optim.value)
]


@pytest.mark.parametrize("optim", OF_BITSANDBYTES)
def test_an_optimizer_of_bitsandbytes_is_refused_under_fsdp(optim, construct):
    with pytest.raises(SMTError, match="cannot step what FSDP2 shards"):
        construct(state={"distributed_type": DistributedType.FSDP}, arguments={"optim": optim})
    construct(state={"distributed_type": DistributedType.NO}, arguments={"optim": optim})


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_that_was_resized_after_its_blocks_were_taken_is_refused(tied, tmp_path):
    model = tiny.llama(tie_word_embeddings=tied)
    convert_to_smt(model, select_tokens(model, [3, 5])).resize_token_embeddings(70)
    with pytest.raises(SMTError, match=r"`model.embed_tokens` was resized from 64 to 70 rows after its blocks"):
        tiny.smt_trainer(model, tmp_path, get_state(model).selection.config).train()


def test_a_change_since_the_blocks_were_taken_is_named_before_training(tmp_path, warnings):
    model = tiny.llama()
    convert_to_smt(model, tiny.choose(model)).resize_token_embeddings(70)
    trainer = tiny.smt_trainer(model, tmp_path, get_state(model).selection.config, max_steps=1)
    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert any(
        "2 frozen tensors, such as `model.embed_tokens.weight`, have other values" in line for line in warnings()
    )


class Stop(transformers.TrainerCallback):
    """Ends the run before its first step."""

    def on_train_begin(self, *args, **kwargs):
        raise KeyboardInterrupt
