import logging

import pytest
from transformers import LlamaConfig

from recipes.parts import dtype
from recipes.parts.dtype import fastest_dtype

CONFIG = LlamaConfig(hidden_size=64)


@pytest.fixture
def processor(monkeypatch):
    """Return a function that says what the machine is: a processor, the times of its products in milliseconds."""

    def be(has_products, times):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr(dtype, "has_bfloat16_products", lambda: has_products)
        monkeypatch.setattr(dtype, "seconds", lambda _, kind: times[str(kind).removeprefix("torch.")] / 1000)

    return be


@pytest.mark.parametrize(
    ("has_products", "bfloat16", "expected", "reason"),
    [
        (True, 50, "bfloat16", "take 50% of the time of those in float32"),
        (True, 95, "float32", "take 95% of the time of those in float32"),
        (True, 900, "float32", "take 900% of the time of those in float32"),
        (False, 50, "float32", "the processor has no bfloat16 products"),
    ],
)
def test_a_processor_takes_bfloat16_where_it_is_clearly_faster(
    processor, caplog, has_products, bfloat16, expected, reason
):
    processor(has_products, {"float32": 100, "bfloat16": bfloat16})
    with caplog.at_level(logging.INFO):
        assert fastest_dtype(CONFIG) == expected
    assert f"loaded in {expected}: " in caplog.text and reason in caplog.text


@pytest.mark.parametrize(("supported", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_takes_bfloat16_where_it_supports_it(monkeypatch, supported, expected):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: supported)
    assert fastest_dtype(CONFIG) == expected


def test_this_machine_has_an_answer():
    assert fastest_dtype(CONFIG) in ("bfloat16", "float32")
