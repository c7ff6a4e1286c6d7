"""What every method trains whole: the heads of a classifier, and whatever else its checkpoint does not have."""

from transformers import PreTrainedModel

from smt_trainer.model.heads import head_names
from smt_trainer.model.made_up import made_up


def new_modules(model: PreTrainedModel) -> list[str]:
    """Return the full names of the heads of a classification model, and of other modules that loading made up.

    A head counts as new even if the checkpoint has one for as many classes. Other models have no new modules.
    """
    heads = head_names(model)
    others = (name.rpartition(".")[0] for name in made_up(model)) if heads else ()
    return heads + [name for name in dict.fromkeys(others) if name.partition(".")[0] not in heads]
