"""The report: one page, complete in itself, opened in a real browser where there is one."""

import html
import re
import shutil
import subprocess

import pytest
from PIL import Image
from test_tables import cell, dense, study

from cospadi.tables.figures import write_figures
from cospadi.tables.paired import differences
from cospadi.tables.render import tables
from cospadi.tables.report import FIGURES, headlines, write_report, written
from cospadi.tables.rulegraph import drawn

DOT = """digraph snakemake_dag {
    graph[bgcolor=white, margin=0];
	0[label = "all", color = "0.00 0.6 0.85", style="rounded"];
	1[label = "tabulate", color = "0.61 0.6 0.85", style="rounded"];
	2[label = "evaluate", color = "0.24 0.6 0.85", style="rounded"];
	3[label = "prepare_model", color = "0.36 0.6 0.85", style="rounded"];
	1 -> 0
	2 -> 1
	3 -> 2
	3 -> 1
}"""
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: apt install chromium")


def cells():
    made = [dense(), *(cell(method, ratio) for method in ("svd_llm", "cospadi") for ratio in (0.2, 0.3))]
    for each in made:
        each.evaluation["continuations"] = [
            {"prompt": "A king", "continuation": f" of <b>{each.method}</b> at {each.compression_ratio}"}
        ]
        each.evaluation |= {"versions": {"torch": "2.13.0"}, "machine": {"platform": "Linux", "cpus": 2}}
    return made


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "rulegraph.dot").write_text(DOT)
    printed = tables(cells(), "A study", differences(cells(), "cospadi"))
    write_figures(cells(), folder, printed)
    return write_report(cells(), folder, "A study", printed)


def test_the_report_holds_everything_and_loads_nothing(page):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*", text) == []
    assert text.count('src="data:image/png;base64,') == len(FIGURES)
    assert "SVD-LLM" in text
    assert "torch 2.13.0" in text
    for rule in ("prepare_model", "evaluate", "tabulate", "all"):
        assert f">{rule}</text>" in text


def test_what_models_write_stands_side_by_side_and_is_only_text(page):
    ((prompt, ratios, rows),) = written(cells(), "small")
    assert (prompt, ratios) == ("A king", ["0.2", "0.3"])
    assert [title for title, _ in rows] == ["Dense", "SVD-LLM", "CoSpaDi"]
    assert dict(rows)["SVD-LLM"] == [" of <b>svd_llm</b> at 0.2", " of <b>svd_llm</b> at 0.3"]
    text = page.read_text(encoding="utf-8")
    assert "<b>svd_llm" not in text
    assert html.escape(" of <b>svd_llm</b> at 0.3") in text


def test_without_texts_and_graph_there_are_no_empty_sections(tmp_path):
    made = [dense(), cell("svd_llm", 0.2), cell("cospadi", 0.2)]
    write_figures(made, tmp_path)
    text = write_report(made, tmp_path, "A study", tables(made, "A study")).read_text(encoding="utf-8")
    assert "What the models write" not in text
    assert "<svg" not in text


def test_rules_stand_in_the_order_of_the_data():
    graph = drawn(DOT)
    assert set(graph.boxes) == {"all", "tabulate", "evaluate", "prepare_model"}
    assert graph.arrows == [("evaluate", "tabulate"), ("prepare_model", "evaluate"), ("tabulate", "all")]
    assert all(graph.boxes[a][0] + graph.box[0] < graph.boxes[b][0] for a, b in graph.arrows)
    assert drawn("digraph {}").boxes == {}


def browse(page, profile, *options):
    """Headless Chromium that can reach nothing."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}", *options, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@needs_browser
def test_a_browser_without_network_shows_tables_and_figures(page, tmp_path):
    picture = tmp_path / "report.png"
    browse(page, tmp_path / "profile", "--window-size=1400,5000", f"--screenshot={picture}")
    with Image.open(picture) as shown:
        assert shown.size == (1400, 5000)
        colours = shown.convert("RGB").resize((350, 1250), Image.Resampling.NEAREST).getcolors(2**20)
    assert len(colours) > 100  # the heat map's scale alone has more than a page of text
    background = max(colours)[0] / (350 * 1250)
    assert 0.3 < background < 0.97

    probe = page.with_name("probe.html")  # what the browser itself says of the page
    probe_script = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "pictures: [...document.images].map(i => i.complete && i.naturalWidth > 100 && i.getBoundingClientRect().height > 100),"
        "rows: [...document.querySelectorAll('tbody tr')].filter(r => r.getBoundingClientRect().height > 5).length,"
        "boxes: [...document.querySelectorAll('svg rect')].filter(r => r.getBoundingClientRect().width > 20).length,"
        "loaded: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length }) })</script>"
    )
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", f"{probe_script}</body>"), encoding="utf-8")
    seen = re.search(r"<title>(.*?)</title>", browse(probe, tmp_path / "other", "--dump-dom").stdout)[1]
    pictures = ",".join(["true"] * len(FIGURES))
    assert html.unescape(seen) == f'{{"pictures":[{pictures}],"rows":8,"boxes":4,"loaded":0}}'


def test_the_headline_names_the_nearest_and_the_next():
    cells = study(methods=("svd", "svd_llm", "cospadi"), ratios=(0.2,))
    rows = {c.method: c.evaluation["kl_to_dense"]["value"] for c in cells if not c.is_dense}
    first, second, *_ = sorted(rows, key=rows.get)
    titles = {c.method: c.method_title for c in cells}
    (line,) = headlines(cells)
    assert "20% of the bits removed" in line
    assert line.index(titles[first]) < line.index(titles[second])
    assert f"next is {titles[second]} with" in line
    alone = [c for c in cells if c.is_dense or c.method == "svd"]
    assert headlines(alone) == []


def test_notes_of_all_models_are_in_the_report_once(tmp_path):
    made = study(models=("small", "other"), methods=("svd", "cospadi"), ratios=(0.2,))
    printed = tables(made, "A study")
    write_figures(made, tmp_path, printed)
    text = html.unescape(write_report(made, tmp_path, "A study", printed).read_text(encoding="utf-8"))
    assert printed[0].notes
    for note in printed[0].all_notes:
        assert text.count(note) == 1


def test_arrows_over_several_columns_run_below_the_boxes():
    graph = drawn(
        '0[label = "d"]; 1[label = "c"]; 2[label = "b"]; 3[label = "a"]; 4[label = "e"]; '
        "1 -> 0; 2 -> 1; 3 -> 2; 4 -> 3; 4 -> 0"
    )
    assert graph.lanes == {}  # a longer path has the same ends
    graph = drawn('0[label = "d"]; 1[label = "c"]; 2[label = "b"]; 3[label = "a"]; 2 -> 1; 1 -> 0; 3 -> 0')
    assert list(graph.lanes) == [("a", "d")]
    lowest = max(y for _, y in graph.boxes.values()) + graph.box[1]
    assert lowest < graph.lanes["a", "d"] < graph.height + 1


@needs_browser
def test_the_printed_report_keeps_every_column(page, tmp_path):
    reader = shutil.which("pdftotext")
    if reader is None:
        pytest.skip("no pdftotext here: apt install poppler-utils")
    browse(page, tmp_path / "print", f"--print-to-pdf={tmp_path / 'report.pdf'}")
    done = subprocess.run(
        [reader, "-layout", "report.pdf", "-"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    (table,) = tables(cells(), "A study", differences(cells(), "cospadi"))
    lines = done.stdout.splitlines()
    place = next(i for i, line in enumerate(lines) if line.strip().startswith("Ratio "))
    head = " ".join(lines[max(0, place - 3) : place + 1])  # titles are above their units
    for column in table.columns:
        assert column.title in head
