"""Find the modules that every method trains whole: a classifier's heads, and others that its checkpoint lacks."""

from transformers import PreTrainedModel

from smt_trainer.model.heads import head_names
from smt_trainer.model.newly_initialised import newly_initialised


def new_modules(model: PreTrainedModel) -> list[str]:
    """Return the full names of the heads of a classification model, and of other newly initialised modules.

    A head counts as new even if the checkpoint has one for as many classes. Other models have no new modules.
    """
    heads = head_names(model)
    others = (name.rpartition(".")[0] for name in newly_initialised(model)) if heads else ()
    return heads + [name for name in dict.fromkeys(others) if name.partition(".")[0] not in heads]
