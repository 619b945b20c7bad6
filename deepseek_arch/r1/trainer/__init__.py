"""R1's trainer on TRL: `pip install "deepseek-arch[r1]"`."""

from ..checks import require

require("trl")
require("transformers")

from .config import R1Config, check_policy  # noqa: E402  the message above comes first
from .grpo import R1Trainer  # noqa: E402
from .reference import ReferenceRefresh  # noqa: E402
from .supervised import R1SFTConfig, R1SFTTrainer  # noqa: E402

__all__ = ["R1Config", "R1SFTConfig", "R1SFTTrainer", "R1Trainer", "ReferenceRefresh", "check_policy"]
