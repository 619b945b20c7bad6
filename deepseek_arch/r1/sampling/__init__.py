"""Training data from a policy's own samples: rejection sampling, filters, refinement, decontamination and mixing."""

from .collect import Collected, CollectSettings, collect
from .decontaminate import decontaminate, ngrams
from .filters import Filters
from .mixing import balance_languages, general_rows, mix
from .rows import Row, read_rows, write_rows

__all__ = [
    "CollectSettings",
    "Collected",
    "Filters",
    "Row",
    "balance_languages",
    "collect",
    "decontaminate",
    "general_rows",
    "mix",
    "ngrams",
    "read_rows",
    "write_rows",
]
