"""The training example and its measurements: acceptance on given text against a plain loop, runs in miniature."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import deepseek_arch as da
from benchmarks.training import mini, mini_measurements
from benchmarks.training.acceptance import on_given_text
from benchmarks.training.corpus import file_text, random_rows, repository_text, spread_rows
from support.small_models import config, model, tokens


@pytest.mark.parametrize("feeding", [("post_norm", "block"), ("pre_norm", "head_norm")])
def test_acceptance_on_given_text_is_what_a_loop_over_positions_finds(feeding):
    """Compares token by token: each depth's guess, and the main model's from the same tokens."""
    lm = model(config("v3", num_nextn_predict_layers=2, mtp_input=feeding[0], mtp_chain=feeding[1]))
    rows = tokens(lm.config, 3, 8)
    depths = on_given_text(lm.train(), rows)
    assert lm.training and len(depths) == 2
    lm.eval()
    for depth in range(2):
        shares = {"accepted": 0, "right": 0, "main_right": 0, "both_right": 0}
        count = 0
        for row in rows:
            for end in range(depth + 2, 8):  # guess token `end` from those before it
                known = row[None, :end]
                out = lm.model(known)
                main = int(lm.lm_head(out.hidden_states[:, -1]).argmax())
                hidden = lm.mtp_hidden(out)
                for d in range(depth + 1):  # depth d reads the token d + 1 further on, known up to `end`
                    hidden = hidden[:, : end - d - 1]
                    rope = tuple(part[..., : end - d - 1, :] for part in out.rope)
                    logits, hidden = lm.mtp_forward(hidden, known[:, d + 1 :], d, rope=rope)
                guess, truth = int(logits[0, -1].argmax()), int(row[end])
                shares["accepted"] += guess == main
                shares["right"] += guess == truth
                shares["main_right"] += main == truth
                shares["both_right"] += guess == main == truth
                count += 1
        for name, share in shares.items():
            assert getattr(depths[depth], name) == pytest.approx(share / count), (depth, name)


def test_evenly_spread_pieces_of_text():
    rows = spread_rows(torch.arange(100), 3, 20)
    assert rows[:, 0].tolist() == [0, 40, 80] and rows[:, -1].tolist() == [19, 59, 99]
    with pytest.raises(ValueError, match="at least 20 tokens of text, got 19"):
        spread_rows(torch.arange(19), 3, 20)


def small_settings(tmp_path, **changes) -> mini_measurements.Settings:
    sizes = {"steps": 30, "batch": 4, "sequence": 24, "evaluations": 3, "prompts": 2, "new_tokens": 8, "warmup": 5}
    pictures = {"picture": str(tmp_path / "experts.png"), "skewed_picture": str(tmp_path / "skewed.png")}
    return mini_measurements.Settings(**(sizes | pictures | {"threads": 1, "skewed_steps": 4, "rate": 3e-3} | changes))


def test_a_run_in_miniature_reports_acceptance_that_rises(tmp_path):
    """Trains on a cycle of 61 tokens with random jumps, which main model and MTP module learn in some ten steps.

    The first evaluation is after three steps, in which five seeds reached shares of 0.26 to 0.52; all ended above 0.9.
    """
    pytest.importorskip("matplotlib")
    jumps = torch.rand(4000) < 0.05
    steps = torch.where(jumps, torch.randint(61, (4000,)), 1)
    text = steps.cumsum(0) % 61
    tiny = config("v3", num_nextn_predict_layers=1, hidden_size=64)
    settings = small_settings(tmp_path, steps=30, evaluations=10)
    report = mini_measurements.run(settings, tiny, text)
    rows = {row.name: row.results["ours"].median for row in report.rows}
    for what in ("held-out text, draft is the main model's guess", "held-out text, draft is right"):
        shares = [rows[f"{what}, after {step} steps"] for step in range(3, 31, 3)]
        assert shares[0] < shares[-1] and shares[-1] > 0.5, (what, shares)
    assert {"own text, first draft accepted, after 30 steps", "decoding 2 prompts"} <= rows.keys()
    skewed = next(row for row in report.rows if "skewed" in row.name)
    assert skewed.results.keys() == {"ours", "no balancing"} and "last 1 of 4 steps" in skewed.name
    for picture in ("experts.png", "skewed.png"):
        assert (tmp_path / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_settings_that_cannot_be():
    for wrong in ({"steps": 0}, {"held_out_rows": 0}, {"skewed_steps": -1}):
        with pytest.raises(ValueError, match="positive sizes"):
            mini_measurements.Settings(**wrong)
    with pytest.raises(ValueError, match="bytes of text, got 50"):
        mini_measurements.run(mini_measurements.Settings(picture="", skewed_picture=""), config("v3"), torch.zeros(50))


def test_the_mini_model_is_what_it_says():
    built = da.DeepseekLM(mini.mini_config(), device="meta")
    assert len(built.model.layers) == 8 and len(built.mtp) == 1


def test_random_pieces_of_text_reach_both_ends():
    rows = random_rows(torch.arange(5), 200, 3, torch.Generator().manual_seed(0))
    assert set(rows[:, 0].tolist()) == {0, 1, 2}
    assert torch.equal(rows[:, 1:] - rows[:, :-1], torch.ones(200, 2, dtype=torch.int64))


def test_the_example_trains_writes_and_saves(tmp_path, capsys):
    (tmp_path / "text").write_bytes(b"one and two and three and " * 40)
    saved = tmp_path / "model"
    example = mini.Example(steps=2, batch=2, sequence=16, threads=1, text=str(tmp_path / "text"), new_tokens=4)
    assert mini.main(replace(example, checkpoint=str(saved), prompt="and")) == 0
    text = capsys.readouterr().out
    assert text.startswith("step 1: loss ") and "tokens for each step" in text
    assert da.inspect_checkpoint(saved).ok


def test_text_is_bytes(tmp_path):
    (tmp_path / "text").write_bytes(b"\x00\xff")
    assert file_text(tmp_path / "text").tolist() == [0, 255]
    assert b"def test_text_is_bytes" in bytes(repository_text().tolist())


def test_accumulated_batches_are_one_step():
    """A step of two batches of 2 is one of a batch of 4, to rounding: the rows are drawn in the same order."""
    text = torch.randint(61, (300,))
    losses = []
    for batch, accumulate in ((4, 1), (2, 2)):
        torch.manual_seed(0)
        lm = da.DeepseekLM(config("v3", num_nextn_predict_layers=0), dtype=torch.float32)
        recipe = mini.Recipe(steps=2, batch=batch, accumulate=accumulate, sequence=8, threads=1, balance=0.0)
        losses.append(mini.train(lm, text, recipe))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
