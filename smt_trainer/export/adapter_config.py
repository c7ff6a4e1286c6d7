"""What `adapter_config.json` of PEFT says of a delta's change as LoRA. Imports no torch.

PEFT scales B A by lora_alpha / r, which is 1 here for each module. `r` is the largest rank; the ranks of the others
stand in `rank_pattern`, under regular expressions that match one name. Servers such as vLLM read `r` and `lora_alpha`
alone, and the ranks from the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smt_trainer.delta.delta import Delta

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
        base: what the user called the base; a name on the hub that the delta records comes first.
        revision: of the base.
    """
    recorded, _, commit = (delta.selection.base_model or "").partition("@")
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
    """Return PEFT's name of what the trained class is for; None leaves the model's own forward."""
    name = delta.architecture
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    # Encoder and decoder share their embeddings where both read text, as PEFT expects, and not where one reads sound.
    if name.endswith("ForConditionalGeneration") and "shared.weight" in delta.base.checksums:
        return "SEQ_2_SEQ_LM"
    ends = {module.rpartition(".")[2] for module in saved}
    return next((task for end, (task, heads) in TASKS.items() if name.endswith(end) and ends & {*heads}), None)
