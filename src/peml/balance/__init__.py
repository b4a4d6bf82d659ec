"""How tasks share a loss (weights) and a gradient (surgery): rules of pure mathematics, which know no trainer."""

from collections.abc import Mapping

from peml.balance.base import Balance, Equal, Rule, Step
from peml.balance.coba import CoBa
from peml.balance.dwa import DWA
from peml.balance.famo import FAMO
from peml.balance.gradnorm import GradNorm
from peml.balance.means import Mean, per_sample, shares
from peml.balance.surgery import AlignedMTL, CAGrad, NashMTL, PCGrad
from peml.balance.uncertainty import Uncertainty

BALANCES: Mapping[str, type[Balance]] = {
    "equal": Equal,
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "gradnorm": GradNorm,
    "coba": CoBa,
    "famo": FAMO,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "aligned_mtl": AlignedMTL,
    "nash_mtl": NashMTL,
}
"""Every rule by the name that recipes have for it."""

__all__ = ["BALANCES", "Balance", "CoBa", "Equal", "Mean", "Rule", "Step", "per_sample", "shares"]
