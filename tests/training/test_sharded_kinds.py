"""What is refused where weights are sharded over ranks; what is trained there is in `runs/test_sharded.py`."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType
from mixtures import mixture

from smt_trainer import SMTError
from smt_trainer.training.sharded_kinds import refuse_partitioned_experts, refuse_sharded_tokens

LINEAR, EXPERT = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts.down_proj.3"


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


def test_new_tokens_are_refused_where_their_weights_are_sharded():
    for sharding in (accelerator(3), accelerator(None, DistributedType.FSDP)):
        with pytest.raises(SMTError, match=r"`embed` has rows of new tokens.*Use DDP or ZeRO-1 or 2"):
            refuse_sharded_tokens(sharding, ["embed"])
        refuse_sharded_tokens(sharding, [])
    for whole in (accelerator(None), accelerator(2)):
        refuse_sharded_tokens(whole, ["embed"])
