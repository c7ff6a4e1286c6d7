"""The setting that all methods share: model, tokens, precision, threads."""

import os
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from recipes.benchmarks.parts.models import MODELS, Mixture, Shape
from recipes.benchmarks.parts.quantised import quantise
from recipes.parts.provenance import provenance
from smt_trainer.model.targets import count_parameters

PACKAGES = ("torch", "transformers", "peft", "smt_trainer")
ENVIRONMENT = ("OMP_NUM_THREADS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "PYTORCH_CUDA_ALLOC_CONF")

GPU_SHAPES = ("llama-3.2-3b", "llama-2-7b", "llama-3-8b")
SHAPES = {name.lower(): MODELS[name] for name in ("SmolLM2-135M", "Llama-3.2-3B", "Llama-2-7B", "Llama-3-8B")}
# Two layers of LLaMA-7B, with its embeddings.
SHAPES["wide"] = MODELS["Llama-2-7B"]._replace(num_hidden_layers=2)
# A twelfth of Qwen3-30B-A3B's layers, at a quarter of its width, with a quarter of its experts.
SHAPES["qwen3-moe"] = Mixture(4, 512, 8, 2, 64, 192, 32, 8, 8192)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """A model with random weights and the random tokens of a step, the same in every process.

    Attributes:
        dtype: dtype of the weights; with "bf16" forward runs under autocast, as in `TrainingArguments(bf16=True)`.
        batch: sequences in a step.
        length: tokens in a sequence.
        checkpointing: whether backward recomputes the activations of each layer.
        chunked_loss: whether the loss handles the tokens in chunks, so that the logits of all tokens never exist at
            once (`torch.nn.functional.linear_cross_entropy`).
        threads: processor threads.
        base: how bitsandbytes quantises the linears (`quantised.BITS`); None: not at all.
    """

    shape: Shape | Mixture
    dtype: str = "fp32"
    batch: int = 2
    length: int = 256
    checkpointing: bool = False
    chunked_loss: bool = False
    threads: int = 1
    seed: int = 0
    base: str | None = None

    def build(self) -> nn.Module:
        """Build the model before any method changes it, on the GPU if there is one."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(self.seed)
        with torch.device(device()):
            model = self.shape.build()
        model = model.to(DTYPES[self.dtype])
        if self.base:
            model = quantise(model, self.base)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    @property
    def targets(self) -> str:
        """What is trained, as `target_modules` of SMTConfig."""
        return "experts" if isinstance(self.shape, Mixture) else "qkv"

    def parameters(self) -> int:
        """Count the model's parameters, tied weights once."""
        with torch.device("meta"):
            return count_parameters(self.shape.build())

    def tokens(self) -> Tensor:
        """Return random token ids, [batch, length]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.shape.vocab_size, (self.batch, self.length), generator=generator).to(device())

    def to_dict(self) -> dict:
        """Return the fields as JSON types."""
        return asdict(self) | {"shape": self.shape._asdict(), "targets": self.targets}

    def circumstances(self, module: str, load: float) -> dict:
        """Return how and where a result was measured.

        Args:
            module: the module that runs.
            load: load of the machine at the start.
        """
        return {
            "setting": self.to_dict(),
            # Other programs add to clock time but not to processor time. A GPU has only clock time.
            "timer": "clock" if torch.cuda.is_available() else "processor",
            "load": [load, os.getloadavg()[0]],
            "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            **provenance(module, (*PACKAGES, "bitsandbytes") if self.base else PACKAGES),
        }


def device() -> str:
    """Return the device that everything runs on."""
    return "cuda" if torch.cuda.is_available() else "cpu"
