"""GPT-2, whose linears are transposed `Conv1D`s, from the warm-up to the merged checkpoint."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from smt_trainer import from_delta
from smt_trainer.cli import main


@pytest.mark.parametrize(
    ("score", "granularity"), [("grad_l1", "block"), ("grad_signed", "row"), ("magnitude", "column")]
)
def test_a_model_is_trained_saved_loaded_merged_inspected_and_plotted(score, granularity, tmp_path, capsys):
    shape = {} if granularity == "block" else {"granularity": granularity, "block_size": "auto"}
    tiny.gpt2().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = tiny.smt_trainer(model, tmp_path, tiny.config(score=score, target_modules="all-linear", **shape))
    trainer.train()
    trainer.save_model(tmp_path / "delta")
    trainer.merge_and_save(tmp_path / "merged")
    assert main(["merge", *(str(tmp_path / name) for name in ("base", "delta", "merged by smt"))]) == 0

    trained, before = tiny.logits(model), tiny.logits(tiny.gpt2())
    assert not torch.equal(trained, before)
    for name in ("merged", "merged by smt"):
        assert torch.equal(tiny.logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)), trained)
    assert torch.equal(tiny.logits(from_delta(tmp_path / "delta", base=str(tmp_path / "base"))), trained)

    selection = trainer.smt_selection
    assert {grid.transposed for grid in selection.grids.values()} == {True}
    pytest.importorskip("matplotlib")
    assert main(["inspect", str(tmp_path / "delta"), "--plot", str(tmp_path / "pictures")]) == 0
    assert selection.summary() in capsys.readouterr().out
    written = (tmp_path / "pictures" / "layers.csv").read_text().splitlines()[1:]
    assert sum(int(line.split(",")[2]) for line in written) == selection.num_blocks
    assert (tmp_path / "pictures" / "selection.png").is_file()
