"""A model's weights as others want to see them while it is trained: under published names, and as matrices.

Both are views of the live parameters, without a file or a copy.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..config.argument_types import check_types
from ..config.deepseek_config import DeepseekConfig
from ..layout.parameter_map import layout, scale_name
from ..moe.moe import Experts
from ..quant.fp8_convert import fp8_layers

__all__ = ["ParameterMatrices", "published_tensors"]


@check_types
@torch.no_grad()
def published_tensors(model: nn.Module, repeated: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yields every weight under the name that it has in a published checkpoint, one expert at a time.

    For a serving engine that takes weights while the model is trained (`load_weights` of vLLM and SGLang), and for any
    reader of published checkpoints:

        engine_model.load_weights(da.published_tensors(model))

    FP8 weights come as codes, each followed by its scales (`..._scale_inv`).

    Args:
        model: a `DeepseekLM`, or `deepseek_arch.hf.DeepseekForCausalLM`. Merge adapters first, and gather what is
            split over ranks.
        repeated: yields embedding and head once more under each MTP layer, as published checkpoints store them: an
            engine that drafts with copies of its own (vLLM's DeepSeekMTP) keeps old ones otherwise.

    Yields:
        The name, and a view of the parameter without gradients.

    Raises:
        ValueError: another kind of model, or parameters that are not those of its config (adapters, parts).
    """
    config = getattr(model, "config", None)
    core = (
        config if isinstance(config, DeepseekConfig) or config is None else getattr(config, "to_core", lambda: None)()
    )
    if not isinstance(core, DeepseekConfig) or not hasattr(model, "lm_head"):
        raise ValueError(f"expected a DeepseekLM or a DeepseekForCausalLM, got {type(model).__name__}")
    layers = fp8_layers(model)
    blocks = {f"{path}.{name}": layer.block_size for path, layer in layers.items() for name in layer.quantized_params}
    state = model.state_dict()
    slots = [slot for slot in layout(core) if not slot.repeats or (repeated and slot.name != "lm_head.weight")]
    wrong = [
        slot.parameter
        for slot in slots
        if slot.parameter not in state or slot.of(state).shape != torch.Size(slot.shape)
    ]
    if wrong:
        raise ValueError(
            f"expected the parameters that the config describes (merge adapters, gather parts), got none or others for "
            f"{', '.join(wrong[:5])}"
        )
    for slot in slots:
        yield slot.name, slot.of(state)
        if slot.parameter in blocks:
            yield scale_name(slot.name), slot.scale_of(state, blocks[slot.parameter][0])


@check_types
class ParameterMatrices:
    """The matrices of a model's trainable parameters, for optimizers that treat each by itself (Muon).

    Stacked experts are one parameter [E, 2 I, H] that holds 2 E matrices: an expert's gate and up are orthogonalized
    each for itself, as they are where a model has one tensor for each. Here each is a parameter of its own, a view of
    the model's memory:

        matrices = da.ParameterMatrices(model)
        muon = torch.optim.Muon([m for name, m in matrices.items() if "embed" not in name and "lm_head" not in name])
        matrices.feed(muon)  # once; then train as ever

    Parameters of other than two dimensions (norms) are left to another optimizer.

    Args:
        model: any module, on the device where it is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        stacks = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
        self._own: dict[str, nn.Parameter] = {}
        self._views: dict[str, tuple[nn.Parameter, nn.Parameter, tuple[int, slice]]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) in stacks:
                for index in _expert_matrices(name, parameter):
                    view = nn.Parameter(parameter.detach()[index])
                    self._views[f"{name}[{index[0]}, {index[1].start}:{index[1].stop}]"] = (view, parameter, index)
            elif parameter.ndim == 2:
                self._own[name] = parameter

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields name and matrix; of a stack's parts the name ends in `[expert, first row:end row]`."""
        yield from self._own.items()
        for name, (view, _, _) in self._views.items():
            yield name, view

    def feed(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives the parts of stacks their gradients before each step, and takes the stacks' gradients after it.

        So it is the step that clears them: `optimizer.zero_grad()` alone knows only of the parts.
        """
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        fed = [entry for entry in self._views.values() if id(entry[0]) in held]

        def before(*args: object) -> None:
            for view, stack, index in fed:
                if view.data_ptr() != stack[index].data_ptr():
                    raise ValueError("expected the model where it was when its matrices were taken, got it moved")
                view.grad = None if stack.grad is None else stack.grad[index]

        def after(*args: object) -> None:
            for view, stack, _ in fed:
                view.grad = stack.grad = None

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def _expert_matrices(name: str, stack: Tensor) -> Iterator[tuple[int, slice]]:
    experts, rows = stack.shape[:2]
    parts = 2 if name.endswith("gate_up_proj") else 1
    for expert in range(experts):
        for part in range(parts):
            yield expert, slice(part * rows // parts, (part + 1) * rows // parts)
