"""What a training costs in memory and communication, worked out on paper before anything is loaded."""

from peml.planning.formulas import Costs, Load, Shape, Sizes, communication, memory
from peml.planning.plan import Plan, plan
from peml.planning.show import show_plan

__all__ = ["Costs", "Load", "Plan", "Shape", "Sizes", "communication", "memory", "plan", "show_plan"]
