"""Scores of a few tokens at the last position, in float32 at least.

The logits z = W h of a bfloat16 model have 8 significant bits, so different answers often tie. W and h have 8 bits,
too, but their exact product has more:

    z_t = sum_j W_tj h_j + b_t        in float32, for the offered tokens t only, at the last position only

Some models then scale z or cap it softly (cap * tanh(z / cap)). Such a function is increasing, so it changes no order.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smt_trainer.sparse.linear import SMTLinear


def last_scores(model: PreTrainedModel, tokens: list[int], **inputs) -> Tensor:
    """Return scores [rows, tokens] at the last position that rank `tokens` as the likelihood does.

    These are the logits before any scaling. If the head is not a plain linear, or if the model reorders the logits
    after it, they are the model's own logits.

    Args:
        inputs: arguments of the model's forward.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def compute(head: nn.Linear | SMTLinear, args: tuple[Tensor], output: Tensor) -> None:
        # Within the hook the weight is whole even where it is sharded. Autocast would round the product again.
        with torch.autocast(output.device.type, enabled=False):
            dtype = torch.promote_types(head.weight.dtype, torch.float32)
            bias = None if head.bias is None else head.bias[tokens].to(dtype)
            scores = nn.functional.linear(args[0][:, -1].to(dtype), head.weight[tokens].to(dtype), bias)
        seen.append((scores, output[:, -1, tokens]))

    head = model.get_output_embeddings()
    # A head of another class may hold a packed weight, or add to the product.
    hook = head.register_forward_hook(compute, prepend=True) if type(head) in (nn.Linear, SMTLinear) else nullcontext()
    with hook:
        logits = model(**inputs, logits_to_keep=1).logits[:, -1, tokens]
    if seen:
        scores, rounded = seen[-1]
        if (logits.gather(1, rounded.argsort()).diff() >= 0).all():
            return scores
    return logits.float()
