"""The figures of studies of every size: nothing lies on anything else, and a method looks alike in all of them."""

import pytest
import rivals
from matplotlib.colors import to_hex
from matplotlib.testing.compare import compare_images
from matplotlib.text import Annotation, Text
from test_tables import cell, dense, overlapping, study

from cospadi.tables import figures
from cospadi.tables.cells import summary
from cospadi.tables.emphasis import palette, standing_out
from cospadi.tables.lines import apart
from cospadi.tables.metrics import AVERAGE, METRICS
from cospadi.tables.pareto import pareto_figure
from cospadi.tables.style import GREY, style

STUDIES = {
    "one method": lambda: [dense(), cell("cospadi", 0.3)],
    "two models": lambda: study(("small", "other")),
    "rivals": rivals.cells,
    "all alike": lambda: [dense(), *(cell(method, 0.3, ppl=22.55, accuracy=0.0) for method in ("svd", "cospadi"))],
}
FIGURES = {
    "pareto": pareto_figure,
    "perplexity": lambda frame: figures._against_size(frame, METRICS["token_perplexity"]),
    "accuracy": lambda frame: figures._against_size(frame, AVERAGE),
}


def drawn(name, frame):
    with style():
        figure = FIGURES[name](frame)
        figure.draw_without_rendering()
    return figure


def names_in(panel):
    return [text for text in panel.texts if isinstance(text, Annotation)]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("of", STUDIES)
def test_no_text_lies_on_another(name, of):
    figure = drawn(name, summary(STUDIES[of]()))
    texts = [label for legend in figure.legends for label in legend.get_texts()]
    for panel in figure.axes:
        texts += [panel.title, panel.xaxis.label, panel.yaxis.label, *panel.texts]
        for axes in (panel, *panel.child_axes):
            for axis in (axes.xaxis, axes.yaxis):
                low, high = sorted(axis.get_view_interval())
                ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
                texts += [label for tick, label in ticks if low <= tick <= high and axes.axison]
        texts += [axes.xaxis.label for axes in panel.child_axes]
    # The words of a name, without the line that points to it.
    boxes = [Text.get_window_extent(text) for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 10
    assert overlapping(boxes) == []
    outside = [
        box for box in boxes if not figure.bbox.contains(box.x0, box.y0) or not figure.bbox.contains(box.x1, box.y1)
    ]
    assert outside == [], "a text is cut off"


def test_a_method_has_one_colour_in_all_figures():
    frame = summary(rivals.cells())
    of_name = palette(frame)
    titles = dict(zip(frame["method"], frame["method_title"], strict=True))
    for name in FIGURES:
        for panel in drawn(name, frame).axes:
            assert len(names_in(panel)) > 10
            by_title = {text.get_text().removesuffix(" ↑"): text for text in names_in(panel)}
            pointers = {title: text.arrow_patch for title, text in by_title.items() if text.arrow_patch}
            for method in of_name.keys() & {method for method, title in titles.items() if title in pointers}:
                assert to_hex(pointers[titles[method]].get_edgecolor()) == to_hex(of_name[method])
                assert any(to_hex(line.get_color()) == to_hex(of_name[method]) for line in panel.lines)
    with_bits = frame.assign(method=frame["method"].where(frame["method"] != "svd_llm", "svd_llm+int8"))
    assert palette(with_bits) == of_name


def test_the_paper_and_the_nearest_of_every_family_stand_out():
    """At 0.3: Basis Sharing before SVD-LLM, OATS before SparseGPT, CoSpaDi+ before all other dictionaries."""
    frame = summary(rivals.cells())
    assert standing_out(frame) == {"basis_sharing", "oats", "cospadi_plus", "cospadi"}
    assert set(palette(frame).values()) - {GREY} == {palette(frame)[name] for name in standing_out(frame)}
    few = summary(study())
    assert standing_out(few) == {"svd", "svd_llm", "cospadi"}


def test_every_line_and_the_dense_model_have_a_name():
    frame = summary(rivals.cells())
    titles = set(frame["method_title"]) - {"Dense"}
    for name in FIGURES:
        left = drawn(name, frame).axes[0]
        shown = {text.get_text().removesuffix(" ↑") for text in names_in(left)}
        assert shown >= titles
        assert any(text.startswith("Dense ") for text in shown)


def test_the_axis_ends_where_good_methods_can_be_told_apart_and_says_so():
    panel = drawn("perplexity", summary(rivals.cells())).axes[0]
    assert panel.get_ylabel() == "Token perplexity ↓ (up to 217)"
    above = {text.get_text() for text in names_in(panel) if text.get_text().endswith("↑")}
    assert "SVD-LLM ↑" in above
    assert "CoSpaDi+ ↑" not in above
    cells = [dense(), cell("svd", 0.3, ppl=40.0), cell("cospadi", 0.3, ppl=30.0)]
    assert drawn("perplexity", summary(cells)).axes[0].get_ylabel() == "Token perplexity ↓"


def test_smaller_is_further_right_in_all_figures():
    frame = summary(rivals.cells())
    left, right = drawn("pareto", frame).axes[0].get_xlim()
    assert left > right  # megabytes
    left, right = drawn("perplexity", frame).axes[0].get_xlim()
    assert left < right  # fraction removed


def test_no_accuracy_is_below_zero():
    panel = drawn("accuracy", summary(STUDIES["all alike"]())).axes[0]
    assert panel.get_ylim()[0] == 0


def test_marks_of_one_ratio_are_side_by_side():
    frame = summary(rivals.cells())
    panel = drawn("perplexity", frame).axes[0]
    at = [line.get_xdata()[0] for line in panel.lines if len(line.get_xdata()) == 4 and line.get_marker() == "o"]
    four = [name for name, of_ratios in rivals.numbers().items() if len(of_ratios) == 4]
    assert len(set(at)) == len(at) == len(four)
    assert max(at) - min(at) < 0.05


def test_levels_are_moved_apart_in_order():
    assert apart([0.0, 0.0, 0.0], 1.0, 0.0, 10.0) == [0.0, 1.0, 2.0]
    assert apart([9.0, 9.5, 10.0], 1.0, 0.0, 10.0) == [8.0, 9.0, 10.0]


def test_the_figure_of_the_first_page_shows_the_table(tmp_path):
    """Else: python tests/tables/rivals.py."""
    picture, _ = rivals.draw(tmp_path / "drawn")
    assert compare_images(rivals.DOCS / "rivals_pareto.png", str(picture), tol=2) is None
