"""The training example: acceptance on given text against a plain loop, and a whole run in miniature."""

from __future__ import annotations

import pytest
import torch

import deepseek_arch as da
from benchmarks.training import mini as train_mini
from benchmarks.training.acceptance import held_out_rows, on_given_text
from support.small_models import config, model, tokens


@pytest.mark.parametrize("feeding", [("post_norm", "block"), ("pre_norm", "head_norm")])
def test_acceptance_on_given_text_is_what_a_loop_over_positions_finds(feeding):
    """Token by token: each depth's guess from the tokens before it, and the trunk's from the same tokens."""
    lm = model(config("v3", num_nextn_predict_layers=2, mtp_input=feeding[0], mtp_chain=feeding[1]))
    rows = tokens(lm.config, 3, 8)
    found = on_given_text(lm.train(), rows)
    assert lm.training and len(found) == 2
    lm.eval()
    for depth in range(2):
        shares = {"accepted": 0, "right": 0, "trunk_right": 0, "both_right": 0}
        count = 0
        for row in rows:
            for end in range(depth + 2, 8):  # guess token `end` from those before it
                known = row[None, :end]
                trunk = lm.model(known)
                own = int(lm.lm_head(trunk.hidden_states[:, -1]).argmax())
                hidden = lm.mtp_hidden(trunk)
                for d in range(depth + 1):  # depth d reads the token d + 1 further on, known up to `end`
                    hidden = hidden[:, : end - d - 1]
                    rope = tuple(part[..., : end - d - 1, :] for part in trunk.rope)
                    logits, hidden = lm.mtp_forward(hidden, known[:, d + 1 :], d, rope=rope)
                guess, truth = int(logits[0, -1].argmax()), int(row[end])
                shares["accepted"] += guess == own
                shares["right"] += guess == truth
                shares["trunk_right"] += own == truth
                shares["both_right"] += guess == own == truth
                count += 1
        for name, share in shares.items():
            assert getattr(found[depth], name) == pytest.approx(share / count), (depth, name)


def test_pieces_of_held_out_text():
    rows = held_out_rows(torch.arange(100), 3, 20)
    assert rows[:, 0].tolist() == [0, 40, 80] and rows[:, -1].tolist() == [19, 59, 99]
    with pytest.raises(ValueError, match="at least 20 tokens of text, got 19"):
        held_out_rows(torch.arange(19), 3, 20)


def small_settings(tmp_path, **changes) -> train_mini.Settings:
    sizes = {"steps": 30, "batch": 4, "sequence": 24, "evaluations": 3, "prompts": 2, "new_tokens": 8, "warmup": 5}
    pictures = {"picture": str(tmp_path / "experts.png"), "skewed_picture": str(tmp_path / "skewed.png")}
    return train_mini.Settings(**(sizes | pictures | {"threads": 1, "skewed_steps": 4, "rate": 3e-3} | changes))


def test_a_run_in_miniature_reports_acceptance_that_rises(tmp_path):
    """A cycle of 61 tokens with random jumps: what can be learned of it is learned by trunk and prediction layer."""
    pytest.importorskip("matplotlib")
    jumps = torch.rand(4000) < 0.05
    steps = torch.where(jumps, torch.randint(61, (4000,)), 1)
    text = steps.cumsum(0) % 61
    tiny = config("v3", num_nextn_predict_layers=1, hidden_size=64)
    settings = small_settings(tmp_path, steps=90)
    report = train_mini.run(settings, tiny, text)
    rows = {row.name: row.results["ours"].median for row in report.rows}
    for what in ("held-out text, draft is the trunk's guess", "held-out text, draft is right"):
        shares = [rows[f"{what}, after {step} steps"] for step in (30, 60, 90)]
        assert shares[0] < shares[-1] and shares[-1] > 0.5, (what, shares)
    assert {"own text, first draft accepted, after 90 steps", "decoding 2 prompts"} <= rows.keys()
    skewed = next(row for row in report.rows if "skewed" in row.name)
    assert skewed.results.keys() == {"ours", "no balancing"} and "last 1 of 4 steps" in skewed.name
    for picture in ("experts.png", "skewed.png"):
        assert (tmp_path / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_settings_that_cannot_be():
    for wrong in ({"steps": 0}, {"held_out_rows": 0}, {"skewed_steps": -1}):
        with pytest.raises(ValueError, match="positive sizes"):
            train_mini.Settings(**wrong)
    with pytest.raises(ValueError, match="bytes of text, got 50"):
        train_mini.run(train_mini.Settings(picture="", skewed_picture=""), config("v3"), torch.zeros(50))


def test_the_mini_model_is_what_it_says():
    built = da.DeepseekLM(train_mini.mini_config(), device="meta")
    assert len(built.model.layers) == 8 and len(built.mtp) == 1
