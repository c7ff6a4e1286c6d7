"""What is refused where weights are sharded over ranks, without any."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from smt_trainer import SMTError
from smt_trainer.model.grid import BlockGrid
from smt_trainer.training.distributed import refuse_sharded_convolutions

GRIDS = {"linear": BlockGrid(4, 4, 1, 4), "conv": BlockGrid(4, 36, 1, 36, kernel=(3, 3))}


def accelerator(kind: DistributedType, stage: int | None = None) -> SimpleNamespace:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(distributed_type=kind, state=SimpleNamespace(deepspeed_plugin=plugin))


@pytest.mark.parametrize(("kind", "stage"), [(DistributedType.FSDP, None), (DistributedType.DEEPSPEED, 3)])
def test_convolutions_are_refused_where_weights_are_sharded(kind, stage):
    with pytest.raises(SMTError, match="`conv` is a convolution, whose blocks cannot be trained in weights that FSDP2"):
        refuse_sharded_convolutions(accelerator(kind, stage), GRIDS)
    refuse_sharded_convolutions(accelerator(kind, stage), {"linear": GRIDS["linear"]})


@pytest.mark.parametrize(
    ("kind", "stage"), [(DistributedType.NO, None), (DistributedType.MULTI_CPU, None), (DistributedType.DEEPSPEED, 2)]
)
def test_they_are_trained_where_weights_are_whole(kind, stage):
    refuse_sharded_convolutions(accelerator(kind, stage), GRIDS)
