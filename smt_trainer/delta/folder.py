"""The files of a delta's folder, and what else lies beside weights. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from smt_trainer.errors import SMTError
from smt_trainer.json_files import load_json
from smt_trainer.model.checkpoint import CONFIG_FILE, WEIGHTS_KEY, further_modules

VOCABULARY, LAYERS = "vocab_size", "num_hidden_layers"
# The key that says which Python files `trust_remote_code=True` runs.
CODE_KEY = "auto_map"
# Keys of config.json that describe the stored tensors and the code that reads them.
AS_STORED = (
    *(WEIGHTS_KEY, CODE_KEY, "architectures", "model_type", "dtype", "torch_dtype", "quantization_config"),
    *("tie_word_embeddings", VOCABULARY),
)
DELTA_FILE = "smt_delta.safetensors"
MANIFEST_FILE = "smt_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
# Written under `WEIGHTS_KEY` in a delta's config.json, where transformers reads the name of the weights file, so that
# `from_pretrained` on the folder fails with this text, even if it also holds an older whole model.
NO_WEIGHTS = "this folder holds a delta, load it with smt_trainer.from_delta(folder)"

WEIGHT_FILES = "*.safetensors *.bin *.pt *.pth *.h5 *.msgpack *.gguf *.onnx *.onnx_data *.index.json".split()
FULL_MODELS = ("model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin")
LEFT_BY_RUNS = "smt_* training_args.bin trainer_state.json optimizer* scheduler* rng_state*".split()
TEMPLATES = "chat_template* additional_chat_templates/*.jinja".split()
TOKENIZER_STATE = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *TEMPLATES,
]
OF_TRAINING = [
    *TOKENIZER_STATE,
    *"vocab.* vocab-* *_vocab.json merges.txt dict.txt *.model *.bpe *.codes *.spm".split(),
    *"normalizer.json emoji.json byte_maps.json word_shape.json word_pronunciation.json".split(),
    *"*processor_config.json generation_config.json".split(),
]


def load_config(folder: str | Path) -> dict[str, Any]:
    """Return the trained model's configuration from a delta's folder; an empty one if there is none."""
    path = Path(folder, CONFIG_FILE)
    config = load_json(path, "model configuration") if path.is_file() else {}
    return {key: value for key, value in config.items() if key != WEIGHTS_KEY} if isinstance(config, dict) else {}


def files_of_training(delta_folder: Path) -> Iterator[PurePath]:
    """Yield the files of tokenizer, templates, processor and generation settings in a delta's folder."""
    return (name for name in files_beside_weights(delta_folder) if fits(name, OF_TRAINING))


def files_beside_weights(folder: Path, without: Path | None = None) -> Iterator[PurePath]:
    """Yield the files in and below a folder that a merged checkpoint takes besides the model's weights. Links are
    followed, each folder is visited once."""
    further = further_modules(Path(folder))
    seen = set() if without is None else {os.path.realpath(without)}
    for parent, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not fnmatch(name, "checkpoint-*"))
        for name in sorted(files):
            path = Path(parent, name)
            where = PurePath(path.relative_to(folder))
            left_out = LEFT_BY_RUNS if where.parts[0] in further else [*WEIGHT_FILES, *LEFT_BY_RUNS]
            if path.is_file() and not name.startswith(".") and not fits(PurePath(name), left_out):
                yield where


def fits(name: PurePath, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns."""
    return any(fnmatch(name.as_posix(), pattern) for pattern in patterns)


def whole_model_in(folder: Path) -> str | None:
    """Return the name of a file with the weights of a whole model in a folder; None if there is none."""
    return next((path.name for name in FULL_MODELS for path in folder.glob(name)), None)


def refuse_full_model(folder: Path) -> None:
    """Raise `SMTError` if a folder holds the weights of a whole model: a delta next to them would be ambiguous."""
    weights = whole_model_in(folder)
    if weights is not None:
        raise SMTError(
            f"{folder} holds a whole model ({weights}), and a delta next to it would be ambiguous. Give another "
            "folder, or remove the model."
        )
