"""Find the settings in which a trained model's configuration differs from its base's, such as a longer context."""

from __future__ import annotations

from typing import Any

from smt_trainer.delta.folder import CODE, EXPLICIT, VOCABULARY

# Fields of a configuration that describe a model's head.
LABELS = ("id2label", "label2id", "problem_type")
# Arguments of `from_pretrained` that say where the base is read from.
WHERE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "trust_remote_code", "code_revision")
# Fields that describe how weights are stored, are restored in another way, or concern only the run.
OTHERS = {
    *(EXPLICIT, CODE, VOCABULARY, "architectures", "model_type", "dtype", "torch_dtype", "quantization_config"),
    *("tie_word_embeddings", "transformers_version", "use_cache", "_name_or_path", "_commit_hash", "name_or_path"),
    *(*LABELS, "num_labels", "pad_token_id", "bos_token_id", "eos_token_id"),
}


def training_settings(trained: dict[str, Any], base: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the trained model's configuration to pass to `from_pretrained`: labels and changed fields.

    Args:
        trained: content of the delta's config.json, which leaves out its class's defaults.
        base: hub name or path of the base.
        kwargs: other arguments of `from_pretrained`.
    """
    labels = {key: trained[key] for key in LABELS if key in trained}
    if "id2label" in labels:
        labels["id2label"] = {int(number): label for number, label in labels["id2label"].items()}
        # The delta holds the new head.
        labels["ignore_mismatched_sizes"] = True
    return _changed_fields(trained, base, kwargs) | labels


def _changed_fields(trained: dict[str, Any], base: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that differ from the base's configuration."""
    from transformers import AutoConfig

    if "model_type" not in trained:
        return {}
    try:
        config = AutoConfig.from_pretrained(base, **{key: kwargs[key] for key in WHERE if key in kwargs})
    except (OSError, ValueError, KeyError):  # loading the model will report it, or knows a custom class
        return {}
    if config.model_type != trained["model_type"]:
        return {}
    before, after = config.to_dict(), type(config).from_dict(dict(trained)).to_dict()
    return _differing(before, after)


def _differing(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with other values, also in nested configurations."""
    found = {}
    for key, value in after.items():
        if key in OTHERS or before.get(key, ...) == value or key not in before:
            continue
        if isinstance(value, dict) and isinstance(before[key], dict) and "model_type" in before[key]:
            value = _differing(before[key], value)
            if not value:
                continue
        found[key] = value
    return found
