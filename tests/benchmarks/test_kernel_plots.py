"""The figures of `python -m benchmarks kernels --plot`: their contents, and labels without overlaps."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from itertools import combinations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from benchmarks.cli.commands import main
from benchmarks.core.report import Report, Row, Samples
from benchmarks.operators import figure_parts, plots
from benchmarks.operators.label_layout import Label, place_labels
from benchmarks.operators.rooflines import Ceilings


def row(op: str, shape: str, flops: float = 0, moved: float = 1e6, others: str = "mm", **details) -> Row:
    every = {"op": op, "shape": shape, "flops": flops, "bytes": moved, "product": "bf16", "runs": "triton"}
    ms = {"ours": Samples((1.0, 1.1, 1.2)), others: Samples((2.0, 2.2))}
    return Row(f"{op} {shape}", "ms", "lower", ms, others, details=every | details)


def report(*rows: Row) -> Report:
    ceilings = Ceilings(2e9, {"bf16": 4e10, "fp32": 1e10})
    return Report("kernels", {}, rows, facts={"ceilings": ceilings.to_dict()})


ROWS = (
    row("gemm", "v3 o_proj 8x8x8", 1e8),
    row("gemm", "v3 decode 1x8x8", 1e6),
    row("copy.rows", "v3 tokens 8x8", others="eager"),
    row("copy.rows", "tiny tokens 2x2"),
    *(row("gemm", f"v3 o_proj 8x8, M={m}", m * 1e6, sweep="M", size=m) for m in (4, 1, 2)),
)


def test_every_kind_of_row_has_its_figure(tmp_path):
    paths = plots.draw(report(*ROWS), tmp_path / "new folder")
    names = ["roofline-v3", "bandwidth-v3", "sweep-v3-gemm-o_proj-8x8", "bandwidth-tiny"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    for path in paths:
        data = path.read_bytes()
        assert data[1:4] == b"PNG"
        assert struct.unpack(">I", data[16:20])[0] == 7 * 220  # the width of a page


def drawn(*rows: Row) -> list[tuple[str, Figure]]:
    page = figure_parts.Page(report(*rows), None, figure_parts.looks_of(rows))
    return list(plots._figures(page, rows))


def test_a_roofline_has_its_ceilings_and_a_marker_for_each_result():
    rows = ROWS[:2]
    page = figure_parts.Page(report(*rows), Ceilings(2e9, {"bf16": 4e10, "fp32": 1e10}), figure_parts.looks_of(rows))
    ((_, figure),) = plots._figures(page, rows)
    (axes,) = figure.axes
    points = sorted(tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() != "None")
    # 1e8 and 1e6 FLOPs over 1e6 bytes, in 1.1 ms by us and in 2.1 ms by the other.
    expected = [(1, 0.001 / 2.1), (1, 0.001 / 1.1), (100, 0.1 / 2.1), (100, 0.1 / 1.1)]
    assert points == [pytest.approx(point) for point in expected]
    texts = [text.get_text() for text in axes.texts]
    assert {"copy 2 GB/s", "bf16 product 0.04 TFLOP/s", "fp32 product 0.01 TFLOP/s"} <= set(texts)
    assert {"gemm o_proj", "gemm decode"} <= set(texts)
    # The slope ends where the faster product begins: 4e10 FLOP/s over 2e9 bytes/s.
    assert any(line.get_xydata()[-1] == pytest.approx((20, 0.04)) for line in axes.lines)


def test_many_rows_are_numbered_with_a_key():
    ((_, figure),) = drawn(*(row("gemm", f"v3 kind{i} 8x8", 1e6 * (i + 1)) for i in range(12)))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [str(i) for i in range(1, 13)]
    key = figure.get_supxlabel()
    assert all(f"{i + 1} gemm kind{i}" in key for i in range(12))


def test_sizes_are_in_a_name_where_it_says_too_little_without():
    same = [row("gemm", "v3 o_proj 8x8"), row("gemm", "v3 o_proj 9x9"), row("gemm", "v3 head 4x4, top-8 of 9x9")]
    assert figure_parts.names_of(same) == ["gemm o_proj 8x8", "gemm o_proj 9x9", "gemm head, top-8 of 9x9"]


def test_a_sweep_has_its_sizes_in_order_and_a_band():
    ((name, figure),) = drawn(*ROWS[4:])
    assert name == "sweep-v3-gemm-o_proj 8x8"
    speed, time = figure.axes
    ours, others = speed.lines
    assert list(ours.get_xdata()) == list(others.get_xdata()) == [1, 2, 4]
    assert list(time.lines[0].get_ydata()) == pytest.approx([1100] * 3)  # microseconds of 1.1 ms
    low, high = time.collections[0].get_datalim(time.transData).intervaly
    assert (low, high) == pytest.approx((1020, 1180))  # the quantiles of 1.0, 1.1 and 1.2 ms
    assert speed.get_ylabel() == "TFLOP/s"


def test_a_provider_looks_the_same_in_every_figure_and_unlike_the_others():
    looks = figure_parts.looks_of([replace(ROWS[0], results={f"p{i}": Samples((1.0,)) for i in range(20)})])
    assert len({(look.color, look.marker) for look in looks.values()}) == 21


@pytest.mark.parametrize("seed", range(3))
def test_labels_are_apart_and_within_the_axes(seed):
    figure = Figure(figsize=(7, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw = random.Random(seed)
    points = [(draw.gauss(0.5, 0.1), draw.gauss(0.5, 0.1)) for _ in range(25)]
    axes.set(xlim=(0, 1), ylim=(0, 1))
    place_labels(axes, [Label(x, y, f"name {i}") for i, (x, y) in enumerate(points)], points, fontsize=6)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # an Annotation's own has the line in it
    assert len(boxes) == 25
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    inside = axes.get_window_extent()
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    assert all(inside.y0 <= box.y0 and box.y1 <= inside.y1 for box in boxes)


def test_reports_that_cannot_be_drawn_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="got one of model"):
        plots.draw(replace(report(*ROWS), benchmark="model"), tmp_path)
    with pytest.raises(ValueError, match="with results"):
        plots.draw(report(replace(ROWS[0], results={})), tmp_path)
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"expected matplotlib for figures.*\[plot\]"):
        plots.draw(report(*ROWS), tmp_path)


def test_the_command_draws_a_saved_report(tmp_path, capsys):
    report(ROWS[2]).save(tmp_path / "report.json")
    assert main(["plot", str(tmp_path / "report.json"), str(tmp_path / "figures")]) == 0
    path = tmp_path / "figures" / "bandwidth-v3.png"
    assert path.exists()
    assert f"saved {path}" in capsys.readouterr().out.replace("\n", "")
