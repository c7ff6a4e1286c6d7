"""A run that pushes to the hub: each commit is a delta with its card."""

import re

import pytest
import tiny
import transformers
from huggingface_hub import ModelCard

from smt_trainer import from_delta, load_delta
from smt_trainer.delta.delta import DELTA_FILE, MANIFEST_FILE


@pytest.fixture
def trainer(hub, base, tmp_path):
    """Train from a base on the hub, with a push at each of two checkpoints, and push once more; return the trainer."""
    hub.upload("someone/base", base)
    model = transformers.AutoModelForCausalLM.from_pretrained("someone/base")
    trainer = tiny.smt_trainer(
        model,
        tmp_path / "run",
        push_to_hub=True,
        hub_model_id="me/tiny-delta",
        save_strategy="steps",
        save_steps=2,
        hub_always_push=True,
    )
    trainer.train()
    trainer.push_to_hub()
    return trainer


@pytest.fixture
def commits(trainer, hub):
    """Return the commits that hold a delta, oldest first."""
    return [sha for sha, files in hub.repositories["me/tiny-delta"].commits.items() if DELTA_FILE in files]


def test_each_checkpoint_is_a_commit_that_loads_as_it_was(trainer, commits, base, tmp_path):
    plain = transformers.AutoModelForCausalLM.from_pretrained
    for step, commit in zip((2, 4), commits, strict=False):
        saved = load_delta(plain(base), tmp_path / "run" / f"checkpoint-{step}", merge=True)
        tiny.assert_same(tiny.logits(from_delta("me/tiny-delta", revision=commit)), tiny.logits(saved))


def test_the_last_commit_is_the_trained_model(trainer, hub):
    tiny.assert_same(tiny.logits(from_delta("me/tiny-delta")), tiny.logits(trainer.model))
    sent = [name for repository, name in hub.sent if repository == "me/tiny-delta"]
    assert set(sent) == {DELTA_FILE, "config.json", "generation_config.json"}


def test_no_commit_holds_a_whole_model(commits, hub):
    assert len(commits) == 3
    for commit in commits:
        files = hub.files("me/tiny-delta", commit)
        assert MANIFEST_FILE in files and not any(name.startswith(("model", "pytorch_model")) for name in files)


def test_the_card_names_base_selection_budget_and_runs(trainer, hub):
    card = hub.files("me/tiny-delta")["README.md"].decode()
    base = hub.repositories["someone/base"].branches["main"]
    assert f"trained values of 12 blocks of the weights of `someone/base@{base}`" in card
    assert trainer.smt_selection.summary() in card
    assert "`score='grad_l1'`, `smt_warmup_steps=2`, `scope='global'`, `budget=12`" in card
    assert "`budget_of='model'`, `layer_cap=None`" in card
    head = ModelCard(card).data
    assert (head.base_model, head.base_model_relation) == ("someone/base", "adapter")
    assert (head.pipeline_tag, head.library_name) == ("text-generation", "smt_trainer")
    assert "generated_from_trainer" in head.tags
    names = {}
    exec(re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1], names)
    tiny.assert_same(tiny.logits(names["model"]), tiny.logits(trainer.model))
