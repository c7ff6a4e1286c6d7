"""Models that were split over ranks when they were loaded: what is refused, and checkpoints of the others. This process
is the first of several ranks, of which no other exists."""

import copy
from types import SimpleNamespace

import mixtures
import pytest
import tiny
import torch
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

from smt_trainer import SMTError, SMTTrainer, convert_to_smt
from smt_trainer.training.tensor_parallel import admitting_checkpoints, refuse_unshown_parallelism

slices = pytest.importorskip("slices", reason="this transformers cuts models in another way", exc_type=ImportError)


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a model for as many ranks as a `DistributedConfig` asks for."""
    from transformers.distributed import DistributedConfig

    def load(model, **sizes):
        model.save_pretrained(tmp_path / "base")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", distributed_config=DistributedConfig(**sizes))

    return load


def trainer(model, arguments=None, distributed_type=DistributedType.MULTI_GPU, **config):
    """Make a stand-in for a trainer of a model, as accelerate would make it on GPUs."""
    defaults = {"parallelism_config": None, "torch_compile": False}
    accelerator = SimpleNamespace(distributed_type=distributed_type)
    arguments = SimpleNamespace(**defaults | (arguments or {}))
    return SimpleNamespace(model=model, args=arguments, accelerator=accelerator, smt_config=tiny.config(**config))


@pytest.mark.parametrize("sizes", [{"fsdp_size": 2}, {"pp_size": 2}, {"fsdp_size": 2, "ep_size": 2}], ids=str)
def test_a_model_that_is_split_without_tensor_parallelism_is_refused(sizes, load, tmp_path):
    model = mixtures.mixture() if "ep_size" in sizes else tiny.llama()
    with slices.silent_ranks(2):
        model = load(model, **sizes)
    # As on one process: accelerate, whose state is made once, must not see the ranks.
    message = "the model was sharded when it was loaded, but not by tensor parallelism. Load it without"
    with pytest.raises(SMTError, match=message):
        SMTTrainer(model, tiny.arguments(tmp_path), train_dataset=tiny.examples())


def test_tensor_parallelism_beside_other_parallelism_is_refused(load):
    with slices.silent_ranks(4):
        model = load(tiny.llama(), tp_size=2, fsdp_size=2)
        with pytest.raises(SMTError, match="cuts the model, and together with fsdp_size=2 blocks are not"):
            refuse_unshown_parallelism(trainer(model))


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"arguments": {"torch_compile": True}}, "together with torch_compile=True"),
        ({"arguments": {"use_vllm": True}}, "together with use_vllm=True"),
        ({"distributed_type": DistributedType.FSDP}, "together with FSDP or DeepSpeed"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "together with FSDP or DeepSpeed"),
        ({"score": "activation"}, "together with score='activation'"),
        ({"score": "qm_taylor", "class_column": "labels"}, "together with score='qm_taylor'"),
        ({"granularity": "row", "block_size": "auto", "train_dependents": True}, "together with train_dependents=True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_known_beside_tensor_parallelism_is_refused(beside, message, load):
    with slices.silent_ranks(2):
        model = load(tiny.llama(), tp_size=2)
        refuse_unshown_parallelism(trainer(model))
        with pytest.raises(SMTError, match=message):
            refuse_unshown_parallelism(trainer(model, **beside))


def test_a_cut_model_inside_another_is_refused(load):
    with slices.silent_ranks(2):
        model = torch.nn.Sequential(load(tiny.llama(), tp_size=2))
        with pytest.raises(SMTError, match=r"cuts a model inside the Sequential.*Pass the model that from_pretrained"):
            refuse_unshown_parallelism(trainer(model))
        with pytest.raises(SMTError, match=r"the tp_plan of the Sequential does not say how"):
            convert_to_smt(model, tiny.choose(model))
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_copied_reference_model_which_would_follow_the_trained_one_is_refused(load):
    with slices.silent_ranks(2):
        model, other = (load(tiny.llama(), tp_size=2) for _ in range(2))
        given = trainer(model)
        given.ref_model = other
        refuse_unshown_parallelism(given)
        given.ref_model = copy.deepcopy(model)
        with pytest.raises(SMTError, match=r"`.*` of this copy of a model computes with the weight of the original"):
            refuse_unshown_parallelism(given)


def test_a_quantised_base_that_is_cut_is_refused(load):
    with slices.silent_ranks(2):
        model = load(tiny.llama(), tp_size=2)
        model.config.quantization_config = {"quant_method": "fp8"}
        with pytest.raises(SMTError, match="together with a quantised base"):
            refuse_unshown_parallelism(trainer(model))


def test_a_model_cut_in_a_way_of_older_versions_is_refused():
    model = tiny.llama()
    model._tp_size = 2
    with pytest.raises(SMTError, match=r"no linear of the model is cut in a supported way. Load it under"):
        refuse_unshown_parallelism(trainer(model))


@pytest.mark.parametrize("cut", [True, False])
def test_checkpoints_are_admitted_for_models_that_are_cut_and_while_the_trainer_is_made(cut, tmp_path):
    arguments = tiny.arguments(tmp_path)
    model = SimpleNamespace(is_distributed_loading_by_transformers=cut)
    with pytest.raises(ZeroDivisionError), admitting_checkpoints(model, (model, arguments)):
        assert arguments.save_only_model == cut
        raise ZeroDivisionError
    assert not arguments.save_only_model
