"""FP8 training as DeepSeek-V3 did it (V3 report, section 3.3), as a change to an existing model.

    report = da.fp8_training(model)            # in place; print(report) shows the precision of each weight
    ...                                        # any training loop
    measured = da.fp8_sensitivity(model, batches)
    da.fp8_training(model, measured.keeping_high(worst=4))
    da.remove_fp8_training(model)

policy: the precision of each GEMM of each layer, as data. operands: values in FP8 or not. products: the three GEMMs and
their derivatives. layers: the modules. convert: a policy on a model. sensitivity: the cost of FP8 by layer.
"""

from .convert import FP8Report, fp8_training, remove_fp8_training
from .policy import FP8, HIGH, V3_RECIPE, FP8Policy, FP8Precision, FP8Rule
from .sensitivity import Sensitivity, fp8_sensitivity

__all__ = [
    "FP8",
    "HIGH",
    "V3_RECIPE",
    "FP8Policy",
    "FP8Precision",
    "FP8Report",
    "FP8Rule",
    "Sensitivity",
    "fp8_sensitivity",
    "fp8_training",
    "remove_fp8_training",
]
