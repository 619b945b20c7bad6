"""Rewards for TRL's trainers, each called as `reward(prompts=..., completions=..., **columns)`.

A reward returns one number for each completion, or None where it does not apply to the problem: TRL leaves those out of
the sum. They read the columns that `Problem.columns` makes.
"""

from .answers import GRADERS, grade, number_of
from .base import Reward, completion_text
from .code import CodeLimits, run_program
from .llm_judge import LLMJudge
from .preference import ModelReward
from .rules import Accuracy, Format, Language, Overlong, Repetition

__all__ = [
    "GRADERS",
    "Accuracy",
    "CodeLimits",
    "Format",
    "LLMJudge",
    "Language",
    "ModelReward",
    "Overlong",
    "Repetition",
    "Reward",
    "completion_text",
    "grade",
    "number_of",
    "run_program",
]
