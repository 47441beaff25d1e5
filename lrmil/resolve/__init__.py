"""Which resolution is needed? The same cases, folds and models at each: what they tell, and what they cost."""

from __future__ import annotations

from lrmil.resolve.audit import Arm, Audit, ModelAudit, audit
from lrmil.resolve.cost import ArmCost, job_costs
from lrmil.resolve.verdict import Comparison, Verdict, cases_needed, decide

__all__ = [
    "Arm",
    "ArmCost",
    "Audit",
    "Comparison",
    "ModelAudit",
    "Verdict",
    "audit",
    "cases_needed",
    "decide",
    "job_costs",
]
