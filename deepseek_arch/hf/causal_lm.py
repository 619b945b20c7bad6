"""The causal language model as transformers knows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedConfig, TemperatureLogitsWarper
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from ..config.deepseek_config import DeepseekConfig
from ..layers.linear import Linear
from ..layers.unreached import connect
from ..models.causal_lm import kept_states
from ..models.tensor_checks import check_kept, check_labels
from ..moe.balance_loss import BalanceLoss
from ..moe.moe import Router
from .added_losses import added_losses, own_losses, replaces_the_head, warms_up_modules
from .attention_mask import only_mask
from .base import DeepseekPreTrainedModel
from .configuration import core_config
from .continuous_batching import PagedGenerationMixin
from .finite_logits import FiniteLogits
from .indexer_training import indexer_stage
from .input_checks import checked_prompts, vocabulary
from .key_mapping import register_conversions
from .layers import DeepseekMTPLayer
from .lookup_tables import add_class_name
from .main_model import DeepseekModel
from .mtp_generation import generate_with_drafts
from .mtp_training import loss_weight
from .outputs import DeepseekCausalLMOutput, DeepseekModelOutput

__all__ = ["DeepseekForCausalLM"]

_COLDEST = 1e-30  # as good as greedy, and a quotient of logits that float32 holds


class DeepseekForCausalLM(DeepseekPreTrainedModel, PagedGenerationMixin):
    """The language model: main model, head, and the multi-token-prediction modules of the checkpoint.

    The MTP modules are kept so that nothing of the checkpoint is lost; `forward` trains them where
    `config.mtp_loss_weight` asks for it (0.3 to 0.1 in V3's report; default 0, and then they do not run).

    Args:
        config: one of our configs, transformers' own for the same family, or a `DeepseekConfig`.

    Attributes:
        mtp_detached: True lets their loss train them alone, and neither the main model nor the embedding and the head
            that they share with it (TRAPS F12).
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # type: ignore[dict-item]  # noqa: RUF012  as the natives

    reads_mtp_modules = True
    mtp_detached = False

    def __init__(self, config: PreTrainedConfig | DeepseekConfig) -> None:
        super().__init__(config)
        core = self.config.to_core()
        self.model = DeepseekModel(self.config)
        self.vocab_size = core.vocab_size
        self.lm_head = Linear(core.hidden_size, core.vocab_size, bias=False)
        self.mtp = nn.ModuleList(DeepseekMTPLayer(core, k) for k in range(core.num_nextn_predict_layers))
        self._balance_router = _scoring_router(core)
        self.post_init()
        if len(self.mtp):
            self._plan_mtp_modules()

    def _plan_mtp_modules(self) -> None:
        """Lets transformers' parallel plans cut and wrap MTP modules as they do decoder layers."""
        layers = "model.layers.*"
        for plan in (self._tp_plan, self._ep_plan, getattr(self, "_fsdp_plan", None)):
            of_layers = [rule for rule in plan or () if rule == layers or rule.startswith(f"{layers}.")]
            for rule in of_layers:
                plan[f"mtp.*{rule.removeprefix(layers)}"] = plan[rule]  # type: ignore[index]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_conversions(cls.__name__, causal_lm=True)
        add_class_name("ForCausalLM", cls.__name__)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and replaces_the_head(value):  # TRL's trainers set it on the instance
            value = own_losses(value)
        super().__setattr__(name, value)

    def _core_for_saving(self) -> DeepseekConfig | None:
        return self.config.to_core()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> DeepseekCausalLMOutput:
        """One forward pass; see `DeepseekModel.forward` for the arguments that are not named here.

        Args:
            labels: [B, T], the tokens themselves (the shift happens in the loss), -100 where ignored.
            logits_to_keep: 0 for all positions, n for the last n, or an index tensor of positions.
            kwargs: also `num_items_in_batch` for the loss. With `output_router_logits`, `aux_loss` is the sum
                over layers of the sequence-wise balance loss without its factor, so that perfect balance gives 1 for
                each layer; it is added to the loss with the factor `router_aux_loss_coef`.

        With `config.mtp_loss_weight` above 0, labels and input_ids, and no cache given, the output has `mtp_loss`: in
        both modes the number that `DeepseekLM` gives, which training adds to the loss with that weight; in evaluation
        the loss is that of the next token alone, comparable with other models'. With `num_items_in_batch`, both added
        losses, means over this call, count by its share of the targets.

        With `config.indexer_stage` "dense", labels, and no cache given, the loss is that of sparse attention's indexers
        alone, which all keys are attended to for; with "sparse", training adds it with `config.indexer_loss_weight`. It
        reaches the indexers alone. `da.train_only_indexers(model)` freezes everything else.

        Raises:
            ValueError: as the main model's, or a weight that is negative or has nothing to weigh, or a stage without
                indexers.
        """
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        logits_to_keep = check_kept(logits_to_keep, tokens)
        vocab_size, ignored = vocabulary(self.model), kwargs.get("ignore_index", -100)
        if labels is not None:
            labels = check_labels(labels, tokens, vocab_size, ignored)
        if kwargs.get("shift_labels") is not None:
            kwargs["shift_labels"] = check_labels(kwargs["shift_labels"], None, vocab_size, ignored)
        attention_mask, predicts, stage = only_mask(attention_mask), False, None
        if labels is not None and past_key_values is None:
            stage = indexer_stage(self)
            predicts = input_ids is not None and (loss_weight(self) > 0 or warms_up_modules(self, stage))
        if stage is not None:  # a cache would carry no gradient to the indexers' keys
            use_cache, kwargs["indexer_stage"] = False, stage
        outputs: DeepseekModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_trunk=predicts,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        assert hidden is not None
        hidden = connect(hidden, self.mtp) if self.training else hidden
        logits = self.lm_head(kept_states(hidden, logits_to_keep))
        num_items, shift_labels = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
        added = added_losses(self, outputs, input_ids, attention_mask, labels, num_items, shift_labels)
        loss = None
        if labels is not None:
            kwargs.pop("indexer_stage", None)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = added.with_loss(loss)
        return DeepseekCausalLMOutput(
            loss=loss,
            aux_loss=added.aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            mtp_loss=added.mtp_loss,
            mtp_losses=added.mtp_losses,
            mtp_accuracy=added.mtp_accuracy,
            indexer_loss=added.indexer_loss,
            indexer_recall=added.indexer_recall,
            routing=outputs.routing,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, with every cache of transformers, beams, and draft models.

        With `use_mtp=True` the model's own MTP modules draft up to `num_assistant_tokens` tokens a step (default
        1), for any number of rows, greedy or sampling; see `deepseek_arch.generate`.

        Raises:
            ValueError: logits are not finite (the message names the first parameter that is not), or what only selects
                is not (a router's bias, an indexer's parameter); prompts are no integers [B, T]; or `use_mtp` without
                MTP modules, or with a setting that it does not go with.
        """
        args, kwargs = checked_prompts(args, kwargs)
        configs = (kwargs.get("generation_config"), *args[1:2], self.generation_config)
        wanted = [kwargs.get("use_mtp"), *(getattr(config, "use_mtp", None) for config in configs)]
        if next((use for use in wanted if use is not None), False):
            return generate_with_drafts(self, *args, **kwargs)
        return cast(Any, GenerationMixin.generate)(self, *args, **kwargs)

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        """As transformers', with a check of the logits before all others."""
        processors = cast(Any, super())._get_logits_processor(*args, **kwargs)
        for processor in processors:
            if isinstance(processor, TemperatureLogitsWarper):  # below, float32 logits would overflow
                processor.temperature = max(processor.temperature, _COLDEST)
        return LogitsProcessorList([FiniteLogits(self, torch.device(kwargs.get("device") or self.device)), *processors])

    @property
    def router_aux_loss_coef(self) -> float:
        """Factor of the balance loss: `router_aux_loss_coef` of the config, else its family's (`BalanceLoss`)."""
        factor = getattr(self.config, "router_aux_loss_coef", None)
        return BalanceLoss.from_config(core_config(self.config)).sequence if factor is None else float(factor)

    def balance_loss(
        self, router_logits: tuple[Tensor, ...], shape: tuple[int, int], valid: Tensor | None = None
    ) -> Tensor:
        """Returns V3's sequence-wise balance loss, or V2's, of all layers with experts together, without a factor.

        Args:
            router_logits: [B T, E] of each layer.
            shape: (B, T).
            valid: bool [B, T], or None where nothing is padding.
        """
        core = core_config(self.config)
        loss = replace(BalanceLoss.from_config(core), sequence=1.0)
        (router,) = self._balance_router
        losses = [
            loss(router, logits.float(), router.route(logits.detach().float())[1], shape, valid)
            for logits in router_logits
        ]
        return torch.stack([each.to(losses[0].device) for each in losses]).sum()


def _scoring_router(core: DeepseekConfig) -> tuple[Router, ...]:
    """Returns a router that scores logits as the layers' do, in a tuple, so that it is no module of the model.

    The layers' own may be wrapped. It has no bias: V2 has none, and V3's loss does not read it. Empty without experts.
    """
    if core.n_routed_experts is None:
        return ()
    router = Router.from_config(core, device="meta")
    router.e_score_correction_bias = None
    return (router,)


register_conversions(DeepseekForCausalLM.__name__, causal_lm=True)
add_class_name("ForCausalLM", DeepseekForCausalLM.__name__)
