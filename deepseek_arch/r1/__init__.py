"""DeepSeek-R1's training recipe: from a base model to R1-Zero, R1 and distilled students (arXiv 2501.12948).

Nothing is imported here: problems, templates and rewards need no PyTorch, and only `trainer` and the stages import
transformers and TRL (`pip install "deepseek-arch[r1]"`).
"""

from __future__ import annotations
