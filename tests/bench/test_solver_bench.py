"""The benchmark's own arithmetic and files; what it measures is another matter."""

import json
import re

import pytest
import references
import torch

from cospadi import cli
from cospadi.bench import cases, render, solver
from cospadi.bench.figure import solver_figure
from cospadi.bench.solvers import MEASURED, Settings, suited, timed
from cospadi.bench.usage import usage
from cospadi.factorization.solvers.ksvd import first_atoms, ksvd
from cospadi.factorization.solvers.sparse_coding import sparse_code
from cospadi.sources.shapes import Shape

CPU = torch.device("cpu")
SMALL = [
    "bench",
    "solver",
    "--matrix",
    "24x40",
    "--ratios",
    "0.3",
    "--rounds",
    "3",
    "--repeats",
    "1",
    "--device",
    "cpu",
]
SCHEMA = {
    "solver": str,
    "weight": str,
    "d_in": int,
    "d_out": int,
    "ratio": float,
    "atoms": int,
    "sparsity": int,
    "rounds": int,
    "seconds": float,
    "output_error": float,
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """All reports of a small run of every solver."""
    folder = tmp_path_factory.mktemp("bench")
    files = [word for name in ("json", "markdown", "figure") for word in (f"--{name}", str(folder / f"{name}.png"))]
    assert cli.main([*SMALL, *files]) == 0
    return folder


@pytest.fixture
def refused(capsys):
    """Run ``cospadi bench solver`` and return its one sentence."""

    def run(*arguments: str) -> str:
        assert cli.main(["bench", "solver", *arguments]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        return captured.err.removeprefix("error: ").rstrip()

    return run


def rows_of(folder) -> dict[str, dict]:
    return {row["solver"]: row for row in json.loads((folder / "json.png").read_text())}


def test_the_json_is_a_list_of_measurements(reports):
    rows = rows_of(reports)
    assert list(rows) == [*MEASURED, "sklearn_omp", "sparse_code"]
    for row in rows.values():
        assert {key: type(row[key]) for key in SCHEMA} == SCHEMA
        assert 0 < row["output_error"] < 1
        assert row["seconds"] > 0
    assert rows["ksvd"]["rounds"] == rows["ksvd_plain"]["rounds"] == 3


def test_curves_end_with_what_is_returned(reports):
    for row in rows_of(reports).values():
        if "curve" in row:
            times = [second for second, _ in row["curve"]]
            assert times == sorted(times)
            assert row["curve"][-1] == [row["seconds"], row["output_error"]]


def test_times_to_an_error_are_parts_of_the_yardsticks_time(reports):
    rows = rows_of(reports)
    yardstick = rows["ksvd_plain"]
    assert 0 < yardstick["time_to_plain"] <= 1
    for name in MEASURED:
        reached = rows[name]["seconds_to_plain"]
        if reached is None:
            assert rows[name]["output_error"] > yardstick["output_error"]
        else:
            assert rows[name]["time_to_plain"] == pytest.approx(reached / yardstick["seconds"])


def test_never_reached_is_said():
    rows = [
        {
            "solver": "htp",
            "weight": "w",
            "ratio": 0.3,
            "seconds": 1.0,
            "output_error": 0.5,
            "curve": [(0.1, 0.9), (1.0, 0.5)],
        },
        {"solver": "ksvd", "weight": "w", "ratio": 0.3, "seconds": 4.0, "output_error": 0.4, "curve": [(4.0, 0.4)]},
    ]
    solver._compare(rows)
    assert [row["time_to_ksvd"] for row in rows] == [None, 1.0]
    assert [row["seconds_to_ksvd"] for row in rows] == [None, 4.0]
    assert render._summary(rows) == [
        "Summary\n",
        "- htp to the last error of ksvd, × its seconds: never in 1 of 1.",
        "- htp ends below the error of ksvd in 0 of 1 problems.",
        "",
    ]


def test_the_summary_compares_the_two_ksvds_by_their_seconds():
    both = {"weight": "w", "output_error": 0.5, "curve": [(1.0, 0.5)]}
    rows = [
        both | {"solver": solver, "ratio": ratio, "seconds": seconds}
        for ratio in (0.2, 0.3)
        for solver, seconds in (("ksvd", 10 * ratio), ("ksvd_plain", 10.0))
    ]
    assert "- ksvd, all rounds, × the seconds of ksvd_plain: median 0.250, worst 0.300." in render._summary(rows)
    assert not render._shares_of_plain(rows[:1])


def test_htp_tells_how_it_uses_the_machine(reports):
    row = rows_of(reports)["htp"]
    assert row["gflops"] > 0
    assert {"float32", "bfloat16"} <= row["peak_gflops"].keys()
    assert 0 < row["product_share"] < 1
    assert row["memory_multiple"] > 1


def test_the_markdown_holds_a_line_per_solver(reports):
    text = (reports / "markdown.png").read_text()
    for name in MEASURED:
        assert len(re.findall(rf"^\| 24x40 \| 24×40 \| 0.3 \| {name} \|", text, re.MULTILINE)) == 1
    widths = {line.count("|") for line in text.split("\n\n")[1].splitlines()}
    assert len(widths) == 1
    assert "equal supports in" in text
    assert text.rstrip().splitlines()[-1].startswith("- htp ends below the error of")


def test_the_report_is_printed_and_progress_is_not(capsys):
    assert cli.main([*SMALL, "--solvers", "one_shot,htp"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Solvers, CPU")
    assert "left" not in captured.out
    assert "2/2" in captured.err
    assert "ksvd" not in captured.out


def test_a_row_of_the_figure_is_a_matrix_and_solvers_have_the_titles_of_the_tables():
    rows = [
        {
            "weight": weight,
            "ratio": ratio,
            "solver": solver,
            "output_error": 0.2,
            "curve": [[2.0, 0.3], [1.0, 0.4], [3.0, 0.2]],
        }
        for weight in ("q", "down")
        for ratio in (0.2, 0.3, 0.5)
        for solver in ("htp", "ksvd", "ksvd_plain", "one_shot")
    ]
    drawn = solver_figure(rows)
    titles = [panel.get_title() for panel in drawn.axes]
    assert titles == [f"{weight}, ratio {ratio}" for weight in ("q", "down") for ratio in (0.2, 0.3, 0.5)]
    (legend,) = drawn.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["CoSpaDi", "CoSpaDi (K-SVD)", "CoSpaDi (K-SVD), plain", "ROCKET factorization"]
    assert list(drawn.axes[0].lines[0].get_xdata()) == [1.0, 2.0, 3.0]


def test_the_figure_is_a_picture(reports):
    assert (reports / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_problem_is_kept_when_the_next_one_fails(tmp_path, monkeypatch):
    whole = MEASURED["one_shot"]

    def breaks(case, settings, progress):
        if case.ratio == 0.4:
            raise KeyboardInterrupt
        return whole(case, settings, progress)

    monkeypatch.setitem(MEASURED, "one_shot", breaks)
    json_file = str(tmp_path / "rows.json")
    assert cli.main([*SMALL, "--solvers", "one_shot", "--ratios", "0.2,0.4", "--json", json_file]) == 130
    assert [row["ratio"] for row in json.loads((tmp_path / "rows.json").read_text())] == [0.2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--solvers", "htp,nope"], "--solvers nope does not exist. Choose from htp, ksvd, orthogonal,"),
        (["--matrix", "5by4"], "--matrix 5by4 is not a size."),
        (["--matrix", "0x4"], "--matrix 0x4 is not a size."),
        (["--shape", "gpt"], "--shape gpt does not exist. Choose from smollm2-135m, llama-3.2-1b, llama-3-8b."),
        (["--matrix", "24x40", "--ratios", "2"], "--ratios 2 is not between 0 and 1."),
        (["--matrix", "24x40", "--ratios", "a"], "--ratios a is not a list of numbers."),
        (["--matrix", "24x40", "--rho", "0.5"], "--rho 0.5 is too small."),
        (["--rounds", "0"], "--rounds 0 is too small."),
        (["--device", "abacus"], "--device=abacus is not a device that this runs on."),
        (["--json", "/dev/null"], "/dev/null is not a regular file"),
        (["--figure", "errors.txt"], "--figure errors.txt is neither .png nor .svg."),
        (["--solvers", ","], "--solvers is empty."),
        (["--layers", ""], "--layers is empty."),
        (["--figure", "errors.png", "--solvers", "sklearn_omp"], "--figure draws errors over seconds"),
        (["--figure", "errors.png", "--shape", "llama-3-8b"], "--figure draws errors over seconds"),
    ],
)
def test_mistakes_are_a_sentence(refused, arguments, sentence):
    assert refused(*arguments).startswith(sentence)


def test_missing_results_name_what_makes_them(refused, tmp_path):
    target = "snakemake --cores all results/calibration/smollm2_135m/news/grams"
    told = refused("--results", str(tmp_path))
    assert told.startswith(f"{tmp_path}/sources/models/smollm2_135m/checkpoint is missing")
    assert target in told
    (tmp_path / "sources/models/smollm2_135m/checkpoint").mkdir(parents=True)
    assert refused("--results", str(tmp_path)).startswith(f"{tmp_path}/calibration/smollm2_135m/news/grams is missing")


def test_without_scikit_learn_it_is_asked_for(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused("--solvers", "sklearn_omp").startswith("--solvers sklearn_omp needs scikit-learn.")


def test_a_whole_model(monkeypatch, capsys, tmp_path):
    tiny = Shape(32, 48, 32, 16, layers=2, vocabulary=64, tied=True)
    assert tiny.sizes == {(32, 32): 4, (32, 16): 4, (32, 48): 4, (48, 32): 2}
    monkeypatch.setitem(cases.SHAPES, "tiny", tiny)
    file = tmp_path / "rows.json"
    arguments = [
        "bench",
        "solver",
        "--shape",
        "tiny",
        "--batch",
        "3",
        "--check",
        "--device",
        "cpu",
        "--json",
        str(file),
    ]
    assert cli.main(arguments) == 0
    rows = json.loads(file.read_text())
    assert [row["matrices"] for row in rows] == [4, 4, 4, 2]
    for row in rows:
        assert {key: type(row[key]) for key in SCHEMA} == SCHEMA
        assert row["solver"] == "htp"
    out = capsys.readouterr().out
    assert "| 32×48 | 4 | 3 |" in out
    (difference,) = re.findall(r"output errors differ by (\S+) of", out)
    assert float(difference) < 1e-2
    assert re.search(r"^\| All \| 14 \|", out, re.MULTILINE)


@pytest.mark.parametrize(("shape", "projections"), [("llama-3.2-1b", 112), ("llama-3-8b", 224)])
def test_known_shapes_have_all_their_projections(shape, projections):
    assert sum(cases.SHAPES[shape].sizes.values()) == projections


@pytest.mark.parametrize("size", [(20, 30), (30, 20)])
def test_a_random_target_has_the_spectrum_it_is_said_to_have(size):
    target = cases.power_law(*size, torch.Generator().manual_seed(1))
    assert target.shape == size
    values = torch.linalg.svdvals(target.double())
    expected = torch.arange(1, 21, dtype=torch.float64) ** -cases.DECAY
    torch.testing.assert_close(values / values[0], expected, rtol=1e-4, atol=0)
    assert float(target.square().mean()) == pytest.approx(1, rel=1e-4)


def test_random_cases_come_from_the_seed():
    first, again, other = (cases.random_cases("20x30", [0.2, 0.4], 2.0, seed, CPU) for seed in (1, 1, 2))
    assert [p.ratio for p in first] == [0.2, 0.4]
    assert torch.equal(first[0].target, again[1].target)
    assert not torch.equal(first[0].target, other[0].target)


def test_an_orthogonal_dictionary_takes_no_more_atoms_than_inputs():
    (problem,) = cases.random_cases("16x400", [0.2], 2.0, 0, CPU)
    wide = cases.Case("w", problem.target, 0.2, atoms=20, sparsity=3)
    assert suited("htp", wide) is wide
    assert suited("orthogonal", wide).atoms == 16


def test_plain_coding_is_orthogonal_matching_pursuit():
    (problem,) = cases.random_cases("20x30", [0.3], 2.0, 3, CPU)
    dictionary = first_atoms(problem.target, 24, seed=0)
    found = sparse_code(dictionary, problem.target, 5, compiled=False)
    assert (found != 0).sum(dim=0).max() == 5
    torch.testing.assert_close(found, references.sparse_code(dictionary, problem.target, 5), rtol=1e-3, atol=1e-4)


def test_plain_ksvd_improves_and_replaces_unused_atoms():
    (problem,) = cases.random_cases("20x30", [0.3], 2.0, 3, CPU)
    errors = []
    fit = ksvd(problem.target, 40, 4, 8, progress=lambda done, e: errors.append(e), compiled=False)
    dictionary, coefficients = fit.dictionary, fit.coefficients
    assert min(errors) < errors[0]
    assert (coefficients != 0).sum(dim=0).max() <= 4
    torch.testing.assert_close(dictionary.norm(dim=0), torch.ones(40))


def test_timing_reports_the_error_of_what_is_returned():
    (problem,) = cases.random_cases("20x30", [0.3], 2.0, 3, CPU)
    run = timed("ksvd_plain", problem, Settings(rounds=4, seed=0))
    assert run.rounds == 4
    assert run.output_error == pytest.approx(min(error for _, error in run.curve), rel=1e-4)


def test_usage_counts_operations_and_memory():
    def run():
        product = torch.ones(64, 32) @ torch.ones(32, 16)
        product.addmm_(torch.ones(64, 8), torch.ones(8, 16))

    seen = usage(run, CPU)
    assert seen.flops == 2 * 64 * 32 * 16 + 2 * 64 * 8 * 16
    assert 0 < seen.product_share < 1
    assert seen.peak_bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)


def test_the_comparison_with_scikit_learn_runs_alone(capsys):
    assert cli.main(["bench", "solver", "--matrix", "24x32", "--ratios", "0.3", "--solvers", "sklearn_omp"]) == 0
    assert "scikit-learn" in capsys.readouterr().out
