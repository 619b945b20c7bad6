"""Public names by group: the one list that `__init__.py` resolves names from and that type checkers read."""

# Configuration, and the facts that follow from it
from .config.deepseek_config import DeepseekConfig as DeepseekConfig
from .config.presets import presets as presets
from .config.errors import ConfigError as ConfigError
from .config.errors import UnsupportedModelError as UnsupportedModelError
from .layout.accounting import ParameterCount as ParameterCount
from .layout.accounting import count_parameters as count_parameters
from .layout.accounting import flops_per_token as flops_per_token
from .layout.accounting import kv_cache_bytes as kv_cache_bytes
from .layout.accounting import weight_bytes as weight_bytes

# Models and their modules
from .models.causal_lm import DeepseekLM as DeepseekLM
from .models.main_model import DecoderLayer as DecoderLayer
from .models.main_model import DeepseekModel as DeepseekModel
from .models.mtp_layer import MTPLayer as MTPLayer
from .models.outputs import CausalLMOutput as CausalLMOutput
from .models.live_weights import ParameterMatrices as ParameterMatrices
from .models.huge_pages import use_huge_pages as use_huge_pages
from .models.live_weights import published_tensors as published_tensors
from .attention.mla import MultiHeadLatentAttention as MultiHeadLatentAttention
from .attention.sparse_attention import SparseLatentAttention as SparseLatentAttention
from .attention.lightning_indexer import LightningIndexer as LightningIndexer
from .moe.moe import Experts as Experts
from .moe.moe import MoE as MoE
from .moe.moe import Router as Router
from .layers.linear import MLP as MLP
from .layers.linear import Linear as Linear
from .layers.norm import RMSNorm as RMSNorm
from .layers.rope import RotaryEmbedding as RotaryEmbedding

# Sparse attention and its training
from .attention.key_selection import KeySelection as KeySelection
from .models.indexer_training import indexer_warm_up as indexer_warm_up
from .models.indexer_training import sparse_from_dense as sparse_from_dense
from .models.indexer_training import sparse_training as sparse_training
from .models.indexer_training import train_only_indexers as train_only_indexers

# Caches and decoding
from .cache.latent_cache import LatentCache as LatentCache
from .cache.static_cache import StaticLatentCache as StaticLatentCache
from .generation.compiled_step import CompiledDecodeStep as CompiledDecodeStep
from .generation.entry import generate as generate
from .generation.mtp_probe import MTPProbe as MTPProbe
from .generation.mtp_probe import probe_mtp as probe_mtp
from .generation.report import SpeculationReport as SpeculationReport

# Checkpoints
from .checkpoint import CheckpointError as CheckpointError
from .checkpoint import convert as convert
from .checkpoint import inspect_checkpoint as inspect_checkpoint
from .checkpoint import load as load
from .checkpoint import save as save
from .checkpoint import slice_checkpoint as slice_checkpoint

# Routing, balancing and placement of experts
from .moe.balance_loss import BalanceLoss as BalanceLoss
from .moe.expert_load import ExpertLoad as ExpertLoad
from .moe.expert_load import LoadHistory as LoadHistory
from .moe.load_balancer import LoadBalancer as LoadBalancer
from .moe.placement import ExpertPlacement as ExpertPlacement
from .moe.placement import plan_placement as plan_placement
from .moe.routing_record import RoutingRecord as RoutingRecord
from .moe.routing_record import routing_agreement as routing_agreement
from .moe.token_dropping import TokenDropping as TokenDropping

# Many devices
from .layout.parallel_layout import LayoutError as LayoutError
from .layout.parallel_layout import ParallelLayout as ParallelLayout
from .parallel.apply import parallelize as parallelize
from .parallel.init_weights import init_weights as init_weights
from .parallel.pipeline import pipeline as pipeline
from .parallel.pipeline import Pipeline as Pipeline
from .parallel.dispatch_choice import register_dispatch as register_dispatch
from .parallel.dispatch_choice import use_dispatch as use_dispatch
from .parallel.norms import clip_grad_norm as clip_grad_norm
from .checkpoint.sharded_state import load_sharded as load_sharded
from .checkpoint.sharded_state import save_sharded as save_sharded
from .models.global_loss import global_loss as global_loss
from .planning.inference import InferencePlan as InferencePlan
from .planning.inference import InferenceSetup as InferenceSetup
from .planning.inference import plan_inference as plan_inference
from .planning.search import search_inference as search_inference
from .planning.search import search_training as search_training
from .planning.setup import TrainingSetup as TrainingSetup
from .planning.training import TrainingPlan as TrainingPlan
from .planning.training import plan_training as plan_training

# FP8
from .quant.fp8_convert import dequantize as dequantize
from .quant.fp8_convert import keep_fp8 as keep_fp8
from .quant.fp8_experts import FP8Experts as FP8Experts
from .quant.fp8_linear import FP8Linear as FP8Linear
from .quant.fp8_training import FP8Policy as FP8Policy
from .quant.fp8_training import FP8Precision as FP8Precision
from .quant.fp8_training import FP8Rule as FP8Rule
from .quant.fp8_training import V3_RECIPE as V3_RECIPE
from .quant.fp8_training import fp8_sensitivity as fp8_sensitivity
from .quant.fp8_training import fp8_training as fp8_training
from .quant.fp8_training import remove_fp8_training as remove_fp8_training

__version__: str
