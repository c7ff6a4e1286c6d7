"""Models sharded over two ranks by FSDP2, tensor parallelism and DeepSpeed ZeRO, compared with one process: gloo, on a
CPU.

`sharded_script.py` has the runs and the shims that the CPU needs.
"""

import importlib.util
import re
from pathlib import Path

import pytest
import sharded_script
import tiny
import torch
from accelerate.commands.config.config_args import load_config_from_file
from sharded_script import CASES, LAUNCHED
from training_script import accelerate_launch, torchrun

from smt_trainer import BlockSelection, load_delta
from smt_trainer.delta.delta import DELTA_FILE, MANIFEST_FILE, Delta
from smt_trainer.training.trainer import SELECTION_FILE

CONFIGURATIONS = Path(__file__).parents[2] / "recipes" / "accelerate"
QUICK = ["fsdp", "fsdp-one-rank-loads", "fsdp-checkpointing", "fsdp-experts"]
HYBRID = ["fsdp-hybrid"]
OF_KINDS = [name for name in CASES if re.search("-(experts|tokens|convolutions)", name) and name not in QUICK]
FSDP_KINDS, ZERO_KINDS = ([name for name in OF_KINDS if how in name] for how in ("fsdp", "zero"))
SLOW = [name for name in CASES if "fsdp" in name and name not in QUICK + HYBRID + OF_KINDS]
QUICK_SLICES = ["tp", "tp-one-block", "tp-rows", "tp-experts"]
SLOW_SLICES = [name for name in CASES if "tp" in name and name not in QUICK_SLICES]
ZERO = [name for name in CASES if "zero" in name and name not in OF_KINDS]
GROUPS = (QUICK, SLOW, HYBRID, FSDP_KINDS, QUICK_SLICES, SLOW_SLICES, ZERO, ZERO_KINDS)
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed: pip install '.[deepspeed]'")
HAS_SLICES = importlib.util.find_spec("transformers.distributed.tensor_parallel") is not None
needs_slices = pytest.mark.skipif(not HAS_SLICES, reason="this transformers cuts models in another way")
MARKS = dict.fromkeys(SLOW + HYBRID + FSDP_KINDS, pytest.mark.slow) | dict.fromkeys(ZERO + ZERO_KINDS, needs_deepspeed)
MARKS |= dict.fromkeys(QUICK_SLICES, needs_slices) | dict.fromkeys(SLOW_SLICES, (needs_slices, pytest.mark.slow))
# With ACCELERATE_USE_CPU, accelerate leaves DeepSpeed out; DeepSpeed has its own variable.
ENVIRONMENT = {"fsdp": {"ACCELERATE_USE_CPU": "true"}, "zero": {"DS_ACCELERATOR": "cpu"}}

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
every_case = pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in CASES])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function that gives the folder of a case; similar cases share one launch."""
    folders = {}

    def folder(name):
        group = next(group for group in GROUPS if name in group)
        if name not in folders:
            where = tmp_path_factory.mktemp("sharded")
            ranks = 4 if group is HYBRID else 2
            environment = ENVIRONMENT["zero" if group in (ZERO, ZERO_KINDS) else "fsdp"]
            torchrun(sharded_script.__file__, ranks, where, *group, **environment)
            folders.update({name: where / name for name in group})
        return folders[name]

    return folder


@pytest.fixture
def ranks_of(folder_of):
    """Return a function that gives what each rank of a case wrote."""
    return lambda name: [torch.load(folder_of(name) / f"result-{rank}.pt", weights_only=True) for rank in range(2)]


def stored(tensors, name):
    """Return the weight of a target in a state dict, as it is stored."""
    stack, _, index = name.rpartition(".")
    return tensors[stack][int(index)] if stack in tensors else tensors[f"{name}.weight"]


@every_case
def test_all_ranks_end_with_the_same_blocks_and_weights(name, ranks_of):
    first, second = ranks_of(name)
    tiny.assert_same(first, second)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in CASES if "bf16" not in name]
)
def test_two_ranks_select_and_train_like_one_process(name, ranks_of, tmp_path):
    """bf16 is left out: both ways of sharding cast the weights, one process casts the activations."""
    ours, single = ranks_of(name)[0]["trained"], sharded_script.run(tmp_path, CASES[name], 1)["trained"]
    tiny.assert_same(ours["block_indices"], single["block_indices"])
    for key in ("blocks", "weights"):
        torch.testing.assert_close(ours[key], single[key], rtol=1e-6, atol=1e-7)
    for key in ("losses", "eval_losses"):
        assert ours[key] == pytest.approx(single[key], rel=1e-6)


@every_case
def test_only_the_blocks_change_and_forward_reads_them(name, ranks_of, folder_of):
    ours, base = ranks_of(name)[0]["trained"], sharded_script.base_model(CASES[name])
    # With bf16, DeepSpeed casts the weights of the model.
    base = (base.bfloat16() if name == "zero2-bf16" else base).float().state_dict()
    changed = {key: weight != base[key] for key, weight in ours["weights"].items()}
    grids = BlockSelection.load(folder_of(name) / "run" / SELECTION_FILE).grids
    for module, blocks in ours["blocks"].items():
        weight, mask = (grids[module].split(stored(tensors, module)) for tensors in (ours["weights"], changed))
        rows, columns = ours["block_indices"][module].unbind(1)
        tiny.assert_same(weight[rows, columns], blocks)
        assert mask[rows, columns].flatten(1).any(1).all()
        mask[rows, columns] = False
    if "tokens-tied" in name:
        tiny.assert_same(ours["weights"]["lm_head.weight"], ours["weights"]["model.embed_tokens.weight"])
        del changed["lm_head.weight"]
    for key, mask in changed.items():
        whole = key.removesuffix(".weight").rpartition(".")[2] in CASES[name].get("smt", {}).get("modules_to_save", ())
        assert mask.any() if whole else not mask.any()


@every_case
def test_a_resumed_run_ends_where_the_uninterrupted_one_ends(name, ranks_of):
    ours = ranks_of(name)[0]
    tiny.assert_same(ours["resumed"], ours["trained"])


@every_case
def test_the_best_blocks_are_loaded_back(name, ranks_of, folder_of):
    ours, best = ranks_of(name)[0], Delta.load(folder_of(name) / "run" / "checkpoint-2")
    tiny.assert_same(ours["reloaded"]["blocks"], {module: blocks.float() for module, blocks in best.blocks.items()})
    assert ours["reevaluated"] == ours["trained"]["eval_losses"][0] != ours["evaluated"]


@every_case
def test_delta_and_merged_checkpoint_give_the_trained_weights(name, ranks_of, folder_of):
    folder, expected = folder_of(name), ranks_of(name)[0]["trained"]["weights"]
    loaded = load_delta(sharded_script.base_model(CASES[name]), folder / "delta", merge=True)
    loaded = loaded.bfloat16() if name == "zero2-bf16" else loaded
    tiny.assert_same({key: weight.float() for key, weight in loaded.state_dict().items()}, expected)
    merged = type(loaded).from_pretrained(folder / "merged")
    tiny.assert_same({key: weight.float() for key, weight in merged.state_dict().items()}, expected)


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS[name]) for name in QUICK_SLICES + SLOW_SLICES])
def test_a_delta_is_loaded_into_slices_of_the_base(name, ranks_of):
    ours = ranks_of(name)[0]
    tiny.assert_same(ours["loaded"], ours["trained"]["weights"])


@every_case
def test_a_checkpoint_holds_the_delta_and_the_state_of_training_but_no_model(name, folder_of):
    checkpoint = folder_of(name) / "run" / "checkpoint-4"
    files = {path for path in checkpoint.rglob("*") if path.is_file()}
    assert {MANIFEST_FILE, DELTA_FILE, "trainer_state.json", "rng_state_0.pth", "rng_state_1.pth"} <= {
        path.name for path in files
    }
    # DeepSpeed adds a script of 40 kB, and saves the trained parameters padded and per rank.
    model = sharded_script.base_model(CASES[name])
    frozen = 4 * sum(parameter.numel() for parameter in model.parameters())
    # A module trained whole is saved five times: in the delta, the model's state, the master and two moments.
    whole = 5 * 4 * model.lm_head.weight.numel() if "whole-module" in name else 0
    assert sum(path.stat().st_size for path in files if path.suffix != ".py") < frozen / 2 + whole


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "fsdp" in name else needs_deepspeed) for name in LAUNCHED]
)
def test_a_provided_accelerate_configuration_shards_as_it_says(name, tmp_path):
    accelerate_launch(
        CONFIGURATIONS / f"{name}.yaml", sharded_script.__file__, tmp_path, "launched", name, **ENVIRONMENT[name[:4]]
    )
    ours = torch.load(tmp_path / name / "result-0.pt", weights_only=True)["trained"]
    single = sharded_script.run(tmp_path / "single", LAUNCHED[name], 1)["trained"]
    torch.testing.assert_close(ours["weights"], single["weights"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.iterdir()), ids=lambda path: path.stem)
def test_accelerate_reads_each_provided_configuration(path):
    expected = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert load_config_from_file(str(path)).distributed_type == expected[path.stem]
