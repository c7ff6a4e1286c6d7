import pytest
import torch

from recipes.parts.inference import batches, inference


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_even_after_an_error(model, training):
    model.train(training)
    with pytest.raises(KeyError), inference(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        raise KeyError
    assert model.training == training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("most", [1, 7, 20, 1000])
def test_every_sequence_is_in_one_batch_and_no_batch_is_too_large(most):
    lengths = [3, 9, 1, 4, 4, 7, 2, 8]
    parts = list(batches(lengths, most))
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or len(part) * max(lengths[index] for index in part) <= most for part in parts)
    assert [lengths[part[0]] for part in parts] == sorted((lengths[part[0]] for part in parts), reverse=True)
