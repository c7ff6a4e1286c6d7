"""`SMTConfig`: defaults of the paper, checks, JSON."""

import dataclasses
import inspect
import json
from dataclasses import fields
from typing import get_args

import pytest
from transformers import HfArgumentParser, TrainingArguments

from smt_trainer import SMTConfig, SMTError
from smt_trainer.settings import Decides, settings


def test_the_defaults_are_those_of_the_paper_but_for_the_length_of_the_warm_up():
    paper = SMTConfig.paper()
    assert (paper.target_modules, paper.budget, paper.smt_warmup_steps) == ("qkv", 0.0084, 100)
    assert (paper.score, paper.granularity, paper.scope) == ("grad_l1", "block", "global")
    assert SMTConfig().differences(paper) == ["smt_warmup_steps: 10 != 100"]
    assert SMTConfig.paper(budget=0.05, smt_warmup_steps=10) == SMTConfig(budget=0.05)


def test_every_field_says_what_it_decides_and_help_shows_its_help():
    shown = " ".join(inspect.getdoc(SMTConfig).split())
    for name, field in settings(SMTConfig).items():
        assert field.decides in get_args(Decides)
        assert len(field) > 20 and f"{name} (default {field.default!r}) {field}" in shown


def test_no_field_has_the_name_of_a_training_argument():
    assert not {item.name for item in fields(SMTConfig)} & {item.name for item in fields(TrainingArguments)}


@dataclasses.dataclass
class ScriptArguments:
    """Arguments that a script adds."""

    data: str = "here"


GIVEN = {
    "target_modules": (["q_proj", "v_proj"], "q_proj v_proj"),
    "exclude_modules": (r".*\.0\..*", r".*\.0\..*"),
    "budget": ({"attention": 0.0042, "mlp": 100}, "attention=0.0042,mlp=100"),
    "layer_cap": (0.5, "0.5"),
    "rank_cap": (256, "256"),
    "block_size": ((64, 32), "64x32"),
    "score": ("grad_signed", "mean_abs"),
    "smt_warmup_steps": (7, "7"),
    "modules_to_save": (["score"], "score"),
    "train_norm": (True, "true"),
    "selection": ("scores.safetensors", "scores.safetensors"),
}
CLASSES = (ScriptArguments, SMTConfig, TrainingArguments)


def test_an_argument_parser_reads_every_field_from_text():
    words = [word for name, (_, text) in GIVEN.items() for word in (f"--{name}", *text.split())]
    script, config, training = HfArgumentParser(CLASSES).parse_args_into_dataclasses(
        [*words, "--output_dir", "out", "--warmup_steps", "3", "--data", "there"], look_for_args_file=False
    )
    assert config == SMTConfig(**{name: value for name, (value, _) in GIVEN.items()})
    assert (script.data, training.warmup_steps) == ("there", 3)


def test_an_argument_parser_gives_the_defaults_without_flags():
    _, config, _ = HfArgumentParser(CLASSES).parse_args_into_dataclasses(
        ["--output_dir", "out"], look_for_args_file=False
    )
    assert config == SMTConfig()


@pytest.mark.parametrize("as_text", [False, True])
def test_a_yaml_file_is_read_by_trls_parser(as_text, tmp_path):
    yaml, trl = pytest.importorskip("yaml"), pytest.importorskip("trl")
    fields = {
        name: text if as_text and isinstance(text, str) and " " not in text else value
        for name, (value, text) in GIVEN.items()
    }
    fields["block_size"] = "64x32" if as_text else [64, 32]
    fields["train_norm"] = True
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(fields | {"output_dir": str(tmp_path)}))
    _, config, _ = trl.TrlParser(CLASSES).parse_args_and_config(["--config", str(path), "--smt_warmup_steps", "9"])
    assert config == SMTConfig(**{name: value for name, (value, _) in GIVEN.items()} | {"smt_warmup_steps": 9})


@pytest.mark.parametrize(
    ("given", "kept"),
    [(["mlp"], "mlp"), (["q_proj"], ["q_proj"]), ([".*q_proj"], ".*q_proj"), (("a", "b"), ["a", "b"]), (None, "qkv")],
)
def test_a_list_of_one_keyword_or_expression_is_unwrapped(given, kept):
    assert SMTConfig(target_modules=given).target_modules == kept


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*", "modules_to_save": []},
        {"block_size": (64, 32), "budget": 7, "scope": "per_module", "lowest_layer": 3},
        {"budget": {"attention": 0.0042, "mlp": 100}, "budget_of": "targets", "layer_cap": 0.5},
        {"granularity": "row", "score": "magnitude", "selection": "selection.json", "master_dtype": "bfloat16"},
    ],
)
def test_a_configuration_survives_json(values):
    config = SMTConfig(**values)
    assert SMTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": 0}, "budget must be a float in"),
        ({"budget": 0.0}, "budget must be a float in"),
        ({"budget": -1}, "budget must be a float in"),
        ({"budget": -0.1}, "budget must be a float in"),
        ({"budget": 1.5}, r"budget must be a float in .*; 0\.84 % is written 0\.0084\).* got 1\.5"),
        ({"budget": "0.84%"}, r"budget must be a count .* \(0\.84 % is written 0\.0084\), got '0\.84%'"),
        ({"budget": True}, "budget must be a float in"),
        ({"budget": float("nan")}, "budget must be a float in"),
        ({"budget": "a tenth"}, "budget must be a count of blocks such as 100 or a fraction"),
        ({"budget": {}}, "budget must be a float in .* or a dict of these by group"),
        ({"budget": {"": 3}}, "budget must be a float in"),
        ({"budget": {"mlp": 0, "attention": 3}}, r"budget\['mlp'\] must be a float in"),
        ({"budget": {"mlp": {"up_proj": 3}}}, r"budget\['mlp'\] must be a float in"),
        ({"budget_of": "all"}, "budget_of must be one of model, targets"),
        ({"layer_cap": 0}, "layer_cap must be an int >= 1"),
        ({"layer_cap": 1.5}, "layer_cap must be an int >= 1"),
        ({"layer_cap": True}, "layer_cap must be an int >= 1"),
        ({"rank_cap": 0}, "rank_cap must be an int >= 1"),
        ({"rank_cap": 0.5}, "rank_cap must be an int >= 1"),
        ({"block_size": 0}, "block_size must be"),
        ({"block_size": True}, "block_size must be"),
        ({"block_size": 16.0}, "block_size must be"),
        ({"block_size": (16,)}, "block_size must be"),
        ({"block_size": "large"}, "block_size must be"),
        ({"block_size": 16, "granularity": "row"}, "fixes the block's shape"),
        ({"granularity": "cell"}, "granularity must be one of block, row, column"),
        ({"score": "grad"}, r"score must be one of grad_l1, .*, random \(or mean_abs, abs_mean, L1, L2\), got 'grad'"),
        ({"score": ["grad_l1"]}, "score must be one of"),
        ({"accumulator_dtype": "float16"}, "accumulator_dtype must be one of float32, bfloat16"),
        ({"class_column": ""}, "class_column must be the name of a column"),
        ({"class_column": ["a"]}, "class_column must be the name of a column"),
        ({"scope": "layer"}, "scope must be one of"),
        ({"accumulator_device": "gpu"}, "accumulator_device must be one of"),
        ({"master_dtype": "float8"}, "master_dtype must be one of"),
        ({"smt_warmup_steps": 0}, "smt_warmup_steps must be an int >= 1"),
        ({"smt_warmup_steps": 1.0}, "smt_warmup_steps must be an int >= 1"),
        ({"lowest_layer": -1}, "lowest_layer must be an int >= 0"),
        ({"target_modules": []}, "target_modules must be"),
        ({"target_modules": ""}, "target_modules must be"),
        ({"exclude_modules": [1]}, "exclude_modules must be"),
        ({"selection": 5}, "selection must be the path of a file or folder, or what the file holds, got 5"),
    ],
)
def test_a_value_out_of_range_is_refused_naming_the_field(values, message):
    with pytest.raises(SMTError, match=message):
        SMTConfig(**values)


@pytest.mark.parametrize(
    ("alias", "score"), [("mean_abs", "grad_signed"), ("abs_mean", "grad_l1"), ("L1", "grad_l1"), ("L2", "grad_l2")]
)
def test_the_names_of_the_authors_code_are_aliases_of_ours(alias, score):
    config = SMTConfig(score=alias)
    assert config.score == score and config == SMTConfig.from_dict(SMTConfig().to_dict() | {"score": alias})
    assert config.differences(SMTConfig(score=score)) == []


def test_an_unknown_field_is_refused_and_the_known_ones_listed():
    with pytest.raises(SMTError, match=r"no field bugdet; its fields are .*budget"):
        SMTConfig.from_dict({"bugdet": 3})


@pytest.mark.parametrize(("text", "budget"), [("100", 100), ("0.0084", 0.0084), ("1e-2", 0.01), ("1", 1), ("1.0", 1.0)])
def test_a_budget_without_a_point_is_a_count_and_with_one_a_fraction(text, budget):
    parsed = SMTConfig(budget=text).budget
    assert parsed == budget and type(parsed) is type(budget)


def test_a_budget_by_groups_is_written_with_equals_signs():
    assert SMTConfig(budget="attention=0.0042, mlp=100").budget == {"attention": 0.0042, "mlp": 100}


@pytest.mark.parametrize("text", ["many", "", "0", "-3", "1.5", "nan", "mlp=", "=3", "mlp=3,attention", "mlp=1,mlp=2"])
def test_a_text_that_does_not_name_a_budget_is_refused(text):
    with pytest.raises(SMTError, match=r"budget must be|budget names a group twice"):
        SMTConfig(budget=text)


def test_differences_name_the_fields_that_decide_what_is_trained():
    ours, theirs = SMTConfig(budget=5, selection="a.json"), SMTConfig(budget=6, accumulator_device="cpu")
    assert ours.differences(theirs) == ["budget: 5 != 6"]
    assert ours.differences(ours) == []


def test_a_name_alone_is_a_list_of_it_and_a_keyword_or_a_regular_expression_stays():
    given = {"q_proj": ["q_proj"], "layers.0.q_proj": ["layers.0.q_proj"], "qkv": "qkv", r".*q_proj": r".*q_proj"}
    for text, kept in given.items():
        assert SMTConfig(target_modules=text).target_modules == SMTConfig(target_modules=[text]).target_modules == kept
