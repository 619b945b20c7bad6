"""Nature's table of R1's stages (doi 10.1038/s41586-025-09422-z, table 2; arXiv 2501.12948 v2)."""

from __future__ import annotations

__all__ = ["NATURE_STAGES", "NATURE_TABLE"]

NATURE_STAGES = ("R1-Zero", "R1 Dev1", "R1 Dev2", "R1 Dev3", "R1")
"""Cold start is Dev1, the first reinforcement Dev2, the second fine-tuning Dev3."""

NATURE_TABLE: dict[str, tuple[float, ...]] = {
    "AIME 2024 (pass@1)": (77.9, 59.0, 74.0, 78.1, 79.8),
    "MATH-500 (pass@1)": (95.9, 94.2, 95.9, 95.4, 97.3),
    "GPQA Diamond (pass@1)": (75.8, 66.1, 70.7, 71.2, 71.5),
    "LiveCodeBench (pass@1)": (50.0, 57.5, 63.5, 64.6, 65.9),
    "Codeforces (rating)": (1444, 1534, 1687, 1746, 2029),
    "IF-Eval (prompt strict)": (46.6, 71.7, 72.0, 78.1, 83.3),
    "AlpacaEval 2.0 (LC win rate)": (24.7, 50.1, 55.8, 62.1, 87.6),
    "Arena-Hard (GPT-4-1106)": (53.6, 77.0, 73.2, 75.6, 92.3),
}
