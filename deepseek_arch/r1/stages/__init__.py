"""The stages of R1's recipe, each a function of its arguments and of a folder: `pip install "deepseek-arch[r1]"`.

What a stage starts from is free: R1-Zero and the cold start begin with the base as in the paper, or with each other's
results as in popular accounts.
"""

from __future__ import annotations

from ..checks import require

require("trl")
require("transformers")

from .collecting import CollectArguments, collect_data  # noqa: E402  the message above comes first
from .context import StageContext  # noqa: E402
from .finetuning import FinetuneArguments, finetune  # noqa: E402
from .judging import JudgeArguments, train_judge  # noqa: E402
from .policy import Policy  # noqa: E402
from .pretraining import PretrainArguments, pretrain  # noqa: E402
from .registry import STAGES, StageKind, run_stage  # noqa: E402
from .reinforcing import ReinforceArguments, reinforce  # noqa: E402

__all__ = [
    "STAGES",
    "CollectArguments",
    "FinetuneArguments",
    "JudgeArguments",
    "Policy",
    "PretrainArguments",
    "ReinforceArguments",
    "StageContext",
    "StageKind",
    "collect_data",
    "finetune",
    "pretrain",
    "reinforce",
    "run_stage",
    "train_judge",
]
