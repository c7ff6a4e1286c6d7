"""`smt extract`, `diff`, `compose` and `unmerge`: what they print, and their exit status."""

import json
import subprocess
import sys

import arithmetic
import pytest
import tiny
from safetensors.torch import load_file

from smt_trainer import compose_deltas, diff_deltas
from smt_trainer.cli import main
from smt_trainer.delta.folder import DELTA_FILE


def smt(capsys, folder, *words):
    """Run a command in which names of folders begin with `@`; return the status and what it prints."""
    status = main([str(folder / word[1:]) if word.startswith("@") else word for word in words])
    return status, capsys.readouterr().out


def test_extract_says_what_is_taken_and_what_is_left(folder, capsys):
    status, output = smt(capsys, folder, "extract", "@base", "@merged", "@exact", "--block-size", "16")
    assert status == 0 and "30 blocks of 16x16 (7,680 parameters)" in output
    assert "merged onto the base, it gives the fine-tuned checkpoint bit for bit\n" in output
    flags = ["--budget", "10", "--granularity", "row", "--target-modules", "qkv"]
    status, output = smt(capsys, folder, "extract", "@base", "@merged", "@some", *flags)
    assert status == 0 and "10 blocks of 1x64" in output
    assert "% of the change is left (Frobenius norm), in " in output
    for delta in ("@exact", "@some"):
        assert smt(capsys, folder, "inspect", delta)[0] == 0
    assert smt(capsys, folder, "verify", "@base", "@exact", "@merged", "--logits")[0] == 0


def test_compose_says_where_deltas_touch(folder, capsys):
    words = ["compose", "@base", "@delta0", "@delta1", "@sum", "--weights", "1", "-0.5"]
    status, output = smt(capsys, folder, *words)
    shared = diff_deltas(folder / "delta0", folder / "delta1").total.shared
    assert status == 0 and f"the deltas overlap in {shared} blocks, in q_proj (" in output
    assert smt(capsys, folder, "merge", "@base", "@sum", "@summed")[0] == 0
    assert smt(capsys, folder, "verify", "@base", "@sum", "@summed", "--logits")[0] == 0
    assert smt(capsys, folder, "compose", "@base", "@delta0", "@delta1", "@mean", "--mean")[0] == 0
    assert smt(capsys, folder, "compose", "@base", "@delta0", "@delta1", "@mean")[0] == 2


@pytest.mark.parametrize("weight", ["-1", "-.5", "-1e-3"])
def test_a_weight_may_be_negative_however_it_is_written(weight, folder, capsys):
    words = ["compose", "@base", "@delta0", "@delta1"]
    assert smt(capsys, folder, *words, "@sum", "--weights", weight, "1")[0] == 0
    deltas = [folder / "delta0", folder / "delta1"]
    compose_deltas(folder / "base", deltas, folder / "expected", weights=[float(weight), 1])
    arithmetic.assert_equal(*(load_file(folder / name / DELTA_FILE) for name in ("sum", "expected")))


def test_unmerge_gives_the_base(folder, capsys):
    status, output = smt(capsys, folder, "unmerge", "@base", "@delta0", "@merged", "@back")
    assert (status, output) == (0, f"base in {folder / 'back'}\n")
    arithmetic.assert_equal(tiny.saved_tensors(folder / "back"), tiny.saved_tensors(folder / "base"))
    assert smt(capsys, folder, "unmerge", "@base", "@delta1", "@merged", "@other")[0] == 2


def test_diff_prints_a_table_or_json(folder, capsys):
    status, output = smt(capsys, folder, "diff", "@delta0", "@delta1")
    assert status == 0 and output.startswith("base         the same, ")
    table = {line.split()[0]: line.split()[1:] for line in output.splitlines()[3:]}
    found = diff_deltas(folder / "delta0", folder / "delta1")
    assert table["all"][:4] == ["30", "30", str(found.total.shared), f"{found.total.jaccard:.3f}"]
    status, output = smt(capsys, folder, "diff", "@delta0", "@delta1", "--json")
    result = json.loads(output)
    assert status == 0 and result["same_base"] is True
    assert result["total"]["shared"] == found.total.shared == sum(one["shared"] for one in result["modules"].values())
    assert result["projections"].keys() == found.projections.keys() and "jaccard" in result["projections"]["q_proj"]


def test_diff_tells_of_other_bases_and_whole_tensors(folder, capsys):
    other = tiny.llama(seed=3)
    arithmetic.train(other, folder / "other", train_norm=True)
    output = smt(capsys, folder, "diff", "@delta0", "@other")[1]
    assert output.startswith("base         not the same, ") and "whole        0 tensors in both" in output
    arithmetic.train(tiny.llama().bfloat16(), folder / "rounded")
    assert "do not show whether values agree" in smt(capsys, folder, "diff", "@delta0", "@rounded")[1]


def test_compose_and_unmerge_need_no_torch(folder):
    script = """import sys; from smt_trainer.cli import main
base, delta, other, merged, out, back = sys.argv[1:]
assert main(["compose", base, delta, other, out]) == main(["unmerge", base, delta, merged, back]) == 0
print(*{'torch', 'transformers', 'accelerate', 'huggingface_hub'} & set(sys.modules))"""
    names = [str(folder / name) for name in ("base", "delta0", "delta1", "merged", "out", "back")]
    run = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == ""
