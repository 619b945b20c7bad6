"""Every public function with arguments of other types and sizes: a right result, or an error that names the argument.

One argument at a time takes each of a list of odd values; the others are as in a call that works. Some hundred values
run with every test run; `-m fuzz` draws ten thousand cases of two odd arguments at a time.
"""

from __future__ import annotations

import decimal
import fractions
import inspect
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import deepseek_arch as da
from support.small_models import config, model, tokens

LONGEST = 2.0  # seconds of one thread
NAN, INF = float("nan"), float("inf")


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 1.5, NAN, INF, -INF, 10**30, -(10**30), 10**400, 2**63, 2**31),
    *("", "x", "1", "\0", "\ud800", b"x", "cpu", "fp8", 1j, decimal.Decimal(2), fractions.Fraction(1, 2)),
    *(np.int64(2), np.int32(-1), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array([1, 2]), np.array(3)),
    *([], [1], [[1]], [None], (), (1, 2), (0, 0), (-1, 2), ("a", "b"), {}, {"a": 1}, {1: 2}, {1, 2}, range(3)),
    *(range(10**12), iter([1]), (i for i in range(2)), object(), int, len, lambda *a, **k: None, Path("x"), ...),
    *(torch.tensor(1), torch.tensor([1, 2]), torch.tensor([[1.5]]), torch.tensor(NAN), torch.ones(1, 5), torch.ones(0)),
    *(torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool), torch.full((1, 5), 10**12)),
    *(
        torch.ones(1, 5).to_sparse(),
        torch.ones(1, 5, dtype=torch.long).to_sparse(),
        torch.ones(1, 5, dtype=torch.complex64),
    ),
    *(torch.ones(2, 5, 32), torch.ones(1, 5, 32, dtype=torch.float64), torch.full((1, 5, 32), NAN)),
    *(torch.ones(1, 5, dtype=torch.uint8), -torch.ones(1, 5, dtype=torch.long), torch.zeros(1, 5)),
    *(torch.float16, torch.int8, torch.float8_e4m3fn, torch.complex64, torch.device("meta"), torch.device("cpu")),
    *(nn.Linear(2, 2), nn.ReLU(), nn.Linear),
)


class World:
    """Models, files and records that the calls share; a call that changes a model gets one of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = config("v3", num_nextn_predict_layers=1)
        self.model = model(self.config)
        dense = model(config("v3"))
        self.sparse = da.sparse_from_dense(dense, index_topk=2, index_n_heads=2, index_head_dim=16).train()
        self.ids = tokens(self.config, 1, 5)
        self.checkpoint = folder / "checkpoint"
        da.save(self.model, self.checkpoint)
        with torch.no_grad():
            self.record = self.model(self.ids, record_routing=True).routing
        self.load = da.ExpertLoad({"gate": torch.arange(8)})
        self.layout = da.ParallelLayout(dp_shard=8, ep=8)

    def fresh(self) -> da.DeepseekLM:
        return model(self.config)

    def trained(self) -> da.DeepseekLM:
        trained = self.fresh().train()
        trained(self.ids, labels=self.ids).loss.backward()
        return trained

    def cache(self) -> da.LatentCache:
        cache = self.model.new_cache(2)
        with torch.no_grad():
            self.model(self.ids.expand(2, -1), cache=cache)
        return cache

    def out(self) -> Path:
        return self.folder / "out"

    def calls(self) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
        """Function and arguments of a call that works, by name."""
        c, ids = self.config, self.ids
        step = {"input_ids": ids, "max_new_tokens": 2}
        small = {"config": c, "device": None, "dtype": torch.float32}
        planned = {"config": c, "layout": self.layout, "device": "H800"}
        searched = {"config": c, "devices": 8, "device": "H800", "fixed": {"ep": 8}, "top": 2}
        attention = {"hidden_size": 32, "num_heads": 2, "kv_lora_rank": 24, "qk_nope_head_dim": 12}
        attention |= {
            "qk_rope_head_dim": 8,
            "v_head_dim": 10,
            "q_lora_rank": 16,
            "softmax_scale": 0.2,
            "norm_eps": 1e-6,
        }
        attention |= {"bias": False, "dropout": 0.0, "layer_idx": 0, "device": None, "dtype": None}
        router = {"hidden_size": 32, "num_experts": 8, "top_k": 2, "topk_method": "noaux_tc", "n_group": 2}
        router |= {"topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "dtype": None}
        expert = {"num_experts": 8, "hidden_size": 32, "intermediate_size": 16, "device": None, "dtype": None}
        forward = {"input_ids": ids, "attention_mask": None, "position_ids": None, "cache": None, "labels": None}
        forward |= {"logits_to_keep": 0, "record_routing": False, "replay_routing": None, "return_logits": True}
        latent = {"num_layers": 3, "batch_size": 2, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "capacity": None}
        latent |= {"first_layer": 0, "format": None, "device": None, "dtype": None}
        return {
            "count_parameters": (da.count_parameters, {"config": c}),
            "flops_per_token": (
                da.flops_per_token,
                {"config": c, "context_length": 8, "training": False, "mtp": False},
            ),
            "kv_cache_bytes": (da.kv_cache_bytes, {"config": c, "tokens": 1, "bytes_per_value": 2}),
            "weight_bytes": (da.weight_bytes, {"config": c, "dtype": "bf16", "mtp": False}),
            "DeepseekLM": (da.DeepseekLM, small),
            "DeepseekModel": (da.DeepseekModel, small),
            "DecoderLayer": (da.DecoderLayer, small | {"layer_idx": 0}),
            "MTPLayer": (da.MTPLayer, small | {"depth": 0}),
            "MultiHeadLatentAttention": (da.MultiHeadLatentAttention, attention),
            "MultiHeadLatentAttention.from_config": (da.MultiHeadLatentAttention.from_config, small | {"layer_idx": 0}),
            "MoE.from_config": (da.MoE.from_config, small | {"layer_idx": 1}),
            "Router": (da.Router, router),
            "Router.from_config": (da.Router.from_config, small),
            "Experts": (da.Experts, expert),
            "FP8Experts": (da.FP8Experts, expert | {"block_size": (16, 16), "scale_format": None}),
            "FP8Linear": (
                da.FP8Linear,
                {"in_features": 32, "out_features": 16, "bias": False, "block_size": (16, 16), "scale_format": None},
            ),
            "MLP": (da.MLP, {"hidden_size": 32, "intermediate_size": 16, "device": None, "dtype": None}),
            "RMSNorm": (da.RMSNorm, {"hidden_size": 32, "eps": 1e-6, "device": None, "dtype": None}),
            "RotaryEmbedding": (
                da.RotaryEmbedding,
                {"dim": 8, "theta": 1e4, "yarn": None, "linear": 1.0, "dynamic": None},
            ),
            "RotaryEmbedding.from_config": (da.RotaryEmbedding.from_config, {"config": c}),
            "forward": (self.model, forward),
            "forward embeds": (self.model, {"inputs_embeds": torch.ones(1, 5, 32), "labels": ids}),
            "forward training": (self.fresh().train(), {"input_ids": ids, "labels": ids, "attention_mask": None}),
            "forward with a cache": (
                lambda **given: self.model(cache=self.cache(), **given),
                {"input_ids": ids.expand(2, -1), "attention_mask": None, "position_ids": None, "logits_to_keep": 1},
            ),
            "new_cache": (self.model.new_cache, {"batch_size": 2, "capacity": 4, "format": None}),
            "new_mtp_cache": (self.model.new_mtp_cache, {"batch_size": 2, "capacity": 4, "depth": 0}),
            "LatentCache": (da.LatentCache, latent),
            "LatentCache.rewind": (lambda lengths: self.cache().rewind(lengths), {"lengths": 2}),
            "LatentCache.reorder": (lambda index: self.cache().reorder(index), {"index": torch.tensor([1, 0])}),
            "StaticLatentCache": (da.StaticLatentCache, {"cache": self.cache(), "capacity": 8}),
            "CompiledDecodeStep": (da.CompiledDecodeStep, {"model": self.model, "cache": None}),
            "generate": (lambda **given: da.generate(self.model, **given), step | {"attention_mask": None}),
            "generate drafts": (
                lambda **given: da.generate(self.model, mtp_depth=1, **given),
                step | {"adaptive": True},
            ),
            "generate model": (lambda model: da.generate(model, ids, max_new_tokens=1), {"model": self.model}),
            "probe_mtp": (
                da.probe_mtp,
                {"model": self.model, "input_ids": ids, "attention_mask": None, "max_new_tokens": 2, "mtp_depth": 1}
                | {"temperature": 0.0, "seed": 0},
            ),
            "use_huge_pages": (da.use_huge_pages, {"module": self.model}),
            "published_tensors": (lambda model: list(da.published_tensors(model)), {"model": self.model}),
            "ParameterMatrices": (da.ParameterMatrices, {"model": self.model}),
            "load": (
                da.load,
                {"path": self.checkpoint, "device": "cpu", "dtype": None, "fp8": "keep", "layers": None}
                | {"experts": None, "mtp": True},
            ),
            "inspect_checkpoint": (da.inspect_checkpoint, {"path": self.checkpoint}),
            "save": (
                da.save,
                {"model": self.model, "path": self.out(), "format": "bf16", "max_shard_size": "5GB"},
            ),
            "slice_checkpoint": (
                da.slice_checkpoint,
                {"path": self.checkpoint, "out": self.out(), "layers": [0, 1], "experts": None, "mtp": False}
                | {"max_shard_size": "5GB"},
            ),
            "convert": (
                da.convert,
                {"path": self.checkpoint, "out": self.folder / "converted", "format": "bf16", "stacked": None}
                | {"max_shard_size": "5GB", "scale_format": None, "dtype": "float32", "resume": False, "verify": False},
            ),
            "LoadBalancer": (da.LoadBalancer, {"model": self.model, "rate": 1e-3, "form": "sign", "group": None}),
            "LoadBalancer.load_state_dict": (da.LoadBalancer(self.model).load_state_dict, {"state": {"steps": 3}}),
            "BalanceLoss": (
                da.BalanceLoss,
                {"sequence": 0.1, "counts": "routed", "expert": 0.0, "device": 0.0, "communication": 0.0, "devices": 1},
            ),
            "BalanceLoss.from_config": (da.BalanceLoss.from_config, {"config": c}),
            "TokenDropping": (da.TokenDropping, {"factor": 1.0, "devices": 1, "spared": 0.1}),
            "ExpertLoad": (da.ExpertLoad, {"loads": {"gate": torch.arange(8)}, "rate": 0.1}),
            "ExpertLoad.save": (self.load.save, {"path": self.folder / "loads.json"}),
            "LoadHistory.add": (da.LoadHistory().add, {"report": self.load}),
            "LoadHistory.mean": (lambda last: self.history().mean(last), {"last": 1}),
            "LoadHistory.max_violation": (lambda name: self.history().max_violation(name), {"name": "gate"}),
            "LoadHistory.save": (lambda path: self.history().save(path), {"path": self.folder / "history.json"}),
            "LoadHistory.load": (da.LoadHistory.load, {"path": self.saved_history()}),
            "plan_placement": (
                da.plan_placement,
                {"loads": [1.0, 2.0, 3.0, 4.0], "devices": 2, "redundant": 0, "nodes": 1},
            ),
            "routing_agreement": (da.routing_agreement, {"first": self.record, "second": self.record}),
            "ParallelLayout": (da.ParallelLayout, dict.fromkeys(("pp", "dp_shard", "cp", "tp", "ep", "etp"), 1)),
            "ParallelLayout.for_devices": (da.ParallelLayout(ep=2).for_devices, {"devices": 8}),
            "ParallelLayout.coordinates": (self.layout.coordinates, {"rank": 1}),
            "ParallelLayout.stride": (self.layout.stride, {"axis": "ep"}),
            "ParallelLayout.validate": (
                self.layout.validate,
                {"config": c, "sequence": 64, "fp8_blocks": False, "redundant_experts": 0},
            ),
            "InferenceSetup": (
                da.InferenceSetup,
                {"batch": 1, "context": 64, "precision": "fp8", "cache_bytes": 2, "redundant": 0, "overlap": True},
            ),
            "TrainingSetup": (
                da.TrainingSetup,
                {"batch": 8, "sequence": 64, "micro_batch": 1, "schedule": "1f1b", "chunks": 1, "zero": 1}
                | {"precision": "fp8", "recompute": "none", "weight_bytes": 2, "master_bytes": 4},
            ),
            "plan_inference": (da.plan_inference, planned | {"setup": None}),
            "plan_training": (da.plan_training, planned | {"setup": da.TrainingSetup(batch=64, schedule="1f1b")}),
            "search_inference": (da.search_inference, searched),
            "search_training": (
                da.search_training,
                searched | {"setup": da.TrainingSetup(batch=64), "free": ("schedule",)},
            ),
            "dequantize": (da.dequantize, {"model": self.fresh(), "dtype": None}),
            "keep_fp8": (
                lambda **given: da.keep_fp8(**({"model": self.fresh()} | given)),
                {"model": self.fresh(), "block_size": (16, 12), "parameters": None, "scale_format": None},
            ),
            "fp8_training": (
                lambda **given: da.fp8_training(**({"model": self.fresh()} | given)),
                {"policy": da.FP8Policy(())},
            ),
            "fp8_training model": (da.fp8_training, {"model": self.fresh()}),
            "remove_fp8_training": (da.remove_fp8_training, {"model": self.fresh()}),
            "fp8_sensitivity": (
                da.fp8_sensitivity,
                {
                    "model": self.fresh(),
                    "batches": [{"input_ids": ids, "labels": ids}],
                    "policy": None,
                    "by": "weight",
                    "gradients": False,
                },
            ),
            "FP8Precision": (
                da.FP8Precision,
                {"fprop": "fp8", "dgrad": "fp8", "wgrad": "fp8", "input_scale": None, "swiglu_cache": "high"},
            ),
            "FP8Rule": (
                da.FP8Rule,
                {"pattern": "*", "precision": da.FP8Precision(), "required": False, "exact": False},
            ),
            "FP8Policy": (da.FP8Policy, {"rules": ()}),
            "FP8Policy.from_dict": (da.FP8Policy.from_dict, {"data": da.V3_RECIPE.to_dict()}),
            "FP8Policy.assign": (
                da.FP8Policy((da.FP8Rule("*", da.FP8Precision()),)).assign,
                {"names": ["model.layers.0.self_attn.o_proj.weight"]},
            ),
            "LightningIndexer": (
                da.LightningIndexer,
                {"hidden_size": 32, "q_lora_rank": 16, "num_heads": 2, "head_dim": 16, "top_k": 2}
                | {"rope_interleaved": False, "device": None, "dtype": None},
            ),
            "clip_grad_norm": (da.clip_grad_norm, {"model": self.trained(), "max_norm": 1.0}),
            "parallelize": (da.parallelize, {"model": self.fresh(), "layout": self.layout}),
            "init_weights": (da.init_weights, {"model": self.fresh(), "seed": 1, "device": "cpu"}),
            "pipeline": (
                da.pipeline,
                {"model": self.fresh(), "layout": self.layout, "schedule": "1F1B", "microbatches": 2}
                | {"stage_layers": None},
            ),
            "register_dispatch": (
                lambda **given: da.register_dispatch(**({"factory": print} | given)),
                {"name": "odd"},
            ),
            "use_dispatch": (da.use_dispatch, {"model": self.fresh(), "name": "rows"}),
            "save_sharded": (
                lambda **given: da.save_sharded(**({"path": self.new()} | given)),
                {"model": self.fresh(), "optimizer": None},
            ),
            "load_sharded": (
                da.load_sharded,
                {"model": self.fresh(), "path": self.sharded(), "optimizer": None},
            ),
            "KeySelection": (da.KeySelection, {"record": False, "stage": None}),
            "sparse_from_dense": (
                lambda **given: da.sparse_from_dense(**({"model": self.fresh()} | given)),
                {"model": self.fresh(), "index_topk": 2, "index_n_heads": 2, "index_head_dim": 16},
            ),
            "train_only_indexers": (da.train_only_indexers, {"model": self.sparse}),
            "indexer_warm_up": (da.indexer_warm_up, {"model": self.sparse, "input_ids": ids, "attention_mask": None}),
            "sparse_training": (
                da.sparse_training,
                {"model": self.sparse, "input_ids": ids, "labels": ids, "position_ids": None},
            ),
            "global_loss": (
                da.global_loss,
                {"out": self.fresh().train()(ids, labels=ids), "mtp_weight": 0.0, "group": None},
            ),
            "DeepseekConfig.from_dict": (da.DeepseekConfig.from_dict, {"data": c.to_dict()}),
            "DeepseekConfig.from_pretrained": (da.DeepseekConfig.from_pretrained, {"source": "tiny"}),
            "DeepseekConfig.is_moe_layer": (c.is_moe_layer, {"layer_idx": 1}),
        }

    def history(self) -> da.LoadHistory:
        history = da.LoadHistory()
        history.add(self.load)
        return history

    def new(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def sharded(self) -> Path:
        folder = self.new()
        da.save_sharded(self.fresh(), folder)
        return folder

    def saved_history(self) -> Path:
        file = self.folder / "saved.json"
        self.history().save(file)
        return file


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Some odd values are paths, which are written to."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("arguments"))


def outcome(function: Callable[..., Any], given: dict[str, Any]) -> str | None:
    """Calls; returns what is wrong about the way it ended, None if nothing is."""
    started = time.thread_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**given)
    except ValueError as error:
        message = str(error)
        if not ("expected" in message or "missing" in message):
            return f"{type(error).__name__} that says nothing of what was expected: {message[:200]}"
        if len(message) > 5000:
            return f"a message of {len(message)} characters"
    except OSError as error:
        if error.errno is None and not error.args:
            return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    took = time.thread_time() - started
    return f"{took:.1f} s" if took > LONGEST else None


def fresh(value: Any) -> Any:
    """Iterators are used up by a call; each gets one of its own."""
    return iter([1]) if hasattr(value, "__next__") else value


def odd_cases(calls: dict[str, Any]) -> list[tuple[str, str, Any]]:
    return [(name, argument, odd) for name, (_, given) in calls.items() for argument in given for odd in ODD]


def failures(calls: dict[str, Any], cases: list[dict[str, Any]]) -> list[str]:
    """Runs cases, each the name of a call and the arguments to change -> what is wrong with their outcomes."""
    wrong = []
    for case in cases:
        function, given = calls[case["call"]]
        changes = {name: fresh(odd) for name, odd in case.items() if name != "call"}
        if (problem := outcome(function, {**given, **changes})) is not None:
            wrong.append(f"{case['call']}({', '.join(f'{k}={text(v)}' for k, v in changes.items())}): {problem}")
    return wrong


def text(value: Any) -> str:
    return " ".join(repr(value)[:60].split())


def test_the_calls_work_as_they_are(world):
    calls = world.calls()
    for name, (function, given) in calls.items():
        # The one needs a cache of its own kind, and compiles; the others a process group.
        if name not in ("CompiledDecodeStep", "parallelize", "pipeline", "use_dispatch"):
            function(**given)


def test_every_public_function_is_called():
    """Records that the package returns, and classes that others' constructors make, are not for users to build."""
    results = {"CausalLMOutput", "MTPProbe", "ParameterCount", "SpeculationReport", "ExpertPlacement", "InferencePlan"}
    results |= {
        "SparseLatentAttention",
        "Pipeline",
        "TrainingPlan",
        "Linear",
        "MoE",
        "presets",
        "RoutingRecord",
        "LoadHistory",
        "DeepseekConfig",
    }
    public = {name for name in dir(da) if name[0] != "_" and callable(getattr(da, name))}
    public = {name for name in public if getattr(da, name).__module__.startswith("deepseek_arch")}
    errors = {name for name in public if inspect.isclass(getattr(da, name)) and name.endswith("Error")}
    assert public - errors - results <= set(World.calls.__code__.co_consts) | called_names()


def called_names() -> set[str]:
    source = inspect.getsource(World.calls)
    return {name for name in dir(da) if f"da.{name}" in source}


def test_odd_arguments(world):
    """Six values of each argument of each function."""
    calls, rng = world.calls(), random.Random(0)
    cases = []
    for name, (_, given) in calls.items():
        for argument in given:
            cases += [{"call": name, argument: odd} for odd in rng.sample(ODD, 6)]
    assert failures(calls, cases) == []


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(10))
def test_all_odd_arguments(world, part):
    calls = world.calls()
    cases = [{"call": name, argument: odd} for name, argument, odd in odd_cases(calls)[part::10]]
    assert failures(calls, cases) == []


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(10))
def test_two_odd_arguments(world, seed):
    calls, rng, cases = world.calls(), random.Random(seed), []
    for _ in range(1000):
        name = rng.choice(sorted(calls))
        arguments = sorted(calls[name][1])
        chosen = rng.sample(arguments, min(2, len(arguments)))
        cases.append({"call": name} | {argument: rng.choice(ODD) for argument in chosen})
    assert failures(calls, cases) == []
