"""PEFT's methods as baselines, each sized to train as close to a given number of parameters as possible."""

from collections.abc import Callable, Mapping

import peft
from torch import nn

ADAPTERS = ("LoRA", "rsLoRA", "DoRA", "MiSS", "SHiRA", "Super-Tuning", "WaveFT")


def adapter_config(method: str, linears: Mapping[str, nn.Linear], parameters: float, seed: int) -> peft.PeftConfig:
    """Return the configuration of `method` that trains about `parameters` parameters.

    All linears get the same rank, except with LoRA, rsLoRA and DoRA, where the first linears get one more until the
    number of parameters is met. LoRA's alpha is twice the rank, as in LLM-Adapters' recipes.

    Args:
        method: one of `ADAPTERS`.
        linears: module name -> linear, for the linears to adapt.
        parameters: number of trained parameters wanted.
        seed: seed of the weights that SHiRA and WaveFT choose.
    """
    outputs = sum(linear.out_features for linear in linears.values())
    inputs_and_outputs = outputs + sum(linear.in_features for linear in linears.values())
    weights = sum(linear.weight.numel() for linear in linears.values())

    def rank(each: int) -> int:
        """Return the closest rank for `each` parameters per rank."""
        return max(1, round(parameters / each))

    def lora(fixed: int = 0, **more) -> peft.LoraConfig:
        """Return LoRA's configuration with `fixed` parameters that do not depend on the rank."""
        lower = max(1, int((parameters - fixed) / inputs_and_outputs))
        pattern = _raised(linears, lower, parameters - fixed - lower * inputs_and_outputs)
        return peft.LoraConfig(
            r=lower,
            lora_alpha=2 * lower,
            rank_pattern=pattern,
            alpha_pattern={name: 2 * raised for name, raised in pattern.items()},
            **more,
        )

    configs: dict[str, Callable[[], peft.PeftConfig]] = {
        "LoRA": lora,
        "rsLoRA": lambda: lora(use_rslora=True),
        "DoRA": lambda: lora(fixed=outputs, use_dora=True),
        "MiSS": lambda: peft.MissConfig(r=rank(outputs)),
        "SHiRA": lambda: peft.ShiraConfig(r=rank(inputs_and_outputs), random_seed=seed),
        "Super-Tuning": lambda: peft.SupertuningConfig(sparsity=1 - parameters / weights),
        "WaveFT": lambda: peft.WaveFTConfig(n_frequency=rank(len(linears)), random_loc_seed=seed),
    }
    config = configs[method]()
    config.target_modules = set(linears)
    return config


def _raised(linears: Mapping[str, nn.Linear], rank: int, missing: float) -> dict[str, int]:
    """Return name -> `rank` + 1 for the first linears, as many as add about `missing` parameters."""
    pattern = {}
    for name, linear in linears.items():
        each = linear.in_features + linear.out_features
        if missing < each / 2:
            break
        pattern[name] = rank + 1
        missing -= each
    return pattern
