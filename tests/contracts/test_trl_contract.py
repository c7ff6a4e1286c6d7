"""How TRL hands weights over to vLLM. A release that changes it fails here first."""

import inspect
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.distributed.fsdp import fully_shard

from smt_trainer import convert_to_smt, merge_and_unload
from smt_trainer.training.vllm_weights import as_merged

trl = pytest.importorskip("trl")
from trl.distributed import DistributedBackend  # noqa: E402
from trl.experimental.online_dpo import OnlineDPOTrainer  # noqa: E402
from trl.generation.vllm_generation import VLLMGeneration  # noqa: E402

CHANGED = "TRL changed how weights go to vLLM; adapt smt_trainer/training/vllm_weights.py"


@pytest.mark.parametrize("kind", [trl.GRPOTrainer, trl.RLOOTrainer], ids=lambda kind: kind.__name__)
def test_trainers_send_by_one_method_of_their_generation(kind):
    assert "self.vllm_generation.sync_weights()" in inspect.getsource(kind), CHANGED
    assert "_move_model_to_vllm" not in inspect.getsource(kind), CHANGED
    assert list(inspect.signature(VLLMGeneration.sync_weights).parameters) == ["self"], CHANGED


def test_online_dpo_sends_by_a_method_of_its_own():
    assert list(inspect.signature(OnlineDPOTrainer._move_model_to_vllm).parameters) == ["self"], CHANGED
    assert "vllm_generation" not in inspect.getsource(OnlineDPOTrainer), CHANGED


@pytest.fixture
def ranks(tmp_path):
    """Make this process the only rank."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "FSDP2"])
def test_what_it_sends_are_the_named_parameters_of_the_model(sharded, llama, ranks):
    convert_to_smt(llama, tiny.choose(llama))
    tiny.step(llama, **tiny.batch())
    expected = {name: tensor.detach().clone() for name, tensor in llama.named_parameters() if "blocks" not in name}
    if sharded:
        fully_shard(llama)
    plugin = SimpleNamespace(fsdp_version=2) if sharded else None
    state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=plugin)
    accelerator = SimpleNamespace(device=torch.device("cpu"), state=state)
    generation = VLLMGeneration.__new__(VLLMGeneration)
    vars(generation).update(model=llama, accelerator=accelerator, _dist=DistributedBackend(accelerator))
    with as_merged(llama):
        sent = dict(generation._iter_named_params())
    assert list(sent) == list(expected), CHANGED
    tiny.assert_same(sent, expected)
    if not sharded:
        tiny.assert_same(dict(merge_and_unload(llama).named_parameters()), sent)
