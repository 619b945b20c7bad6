"""transformers' own model tests on our classes; not collected with the suite, since its files are not ours to ship.

    PEER=$(mktemp -d)
    pip download transformers==5.23.0 --no-binary :all: --no-deps -d $PEER && tar -C $PEER -xzf $PEER/*.gz
    pip install parameterized
    PEER_TESTS=$PEER/transformers-5.23.0 python -m pytest tests/hf/peer_suite.py -q -rs -o addopts=

(`addopts` of this project wants every marker declared, and transformers' tests have their own.)

Of the source distribution come the common model tests; the mixins for generation and exporters are not in it, and stand
here as empty classes. `NOT_OURS` lists what fails, with the reason.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import deepseek_arch.hf as dhf
from support import small_models
from support.small_models import tokens

SOURCES = Path(os.environ.get("PEER_TESTS", ""))
if not (SOURCES / "tests" / "test_modeling_common.py").is_file():
    pytest.skip("expected PEER_TESTS to be an unpacked source distribution of transformers", allow_module_level=True)

NOT_OURS: dict[str, str] = {
    "test_correct_missing_keys": "a missing weight is an error here, not a warning",
    "test_model_weights_reload_no_missing_tied_weights": "a missing head is an error here, tied or not",
    "test_reverse_loading_mapping": "the renaming of router biases is for the files of adapters, which a model has not",
    "TestV3.test_tp_plan_matches_params": "the plan names q_proj and q_b_proj, and a model has one of them",
    "TestV2.test_tp_plan_matches_params": "the plan names q_proj and q_b_proj, and a model has one of them",
    "test_generation_tester_mixin_inheritance": "the generation mixin is not in the source distribution",
}


def peer(name: str) -> Any:
    """Imports a module of transformers' tests, with empty mixins where the source distribution has none."""
    package = types.ModuleType("peer_tests")
    package.__path__ = [str(SOURCES / "tests")]
    sys.modules.setdefault("peer_tests", package)
    for module, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        folder, _, _ = module.partition(".")
        sys.modules.setdefault(f"peer_tests.{folder}", types.ModuleType(f"peer_tests.{folder}"))
        stub = types.ModuleType(f"peer_tests.{module}")
        setattr(stub, mixin, type(mixin, (), {}))
        sys.modules.setdefault(f"peer_tests.{module}", stub)
    return importlib.import_module(f"peer_tests.{name}")


common = peer("test_modeling_common")


class ModelTester:
    """Makes the tiny configs and inputs that the mixin asks for."""

    is_training = True
    batch_size, seq_length = 2, 7

    def __init__(self, parent: unittest.TestCase, kind: str) -> None:
        self.parent, self.kind = parent, kind
        layers: dict[str, Any] = {"num_hidden_layers": 2}
        if kind == "glm-5":
            layers["indexer_types"] = ("full", "shared")
        self.core = small_models.config(kind, **layers)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
            setattr(self, name, getattr(self.core, name))

    def get_config(self) -> Any:
        config = dhf.as_arch_config(self.core)
        config.pad_token_id = 0
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        ids = tokens(self.core, self.batch_size, self.seq_length).clamp(min=1)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Suite(common.ModelTesterMixin):
    all_model_classes = (
        dhf.DeepseekModel,
        dhf.DeepseekForCausalLM,
        dhf.DeepseekForSequenceClassification,
        dhf.DeepseekForTokenClassification,
    )
    kind = ""
    test_all_params_have_gradient = False  # experts that no token chose have none, as in the natives' tests

    def setUp(self) -> None:
        test = self._testMethodName
        reason = NOT_OURS.get(test) or NOT_OURS.get(f"{type(self).__name__}.{test}")
        if reason:
            self.skipTest(reason)
        dhf.register()
        transformers.logging.set_verbosity_warning()  # the fixture of this folder has silenced it
        self.model_tester = ModelTester(self, self.kind)  # type: ignore[arg-type]


class TestV3(_Suite, unittest.TestCase):
    kind = "v3"


class TestV2(_Suite, unittest.TestCase):
    kind = "v2"


class TestGlm(_Suite, unittest.TestCase):
    kind = "glm"


class TestV32(_Suite, unittest.TestCase):
    kind = "v32"


class TestGlm5(_Suite, unittest.TestCase):
    kind = "glm-5"
