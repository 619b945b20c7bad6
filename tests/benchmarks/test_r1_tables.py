"""Tables of the R1 recipe's results: figures come from the files, and stand in documents between their marks."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks.training.r1_tables import FOLDER, Settings, claims_table, load_results, main, refresh, stage_table


def cells(table) -> dict[str, tuple[str, ...]]:
    return {row[0]: row[1:] for row in table.rows}


def test_figures_are_those_of_the_files():
    box, seeds, students = load_results(FOLDER)
    box = copy.deepcopy(box)
    box["align"]["metrics"]["reasoning"]["pass_at_1"] = {"mean": 0.4321, "half_width": 0.0123, "count": 400}
    box["finetune"]["metrics"]["reasoning"]["pass_at_1"] = {"mean": 0.5, "half_width": 0.01, "count": 400}
    box["align"]["metrics"]["general"]["quality"]["mean"] = 1.876
    assert cells(stage_table(box))["R1: alignment RL"][0] == "43.2 ± 1.2"
    (claim,) = [row[1] for row in claims_table(box, seeds, students).rows if row[0].startswith("alignment")]
    assert "to 1.88; " in claim and claim.endswith("-6.8 points")


def test_a_rise_is_counted_in_its_standard_errors():
    box, _, students = load_results(FOLDER)
    run = copy.deepcopy({name: box[name] for name in ("base", "zero", "cold_start")})
    for name, mean in (("base", 0.2), ("zero", 0.4)):
        run[name]["metrics"]["reasoning"]["pass_at_1"] = {"mean": mean, "half_width": 0.0196 * 2**0.5, "count": 9}
    (claim,) = [row[1] for row in claims_table(box, {"seed 7": run}, students).rows if "60 steps" in row[0]]
    assert claim == "20.0 to 40.0 % (z = 10)"


def test_tables_stand_between_their_marks(tmp_path):
    box, seeds, students = load_results(FOLDER)
    tables = {"r1 stages": stage_table(box), "r1 claims": claims_table(box, seeds, students)}
    path = tmp_path / "document.md"
    path.write_text("a\n<!-- begin r1 stages -->\nstale\n<!-- end r1 stages -->\nb\n", encoding="utf-8")
    assert main(Settings(into=path)) == 0
    text = path.read_text(encoding="utf-8")
    assert text.startswith("a\n<!-- begin r1 stages -->\n| stage |") and text.endswith("<!-- end r1 stages -->\nb\n")
    assert "stale" not in text and refresh(text, tables) == text
    with pytest.raises(ValueError, match="begin r1 stages"):
        refresh("nothing", tables)


def test_every_run_of_other_seeds_says_how_it_was_made():
    for path in FOLDER.glob("box-*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["command"].startswith("deepseek-arch r1 run box ") and "SEED" in found["command"]
        for seed, run in found["runs"].items():
            assert {f"seed {stage['seed']}" for stage in run.values()} == {seed}
