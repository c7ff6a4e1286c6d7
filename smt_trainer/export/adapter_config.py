"""Make PEFT's `adapter_config.json` for a delta's change as LoRA. Imports no torch.

PEFT scales B A by lora_alpha / r, which is 1 here for each module. `r` is the largest rank; the ranks of the other
modules are in `rank_pattern`, under regular expressions that match one name each. Servers such as vLLM read only `r`
and `lora_alpha`, and take the ranks from the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smt_trainer.delta.delta import Delta
from smt_trainer.model.hub import split_commit

ADAPTER_CONFIG = "adapter_config.json"
# The end of a class's name -> PEFT's task, and the heads that PEFT then always stores.
TASKS = {
    "ForSequenceClassification": ("SEQ_CLS", ("classifier", "score")),
    "ForTokenClassification": ("TOKEN_CLS", ("classifier", "score")),
    "ForQuestionAnswering": ("QUESTION_ANS", ("qa_outputs",)),
}


def adapter_config(
    delta: Delta, ranks: Mapping[str, int], saved: list[str], base: str | Path, revision: str | None
) -> dict[str, Any]:
    """Return PEFT's configuration of the adapter.

    Args:
        delta: the trained values.
        ranks: module name -> rank r of its factors.
        saved: modules that are stored whole.
        base: the base as the user gave it; a hub name that the delta records takes precedence.
        revision: revision of the base.
    """
    recorded, commit = split_commit(delta.selection.base_model)
    largest = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank < largest}
    return {
        "peft_type": "LORA",
        "task_type": _task(delta, saved),
        "base_model_name_or_path": recorded if commit else str(base),
        "revision": commit or revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(delta.selection.grids[name].transposed for name in ranks),
        "target_modules": list(ranks),
        "modules_to_save": saved or None,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
    }


def _task(delta: Delta, saved: Iterable[str]) -> str | None:
    """Return PEFT's task type for the trained class; None keeps the model's own forward."""
    name = delta.architecture
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    # PEFT expects that encoder and decoder both read text: then they share embeddings, unlike if one reads audio.
    if name.endswith("ForConditionalGeneration") and "shared.weight" in delta.fingerprint.checksums:
        return "SEQ_2_SEQ_LM"
    ends = {module.rpartition(".")[2] for module in saved}
    return next((task for end, (task, heads) in TASKS.items() if name.endswith(end) and ends & {*heads}), None)
