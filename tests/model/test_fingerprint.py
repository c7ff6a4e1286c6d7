"""The fingerprint of a base: the same for the same values however they are stored, another for any other base."""

import copy
import math
import weakref
from unittest.mock import patch

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from smt_trainer import SMTError, convert_to_smt, from_delta, load_delta, merge_and_unload, save_delta
from smt_trainer.model import fingerprint
from smt_trainer.model.fingerprint import FEWEST, RUN, SAMPLED_IN_FULL, Fingerprint, read_sample, sample, saved_tensors
from smt_trainer.model.names import find_names
from smt_trainer.tensor_header import read_header


def differences(found: Fingerprint, model) -> list[str]:
    tensors = dict(saved_tensors(model))
    return found.differences(tensors, lambda key, stride, rows: sample(tensors[key], stride, rows))


def test_every_changed_value_of_a_small_tensor_is_found(llama):
    found = Fingerprint.of(llama, torch.float32)
    for name, parameter in llama.named_parameters():
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
            assert differences(found, llama) == [name]
            parameter.copy_(before)


def checksum(weight, dtype, stride) -> str:
    return fingerprint._checksums([sample(weight, stride)], str(dtype).removeprefix("torch."))[0]


@given(
    st.integers(2, 300), st.integers(1, 400), st.integers(0, 10**6), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_runs_of_a_large_tensor_lie_within_it_and_all_over_its_columns(rows, columns, stride, dtype):
    model = nn.Linear(columns, rows + SAMPLED_IN_FULL // columns, bias=False, dtype=dtype)
    count = model.weight.numel()
    found = fingerprint._apart(min(max(RUN, stride), count // FEWEST), columns)
    starts = torch.arange(count // found) * found
    assert len(starts) >= FEWEST - 1 and starts[-1] + RUN <= count
    assert math.gcd(found, columns) <= 2 and found % 2 == 0
    sampled = (starts[:, None] + torch.arange(RUN)).flatten()
    with torch.no_grad():
        model.weight.zero_()
        for place in (0, len(sampled) // 2, len(sampled) - 1):
            model.weight.view(-1)[sampled[place]] = 1
            assert checksum(model.weight, dtype, max(RUN, stride)) != 16 * "0"
            model.weight.view(-1)[sampled[place]] = 0
        model.weight.fill_(1)
        model.weight.view(-1)[sampled] = 0
        assert checksum(model.weight, dtype, max(RUN, stride)) == 16 * "0"


def test_a_relative_that_was_tuned_in_a_few_blocks_is_told_apart():
    """In a model of three million values, each of 100 draws of 8 blocks of 16x16 is found."""
    model = nn.Sequential(*(nn.Linear(576, 576, bias=False) for _ in range(9)))
    found = Fingerprint.of(model, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        near = copy.deepcopy(model)
        for layer, row, column in (
            torch.randint(0, 9 * 36 * 36, (8, 1), generator=generator)
            // torch.tensor([36 * 36, 36, 1])
            % torch.tensor([9, 36, 36])
        ):
            with torch.no_grad():
                near[layer].weight[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 1e-3
        assert differences(found, near)


@pytest.mark.parametrize(("made", "finer"), [("bfloat16", "float32"), ("float16", "float64"), ("float32", "float64")])
def test_a_finer_dtype_keeps_it(made, finer):
    base = tiny.llama().to(getattr(torch, made))
    found = Fingerprint.of(base, getattr(torch, made))
    assert differences(found, base.to(getattr(torch, finer))) == []


@pytest.mark.parametrize("size", ["1GB", "40KB"])
def test_shards_and_the_prefix_of_the_base_model_keep_it(size, llama, tmp_path):
    found = Fingerprint.of(llama, torch.float32)
    llama.save_pretrained(tmp_path / "base", max_shard_size=size)
    assert differences(found, AutoModelForCausalLM.from_pretrained(tmp_path / "base")) == []
    bare = AutoModel.from_pretrained(tmp_path / "base")
    assert differences(found, bare) == []
    with torch.no_grad():
        bare.layers[1].mlp.up_proj.weight[0] += 1
    assert differences(found, bare) == ["model.layers.1.mlp.up_proj.weight"]


def test_names_that_could_be_two_are_left_out():
    assert find_names(["a.b.weight"], ["model.a.b.weight"]) == {"a.b.weight": "model.a.b.weight"}
    assert find_names(["model.a.b.weight"], ["a.b.weight"]) == {"model.a.b.weight": "a.b.weight"}
    assert find_names(["b.weight"], ["x.b.weight", "y.b.weight"]) == {}


def test_statistics_of_normalisation_belong_to_the_base():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    found = Fingerprint.of(model, torch.float32)
    model(torch.randn(8, 4))
    assert sorted(differences(found, model)) == ["1.running_mean", "1.running_var"]


def relative(llama, tmp_path):
    """A base that another delta was merged into."""
    other = tiny.choose(llama, tiny.config(target_modules=["down_proj"], budget=1, score="random"))
    convert_to_smt(llama, other)
    tiny.step(llama, **tiny.batch())
    return merge_and_unload(llama)


def test_a_base_that_differs_in_one_block_elsewhere_is_refused(delta, tmp_path):
    folder, _ = delta
    near = relative(tiny.llama(), tmp_path)
    with pytest.raises(SMTError, match=r"other values in 1 of its 21 tensors, such as `model.layers.\d.mlp.down_proj"):
        load_delta(near, folder)
    near.save_pretrained(tmp_path / "near")
    with pytest.raises(SMTError, match="other values in 1 of its 21 tensors"):
        from_delta(folder, base=str(tmp_path / "near"))


def test_a_second_stage_names_no_base(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    convert_to_smt(model, tiny.choose(model))
    tiny.step(model, **tiny.batch())
    convert_to_smt(merge_and_unload(model), tiny.choose(model, tiny.config(target_modules="mlp", score="random")))
    save_delta(model, tmp_path / "second")
    with pytest.raises(SMTError, match="other values in"):
        from_delta(tmp_path / "second", base=str(base))


def test_a_bf16_delta_that_was_loaded_in_float32_and_saved_again_keeps_its_base(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    convert_to_smt(model, tiny.choose(model))
    tiny.step(model, **tiny.batch())
    save_delta(model, tmp_path / "bf16")
    again = load_delta(AutoModelForCausalLM.from_pretrained(base), tmp_path / "bf16")
    save_delta(again, tmp_path / "float32")
    third = from_delta(tmp_path / "float32", base=str(base))
    assert torch.equal(tiny.logits(third), tiny.logits(again))


def test_the_digest_tells_bases_apart(llama):
    first = Fingerprint.of(llama, torch.float32)
    assert first.digest == Fingerprint.of(tiny.llama(), torch.float32).digest
    assert first.digest != Fingerprint.of(tiny.llama(seed=1), torch.float32).digest
    assert fingerprint.Fingerprint.of(llama, torch.bfloat16).digest != first.digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_the_sample_of_a_file_is_that_of_the_tensor(dtype, tmp_path):
    shapes = ((), (0, 3), (5,), (64,), (SAMPLED_IN_FULL + 7,), (130, 1024), (3, 64, 1111))
    tensors = {str(shape): torch.randn(shape).to(dtype) for shape in shapes}
    save_file(tensors, tmp_path / "file.safetensors")
    places, _ = read_header(tmp_path / "file.safetensors", "file")
    for name, tensor in tensors.items():
        for stride in (RUN, 1000, 10**6):
            ours, theirs = read_sample(tmp_path, [places[name]], stride), sample(tensor, stride)
            assert ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("shape", [(4, 6, 5), (3, 128, 96), (7, 40, 111)], ids=str)
@pytest.mark.parametrize("stride", [RUN, 1000, 10**6])
def test_the_sample_of_parts_in_several_files_is_that_of_the_joined_tensor(stride, shape, tmp_path):
    tensor, places = torch.randn(shape), {}
    for number, matrix in enumerate(tensor):
        parts = {f"{number}.{place}": part.contiguous() for place, part in enumerate(matrix.tensor_split([1, 33]))}
        save_file(parts, tmp_path / f"{number}.safetensors")
        places |= read_header(tmp_path / f"{number}.safetensors", "file")[0]
    ours = read_sample(tmp_path, [places[name] for name in sorted(places)], stride)
    assert ours.tobytes() == sample(tensor, stride).tobytes()


def test_a_tensor_of_many_parts_opens_each_file_once(tmp_path):
    parts = torch.randn(300, 8, 8)
    save_file({f"{number:03}": part.contiguous() for number, part in enumerate(parts)}, tmp_path / "file.safetensors")
    places, _ = read_header(tmp_path / "file.safetensors", "file")
    with patch("builtins.open", wraps=open) as opening:
        ours = read_sample(tmp_path, [places[name] for name in sorted(places)], RUN)
    assert opening.call_count == 1 and ours.tobytes() == sample(parts, RUN).tobytes()


def test_a_sample_keeps_no_tensor_alive():
    """A copy: the fingerprint of a sharded model holds one gathered tensor at a time."""
    for shape in ((8,), (300, 300)):
        tensor = torch.randn(shape)
        alive = weakref.ref(tensor.untyped_storage())
        found = sample(tensor, RUN)
        del tensor
        assert alive() is None and len(found)


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_checksum_is_the_sum_of_the_values_as_integers(dtype, base_dtype):
    """As torch rounds and reads them; deltas keep these sums."""
    kind = getattr(torch, base_dtype)
    wide = torch.float64 if kind == torch.float64 else torch.float32
    for shape in ((0,), (7,), (300, 301)):
        tensor = torch.randn(shape).to(getattr(torch, dtype))
        found = checksum(tensor, kind, 1000)
        if tensor.numel() > SAMPLED_IN_FULL:
            step = fingerprint._apart(1000, 301)
            runs = [tensor.view(-1)[start : start + RUN] for start in range(0, tensor.numel() - step + 1, step)]
            values, integer = torch.cat(runs), torch.int64
        else:
            values, integer = tensor, torch.int32
        total = sum(values.to(kind).to(wide).view(integer).tolist())
        assert found == f"{total % 2**64:016x}"


@given(st.integers(1, 400), st.integers(1, 30), st.integers(0, 400))
def test_rows_of_the_base_give_its_checksum_whatever_was_added(rows, columns, added):
    before = nn.Embedding(10 * rows, columns)
    grown = nn.Embedding(10 * rows + added, columns)
    with torch.no_grad():
        grown.weight[: 10 * rows] = before.weight
    found = Fingerprint.of(grown, torch.float32, rows={"weight": 10 * rows})
    assert found.rows == {"weight": 10 * rows}
    assert differences(found, before) == differences(found, grown) == []
    with torch.no_grad():
        before.weight += 1
    assert differences(found, before) == ["weight"]


def test_what_is_left_out_changes_no_other_checksum():
    model = tiny.llama(vocab_size=1200, hidden_size=256)
    found, names = Fingerprint.of(model, torch.float32), [name for name, _ in model.named_parameters()]
    for name in names:
        other = Fingerprint.of(model, torch.float32, without=[name])
        left = {key: checksum for key, checksum in found.checksums.items() if key != name}
        assert (other.stride, other.checksums) == (found.stride, left)
