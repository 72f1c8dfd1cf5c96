"""The pipeline as a person runs it: snakemake in a folder of its own, on tiny random models."""

import base64
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from cases import cases
from safetensors import safe_open

from cospadi.pipeline import forks

ROOT = Path(__file__).parents[2]
METHODS = ("svd", "asvd_search", "cospadi", "cospadi_paper")
MODEL = "tiny_llama"
"""A study of two is planned in test_study.py; each of its cells is a job like these."""
QUANTIZED = "cospadi+int4"
"""One method is quantized, too."""
TRIMMED = (
    f"study.models=[{MODEL}] study.methods=[{','.join(METHODS)}] study.layers_per_job=2 "
    "+study.quantizations_of.cospadi=[none,int4] factorization.rank_search.n_samples=4"
)
COLUMNS = (
    *("model", "method", "solver", "compression_ratio", "stored_ratio", "bits", "token_perplexity"),
    *("second_perplexity", "word_perplexity", "lambada_perplexity"),
    *("kl_to_dense", "top1_agreement", "average_accuracy", "output_error_mean"),
    *("factorize_seconds", "peak_memory_mb"),
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("workflow"),  # one full run, shared by all
    pytest.mark.usefixtures("one_server"),
]


def command(folder: Path, *options: str, study: str = "smoke", overrides: str = TRIMMED) -> list[str]:
    settings = [f"study={study}", *([f"overrides={overrides}"] if overrides else [])]
    return [sys.executable, "-m", "snakemake", "--directory", str(folder), *options, "--config", *settings]


def snakemake(
    folder: Path, *options: str, study: str = "smoke", overrides: str = TRIMMED
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, *(options or ("--cores", "2")), study=study, overrides=overrides),
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def planned(folder: Path, overrides: str) -> dict[str, list[str]]:
    """Rule -> wildcards of the jobs that a dry run lists."""
    run = snakemake(folder, "--cores", "2", "-n", overrides=overrides)
    assert run.returncode == 0, run.stdout
    jobs: dict[str, list[str]] = {}
    for block in re.split(r"^(?:local)?rule ", run.stdout, flags=re.MULTILINE)[1:]:
        wildcards = re.search(r"wildcards: (.*)", block)
        jobs.setdefault(block.split(":")[0], []).append(wildcards[1] if wildcards else "")
    jobs.pop("all", None)
    return jobs


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results/tables/smoke/summary.csv", encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "results").rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(one_server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(forks.ADDRESS)  # this one starts a server of its own
        run = snakemake(folder)
    assert run.returncode == 0, run.stdout[-5000:]
    return folder


@pytest.mark.parametrize("study", cases(["default", "quantization", "smoke", "paper_llama", "paper_qwen"], {"default"}))
def test_a_study_can_be_planned(tmp_path, study):
    run = snakemake(tmp_path, "--cores", "2", "-n", study=study, overrides="")
    assert run.returncode == 0, run.stdout
    assert "tabulate" in run.stdout
    assert not (tmp_path / "results").exists()


MISTAKES = [
    ("smoke", "evaluation.windw=3", "evaluation.windw is not a setting. Did you mean window?"),
    ("smoke limit=3", "", "--config knows study=… and overrides=…, not limit."),
    ("smoke", "factorization.rhoo=3", "has the setting factorization.rhoo. Did you mean rho?"),
    ("smoke", "study.compression_ratios=[20]", "factorization.compression_ratio=20 is not between 0 and 1."),
    ("nope", "", "study=nope does not exist."),
]


@pytest.mark.parametrize("mistake", cases(MISTAKES, MISTAKES[:2]))
def test_a_mistake_is_a_sentence_before_the_first_job(tmp_path, mistake):
    study, overrides, sentence = mistake
    options = command(tmp_path, "--cores", "2", "-n", study=study.split()[0], overrides=overrides) + study.split()[1:]
    run = subprocess.run(options, cwd=ROOT, check=False, capture_output=True, text=True)
    told = run.stdout + run.stderr
    assert run.returncode != 0
    assert told.count(sentence) == 1
    assert "Traceback" not in told


def test_every_cell_is_in_the_table(finished):
    found = rows(finished)
    assert list(found[0])[: len(COLUMNS)] == list(COLUMNS)
    assert sorted(row["method"] for row in found) == sorted(("dense", *METHODS, QUANTIZED))
    assert {row["model"] for row in found} == {MODEL}
    for row in found:
        assert float(row["token_perplexity"]) > 1
        assert float(row["compression_ratio"]) == (0 if row["method"] == "dense" else 0.3)
        if row["method"] != "dense":
            assert float(row["kl_to_dense"]) > 0
            assert 0 < float(row["output_error_mean"]) < 1
            assert float(row["factorize_seconds"]) > 0
            assert float(row["peak_memory_mb"]) > 50
            assert row["solver"] == {"cospadi": "htp", QUANTIZED: "htp", "cospadi_paper": "ksvd"}.get(row["method"], "")
    plain, small = (next(row for row in found if row["method"] == name) for name in ("cospadi", QUANTIZED))
    assert (plain["bits"], small["bits"]) == ("16", "4")
    assert float(small["stored_bits"]) < 0.5 * float(plain["stored_bits"])
    assert float(small["factorize_seconds"]) > float(plain["factorize_seconds"])  # both count


def tensor_bits(folder: Path) -> dict[str, int]:
    """Bits of every projection as they lie in the files."""
    bits: dict[str, int] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                projection = name.rpartition(".")[0]
                bits[projection] = bits.get(projection, 0) + 8 * tensor.numel() * tensor.element_size()
    return bits


def test_no_cell_exceeds_its_budget_and_the_table_tells_the_bits_on_disk(finished):
    for row in rows(finished):
        if row["method"] == "dense":
            continue
        method, _, quantization = row["method"].partition("+")
        room, name = (
            ("quantization", f"{method}-0.3-{quantization}") if quantization else ("factorization", f"{method}-0.3")
        )
        folder = finished / "results" / room / row["model"] / "smoke" / name
        on_disk = tensor_bits(folder)
        records = [p for file in folder.glob("0*.json") for p in json.loads(file.read_text())["projections"]]
        assert {p["name"]: p["stored_bits"] for p in records} == on_disk
        assert len(on_disk) == 2 * 7
        assert sum(on_disk.values()) == int(float(row["stored_bits"]))
        assert float(row["stored_bits"]) <= float(row["budget_bits"])
        assert float(row["stored_ratio"]) == pytest.approx(1 - float(row["stored_bits"]) / float(row["dense_bits"]))
        if row["method"] != "asvd_search":  # which spends one projection's bits on another
            assert all(p["stored_bits"] <= p["budget_bits"] for p in records)


def test_a_factor_record_tells_what_was_done(finished):
    folder = finished / "results/factorization/tiny_llama/smoke/cospadi-0.3"
    record = json.loads((folder / "000-001.json").read_text())
    assert record["settings"]["factorization"]["rho"] == 3
    assert record["settings"]["factorization"]["compression_ratio"] == 0.3
    assert record["versions"]["torch"]
    assert record["seconds"] > 0
    assert record["peak_memory_mb"] > 50
    assert all(p["seconds"] > 0 for p in record["projections"])
    assert "left 0.0 s" in (folder / "000-001.log").read_text()


def test_nothing_half_written_is_left(finished):
    assert not list(finished.rglob("*.partial"))


def test_a_second_run_has_nothing_to_do(finished):
    before, started = times(finished), time.monotonic()
    run = snakemake(finished)
    took = time.monotonic() - started
    assert run.returncode == 0
    assert "Nothing to be done" in run.stdout, run.stdout[-3000:]
    assert times(finished) == before
    assert took < 20  # 4 on free cores


def test_another_evaluation_leaves_the_factors_alone(finished):
    jobs = planned(finished, f"{TRIMMED} evaluation.n_windows=2")
    assert {rule: len(found) for rule, found in jobs.items()} == {
        "evaluate": 5,
        "evaluate_dense": 1,
        "tabulate": 1,
        "track": 1,
    }


def test_another_rho_touches_only_cospadi(finished):
    jobs = planned(finished, f"{TRIMMED} factorization.rho=2")
    assert set(jobs) == {"factorize", "quantize", "evaluate", "tabulate", "track"}
    touched = {found for rule in ("factorize", "quantize", "evaluate") for found in jobs[rule]}
    assert all("method=cospadi" in found for found in touched)
    assert len(jobs["factorize"]) + len(jobs["quantize"]) == len(jobs["evaluate"])


@pytest.mark.thorough
def test_another_rounding_leaves_factors_and_other_cells_alone(finished):
    jobs = planned(finished, f"{TRIMMED} quantization.sweeps=1")
    assert {rule: len(found) for rule, found in jobs.items()} == {
        "quantize": 1,
        "evaluate": 1,
        "tabulate": 1,
        "track": 1,
    }


def test_a_method_that_goes_by_the_loss_has_stages_of_its_own(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True, copy_function=shutil.copy2)
    overrides = (
        "study.models=[tiny_llama] study.methods=[cospadi_fast] study.layers_per_job=1 "
        "+study.quantizations_of.cospadi_fast=[none,int8] tracking=disabled"
    )
    run = snakemake(folder, overrides=overrides)
    assert run.returncode == 0, run.stdout[-5000:]
    place = folder / "results/factorization/tiny_llama/smoke/cospadi_fast-0.3"
    chosen = json.loads((place / "ratios.json").read_text())
    assert chosen["expected_loss"] <= chosen["expected_loss_uniform"]
    files = [json.loads(file.read_text())["projections"] for file in sorted(place.glob("0*.json"))]
    for row in (row for projections in files for row in projections):
        assert 1 - row["stored_bits"] / row["dense_bits"] >= chosen["ratios"][row["name"]] - 1e-9
    assert [row["method"] for row in rows(folder)] == ["dense", "cospadi_fast", "cospadi_fast+int8"]
    assert planned(folder, overrides) == {}
    blended = planned(folder, f"{overrides} calibration.fisher.blend=0.2")
    assert set(blended) == {"expect_losses", "choose_ratios", "factorize", "quantize", "evaluate", "tabulate"}
    assert set(planned(folder, f"{overrides} calibration.fisher.n_samples=4")) == {*blended, "fisher"}


@pytest.mark.thorough
def test_a_revision_makes_factors_and_what_follows_stale(finished):
    jobs = planned(finished, f"{TRIMMED} factorization.revision=9")
    assert {rule: len(found) for rule, found in jobs.items()} == {
        "search_ranks": 1,
        "choose_ranks": 1,
        "factorize": 4,
        "quantize": 1,
        "evaluate": 5,
        "tabulate": 1,
        "track": 1,
    }


def test_every_cell_is_a_wandb_run_and_its_settings_touch_nothing_else(finished):
    record = json.loads((finished / "results/tracking/smoke/record.json").read_text())
    assert len(record["runs"]) == 6 + 1  # a cell each, the dense model and the tables
    assert {(run["mode"], run["why"]) for run in record["runs"]} == {("offline", "WANDB_MODE=offline")}
    assert all(list((finished / "results/tracking/smoke" / run["files"]).glob("*.wandb")) for run in record["runs"])
    jobs = planned(finished, f"{TRIMMED} tracking.project=other")
    assert {rule: len(found) for rule, found in jobs.items()} == {"track": 1}
    assert planned(finished, f"{TRIMMED} tracking=disabled") == {}


def test_the_report_holds_tables_and_captions(finished):
    report = finished / "report.html"
    run = snakemake(finished, "--cores", "1", "--report", str(report))
    assert run.returncode == 0, run.stdout[-3000:]
    page = report.read_text(encoding="utf-8")
    assert "summary.csv" in page
    assert "perplexity.png" in page
    for caption in (ROOT / "workflow/report").glob("*.rst"):
        words = re.findall(r"[A-Za-z]{4,}", re.sub(r"\{\{.*?\}\}|\(.*?\)", " ", caption.read_text()))
        assert all(word in page for word in words[:5]), caption


def test_a_failed_job_tells_why_and_finished_results_stay(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True, copy_function=shutil.copy2)
    before = times(folder)
    run = snakemake(folder, overrides=f"{TRIMMED} calibration.n_samples=100000")
    assert run.returncode != 0
    assert re.search(
        r"error: The calibration text has \d+ tokens, \d+ are asked for\. Set calibration\.n_samples", run.stdout
    )
    for room in ("sources", "factorization", "evaluation", "tables"):
        kept = {path: when for path, when in before.items() if f"/results/{room}/" in str(path)}
        assert kept
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert not list(folder.rglob("*.partial"))


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    overrides = "study.models=[tiny_qwen3] study.methods=[svd,cospadi_ksvd] tracking=disabled"
    log = tmp_path / "log"
    folder = tmp_path / "study"
    folder.mkdir()
    with open(log, "w") as stream:
        run = subprocess.Popen(
            command(folder, "--cores", "2", overrides=overrides),
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    give_up = time.monotonic() + 300
    done = folder / "results/factorization/tiny_qwen3/smoke"
    while not list(done.glob("*/*.safetensors")) and run.poll() is None and time.monotonic() < give_up:
        time.sleep(0.1)
    time.sleep(2)  # snakemake takes note of the job
    assert run.poll() is None, log.read_text()
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert list((folder / ".snakemake/locks").iterdir()), "the kill came too late to leave a lock"

    noted = re.findall(r"Finished jobid: \d+ \(Rule: (\w+)\)", log.read_text())
    # What snakemake took note of before it was killed stays; a job that had just written its files is run again.
    assert {"prepare_model", "prepare_text", "calibrate"} <= set(noted)
    before = {
        path: when
        for path, when in times(folder).items()
        if "/sources/" in str(path) or ("/calibration/" in str(path) and path.name == "record.json")
    }
    factors = {path: path.stat().st_mtime_ns for path in done.glob("*/*.safetensors")}

    again = snakemake(folder, overrides=overrides)
    assert again.returncode == 0, again.stdout[-5000:]
    assert "cannot be locked" not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    kept = [path for path, when in factors.items() if path.stat().st_mtime_ns == when]
    assert len(kept) >= min(noted.count("factorize"), len(factors))
    assert len(rows(folder)) == 3
    assert not list(folder.rglob("*.partial"))
    assert "Nothing to be done" in snakemake(folder, overrides=overrides).stdout


# The notebooks


def executed(name: str, folder: Path, **environment: str):
    """A notebook run from top to bottom in ``folder``; whatever it raises, the test does."""
    import jupytext
    from nbclient import NotebookClient

    notebook = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    # a kernel that finds this project and none of the settings of whoever runs the tests
    kernel_env = os.environ | {"IPYTHONDIR": str(folder / "ipython")} | environment
    kernel_env.pop("MPLBACKEND", None)  # the kernel's own puts pictures into the notebook
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=kernel_env)
    return notebook


def printed(notebook) -> str:
    outputs = [output for code in notebook.cells for output in code.get("outputs", [])]
    return "".join(output.get("text", "") + str(output.get("data", {}).get("text/html", "")) for output in outputs)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_make_notebooks_writes_the_executed_tour(finished):
    """The commands of the target itself, with the programs of this environment: it shows the figures and rows of the study."""
    plan = ["make", "-n", "--no-print-directory", "-o", ".venv/.installed", "notebooks", "STUDY=smoke"]
    unmade = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    commands = subprocess.run(plan, cwd=ROOT, env=unmade, check=True, capture_output=True, text=True).stdout
    assert "jupytext" in commands
    (finished / "notebooks").symlink_to(ROOT / "notebooks")
    commands = commands.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    run = subprocess.run(
        ["sh", "-ec", commands], cwd=finished, check=False, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    tour = nbformat.read(finished / "results/notebooks/smoke.ipynb", as_version=4)
    pictures = [o for cell in tour.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    files = [finished / f"results/tables/smoke/{name}.png" for name in ("pareto", "perplexity", "output_error")]
    assert [base64.b64decode(picture["data"]["image/png"]) for picture in pictures] == [
        file.read_bytes() for file in files
    ]
    shown = printed(tour)
    for row in rows(finished):
        assert row["method_title"] in shown


def test_compress_your_own_model_runs(tmp_path):
    small = {"COSPADI_MODEL": "tiny_llama", "COSPADI_SETTINGS": "calibration=smoke"}
    notebook = executed("compress_your_own", tmp_path, **small)
    shown = printed(notebook)
    assert shown.count("MB of weights on disk") == 2
    assert "values_scales" in shown  # the int8 model took the other's place
    assert (tmp_path / "my-smaller-model" / "model.safetensors").is_file()
