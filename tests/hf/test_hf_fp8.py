"""FP8 checkpoints whose weights stay FP8 in transformers: bytes in and out, generation, adapters, training."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from twins import load_silently, same_tensors

import deepseek_arch as da
import deepseek_arch.hf as dhf
from deepseek_arch.layers.linear import Linear
from deepseek_arch.quant.fp8_convert import fp8_layers
from deepseek_arch.quant.fp8_experts import FP8Experts
from support.small_models import error, tokens

E4M3 = torch.float8_e4m3fn
ROUNDING = 2.0**-16  # float32 sums in another order, through three layers
O_PROJ, EXPERTS = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.experts."


def bytes_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FP8 values as bytes, so that equal NaN and both zeros compare."""
    return {name: t.view(torch.uint8) if t.dtype == E4M3 else t for name, t in state.items()}


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    dtypes = {name: t.dtype for name, t in a.items()} == {name: t.dtype for name, t in b.items()}
    return dtypes and same_tensors(bytes_of(a), bytes_of(b))


def stored(folder) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def quantization(folder) -> dict | None:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


def fp8_and_scales(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if v.dtype == E4M3 or k.endswith("_scale_inv")}


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", [None, "auto", torch.float32, torch.float16])
def test_fp8_is_kept_as_da_load_keeps_it(fp8_folder, dtype):
    arguments = {} if dtype is None else {"dtype": dtype}
    model, info = load_silently(dhf.DeepseekForCausalLM, fp8_folder, output_loading_info=True, **arguments)
    assert not any(info.values())
    core = da.load(fp8_folder, dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
    assert same_bytes(model.state_dict(), core.state_dict()) and core.load_report.kept
    ids = tokens(core.config, 2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, core(ids).logits)
    assert model.is_quantized and model.config.quantization_config.blocks == (128, 128)
    held = fp8_and_scales(model)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(held)


@pytest.mark.parametrize(
    "argument", [FineGrainedFP8Config(), dhf.DeepseekFP8Config(), dhf.DeepseekFP8Config(dequantize=False)]
)
def test_asking_for_fp8_is_asking_for_the_default(fp8_folder, argument):
    with dhf.registered():
        model = load_silently(AutoModelForCausalLM, fp8_folder, quantization_config=argument)
    assert type(model) is dhf.DeepseekForCausalLM
    assert same_bytes(model.state_dict(), da.load(fp8_folder).state_dict())


def test_kept_and_dequantized_agree(fp8_folder):
    kept = dhf.DeepseekForCausalLM.from_pretrained(fp8_folder, dtype=torch.float32)
    plain = dhf.DeepseekForCausalLM.from_pretrained(
        fp8_folder, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    ids = tokens(kept.config.to_core(), 2, 9)
    with torch.no_grad():
        assert error(kept(ids).logits, plain(ids).logits) < ROUNDING
    generated = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (kept, plain)]
    assert torch.equal(*generated)
    assert torch.equal(generated[0], da.generate(da.load(fp8_folder, dtype="float32"), ids, max_new_tokens=6))
    # Drafts of the model's own MTP modules; transformers' loader of such modules would read FP8 values as weights.
    assert torch.equal(kept.generate(ids, max_new_tokens=6, do_sample=False, use_mtp=True), generated[0])


def test_the_files_say_what_is_fp8(fp8_folder, edited, tmp_path):
    """One projection and one layer's experts are not; scales of the others are exponent bytes."""
    expected = {}

    def change(tensors, config):
        for name in [n for n in tensors if tensors[n].dtype == E4M3]:
            scale = tensors[f"{name}_scale_inv"]
            if name.startswith((O_PROJ, EXPERTS)):
                del tensors[f"{name}_scale_inv"]
                tensors[name] = torch.randn(tensors[name].shape).bfloat16()
            else:
                exponent = scale.log2().ceil()
                tensors[f"{name}_scale_inv"] = (exponent + 127).to(torch.uint8)
                expected[f"{name}_scale_inv"] = exponent.exp2()
        expected.update({n: t for n, t in tensors.items() if t.dtype != torch.uint8})

    folder = edited(fp8_folder, change)
    model, info = load_silently(dhf.DeepseekForCausalLM, folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values())
    assert same_bytes(model.state_dict(), da.load(folder, dtype=torch.float32).state_dict())
    layers = model.model.layers
    assert type(layers[0].self_attn.o_proj) is Linear and not isinstance(layers[1].mlp.experts, FP8Experts)
    assert isinstance(layers[2].mlp.experts, FP8Experts)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    assert same_bytes(stored(tmp_path / "saved"), expected)


def test_experts_that_are_fp8_in_part_are_an_error_unless_dequantized(fp8_folder, edited):
    name = f"{EXPERTS}3.up_proj.weight"

    def change(tensors, config):
        del tensors[f"{name}_scale_inv"]
        tensors[name] = tensors[name].to(torch.bfloat16)

    folder = edited(fp8_folder, change)
    with pytest.raises(ValueError, match=r"all FP8 or none, got some of model\.layers\.1\.mlp\.experts; .*dequantize"):
        dhf.DeepseekForCausalLM.from_pretrained(folder)
    dhf.DeepseekForCausalLM.from_pretrained(folder, quantization_config=dhf.DeepseekFP8Config(dequantize=True))


def test_fp8_values_without_scales_are_named_first(fp8_folder, edited):
    """transformers 5.17 casts FP8 values before the missing scales could be noticed."""
    folder = edited(fp8_folder, lambda tensors, _: tensors.pop(f"{O_PROJ}_scale_inv"))
    with pytest.raises(ValueError, match=rf"a scale beside each FP8 tensor, got none for {O_PROJ}"):
        dhf.DeepseekForCausalLM.from_pretrained(folder)


def test_other_models_fp8_is_transformers_own():
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["fp8"] is FineGrainedFP8Config


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("how", ["one file", "shards", "stacked", "from memory"])
def test_bytes_and_names_come_back(fp8_folder, tmp_path, how):
    model = dhf.DeepseekForCausalLM.from_pretrained(fp8_folder)
    if how == "stacked":
        model.save_pretrained(tmp_path, save_original_format=False)
        assert "model.layers.1.mlp.experts.gate_up_proj_scale_inv" in stored(tmp_path)
        again = load_silently(dhf.DeepseekForCausalLM, tmp_path)
        again.save_pretrained(tmp_path / "published")
        assert same_bytes(again.state_dict(), model.state_dict())
        assert same_bytes(stored(tmp_path / "published"), stored(fp8_folder))
        return
    if how == "from memory":
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    else:
        model.save_pretrained(tmp_path, **({"max_shard_size": "1MB"} if how == "shards" else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (how == "shards")
    assert same_bytes(stored(tmp_path), stored(fp8_folder))
    assert quantization(tmp_path) == quantization(fp8_folder)
    assert same_bytes(da.load(tmp_path).state_dict(), model.state_dict())


def test_scale_grids_of_one_row_or_column_keep_their_shape(tmp_path):
    """transformers 5.17 would save [2, 1] as [2]."""
    config = da.DeepseekConfig.from_pretrained("tiny").replace(moe_intermediate_size=64, hidden_size=96)
    da.save(da.DeepseekLM(config, dtype=torch.bfloat16), tmp_path / "a", format="fp8")
    model = dhf.DeepseekForCausalLM.from_pretrained(tmp_path / "a")
    assert model.model.layers[1].mlp.experts.down_proj_scale_inv.shape[1:] == (1, 1)
    model.save_pretrained(tmp_path / "b")
    assert same_bytes(stored(tmp_path / "b"), stored(tmp_path / "a"))


def test_main_models_and_classifiers(fp8_folder, tmp_path):
    model = dhf.DeepseekForCausalLM.from_pretrained(fp8_folder)
    main = load_silently(dhf.DeepseekModel, fp8_folder)
    assert same_bytes(main.state_dict(), model.model.state_dict())
    main.save_pretrained(tmp_path / "main")
    assert same_bytes(load_silently(dhf.DeepseekModel, tmp_path / "main").state_dict(), main.state_dict())
    assert quantization(tmp_path / "main") == quantization(fp8_folder)
    classifier = load_silently(dhf.DeepseekForSequenceClassification, fp8_folder, num_labels=3)
    assert same_bytes(classifier.model.state_dict(), main.state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    again = load_silently(dhf.DeepseekForSequenceClassification, tmp_path / "classifier")
    assert same_bytes(again.state_dict(), classifier.state_dict())


def test_casts_leave_fp8_alone(fp8_folder):
    model = dhf.DeepseekForCausalLM.from_pretrained(fp8_folder)
    before = fp8_and_scales(model)
    ids = tokens(model.config.to_core(), 1, 5)
    for cast, dtype in (
        (model.half, torch.float16),
        (model.float, torch.float32),
        (model.bfloat16, torch.bfloat16),
        (lambda: model.to(torch.float32), torch.float32),
    ):
        assert cast() is model and model.dtype == dtype
        assert same_bytes(fp8_and_scales(model), before)
        assert model(ids).logits.dtype == dtype


def test_dequantizing_in_memory_gives_the_dequantized_model(fp8_folder, tmp_path):
    model = dhf.DeepseekForCausalLM.from_pretrained(fp8_folder)
    model.save_pretrained(tmp_path / "fp8")  # transformers then names the config's dtype by a string
    model.dequantize()
    plain = dhf.DeepseekForCausalLM.from_pretrained(
        fp8_folder, quantization_config=dhf.DeepseekFP8Config(dequantize=True)
    )
    assert same_tensors(model.state_dict(), plain.state_dict()) and not model.is_quantized
    model.save_pretrained(tmp_path / "bf16")
    assert quantization(tmp_path / "bf16") is None
    assert same_tensors(da.load(tmp_path / "bf16").state_dict(), plain.state_dict())
    model.load_state_dict(stored(tmp_path / "bf16") | dict(model.mtp.state_dict(prefix="mtp.")), strict=False)
    # From the config of an FP8 model, an ordinary one (TRAPS E12).
    fresh = dhf.DeepseekForCausalLM(dhf.DeepseekForCausalLM.from_pretrained(fp8_folder).config)
    fresh.save_pretrained(tmp_path / "fresh")
    assert quantization(tmp_path / "fresh") is None and da.load(tmp_path / "fresh")


def test_published_names_are_taken_by_load_state_dict(fp8_folder, tmp_path):
    """And only in their own kind: a copy would take ordinary values for FP8, or FP8 for ordinary ones (TRAPS E11)."""
    model = dhf.DeepseekForCausalLM.from_pretrained(fp8_folder)
    plain = dhf.DeepseekForCausalLM.from_pretrained(
        fp8_folder, quantization_config=dhf.DeepseekFP8Config(dequantize=True)
    )
    before = fp8_and_scales(model)
    for layer in fp8_layers(model).values():
        for name in layer.quantized_params:
            codes, scale = layer.pair(name)
            codes.data, scale.data = torch.zeros_like(codes), torch.zeros_like(scale)
    model.load_state_dict(stored(fp8_folder))  # strict: nothing missing, nothing unexpected
    assert same_bytes(fp8_and_scales(model), before)
    plain.save_pretrained(tmp_path)
    expert = rf"{EXPERTS}0\.down_proj\.weight: expected torch\.float8_e4m3fn, got torch\.bfloat16"
    with pytest.raises(RuntimeError, match=expert):
        model.load_state_dict(stored(tmp_path), strict=False)
    assert same_bytes(fp8_and_scales(model), before)
    with pytest.raises(RuntimeError, match=rf"{EXPERTS}0\.down_proj\.weight: expected torch\.bfloat16, got torch\.fl"):
        plain.load_state_dict(stored(fp8_folder), strict=False)


# ---------------------------------------------------------------- devices


LAYERS_ON_DISK = {"model.layers.1": "disk", "model.layers.2": "disk"}
ELSEWHERE = ("model.embed_tokens", "model.norm", "model.rotary_emb", "model.layers.0", "lm_head", "mtp")


@pytest.mark.parametrize(
    "device_map", [{"": "cpu"}, LAYERS_ON_DISK | dict.fromkeys(ELSEWHERE, "cpu")], ids=["cpu", "disk"]
)
def test_device_maps(fp8_folder, tmp_path, device_map):
    """Offloaded layers have no weights until they are called; the absorbed form asks kv_b_proj what it computes."""
    pytest.importorskip("accelerate")
    arguments = {"dtype": torch.float32, "device_map": device_map, "offload_folder": str(tmp_path)}
    model = dhf.DeepseekForCausalLM.from_pretrained(fp8_folder, **arguments)
    ids = tokens(model.config.to_core(), 1, 6)
    with torch.no_grad():
        expected = da.load(fp8_folder, dtype="float32")(ids).logits
        assert error(model(ids).logits, expected) < ROUNDING
        steps = [model(ids[:, :-1], use_cache=True)]
        steps.append(model(ids[:, -1:], past_key_values=steps[0].past_key_values))
        assert error(torch.cat([step.logits for step in steps], 1), expected) < ROUNDING


# ---------------------------------------------------------------- adapters

ADAPTERS = {
    "attention": {"target_modules": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]},
    "stacked experts": {
        "target_modules": ["o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
    "all linear layers": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("where", ADAPTERS)
def test_lora_on_an_fp8_base(fp8_folder, tmp_path, where):
    """Trains, is saved, loaded and attached; merging fails unless the base is dequantized."""
    peft = pytest.importorskip("peft")

    def base():
        return dhf.DeepseekForCausalLM.from_pretrained(fp8_folder, dtype=torch.float32)

    frozen = {name: p.clone() for name, p in bytes_of(base().state_dict()).items()}
    settings = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **ADAPTERS[where])
    model = peft.get_peft_model(base(), settings).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    ids = tokens(model.config.to_core(), 2, 9)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    first = model(ids, labels=ids).loss
    first.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if p.requires_grad and ".mtp." not in n)
    optimizer.step()
    with torch.no_grad():
        assert model(ids, labels=ids).loss < first - 0.05
        logits = model(ids).logits
        # The absorbed form reads kv_b_proj through its adapter.
        steps = [model(ids[:, :-1], use_cache=True)]
        steps.append(model(ids[:, -1:], past_key_values=steps[0].past_key_values))
        assert error(torch.cat([step.logits for step in steps], 1), logits) < ROUNDING
        model.save_pretrained(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
        attached = base()
        attached.load_adapter(str(tmp_path / "adapter"))
        for other in (again, attached.eval()):
            assert error(other(ids).logits, logits) < ROUNDING
        with pytest.raises(RuntimeError, match="Float8"):
            model.merge_and_unload()
        renamed = {
            n.replace("base_model.model.", "").replace("base_layer.", ""): t for n, t in model.state_dict().items()
        }
        assert same_tensors({n: t for n, t in bytes_of(renamed).items() if "lora_" not in n}, frozen)
        again.dequantize()
        merged = again.merge_and_unload()
        assert error(merged(ids).logits, logits) < ROUNDING
        merged.save_pretrained(tmp_path / "merged")
        assert error(da.load(tmp_path / "merged")(ids).logits, logits) < ROUNDING


def test_adapters_added_in_transformers_own_way(fp8_folder):
    peft = pytest.importorskip("peft")
    model = dhf.DeepseekForCausalLM.from_pretrained(fp8_folder)
    model.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, **ADAPTERS["stacked experts"]))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.bfloat16}
    ids = tokens(model.config.to_core(), 1, 5)
    model(ids, labels=ids).loss.backward()


def test_trainer_trains_adapters_and_refuses_a_bare_fp8_model(fp8_folder, tmp_path, capsys):
    pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    base = dhf.DeepseekForCausalLM.from_pretrained(fp8_folder)
    before = fp8_and_scales(base)
    rows = [{"input_ids": row, "labels": row} for row in tokens(base.config.to_core(), 4, 10)]
    options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        lr_scheduler_type="constant",
        **options,
    )
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(base, arguments, train_dataset=rows)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_b_proj", "o_proj"]))
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    renamed = {name.replace(".base_layer", ""): tensor for name, tensor in fp8_and_scales(base).items()}
    assert same_bytes(renamed, before)
