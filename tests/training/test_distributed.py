"""What is refused where weights are sharded over ranks, without any."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from smt_trainer import SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.training.distributed import refuse_sharded_kinds

GRIDS = {
    "linear": BlockGrid(4, 4, 1, 4),
    "conv": BlockGrid(4, 36, 1, 36, kernel=(3, 3)),
    "tokens": BlockGrid(8, 4, 1, 4, embedding=True),
}


def accelerator(kind: DistributedType, stage: int | None = None) -> SimpleNamespace:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize(("kind", "stage"), [(DistributedType.FSDP, None), (DistributedType.DEEPSPEED, 3)])
def test_convolutions_and_embeddings_are_refused_where_weights_are_sharded(kind, stage):
    for name, described in (("conv", "a convolution"), ("tokens", "an embedding")):
        match = f"`{name}` is {described}, whose blocks cannot be trained in weights that FSDP2"
        with pytest.raises(SMTError, match=match):
            refuse_sharded_kinds(accelerator(kind, stage), {"linear": GRIDS["linear"], name: GRIDS[name]})
    refuse_sharded_kinds(accelerator(kind, stage), {"linear": GRIDS["linear"]})


@pytest.mark.parametrize(
    ("kind", "stage"), [(DistributedType.NO, None), (DistributedType.MULTI_CPU, None), (DistributedType.DEEPSPEED, 2)]
)
def test_they_are_trained_where_weights_are_whole(kind, stage):
    refuse_sharded_kinds(accelerator(kind, stage), GRIDS)
