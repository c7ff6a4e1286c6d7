"""Model families: check the table in `families.md`, and that a step trains the chosen blocks and nothing else."""

import copy
import re

import pytest
import tiny
import torch
import transformers
from families import FAMILIES
from family_table import NONE, TABLE, UNTUNABLE, row
from packaging.version import Version
from reference import block_mask
from torch import nn

from smt_trainer import (
    BlockScores,
    Delta,
    SMTConfig,
    SMTError,
    convert_to_smt,
    merge_and_unload,
    merge_checkpoint,
    verify_merge,
)
from smt_trainer.delta.training_settings import training_settings
from smt_trainer.model.experts import ExpertMatrix
from smt_trainer.model.groups import LINEAR_KEYWORDS
from smt_trainer.model.kinds import is_linear, named_targets
from smt_trainer.model.language_model import find_language_model
from smt_trainer.model.names import by_projection
from smt_trainer.model.targets import find_targets
from smt_trainer.sparse.block_module import block_modules
from smt_trainer.sparse.write_back import write_back

ROWS = {line.split(" | ")[0].removeprefix("| "): line for line in TABLE.read_text().splitlines() if "%)" in line}
OF_THE_TABLE = Version(re.search(r"transformers (\d+\.\d+\.\d+)", TABLE.read_text())[1])
SPEAKING = [name for name, family in FAMILIES.items() if family.is_composite and name != "CLIP"]
EVERYTHING = "every linear"
# transformers 5.5 has other modules in these, or runs them differently.
CHANGED = frozenset("DeepSeek-V2, Mamba, Falcon-Mamba, Granite 4 hybrid, Jamba, Nemotron-H, ViT".split(", "))


@pytest.fixture(autouse=True)
def skip_missing(request):
    """Skip families that older releases of transformers lack, or implement differently."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if name and not hasattr(transformers, FAMILIES[name].architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {FAMILIES[name].architecture}")
    if name in CHANGED and Version(transformers.__version__) < OF_THE_TABLE:
        pytest.skip(f"transformers {transformers.__version__} has another {FAMILIES[name].architecture}")


def perturbed(name: str) -> nn.Module:
    """Build a model without zero weights, which would keep others from getting a gradient."""
    model, generator = FAMILIES[name].build(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 32
    return model


def config(name: str, target_modules, **fields) -> SMTConfig:
    """Make a configuration of two small blocks in each target."""
    fields = {"scope": "per_module", "budget": 2, "block_size": (4, 16), "modules_to_save": []} | fields
    return SMTConfig(target_modules=target_modules, smt_warmup_steps=1, **fields)


def linears(model: nn.Module) -> list[str]:
    """Name all linears and matrices of experts except the output embeddings."""
    found = {name for name, one in named_targets(model).items() if is_linear(one) or isinstance(one, ExpertMatrix)}
    return sorted(found - {"lm_head"})


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy all parameters and buffers, also those outside the state dict."""
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_says_what_the_keywords_mean(name):
    assert row(name, FAMILIES[name]) == ROWS[name]


def test_the_table_has_no_other_rows():
    assert ROWS.keys() == FAMILIES.keys()


def cases() -> list:
    """Make the cases: all linears at once in the default suite, each other keyword and all names in the slow one."""
    found = []
    for name, family in FAMILIES.items():
        found.append(pytest.param(name, "all-linear", id=f"{name}-all-linear"))
        cells = zip(LINEAR_KEYWORDS[:-1], ROWS[name].split(" | ")[1:], strict=False)
        others = [keyword for keyword, cell in cells if cell not in (NONE, UNTUNABLE)]
        for other in [*others, *([EVERYTHING] if family.is_composite else [])]:
            found.append(pytest.param(name, other, id=f"{name}-{other}", marks=pytest.mark.slow))
    return found


@pytest.mark.parametrize(("name", "target_modules"), cases())
def test_a_step_moves_the_chosen_blocks_and_nothing_else(name, target_modules):
    model, family = perturbed(name).train(), FAMILIES[name]
    reaches_all = target_modules == EVERYTHING
    target_modules = linears(model) if reaches_all else target_modules
    targets = find_targets(model, config(name, target_modules))
    inputs, plain = family.inputs(model), copy.deepcopy(model)
    scores = BlockScores.of(model, config(name, target_modules, score="grad_signed"), [inputs])
    tiny.assert_same(tensors(model), tensors(plain))
    unreached = list(scores.unreached)
    if reaches_all:
        # Some towers have layers whose output nothing uses.
        assert all("vision" in module for module in unreached)
    else:
        assert by_projection(unreached).keys() == set(family.read) & by_projection(targets).keys()

    selection = tiny.choose(model, config(name, target_modules, score="random", exclude_modules=unreached or None))
    assert {module: len(chosen) for module, chosen in selection.block_indices.items()} == dict.fromkeys(scores.grids, 2)
    convert_to_smt(model, selection)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.01)
    model(**inputs).loss.backward()
    without = [module for module, linear in block_modules(model) if not linear.blocks.grad.flatten(1).any(1).all()]
    assert not without
    optimizer.step()
    write_back(linear for _, linear in block_modules(model))
    merge_and_unload(model)

    before, after = tensors(plain), tensors(model)
    allowed = {key: torch.zeros_like(tensor, dtype=torch.bool) for key, tensor in before.items()}
    for module, indices in selection.block_indices.items():
        mask = block_mask(selection.grids[module], indices)
        stack, _, number = module.rpartition(".")
        place = allowed[stack][int(number)] if stack in allowed else allowed[f"{module}.weight"]
        place |= mask
        own, old = named_targets(model)[module].weight, named_targets(plain)[module].weight
        assert (own != old)[mask].any()
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        tiny.assert_same(after[key][~allowed[key]], tensor[~allowed[key]])


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.read])
def test_weights_that_are_only_read_are_refused_in_the_first_step_without_a_warm_up(name, tmp_path):
    model, family = FAMILIES[name].build(), FAMILIES[name]
    before = tensors(model)
    trainer = tiny.smt_trainer(model, tmp_path, config(name, "all-linear", score="random"))
    with pytest.raises(SMTError, match=rf"the model reads {family.read[0]} .* without calling.*No optimizer step"):
        trainer.train()
    merge_and_unload(model)
    tiny.assert_same(tensors(model), before)


# ---- models of images and text ----


@pytest.mark.parametrize("name", SPEAKING)
def test_keywords_mean_the_language_model_and_say_so(name, warnings):
    model = FAMILIES[name].build()
    inner = find_language_model(model)
    for keyword in LINEAR_KEYWORDS:
        if keyword != "experts":
            found = find_targets(model, SMTConfig(target_modules=keyword))
            assert found and all(target.startswith(f"{inner}.") for target in found)
    assert len(warnings()) == 4
    towers = [target for target in named_targets(model) if "vision" in target or "visual" in target]
    for line in warnings():
        assert f"means the language model, `{inner}`" in line
        named = re.findall(r"`([\w.]+)`", line)[1:]
        assert towers and all(any(one.startswith(f"{module}.") for module in named) for one in towers)
        assert "lm_head" not in named


@pytest.mark.parametrize("name", SPEAKING)
def test_names_reach_what_lies_beside_the_language_model(name, warnings):
    model = FAMILIES[name].build()
    inner = find_language_model(model)
    others = [target for target in linears(model) if not target.startswith(inner)]
    for wanted in (others, "|".join(map(re.escape, others))):
        found = find_targets(model, SMTConfig(target_modules=wanted))
        # nn.MultiheadAttention reads the weight of its output projection.
        assert found.keys() == {one for one in others if not one.endswith("head.attention.out_proj")}
    assert not any("language model" in line for line in warnings())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SPEAKING])
def test_other_models_have_no_part_beside(name, warnings):
    find_targets(FAMILIES[name].build(), SMTConfig(target_modules="all-linear"))
    assert not any("language model" in line for line in warnings())


# ---- checkpoints ----


@pytest.mark.parametrize("name", FAMILIES)
def test_merging_gives_the_trained_model(name, tmp_path):
    base, delta, merged = tmp_path / "base", tmp_path / "delta", tmp_path / "merged"
    family = FAMILIES[name]
    kind = type(family.build())
    family.build().save_pretrained(base)
    model = kind.from_pretrained(base)
    target_modules = linears(model) if family.is_composite else "all-linear"
    convert_to_smt(model, tiny.choose(model, config(name, target_modules, score="random")))
    tiny.disturb(model)
    Delta.of(model).save(delta)
    merge_checkpoint(base, delta, merged)
    assert not verify_merge(base, delta, merged).problems
    result, plain = kind.from_pretrained(merged), kind.from_pretrained(base)
    changed = {key for key, value in result.state_dict().items() if not torch.equal(value, plain.state_dict()[key])}
    assert len(changed) > 2
    tiny.assert_same(tensors(result), tensors(merge_and_unload(model)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_as_it_was_loaded_has_no_settings_of_its_own(name, tmp_path):
    model = FAMILIES[name].build()
    model.save_pretrained(tmp_path / "base")
    config = type(model).from_pretrained(tmp_path / "base").config
    (tmp_path / "config.json").write_text(config.to_json_string(use_diff=True))
    found = training_settings(tmp_path, str(tmp_path / "base"), {})
    assert found.keys() <= {"id2label", "label2id", "problem_type", "ignore_mismatched_sizes"}
