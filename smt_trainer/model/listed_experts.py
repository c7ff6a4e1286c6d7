"""Find experts that are modules in a list: `mlp.experts.7.up_proj`, with a `ModuleList` or `ModuleDict` `experts`.

Their linears are targets like any others. But a router decides which of them a forward calls, and these
differ between ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from smt_trainer.model.names import EXPERT_BLOCKS

LISTS = (nn.ModuleList, nn.ModuleDict)


def expert_lists(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield the name of each list of experts, the list, and the module whose forward calls the experts: the list itself
    or the nearest module around it that has a forward. Lists of trained blocks (of 3-D parameters) are skipped."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        path = name.split(".")
        called = f"{path[-1]}.{type(module).__name__}".lower()
        if isinstance(module, LISTS) and "expert" in called and EXPERT_BLOCKS not in path:
            around = (modules[".".join(path[:length])] for length in range(len(path), -1, -1))
            yield name, module, next((one for one in around if type(one).forward is not nn.Module.forward), model)
