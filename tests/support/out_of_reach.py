"""A model with linears that cannot be trained, or not in every step."""

import tiny
import torch
import torch.nn.functional as F
from torch import nn


class Mixer(nn.Module):
    """Calls `called`, reads the weight of `read`, drops the output of `unused`, and sends tokens to experts 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.unused = (nn.Linear(32, 32) for _ in range(3))
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x, step: int):
        self.unused(x)
        return self.experts[min(step, 1)](self.called(x) + F.linear(x, self.read.weight))


class OutOfReach(nn.Module):
    """Predicts the next token; expert 0 serves the first call only, expert 2 none, and `tower` does not run at all."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(tiny.VOCABULARY, 32)
            self.mixers = nn.ModuleList([Mixer(), Mixer()])
            self.tower = nn.Sequential(nn.Linear(32, 32))
            self.head = nn.Linear(32, tiny.VOCABULARY)
        self.calls = 0

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for mixer in self.mixers:
            x = mixer(x, self.calls)
        if self.training:
            self.calls += 1
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), "logits": logits}
