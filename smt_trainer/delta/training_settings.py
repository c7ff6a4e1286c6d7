"""Find the settings in which a trained model's configuration differs from its base's, such as a longer context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from smt_trainer.delta.folder import AS_STORED, load_config
from smt_trainer.model.checkpoint import CONFIG_FILE

# Fields of a configuration that describe a model's head.
LABELS = ("id2label", "label2id", "problem_type")
# Fields that are set after loading.
SPECIAL_TOKENS = {"pad_token_id", "bos_token_id", "eos_token_id"}
# Arguments of `from_pretrained` that say where the base is read from.
WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code", "code_revision")
# Fields that describe how weights are stored, are restored in another way, or concern only the run.
OTHERS = {
    *AS_STORED,
    *("transformers_version", "use_cache", "_name_or_path", "_commit_hash", "name_or_path"),
    *(*LABELS, "num_labels", *SPECIAL_TOKENS),
}


def training_settings(folder: Path, base: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `from_pretrained` that give a base the configuration of training: labels and changed fields.

    Args:
        folder: of the delta; its config.json leaves out what the class has by default.
        base: hub name or path of the base.
        kwargs: the user's arguments of `from_pretrained`.
    """
    trained = load_config(folder)
    labels = {key: trained[key] for key in LABELS if key in trained}
    if "id2label" in labels:
        labels["id2label"] = {int(number): label for number, label in labels["id2label"].items()}
        # The delta holds the new head.
        labels["ignore_mismatched_sizes"] = True
    return _changed_fields(folder, trained.get("model_type"), base, kwargs) | labels


def _changed_fields(folder: Path, model_type: str | None, base: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with other values than in the base's configuration."""
    from transformers import AutoConfig

    if model_type is None:
        return {}
    try:
        config = AutoConfig.from_pretrained(base, **{key: kwargs[key] for key in WHERE if key in kwargs})
    except (OSError, ValueError, KeyError):  # loading the model says what is wrong, or knows a class of the user's own
        return {}
    if config.model_type != model_type:
        return {}
    return _differing(config.to_dict(), type(config).from_json_file(folder / CONFIG_FILE).to_dict())


def _differing(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with other values, also in nested configurations."""
    found = {}
    for key, value in after.items():
        if key in OTHERS or key not in before or before[key] == value:
            continue
        if isinstance(value, dict) and isinstance(before[key], dict) and "model_type" in before[key]:
            value = _differing(before[key], value)
            if not value:
                continue
        found[key] = value
    return found
