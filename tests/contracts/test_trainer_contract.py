"""The private methods of `Trainer` that the library overrides or calls. A release that changes one fails here first."""

import inspect

import pytest
from transformers import Trainer

from smt_trainer import SMTTrainerMixin
from smt_trainer.training import trainer as ours
from smt_trainer.training.saving import SavesDelta

OVERRIDDEN = {
    "_inner_training_loop": ["batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "_save": ["output_dir", "state_dict"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_save_rng_state": ["output_dir"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_best_model": [],
    "_push_from_checkpoint": ["checkpoint_folder"],
}
CALLED = {"_get_output_dir": ["trial"], "_set_signature_columns_if_needed": []}
EXPECTED = OVERRIDDEN | CALLED


@pytest.mark.parametrize("name", EXPECTED)
def test_a_private_method_has_the_signature_the_library_was_written_for(name):
    found = list(inspect.signature(getattr(Trainer, name)).parameters)[1:]
    assert found == EXPECTED[name], f"transformers changed Trainer.{name}; adapt smt_trainer/training/"


def test_the_list_at_the_top_of_the_file_is_complete():
    ours_alone = {**vars(SMTTrainerMixin), **vars(SavesDelta)}
    overridden = {name for name in ours_alone if name.startswith("_") and hasattr(Trainer, name)}
    private = {name for name in overridden if not name.startswith("__")}
    assert private == set(OVERRIDDEN)
    assert all(f"`{name}`" in ours.__doc__ for name in EXPECTED)
