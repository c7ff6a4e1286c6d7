"""The whole script, on a tiny model and a folder of LLM-Adapters files."""

import json
import logging
import subprocess
import sys

import pytest
import quantised
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from recipes import finetune
from recipes.commonsense.task import COMMONSENSE
from recipes.parts.arguments import RecipeArguments, parse_arguments
from recipes.parts.methods import trained_parameters
from recipes.parts.task import Decoding
from smt_trainer import SMTConfig, SMTError, SMTTrainer
from smt_trainer.delta.delta import Delta
from smt_trainer.sparse.state import is_smt_model
from smt_trainer.training.warmup import Warmup

ARGUMENTS = (
    "--budget 6 --block_size 16 --smt_warmup_steps 2 --max_length 512 --validation_per_set 2 --num_beams 1 "
    "--max_new_tokens 4 --check_per_set 2 --per_device_train_batch_size 2 --max_steps 3 --learning_rate 0.05 "
    "--dtype float32 --save_strategy no --use_cpu true --disable_tqdm true"
).split()


def records(name, answers, count):
    shown = "/".join(answers)
    return [
        {
            "instruction": f"{name} question {number} of {count}?\n\nAnswer format: {shown}",
            "input": "",
            "output": f"the correct answer is {answers[number % len(answers)]}",
            "answer": answers[number % len(answers)],
        }
        for number in range(count)
    ]


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.fixture
def data(tmp_path):
    """Two question sets in LLM-Adapters' layout."""
    for name, answers in (("boolq", ("true", "false")), ("piqa", ("solution1", "solution2"))):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for split, count in (("train", 10), ("test", 4)):
            (folder / f"{split}.json").write_text(json.dumps(records(name, answers, count)))
    return tmp_path / "data"


@pytest.fixture
def base(tmp_path, model, tokenizer):
    """The tiny model on disk."""
    model.float().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def run(tmp_path, monkeypatch, data, base):
    """Return a function that runs the script with more arguments and returns its output folder."""

    def run(*more):
        output = tmp_path / "out"
        paths = ["--model", str(base), "--data", str(data), "--output_dir", str(output)]
        monkeypatch.setattr(sys, "argv", ["finetune", *ARGUMENTS, *paths, *more])
        finetune.main()
        return output

    return run


def test_it_leaves_delta_merged_checkpoint_picture_and_results(run):
    output = run()
    results = json.loads((output / "results.json").read_text())
    assert results["merged_equal"] is True
    assert results["steps"] == 3
    assert results["selection"].startswith("6 blocks of 16x16 (1,536 parameters)")
    for measure, summary in results["measures"].items():
        for part in ("before", "after"):
            sets = {name: sum(values) / len(values) for name, values in results[part][measure].items()}
            assert summary[part] == {"average": sum(sets.values()) / 2, "sets": sets}
            assert list(sets) == ["boolq", "piqa"]
    for key in ("trainable_fraction", "seconds_per_step", "peak_memory_bytes", "delta_bytes", "versions", "seed"):
        assert results[key], key
    assert (output / "selection.png").read_bytes().startswith(b"\x89PNG")
    assert "| **average** |" in (output / "results.md").read_text()
    assert (output / "delta" / "smt_delta.safetensors").is_file()


def test_results_hold_no_absolute_path(run, tmp_path):
    output = run()
    assert str(tmp_path) not in (output / "results.json").read_text() + (output / "results.md").read_text()


def test_the_merged_checkpoint_is_the_base_but_for_the_blocks(run, base):
    merged = AutoModelForCausalLM.from_pretrained(run() / "merged").state_dict()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed and all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for name in changed)


def test_a_second_run_replaces_the_results_of_the_first(run):
    run()
    assert json.loads((run("--max_steps", "2") / "results.json").read_text())["steps"] == 2


@pytest.mark.parametrize("quantise", [[], ["--load_in_4bit"]], ids=["plain", "4 bits"])
def test_a_run_that_was_cut_off_repeats_nothing(quantise, run, monkeypatch):
    epoch = [*quantise, *"--save_strategy epoch --num_train_epochs 1 --max_steps -1 --train_records 6".split()]
    whole = json.loads((run(*epoch) / "results.json").read_text())
    evaluated = []
    evaluate = COMMONSENSE.evaluate
    monkeypatch.setattr(COMMONSENSE, "evaluate", lambda *args: evaluated.append(args[0]) or evaluate(*args))
    monkeypatch.setattr(Warmup, "run", lambda _: pytest.fail("a second warm-up"))
    results = json.loads((run(*epoch, "--resume_from_checkpoint", "true") / "results.json").read_text())
    # The tuned model as a whole, then it and the merged checkpoint on a sample.
    assert len(evaluated) == 3 and all(is_smt_model(model) for model in evaluated[:2])
    assert (results["steps"], results["seconds_per_step"]) == (3, None)
    for key in ("before", "after", "measures", "steps", "selection"):
        assert results[key] == whole[key], key


def test_a_run_cut_off_before_its_selection_starts_from_the_evaluation_that_is_there(run, monkeypatch, tmp_path):
    with monkeypatch.context() as context:
        context.setattr(SMTTrainer, "train", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    before = json.loads((tmp_path / "out" / "before.json").read_text())
    results = json.loads((run("--resume_from_checkpoint", "true") / "results.json").read_text())
    assert results["before"] == before["values"] and results["steps"] == 3
    # Nothing was evaluated anew: the file is not written again.
    assert json.loads((tmp_path / "out" / "before.json").read_text()) == before


def test_the_results_before_training_are_logged_and_written_at_once(run, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(SMTTrainer, "train", interrupt)
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        run()
    assert "| set | questions | untuned, accuracy | untuned, accuracy by likelihood |" in caplog.text
    kept = json.loads((tmp_path / "out" / "before.json").read_text())
    assert {name: len(values) for name, values in kept["values"]["accuracy"].items()} == {"boolq": 4, "piqa": 4}


def test_another_method_is_trained_beside_it_on_the_same_records(run, monkeypatch):
    trainers = []

    def train(trainer, *arguments, _train=Trainer.train, **keywords):
        trainers.append(trainer)
        return _train(trainer, *arguments, **keywords)

    monkeypatch.setattr(Trainer, "train", train)
    output = run("--beside", "LoRA", "--beside_rate", "0.02", "--budget", "0.05")
    smt, lora = trainers
    assert isinstance(smt, SMTTrainer) and isinstance(lora.model, PeftModel)
    assert lora.train_dataset is smt.train_dataset and lora.args.learning_rate == 0.02 != smt.args.learning_rate
    results = json.loads((output / "results.json").read_text())
    found, measure = results["beside"], "accuracy by likelihood"
    trained = trained_parameters(lora.model)
    assert found["trained_parameters"] == trained
    # The ranks of so small a model are coarse.
    assert trained == pytest.approx(smt.smt_selection.trainable_parameters, rel=0.05)
    assert list(found["measures"]) == [measure]
    report = (output / "results.md").read_text()
    assert f"LoRA, {measure}" in report and f"Against LoRA ({trained:,} parameters, rate 0.02, " in report


def test_a_model_in_bfloat16_equals_its_merged_checkpoint(run):
    output = run("--dtype", "bfloat16")
    results = json.loads((output / "results.json").read_text())
    assert (results["dtype"], results["merged_equal"]) == ("bfloat16", True)
    assert AutoModelForCausalLM.from_pretrained(output / "merged").dtype == torch.bfloat16


# ---- a base that bitsandbytes quantises ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_over_a_base_in_4_bits_the_merged_checkpoint_is_dense_and_equals_the_trained_model(dtype, run):
    output = run("--load_in_4bit", "--dtype", dtype)
    results, text = json.loads((output / "results.json").read_text()), (output / "results.md").read_text()
    assert (results["quantization"], results["merged_onto"]) == ("bitsandbytes, 4 bits, nf4, double", "dequantized")
    assert (results["merged_equal"], results["merged_moved"]["largest"], results["steps"]) == (True, 0, 3)
    assert "| merged onto | dequantized weights |\n| merged checkpoint equal to the trained model | yes |" in text
    quantization = Delta.load(output / "delta").quantization
    assert quantization["bnb_4bit_compute_dtype"] == dtype
    merged = AutoModelForCausalLM.from_pretrained(output / "merged")
    assert merged.dtype == getattr(torch, dtype) and not hasattr(merged.config, "quantization_config")


def test_over_a_base_in_8_bits_the_report_says_how_far_the_merged_checkpoint_moved(run):
    output = run("--load_in_8bit", "--dtype", "bfloat16")
    results, text = json.loads((output / "results.json").read_text()), (output / "results.md").read_text()
    assert (results["quantization"], results["merged_onto"]) == ("bitsandbytes, 8 bits", "dequantized")
    assert 0 < results["merged_moved"]["divergence"] < 0.1
    assert "| merged checkpoint equal to the trained model | NO: over " in text


def test_the_evaluation_of_the_untuned_model_does_not_keep_a_quantised_base_from_learning(run):
    blocks = Delta.load(run("--load_in_4bit") / "delta").blocks
    untrained = Delta.load(run("--load_in_4bit", "--learning_rate", "0") / "delta").blocks
    assert all(not torch.equal(blocks[name], untrained[name]) for name in blocks)


def test_a_base_that_is_stored_quantised_is_trained_as_it_is_and_not_quantised_again(run, base, tmp_path):
    config = quantised.config("nf4", bnb_4bit_compute_dtype=torch.float32)
    quantised_base = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    quantised_base.save_pretrained(tmp_path / "stored")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "stored")
    stored = ("--model", str(tmp_path / "stored"))
    results = json.loads((run(*stored) / "results.json").read_text())
    assert (results["merged_onto"], results["merged_equal"]) == ("dequantized", True)
    match = r"the base is already quantised \(bitsandbytes, 4 bits, nf4, double\). Leave out --load_in_8bit"
    with pytest.raises(ValueError, match=match):
        run(*stored, "--load_in_8bit")


def test_both_numbers_of_bits_are_refused(run):
    with pytest.raises(ValueError, match="exclude each other"):
        run("--load_in_4bit", "--load_in_8bit")


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(run, tmp_path, base, data):
    alone = json.loads((run("--per_device_train_batch_size", "4") / "results.json").read_text())
    output = tmp_path / "both"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    paths = ["--model", str(base), "--data", str(data), "--output_dir", str(output)]
    subprocess.run([*launch, "recipes.finetune", *ARGUMENTS, *paths], check=True)
    together = json.loads((output / "results.json").read_text())
    assert together["merged_equal"] is True
    for key in ("before", "selection", "steps"):
        assert together[key] == alone[key], key


def test_a_profile_stands_for_its_arguments_and_later_ones_override_it(tmp_path, monkeypatch):
    profile = tmp_path / "own.args"
    profile.write_text("--budget 12\n--learning_rate 0.5\n--output_dir somewhere\n")
    monkeypatch.setattr(sys, "argv", ["finetune", "--profile", str(profile), "--learning_rate", "0.25"])
    _, _, smt_config, training = parse_arguments()
    assert (smt_config.budget, training.learning_rate, training.output_dir) == (12, 0.25, "somewhere")


def test_every_field_of_the_smt_configuration_is_a_flag(monkeypatch):
    flags = "--target_modules q_proj v_proj --score taylor --budget q_proj=4,v_proj=0.01 --layer_cap 2 --train_norm"
    monkeypatch.setattr(sys, "argv", ["finetune", *flags.split()])
    recipe, decoding, smt_config, _ = parse_arguments()
    assert smt_config == SMTConfig(
        target_modules=["q_proj", "v_proj"],
        score="taylor",
        budget={"q_proj": 4, "v_proj": 0.01},
        layer_cap=2,
        train_norm=True,
    )
    assert (recipe, decoding) == (RecipeArguments(), Decoding())


def test_a_missing_profile_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune", "--profile", "nowhere.args"])
    with pytest.raises(SystemExit, match=r"no profile at nowhere\.args"):
        parse_arguments()


@pytest.mark.parametrize("profile", ["default", "paper"])
def test_the_shipped_profiles_parse(monkeypatch, profile):
    monkeypatch.setattr(sys, "argv", ["finetune", "--profile", f"recipes/commonsense/{profile}.args"])
    _, _, smt_config, training = parse_arguments()
    block_size, steps = {"default": (64, 4), "paper": ("auto", 100)}[profile]
    assert smt_config == SMTConfig(budget=0.0084, block_size=block_size, smt_warmup_steps=steps)
    assert training.seed == 1234


def test_a_bad_budget_is_refused_before_anything_is_evaluated(run, monkeypatch):
    monkeypatch.setattr(COMMONSENSE, "evaluate", lambda *_: pytest.fail("evaluated first"))
    with pytest.raises(SMTError, match="budget"):
        run("--budget", "0")
