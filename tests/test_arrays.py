"""Arrays of numpy do as torch's tensors do, bit for bit, with the dtypes that numpy lacks as well."""

import numpy as np
import pytest
import torch

from smt_trainer import SMTError
from smt_trainer.arrays import DTYPES, FLOATS, INTEGERS, all_finite, as_array, as_tensor, cast, dtype_name, wider

PATTERNS = torch.arange(-(2**15), 2**15).to(torch.int16)


def values(dtype: str) -> torch.Tensor:
    """Values of a dtype: all of 16 bits; of longer ones random bits, and all that lie at or near those of 16 bits."""
    kind = getattr(torch, dtype)
    if kind.itemsize == 2:
        return PATTERNS.view(kind)
    random = torch.randint(-(2**63), 2**63 - 1, (2**16,)).view(kind)
    halves = torch.cat([PATTERNS.view(torch.float16), PATTERNS.view(torch.bfloat16)]).to(kind)
    middles = torch.cat([(halves[1:] + halves[:-1]) / 2, halves])
    return torch.cat([random, *(middles * (1 + shift) for shift in (0, torch.finfo(kind).eps, -torch.finfo(kind).eps))])


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_floats_are_cast_as_torch_casts_them(source, target):
    given = values(source)
    given = given[given.isfinite()]
    expected, found = given.to(getattr(torch, target)), as_tensor(cast(as_array(given), target))
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_a_nan_stays_one():
    for source in FLOATS:
        nan = values(source)
        nan = nan[nan.isnan()]
        assert all(as_tensor(cast(as_array(nan), target)).isnan().all() for target in FLOATS)


@pytest.mark.parametrize("target", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("source", INTEGERS)
def test_integers_are_cast_as_torch_casts_them(source, target):
    given = torch.arange(-300, 300).to(getattr(torch, source))
    assert torch.equal(as_tensor(cast(as_array(given), target)), given.to(getattr(torch, target)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_array_shares_the_values_of_its_tensor(dtype):
    for shape in ((), (0, 3), (7, 6)):
        tensor = torch.randint(0, 2, shape).to(getattr(torch, dtype))
        array = as_array(tensor)
        assert array.shape == shape and dtype_name(array) == dtype
        again = as_tensor(array)
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
        assert again.data_ptr() == tensor.data_ptr() or not tensor.numel()


def test_an_array_that_torch_cannot_write_to_is_copied():
    odd = np.frombuffer(b"\0" + bytes(range(8)), DTYPES["bfloat16"], offset=1)
    assert as_tensor(odd).view(torch.uint8).tolist() == list(range(8))
    strided = np.arange(12.0).reshape(3, 4)[:, ::2]
    assert as_tensor(strided).tolist() == strided.tolist()


def test_a_dtype_that_no_file_holds_is_refused():
    with pytest.raises(SMTError, match="a tensor of complex128 cannot be stored; expected one of float32"):
        as_array(torch.zeros(1, dtype=torch.complex128))


@pytest.mark.parametrize("dtype", [*FLOATS, "float8_e4m3fn", "float8_e5m2"])
def test_all_finite_is_torchs_isfinite(dtype):
    given = values(dtype) if dtype in FLOATS else torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    finite = (given.float() if dtype not in FLOATS else given).isfinite().numpy()
    ours = as_array(given)
    assert all_finite(ours[finite]) and all_finite(ours[:0])
    others = ours[~finite]
    assert len(others) and not any(all_finite(one) for one in others[:: max(1, len(others) // 50)])


def test_integers_are_finite():
    assert all(all_finite(np.ones(3, DTYPES[dtype])) for dtype in INTEGERS)


def test_the_wider_dtype_is_the_one_that_torch_promotes_to():
    for first in FLOATS:
        for second in FLOATS:
            expected = torch.promote_types(getattr(torch, first), getattr(torch, second))
            assert getattr(torch, wider(first, second)) == expected
