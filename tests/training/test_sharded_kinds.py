"""What is refused where weights are sharded over ranks; what is trained there is in `runs/test_sharded.py`."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from mixtures import listed, mixture

from smt_trainer import SMTError
from smt_trainer.training import sharded_kinds
from smt_trainer.training.sharded_kinds import refuse_partitioned_experts, refuse_sharded_tokens

LINEAR, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj.3"
LISTED = "model.layers.0.mlp.experts.3.down"


def accelerator(stage: int | None, distributed_type: DistributedType = DistributedType.NO) -> SimpleNamespace:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin), distributed_type=distributed_type)


def test_experts_are_refused_where_zero3_partitions_them():
    model = mixture()
    with pytest.raises(
        SMTError, match=f"`{EXPERT}` lies in a parameter with all experts.*Use FSDP2, DDP or ZeRO-1 or 2"
    ):
        refuse_partitioned_experts(accelerator(3), model, [LINEAR, EXPERT])
    refuse_partitioned_experts(accelerator(3), model, [LINEAR])
    for stage in (None, 1, 2):
        refuse_partitioned_experts(accelerator(stage), model, [LINEAR, EXPERT])


def test_experts_in_a_list_are_refused_where_a_rank_without_a_token_is_waited_for(monkeypatch):
    model, fsdp = listed(), accelerator(None, DistributedType.FSDP)
    message = f"`{LISTED}` belongs to an expert in a list, which a router calls on some ranks only, "
    with pytest.raises(SMTError, match=f"{message}so ZeRO-3 would wait.*Use FSDP2, DDP or ZeRO-1 or 2"):
        refuse_partitioned_experts(accelerator(3), model, [LINEAR, LISTED])
    monkeypatch.setattr(sharded_kinds, "KNOWS_UNUSED", False)
    with pytest.raises(SMTError, match=f"{message}and FSDP2 of torch .* Use torch 2.13 or newer"):
        refuse_partitioned_experts(fsdp, model, [LINEAR, LISTED])
    monkeypatch.setattr(sharded_kinds, "KNOWS_UNUSED", True)
    for sharding in (fsdp, accelerator(None), accelerator(2)):
        refuse_partitioned_experts(sharding, model, [LINEAR, LISTED])
    refuse_partitioned_experts(accelerator(3), model, [LINEAR])


def test_new_tokens_are_refused_where_their_weights_are_sharded():
    for sharding in (accelerator(3), accelerator(None, DistributedType.FSDP)):
        with pytest.raises(SMTError, match=r"`embed` has rows of new tokens.*Use DDP or ZeRO-1 or 2"):
            refuse_sharded_tokens(sharding, ["embed"])
        refuse_sharded_tokens(sharding, [])
    for whole in (accelerator(None), accelerator(2)):
        refuse_sharded_tokens(whole, ["embed"])
