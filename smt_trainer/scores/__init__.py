"""Score how much each block of the targets matters for the task.

Let G = sum over warm-up steps t of G_t be the summed gradient of one weight W [O, I]. G_t is the gradient of one
optimizer step's loss (over all micro-batches and ranks) at the base weights. The scores of a block are:

    grad_l1          mean of |G|                         SMT, section 3.2 and appendix B
    grad_l2          root of the sum of G^2
    grad_signed      |mean of G|                         what the authors' released code ranks by
    grad_abs         sum over t of the mean of |G_t|     here G_t is the gradient of one backward (one micro-batch)
    taylor           |<W, G>|                            SPSFT, section 3.2, eq. 6
    qm_taylor        mean of quantiles over the classes  SPSFT, section 3.2, eq. 7
    activation       L2 norm of its columns' inputs      SMT's selection by activations (forward only)
    low_activation   1 / activation                      what moves the outputs least (forward only)
    magnitude        L2 norm of W                        SPSFT, section 3.2 (no warm-up)
    random           uniform, seeded                     the baseline that a score has to beat (no warm-up)

Ranks average sums that are linear in the data: of G, of <W, G>, of squares. Absolute values and roots are taken
afterwards. Only `grad_abs` depends on how the data are split. Each file of this package explains its own scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from smt_trainer.config import SMTConfig
from smt_trainer.model.grid import BlockGrid
from smt_trainer.scores.accumulated import GradL1, GradL2
from smt_trainer.scores.activation import Activation, LowActivation
from smt_trainer.scores.block_sums import GradAbs, GradSigned, Taylor
from smt_trainer.scores.classwise import QMTaylor
from smt_trainer.scores.scorer import Scorer
from smt_trainer.scores.weights import Magnitude, Random

if TYPE_CHECKING:
    from smt_trainer.model.kinds import Target

__all__ = ["SCORERS", "Scorer", "make_scorer"]

SCORERS: dict[str, type[Scorer]] = {
    "grad_l1": GradL1,
    "grad_l2": GradL2,
    "grad_signed": GradSigned,
    "grad_abs": GradAbs,
    "taylor": Taylor,
    "qm_taylor": QMTaylor,
    "activation": Activation,
    "low_activation": LowActivation,
    "magnitude": Magnitude,
    "random": Random,
}


def make_scorer(
    targets: Mapping[str, Target], grids: Mapping[str, BlockGrid], config: SMTConfig, seed: int = 0
) -> Scorer:
    """Make the scorer that `config.score` names."""
    return SCORERS[config.score](targets, grids, config, seed)
