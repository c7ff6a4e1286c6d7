"""A model of images with convolutions and batch normalisation, from the warm-up to the merged checkpoint."""

import shutil

import images
import pytest
import tiny
import torch
from ranks import assert_two_ranks_train_like_one_process
from torch import nn

from smt_trainer import (
    SMTError,
    SMTTrainer,
    applied,
    convert_to_smt,
    delta_patches,
    export_lora,
    from_delta,
    load_delta,
    save_delta,
)
from smt_trainer.cli import main
from smt_trainer.delta.delta import Delta
from smt_trainer.sparse.block_module import block_modules

RUNS = {
    "rows": {"score": "taylor"},
    "by class": {"score": "qm_taylor", "modules_to_save": ["classifier"]},
    "columns": {"score": "activation", "granularity": "column", "train_norm": True},
    "dependents": {"score": "grad_signed", "train_dependents": True, "train_norm": True},
}


def smt_trainer(model, folder, config, **overrides) -> SMTTrainer:
    args = tiny.arguments(folder, **overrides)
    return SMTTrainer(model=model, args=args, train_dataset=images.examples(), smt_config=config)


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images.batch()["pixel_values"]).logits


@pytest.fixture
def base(tmp_path):
    images.resnet().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("fields", RUNS.values(), ids=RUNS)
def test_a_resnet_is_trained_saved_loaded_and_merged(fields, base, tmp_path):
    kind = type(images.resnet())
    trainer = smt_trainer(kind.from_pretrained(base), tmp_path / "run", images.config(**fields))
    trainer.train()
    trainer.save_model(tmp_path / "delta")
    trainer.merge_and_save(tmp_path / "merged")
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "delta", "by smt"))]) == 0
    assert main(["verify", *(str(tmp_path / name) for name in ("base", "delta", "by smt"))]) == 0
    assert main(["inspect", str(tmp_path / "delta")]) == 0
    trained = trainer.model.eval()
    assert not torch.equal(outputs(trained), outputs(images.resnet()))
    plain = [kind.from_pretrained(tmp_path / name) for name in ("merged", "by smt")]
    plain.append(from_delta(tmp_path / "delta", base=str(base)))
    for model in plain:
        assert torch.equal(outputs(model), outputs(trained))
    selection = trainer.smt_selection
    whole = Delta.load(tmp_path / "delta").whole
    for name, before in images.resnet().state_dict().items():
        module, after = name.removesuffix(".weight"), plain[0].state_dict()[name]
        if module in selection.block_indices:
            inside = torch.zeros(before.shape, dtype=torch.bool)
            indices, grid = torch.from_numpy(selection.block_indices[module]), selection.grids[module]
            grid.scatter_(inside, indices, torch.ones(len(indices), *grid.block_shape, dtype=torch.bool))
            assert torch.equal(after[~inside], before[~inside]) and not torch.equal(after[inside], before[inside])
        else:
            assert torch.equal(after, before) != (name in whole)


@pytest.mark.parametrize("train_norm", [False, True])
def test_running_statistics_are_kept_in_checkpoint_delta_and_resumed_run(train_norm, base, tmp_path):
    """Frozen or not, batch normalisation goes on with its statistics in training, as it does in any Trainer."""
    kind, config = type(images.resnet()), images.config(train_norm=train_norm)
    whole_run = smt_trainer(kind.from_pretrained(base), tmp_path / "a", config, save_strategy="steps", save_steps=2)
    whole_run.train()
    before, after = images.resnet().state_dict(), whole_run.model.state_dict()
    name = "resnet.embedder.embedder.normalization"
    assert after[f"{name}.num_batches_tracked"] == 4
    assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"]) != train_norm
    stored = Delta.load(tmp_path / "a" / "checkpoint-4").whole
    assert {key for key in before if "running" in key or "tracked" in key} <= stored.keys()
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    resumed = smt_trainer(kind.from_pretrained(base), tmp_path / "a", config, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    tiny.assert_same(resumed.model.state_dict(), after)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_ranks_train_convolutions_like_one_process(tmp_path):
    """Without batch normalisation, which under DDP has the statistics of the rank's own examples, in any Trainer."""
    config, data = images.config(score="grad_l1"), images.examples()
    assert_two_ranks_train_like_one_process(
        tmp_path, make=images.convnext, smt_config=config, kind=SMTTrainer, data=data, learning_rate=0.1
    )


def test_statistics_of_a_model_in_evaluation_mode_are_not_stored(base, tmp_path):
    model = type(images.resnet()).from_pretrained(base)
    convert_to_smt(model, tiny.choose(model, images.config(score="random", modules_to_save=[])))
    tiny.step(model.eval(), **images.batch())
    save_delta(model, tmp_path / "delta")
    assert not Delta.load(tmp_path / "delta").whole
    assert torch.equal(outputs(from_delta(tmp_path / "delta", base=str(base))), outputs(model))


def test_a_model_in_groups_trains_on_in_its_own_loop_and_after_loading(tmp_path):
    model = images.ResNeXt().train()
    selection = tiny.choose(model, images.config(score="random", budget=20, train_bias=True))
    convert_to_smt(model, selection)
    for _ in range(2):
        tiny.step(model, **images.batch())
        model.zero_grad()
    save_delta(model, tmp_path / "delta", master=True)
    again = load_delta(images.ResNeXt(), tmp_path / "delta").train()
    for each in (model, again):
        tiny.step(each, **images.batch(seed=2))
    tiny.assert_same(again.state_dict(), model.state_dict())
    assert {name for name, _ in block_modules(again)} == selection.block_indices.keys()


def test_a_delta_of_convolutions_is_swapped_in_and_out_and_patches_a_checkpoint(base, tmp_path):
    kind = type(images.resnet())
    model = convert_to_smt(kind.from_pretrained(base), tiny.choose(images.resnet(), images.config(score="random")))
    tiny.step(model.train(), **images.batch())
    save_delta(model, tmp_path / "delta")
    plain, trained = kind.from_pretrained(base), outputs(model)
    with applied(plain, tmp_path / "delta"):
        assert torch.equal(outputs(plain), trained)
    tiny.assert_same(plain.state_dict(), images.resnet().state_dict())
    state = plain.state_dict()
    for patch in delta_patches(base, tmp_path / "delta"):
        flat = state[patch.name].view(-1)
        assert patch.shape == state[patch.name].shape
        flat[slice(None) if patch.indices is None else patch.indices.long()] = patch.values
    assert torch.equal(outputs(plain), trained)


def test_a_delta_of_convolutions_is_no_lora(base, tmp_path):
    model = type(images.resnet()).from_pretrained(base)
    convert_to_smt(model, tiny.choose(model, images.config(score="random")))
    save_delta(model, tmp_path / "delta")
    with pytest.raises(SMTError, match=r"convolution` is a convolution, and an adapter is written for linears only"):
        export_lora(base, tmp_path / "delta", tmp_path / "adapter")


class Norms(nn.Module):
    """One normalisation of every family, each on what suits it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norms = nn.ModuleDict(
            {
                "batch1": nn.BatchNorm1d(8),
                "batch2": nn.BatchNorm2d(8),
                "batch3": nn.BatchNorm3d(8),
                "instance": nn.InstanceNorm1d(8, affine=True, track_running_stats=True),
                "group": nn.GroupNorm(2, 8),
                "layer": nn.LayerNorm(8),
                "rms": nn.RMSNorm(8),
            }
        )

    def forward(self, x):
        x = self.linear(x)
        y = x.view(2, 2, 2, 8).movedim(-1, 1)
        shapes = {"batch1": y.flatten(2), "instance": y.flatten(2), "batch2": y, "batch3": y[:, :, None], "group": y}
        return sum(norm(shapes.get(name, x)).square().exp().mean() for name, norm in self.norms.items())


def test_norms_of_every_family_are_trained_whole_with_their_statistics(tmp_path):
    model = Norms().train()
    before, x = tiny.weights(model), torch.randn(8, 8)
    config = tiny.config(target_modules=["linear"], block_size=4, budget=1, score="random", train_norm=True)
    convert_to_smt(model, tiny.choose(model, config))
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(x).backward()
    optimizer.step()
    save_delta(model, tmp_path / "delta")
    plain = Norms()
    plain.load_state_dict(before)
    plain = load_delta(plain, tmp_path / "delta", merge=True).eval()
    assert torch.equal(plain(x), model.eval()(x))
    # An instance normalisation does not count its batches.
    unchanged = {"linear.bias", "norms.instance.num_batches_tracked"}
    assert {name for name, tensor in plain.state_dict().items() if torch.equal(tensor, before[name])} == unchanged
