"""Find PEFT's `modules_to_save` for the tensors that a delta stores whole. Imports no torch.

PEFT replaces such a module with a copy of all its values. So the tensors must make up complete modules: whatever the
base has under a module's name must be in the delta. Of nested modules the outermost is named (`classifier` for a head
of two linears), as PEFT itself would, but never a list of modules, which has no forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from smt_trainer.errors import SMTError
from smt_trainer.merging.plan import MergePlan
from smt_trainer.merging.tied import may_tie
from smt_trainer.model.checkpoint import Checkpoint, vocabulary_sizes

INSTEAD = "Merge it instead (smt merge), or load it with from_delta."


def saved_modules(plan: MergePlan, checkpoint: Checkpoint) -> list[str]:
    """Return the names of the modules that a delta's whole tensors make up, in the delta's order.

    Args:
        plan: the plan of merging the delta into the base.
        checkpoint: the base.

    Raises:
        SMTError: a tensor's module is not complete, or the tensor has other rows than in the base, may be tied to
            another one, or is a running statistic; or PEFT, which matches names by their endings, would also replace
            another module.
    """
    delta, keys = plan.delta, plan.keys
    whole, of_base = delta.whole_arrays, {**delta.fingerprint.checksums, **delta.fingerprint.codes}
    statistics = sorted({*delta.unnamed} & {*of_base})
    if statistics:
        raise SMTError(
            f"PEFT's LoRA has no place for `{statistics[0]}`, which forward changes or a script has unfrozen. {INSTEAD}"
        )
    for name, values in whole.items():
        if name in keys and values.shape != plan.tensors[keys[name]].shape:
            raise SMTError(
                f"the delta has another vocabulary than the base (`{name}`: {len(values)} rows for "
                f"{plan.tensors[keys[name]].shape[0]}), and PEFT's LoRA keeps that of the base. {INSTEAD}"
            )
    config = checkpoint.config or {}
    tied = [name for name in keys if name in whole and _is_embedding(whole[name], vocabulary_sizes(config))]
    if tied and may_tie(config):
        raise SMTError(
            f"the delta trains `{tied[0]}`, which the base may tie to its output embeddings; PEFT would change one of "
            f"the two. {INSTEAD}"
        )

    def is_whole(module: str) -> bool:
        return all(name in whole for name in of_base if name.startswith(f"{module}."))

    found = {_module_of(name, is_whole): None for name in whole}
    _refuse_others(found, [*of_base, *whole])
    return list(found)


def _is_embedding(values: np.ndarray, vocabulary: set[int]) -> bool:
    return values.ndim == 2 and len(values) in vocabulary


def _module_of(name: str, is_whole: Callable[[str], bool]) -> str:
    """Return the outermost module around a tensor that the delta holds completely."""
    module, _, leaf = name.rpartition(".")
    if not module or not is_whole(module):
        why = "train_bias=True trains" if leaf == "bias" else "the delta holds"
        raise SMTError(
            f"PEFT's LoRA stores whole modules, and {why} `{name}` without the rest of its module. {INSTEAD}"
        )
    while True:
        parent, _, last = module.rpartition(".")
        if not parent or last.isdigit() or not is_whole(parent):
            return module
        module = parent


def _refuse_others(saved: Iterable[str], tensors: Iterable[str]) -> None:
    """Raise `SMTError` if any module that is not in a saved one has a name that ends in a saved one's."""
    inside = tuple(f"{module}." for module in saved)
    for name in tensors:
        parts = name.split(".")
        for module in (".".join(parts[:length]) for length in range(1, len(parts))):
            if module.endswith(tuple(saved)) and not f"{module}.".startswith(inside):
                raise SMTError(
                    f"PEFT finds modules to save by the end of their names, and would replace `{module}` as well as "
                    f"what the delta trains ({', '.join(saved)}). {INSTEAD}"
                )
