"""The benchmark of a training step over a base that bitsandbytes has quantised, on a tiny model."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recipes.benchmarks import training_step
from recipes.benchmarks.estimator import compare
from recipes.benchmarks.parts.memory import account, storages
from recipes.benchmarks.parts.methods import FLOOR, FULL, METHODS, SECOND_FLOOR, SMT, UNABLE, Variant
from recipes.benchmarks.parts.models import tiny
from recipes.benchmarks.parts.quantised import BITS, flop_formulas, quantised_linears, scales
from recipes.benchmarks.parts.setting import SHAPES, Setting
from recipes.benchmarks.parts.training import Training, copy_for
from smt_trainer.estimation.quantised import QuantisedBase

pytest.importorskip("bitsandbytes")

PLAIN = Setting(tiny(8), "bf16", batch=1, length=8)
SETTINGS = {base: replace(PLAIN, base=base) for base in BITS}
ABLE = [(base, method) for base in BITS for method in (FLOOR, *METHODS) if method not in UNABLE[base]]
BUDGET = 0.05


@pytest.fixture(scope="module")
def models():
    return {base: setting.build() for base, setting in SETTINGS.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "tiny", PLAIN.shape)
        words = ["--shape", "tiny", "--base", "nf4", "--rounds", "1", "--curve-rounds", "0", "--budgets", str(BUDGET)]
        words += ["--batch", "1", "--length", "8", "--methods", FULL, "LoRA", SMT]
        training_step.main([*words, "--output", str(folder)])
    return folder


def training_of(method, model, setting):
    variant = Variant(method, None if method in (FLOOR, FULL) else BUDGET)
    return Training(copy_for(variant, model), variant, setting)


def values(model):
    """Return what is stored of a model: of a quantised weight its numbers, scales and tables."""
    return [tensor.detach().clone() for tensor in (*model.parameters(), *scales(model))]


def test_the_report_has_the_methods_that_can_and_names_those_that_cannot(files):
    results = json.loads((files / "step-tiny-bf16-nf4.json").read_text())
    assert [row["method"] for row in results["methods"]] == [FLOOR, SECOND_FLOOR, "LoRA", SMT]
    assert results["setting"]["base"] == "nf4" and "bitsandbytes" in results["versions"]
    report = (files / "step-tiny-bf16-nf4.md").read_text()
    assert "NF4" in report and all(method in report for method in UNABLE["nf4"])
    own = results["methods"][-1]["own_work"]
    assert "putting blocks in" in own and "write-back" not in own
    shares = [part["clock"]["median"] for part in own.values()]
    assert len(shares) == 4 and all(share > 0 for share in shares) and sum(shares) < 1


def test_the_estimator_reads_the_bits_of_a_result(files):
    for row in compare(json.loads((files / "step-tiny-bf16-nf4.json").read_text())):
        assert row["base"] == "nf4"
        if row["method"] == SMT:
            assert row["estimated_bytes"] == pytest.approx(row["measured_bytes"], rel=0.1)


@pytest.mark.parametrize(("base", "method"), ABLE)
def test_a_method_trains_and_leaves_the_base_alone_that_it_shares(base, method, models):
    before = values(models[base])
    training = training_of(method, models[base], SETTINGS[base])
    tokens = PLAIN.tokens()
    loss = training.loss(tokens).item()
    for _ in range(2):
        training.step(tokens)
    assert all(map(torch.equal, values(models[base]), before))
    assert (training.loss(tokens).item() < loss) == (method != FLOOR)
    own = storages([*training.model.parameters(), *scales(training.model)])
    weights = [linear.weight for linear in quantised_linears(models[base])]
    assert storages([*weights, *scales(models[base])]).items() <= own.items()


@pytest.mark.parametrize("base", BITS)
def test_the_weights_take_the_bytes_that_the_estimator_says(base, models):
    weights = [linear.weight for linear in quantised_linears(models[base])]
    held = storages([*weights, *scales(models[base])])
    assert sum(held.values()) == QuantisedBase.of(PLAIN.build(), BITS[base]).nbytes


@pytest.mark.parametrize("base", BITS)
def test_the_floor_computes_what_it_does_over_plain_weights(base, models):
    expected = account(training_of(FLOOR, PLAIN.build(), PLAIN), PLAIN.tokens())
    found = account(training_of(FLOOR, models[base], SETTINGS[base]), PLAIN.tokens())
    assert found["flops"] == expected["flops"]
    assert found["live_bytes"] < expected["live_bytes"]


def test_the_product_of_8_bit_integers_is_counted(models):
    linear, x = quantised_linears(models["int8"])[0], torch.randn(3, 64)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        # In training, bitsandbytes multiplies floats on a CPU.
        linear.eval()(x)
        linear.train()
    assert counter.get_total_flops() == 2 * 3 * 64 * 64


def test_evaluation_does_not_repack_4_bit_weights(models):
    before = values(models["nf4"])
    model = training_of(FLOOR, models["nf4"], SETTINGS["nf4"]).model.eval()
    with torch.no_grad():
        model(PLAIN.tokens())
    assert all(map(torch.equal, values(model), before))
