"""Folders in and out: both ways with transformers and with `da.load`, FP8, MTP modules, and what must fail."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, FineGrainedFP8Config
from twins import NATIVE, load_silently, ours, same_tensors

import deepseek_arch as da
import deepseek_arch.hf as dhf
from support import small_models
from support.small_models import error, tokens


def names(folder) -> set[str]:
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= set(tensors.keys())
    return found


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("kind", small_models.KINDS)
@pytest.mark.parametrize("built", ["from a config", "from a folder"])
def test_published_names_bit_for_bit_both_ways(folder_of, tmp_path, kind, built):
    folder = folder_of(kind, num_nextn_predict_layers=2)
    core = da.load(folder)
    if built == "from a folder":
        model = load_silently(dhf.DeepseekForCausalLM, folder)
    else:
        model = dhf.DeepseekForCausalLM(core.config)
        model.load_state_dict(core.state_dict())
    assert same_tensors(model.state_dict(), core.state_dict())
    model.save_pretrained(tmp_path)
    assert names(tmp_path) == names(folder)
    assert same_tensors(da.load(tmp_path).state_dict(), core.state_dict())
    again = load_silently(dhf.DeepseekForCausalLM, tmp_path)
    assert same_tensors(again.state_dict(), core.state_dict())


@pytest.mark.parametrize("kind", [k for k in small_models.KINDS if k != "kimi"])
def test_transformers_reads_what_we_save_and_we_what_it_saves(folder_of, tmp_path, kind):
    model = ours(small_models.config(kind))
    model.save_pretrained(tmp_path / "ours")
    native_class = NATIVE[model.config.model_type][1]
    native, info = native_class.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    native.save_pretrained(tmp_path / "native")
    back = load_silently(dhf.DeepseekForCausalLM, tmp_path / "native")
    assert same_tensors(back.state_dict(), model.state_dict())


@pytest.mark.parametrize("how", ["shards", "a state dict", "stacked", "half"])
def test_other_ways_of_saving(folder_of, tmp_path, how):
    model = dhf.DeepseekForCausalLM.from_pretrained(folder_of("v3", num_nextn_predict_layers=1))
    expected = model.state_dict()
    if how == "shards":
        model.save_pretrained(tmp_path, max_shard_size="20KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
    elif how == "a state dict":
        model.save_pretrained(tmp_path, state_dict=model.state_dict())
    elif how == "stacked":
        model.save_pretrained(tmp_path, save_original_format=False)
        assert "model.layers.1.mlp.experts.gate_up_proj" in names(tmp_path)
    else:
        model.half().save_pretrained(tmp_path)
        expected = model.state_dict()
    again = load_silently(dhf.DeepseekForCausalLM, tmp_path)
    assert same_tensors(again.state_dict(), expected)
    again.save_pretrained(tmp_path / "published")
    assert same_tensors(da.load(tmp_path / "published").state_dict(), expected)


def test_fresh_models_are_drawn_as_the_config_says(tmp_path):
    """Uninitialized memory is NaN in these tests."""
    model = dhf.DeepseekForCausalLM(small_models.config("v3", num_nextn_predict_layers=1, initializer_range=0.1))
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            assert (tensor == 1).all(), name
        elif "e_score" in name:
            assert (tensor == 0).all(), name
        else:
            # Five standard errors of a sample's standard deviation.
            assert abs(tensor.std() - 0.1) < 5 * 0.1 / (2 * tensor.numel()) ** 0.5, name


def test_tied_embeddings_stay_tied(tmp_path):
    config = small_models.config("v3", tie_word_embeddings=True, num_nextn_predict_layers=1)
    model = dhf.DeepseekForCausalLM(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in names(tmp_path)
    assert "model.layers.3.shared_head.head.weight" in names(tmp_path)
    again = load_silently(dhf.DeepseekForCausalLM, tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert same_tensors(da.load(tmp_path).state_dict(), model.state_dict())


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings_reach_head_and_copies(tmp_path, tied):
    config = small_models.config("v3", tie_word_embeddings=tied, num_nextn_predict_layers=1)
    model = dhf.DeepseekForCausalLM(config).eval()
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path)
    core = da.load(tmp_path)
    ids = tokens(core.config, 1, 5)
    assert core.config.vocab_size == 70
    with torch.no_grad():
        assert model(ids).logits.shape[-1] == 70
        assert error(model(ids).logits, core(ids).logits) == 0


def biases_of(model) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if k.endswith("e_score_correction_bias")}


def test_router_biases_stay_float32_in_narrower_models(folder_of):
    """Loaded as bfloat16, cast afterwards: same bits (TRAPS C2)."""
    folder = folder_of("v3", num_nextn_predict_layers=1)
    expected = biases_of(da.load(folder))
    assert len(expected) == 3
    model = dhf.DeepseekForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and same_tensors(biases_of(model), expected)
    assert same_tensors(biases_of(model.half()), expected)


def test_router_biases_are_float32_whatever_the_file_stores(folder_of, fp8_folder, edited):
    for folder in (folder_of("v3", num_nextn_predict_layers=1), fp8_folder):
        narrow = edited(
            folder, lambda tensors, _: tensors.update({k: tensors[k].half() for k in tensors if "e_sc" in k})
        )
        model = dhf.DeepseekForCausalLM.from_pretrained(narrow, dtype=torch.bfloat16)
        assert {v.dtype for v in biases_of(model).values()} == {torch.float32}


def test_main_model_and_classifiers_ignore_mtp_modules_in_silence(folder_of):
    folder = folder_of("v3", num_nextn_predict_layers=1)
    main, info = load_silently(dhf.DeepseekModel, folder, output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"} and not info["missing_keys"]
    classifier, info = load_silently(
        dhf.DeepseekForSequenceClassification, folder, num_labels=3, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight"}
    assert classifier.score.out_features == 3
    core = da.load(folder).model
    for model in (main, classifier.model):
        assert torch.equal(model.layers[1].mlp.experts.gate_up_proj, core.layers[1].mlp.experts.gate_up_proj)


def test_stray_rotary_tables_are_skipped_in_silence(folder_of, edited):
    """Kimi-K2's files have one a layer, of a size that fits nothing (TRAPS H2)."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = edited(folder_of("kimi"), lambda tensors, _: tensors.update({name: torch.ones(56)}))
    _, info = load_silently(dhf.DeepseekForCausalLM, folder, output_loading_info=True)
    assert not any(info.values())


# ---------------------------------------------------------------- MTP modules


@pytest.mark.parametrize("present", [0, 1])
def test_absent_mtp_modules_are_left_out_with_a_warning(folder_of, edited, tmp_path, present):
    folder = folder_of("v3", num_nextn_predict_layers=2)

    def drop(tensors, _):
        for name in [n for n in tensors if n.startswith(("model.layers.3.", "model.layers.4.")[present:])]:
            del tensors[name]

    with pytest.warns(UserWarning, match=f"2 multi-token-prediction modules, the checkpoint has {present}"):
        model = dhf.DeepseekForCausalLM.from_pretrained(edited(folder, drop))
    assert len(model.mtp) == model.config.num_nextn_predict_layers == present
    model.save_pretrained(tmp_path / "saved")
    assert len(da.load(tmp_path / "saved").mtp) == present


def test_mtp_modules_can_be_left_out(folder_of):
    folder = folder_of("v3", num_nextn_predict_layers=2)
    model, info = load_silently(dhf.DeepseekForCausalLM, folder, num_nextn_predict_layers=0, output_loading_info=True)
    assert len(model.mtp) == 0 and not any(info.values())


# ---------------------------------------------------------------- FP8, dequantized (kept: test_hf_fp8.py)

DEQUANTIZE = [FineGrainedFP8Config(dequantize=True), dhf.DeepseekFP8Config(dequantize=True)]


@pytest.mark.parametrize("dtype", [None, "auto", torch.float32, torch.float16])
def test_fp8_is_dequantized_as_da_load_does(fp8_folder, dtype):
    """Every matrix here has partial blocks, on which transformers' own reader fails or is wrong (TRAPS E2)."""
    arguments = {"quantization_config": DEQUANTIZE[0]} | ({} if dtype is None else {"dtype": dtype})
    model = load_silently(dhf.DeepseekForCausalLM, fp8_folder, **arguments)
    core = da.load(fp8_folder, dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16, fp8="dequantize")
    assert same_tensors(model.state_dict(), core.state_dict())
    assert getattr(model.config, "quantization_config", None) is None


def test_dequantized_models_are_saved_as_ordinary_ones(fp8_folder, tmp_path):
    """A quantization_config left behind would have the next reader look for scales (TRAPS E12)."""
    with dhf.registered():
        model = AutoModelForCausalLM.from_pretrained(fp8_folder, dtype=torch.float32, quantization_config=DEQUANTIZE[1])
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert not [name for name in names(tmp_path) if "scale" in name]
    assert same_tensors(da.load(tmp_path).state_dict(), model.state_dict())
    native = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    ids = tokens(model.config.to_core(), 2, 9)
    with torch.no_grad():
        assert error(model(ids).logits, native(ids).logits) <= 1e-4


def test_our_fp8_config_asks_for_the_same_as_transformers_own(fp8_folder):
    states = []
    for argument in DEQUANTIZE:
        config = dhf.ArchDeepseekV3Config.from_pretrained(fp8_folder)
        before = config.to_dict()
        model = load_silently(dhf.DeepseekForCausalLM, fp8_folder, config=config, quantization_config=argument)
        states.append(model.state_dict())
        assert config.to_dict() == before
    assert same_tensors(*states)


def test_models_built_from_an_fp8_config_are_saved_without_it(tmp_path):
    model = dhf.DeepseekForCausalLM(da.DeepseekConfig.from_pretrained("tiny"))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# ---------------------------------------------------------------- what must fail


def _without(name):
    return lambda tensors, config: tensors.pop(name)


def _replaced(name, change):
    def edit(tensors, config):
        tensors[name] = change(tensors[name])

    return edit


def _truncated_depth(tensors, config):
    config["num_hidden_layers"] = 2


EXPERT, OUTPUT = "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"
BROKEN = {
    "an expert's matrix is missing": (_without(EXPERT), r"layers\.1\.mlp\.experts\.gate_up_proj"),
    "a matrix is missing": (_without(OUTPUT), r"1 missing: model\.layers\.0\.self_attn\.o_proj\.weight"),
    "the head is missing": (
        lambda tensors, _: [tensors.pop(k) for k in list(tensors) if "head.weight" in k],
        r"1 missing: lm_head\.weight",
    ),
    "a router bias is missing": (
        _without("model.layers.2.mlp.gate.e_score_correction_bias"),
        r"1 missing: model\.layers\.2\.mlp\.gate\.e_score_correction_bias",
    ),
    "a shape is swapped": (_replaced(OUTPUT, lambda t: t.T), r"1 of another shape: .*\[20, 32\] instead of \[32, 20\]"),
    "an expert's shape is swapped": (_replaced(EXPERT, lambda t: t.T), r"cannot be converted: .*experts\.gate_up_proj"),
    "an MTP module is incomplete": (
        _without("model.layers.3.enorm.weight"),
        r"1 missing: model\.layers\.3\.enorm\.weight",
    ),
    "a copy of the embedding differs": (
        _replaced("model.layers.3.embed_tokens.weight", lambda t: t + 1),
        r"copies .* to be equal",
    ),
    "the config has fewer layers": (_truncated_depth, r"missing: model\.layers\.2\.eh_proj\.weight"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_checkpoints_that_leave_a_weight_undefined_do_not_load(folder_of, edited, what):
    change, message = BROKEN[what]
    folder = edited(folder_of("v3", num_nextn_predict_layers=1), change)
    with pytest.raises(ValueError, match=message):
        dhf.DeepseekForCausalLM.from_pretrained(folder)


SCALE = OUTPUT + "_scale_inv"


def _with_nan(scale):
    scale = scale.clone()
    scale[0, 0] = float("nan")
    return scale


def _short(tensors, config):
    tensors[OUTPUT], tensors[SCALE] = tensors[OUTPUT][:128], tensors[SCALE][:1]


BROKEN_FP8 = {
    "a scale is missing": (_without(SCALE), r"o_proj\.weight"),
    "an expert's scale is missing": (_without(EXPERT + "_scale_inv"), r"experts\.3\.up_proj\.weight"),
    "a matrix is missing": (_without(OUTPUT), r"FP8 tensors beside the scales, got .*o_proj\.weight_scale_inv"),
    "a scale is not finite": (_replaced(SCALE, _with_nan), r"o_proj\.weight(_scale_inv)?: expected finite scales"),
    "a scale is too short": (
        _replaced(SCALE, lambda t: t[:1]),
        r"o_proj\.weight(_scale_inv: expected shape|: expected float32 scales) \[2, 1\]",
    ),
    "a matrix is too short": (_short, r"o_proj\.weight: expected shape \[192, 128\], got \[128, 128\]"),
    "a norm is too short": (_replaced("model.norm.weight", lambda t: t[:100]), r"model\.norm\.weight"),
    # Raw FP8 values would be loaded as weights, without a word (TRAPS E11).
    "the config does not say FP8": (
        lambda tensors, config: config.pop("quantization_config"),
        r"scales without an FP8 quantization_config",
    ),
}


@pytest.mark.parametrize("argument", [None, DEQUANTIZE[0]], ids=["kept", "dequantized"])
@pytest.mark.parametrize("what", BROKEN_FP8)
def test_broken_fp8_checkpoints_do_not_load(fp8_folder, edited, what, argument):
    change, message = BROKEN_FP8[what]
    with pytest.raises(ValueError, match=message):
        dhf.DeepseekForCausalLM.from_pretrained(edited(fp8_folder, change), quantization_config=argument)


def test_other_shapes_load_when_asked_for(folder_of, edited):
    folder = edited(folder_of("v3"), lambda tensors, config: config.update(vocab_size=50))
    model = dhf.DeepseekForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape == (50, 32)
