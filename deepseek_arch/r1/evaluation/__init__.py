"""Measures of a policy: pass@1 and votes over samples, form, language, length, reflection, drafts and expert load.

Needs neither transformers nor TRL: a policy is anything with the methods of `Sampler`.
"""

from .general import GeneralResult, evaluate_general
from .measures import REFLECTIONS, Interval, mean_interval, reflections, vote
from .mixture import expert_violation, mtp_acceptance
from .reasoning import Evaluation, EvaluationSettings, Sampler, Transcript, evaluate

__all__ = [
    "REFLECTIONS",
    "Evaluation",
    "EvaluationSettings",
    "GeneralResult",
    "Interval",
    "Sampler",
    "Transcript",
    "evaluate",
    "evaluate_general",
    "expert_violation",
    "mean_interval",
    "mtp_acceptance",
    "reflections",
    "vote",
]
