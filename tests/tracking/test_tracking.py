"""W&B as a mirror: what a run holds, that nothing depends on it, and that no test reaches a network."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cospadi import cli
from cospadi.errors import UserError
from cospadi.pipeline.stages import tables, tracking
from cospadi.pipeline.study import Study
from cospadi.records import read_json, write_json, write_text
from cospadi.settings import load
from cospadi.tables.cells import summary
from cospadi.tracking import mode, offline
from cospadi.tracking.runs import cell_runs, run_id
from cospadi.tracking.settings import TrackingConfig

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef" * 2 + "deadbeef"
CLOSED = "http://127.0.0.1:9"
OVERRIDES = [
    *("study.models=[tiny_llama]", "study.methods=[svd,cospadi]", "study.compression_ratios=[0.2,0.3]"),
    "+study.quantizations_of.cospadi=[none,int8]",
]
PROJECTIONS = ("self_attn.q_proj", "mlp.down_proj")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("tracking")]


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No key, no login, no settings of the person who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)


def measured(value, stderr=None):
    return {"value": value, "stderr": stderr, "protocol": "eight windows"}


def write_records(study: Study) -> None:
    """Records of a finished study, made by hand, below the working folder."""

    def evaluation(ppl, seed, **settings):
        return {
            "room": "evaluation",
            "settings": {"evaluation": {"seed": seed}, **settings},
            "token_perplexity": measured(ppl, 0.5),
            "kl_to_dense": measured("nan"),
            "average_accuracy": measured(0.4, 0.01),
            "tasks": {"arc_easy": measured(0.4, 0.02) | {"metric": "acc", "higher_is_better": True}},
            "seconds": 12.5,
            "peak_memory_mb": 900.25,
            "versions": {"torch": "2"},
        }

    def factors(cell, first):
        rows = [
            {
                "name": f"model.layers.{layer}.{name}",
                "layer": layer,
                "projection": name,
                "d_in": 64,
                "d_out": 64,
                "kind": "low_rank",
                "rank": 12,
                "dense_bits": 16 * 64 * 64,
                "budget_bits": 50000,
                "stored_bits": 49000,
                "value_bits": 16,
                "output_error": 0.1 * (layer + 1) * (1 + PROJECTIONS.index(name)),
                "weight_error": 0.3,
                "seconds": 0.5,
                "fallback": None,
            }
            for layer in (first,)
            for name in PROJECTIONS
        ]
        settings = {"factorization": {"name": cell.method, "rho": 3, "compression_ratio": float(cell.ratio)}}
        return {"settings": settings, "projections": rows, "seconds": 3.25, "peak_memory_mb": 500.0}

    write_json(Path(study.dense_record("tiny_llama")), evaluation(20.0, 1))
    for number, cell in enumerate(study.cells):
        write_json(Path(study.evaluation_record(cell)), evaluation(30.0 + number, 1))
        for file in (f for f in study.records(cell) if "evaluation" not in f):
            write_json(Path(file), factors(cell, int(Path(file).stem[:3])))


def write_tables(study: Study) -> None:
    """As much of a study's tables as tracking looks at."""
    from PIL import Image

    folder = Path(study.summary).parent
    write_text(folder / "summary.csv", summary(list(tables.study_cells(study).values())).to_csv(index=False))
    for name in ("projections.csv", "tiny_llama.md", "perplexity.svg", "run.log"):
        write_text(folder / name, name)
    Image.new("RGB", (8, 8)).save(folder / "perplexity.png")


@pytest.fixture
def refused(capsys):
    """Run the command line and return its one sentence."""

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 1
        return capsys.readouterr().err.removeprefix("error: ").rstrip()

    return run


@pytest.fixture(scope="module")
def grid() -> Study:
    return Study("smoke", OVERRIDES)


@pytest.fixture
def study(grid, tmp_path, monkeypatch) -> Study:
    """A finished study below the working folder."""
    monkeypatch.chdir(tmp_path)
    write_records(grid)
    return grid


def tracked(study: Study, **settings) -> dict:
    """What ``track`` notes."""
    folder = Path("results/tracking/smoke")
    study.root = replace(study.root, tracking=TrackingConfig(name="auto", **settings))
    tracking.track(study, folder)
    return read_json(folder / "record.json")


def notes(record: dict) -> dict[str, dict]:
    return {note["name"]: note for note in record["runs"]}


def inspect(files: Path) -> tuple[dict, dict, list[dict]]:
    """A run as W&B reads it: its record, its summary with its config, and its history."""
    program = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect"]

    def read(*options: str) -> str:
        return subprocess.run([*program, *options, str(files)], check=True, capture_output=True, text=True).stdout

    lines = [json.loads(line) for line in read("--json").splitlines()]
    run = next(line["run"] for line in lines if line["type"] == "run")
    history = [line["history"]["item"] for line in lines if line["type"] == "history"]
    metrics = [line["metric"] for line in lines if line["type"] == "metric"]
    return run | {"metrics": metrics}, json.loads(read("--summary", "--json")), history


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tracking" not in path.parts}


class Server:
    """A stand-in for W&B on this machine: answers, refuses the key, or never says a word."""

    def __init__(self, status: int = 200, viewer: dict | None = None, silent: bool = False, uploads: bool = False):
        keys, asked = self.keys, self.asked = [], []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                keys.append(self.headers["Authorization"])
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
                asked.append((body.get("operationName") or self.path, body.get("variables") or body))
                if silent:
                    time.sleep(30)
                answer = {"viewer": viewer} | (stored(*asked[-1], f"http://{self.headers['Host']}") if uploads else {})
                content = json.dumps({"data": answer}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_PUT(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def stored(operation: str, variables: dict, url: str) -> dict:
    """As much of W&B's answers as ``wandb sync`` reads."""
    if operation == "UpsertBucket":
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": variables["name"], "displayName": variables["displayName"], "project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if operation == "CreateArtifact":
        artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}
    if operation == "CreateRunFiles":
        files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
    return {}


def reach(**settings) -> tuple[mode.Reach, float]:
    started = time.perf_counter()
    reached = mode.reach(TrackingConfig(name="auto", **settings))
    return reached, time.perf_counter() - started


# What a run holds


def test_a_cell_is_a_run_with_its_settings_numbers_and_errors(study):
    write_tables(study)
    record = tracked(study, mode="offline")
    notes_by_name = notes(record)
    cells = ["svd 0.2", "svd 0.3", "cospadi 0.2", "cospadi 0.2 int8", "cospadi 0.3", "cospadi 0.3 int8"]
    assert list(notes_by_name) == ["dense", *cells, "tables"]
    assert {note["mode"] for note in notes_by_name.values()} == {"offline"}
    note = notes_by_name["cospadi 0.3 int8"]
    assert note["place"] == "tiny_llama/smoke/cospadi-0.3-int8/smoke"
    folder = Path("results/tracking/smoke")
    assert read_json(folder / note["place"] / "record.json") == note

    run, whole, history = inspect(folder / note["files"])
    assert (run["run_id"], run["display_name"], run["run_group"]) == (note["run"], "cospadi 0.3 int8", "smoke")
    assert (run["project"], run["job_type"]) == ("cospadi", "cell")
    assert run["tags"] == ["tiny_llama", "cospadi", "0.3", "int8"]
    config, numbers = whole["config"], whole["summary"]
    named = {"study": "smoke", "model": "tiny_llama", "method": "cospadi", "quantization": "int8"}
    assert {name: config[name] for name in named} == named
    assert config["compression_ratio"] == 0.3
    assert config["settings"]["factorization"]["rho"] == 3
    assert config["settings"]["evaluation"] == {"seed": 1}
    assert config["protocols"]["arc_easy"] == "eight windows"
    assert (numbers["token_perplexity"], numbers["token_perplexity_stderr"]) == (35.0, 0.5)
    assert (numbers["average_accuracy"], numbers["arc_easy"], numbers["arc_easy_stderr"]) == (0.4, 0.4, 0.02)
    assert numbers["diverged"] == "kl_to_dense"
    assert "kl_to_dense" not in numbers
    assert numbers["stored_mb"] == 2 * 2 * 49000 / 8e6
    assert numbers["factorize_seconds"] == 2 * 2 * 3.25  # two blocks, factorized and quantized
    assert (numbers["evaluate_seconds"], numbers["peak_memory_mb"]) == (12.5, 500.0)
    assert numbers["output_error_mean"] == pytest.approx(0.225)
    assert numbers["projections"]["nrows"] == 4
    assert "output_error/mean" not in numbers  # the last layer's is nobody's summary

    layers = [row for row in history if "layer" in row]
    assert [row["layer"] for row in layers] == [0, 1]
    assert [row["output_error/mean"] for row in layers] == pytest.approx([0.15, 0.3])
    assert [row["output_error/down_proj"] for row in layers] == pytest.approx([0.2, 0.4])
    (errors,) = [metric for metric in run["metrics"] if metric.get("glob_name") == "output_error/*"]
    assert errors["step_metric"] == "layer"

    run, whole, _ = inspect(folder / notes_by_name["dense"]["files"])
    assert (run["job_type"], run["tags"]) == ("dense", ["tiny_llama", "dense"])
    assert whole["summary"]["token_perplexity"] == 20.0
    run, whole, _ = inspect(folder / notes_by_name["tables"]["files"])
    assert run["job_type"] == "tables"
    assert whole["summary"]["summary"]["nrows"] == 7
    assert whole["summary"]["figures/perplexity"]["_type"] == "image-file"
    artifacts = b"".join(path.read_bytes() for path in (folder / notes_by_name["tables"]["files"]).glob("*.wandb"))
    for name in (b"smoke-tables", b"summary.csv", b"projections.csv", b"tiny_llama.md", b"perplexity.svg"):
        assert name in artifacts


def test_the_same_cell_is_the_same_run_and_other_settings_are_another(study):
    cells = tables.study_cells(study)
    ids = [run.id for run in cell_runs("smoke", cells)]
    assert ids == [run.id for run in cell_runs("smoke", tables.study_cells(Study("smoke", OVERRIDES)))]
    assert len(set(ids)) == len(ids) == 7
    assert not set(ids) & {run.id for run in cell_runs("other", cells)}
    assert run_id("a", "b", {"x": 1, "y": 2}) == run_id("a", "b", {"y": 2, "x": 1}) != run_id("a", "b", {"x": 1})


def test_only_what_is_new_is_written_again(study):
    before = notes(tracked(study, mode="offline"))
    record = Path(study.evaluation_record(study.cells[0]))
    write_json(record, read_json(record) | {"seconds": 99.0})
    again = notes(tracked(study, mode="offline"))
    changed = {name for name in before if again[name]["files"] != before[name]["files"]}
    assert changed <= {"svd 0.2"}  # the same second gives the same name
    assert again["svd 0.2"]["content"] != before["svd 0.2"]["content"]
    assert again["svd 0.2"]["run"] == before["svd 0.2"]["run"]
    settings = read_json(record)["settings"]["evaluation"] | {"seed": 2}
    write_json(record, read_json(record) | {"settings": {"evaluation": settings}})
    other = notes(tracked(study, mode="offline"))
    assert other["svd 0.2"]["run"] != before["svd 0.2"]["run"]
    folders = list(Path("results/tracking/smoke/wandb").glob("offline-run-*"))
    assert len(folders) == 7  # none of the run that was replaced
    assert {f"results/tracking/smoke/{note['files']}" for note in other.values()} == {str(f) for f in folders}


def test_a_study_that_is_not_finished_is_logged_as_far_as_it_is(study):
    for record in (study.evaluation_record(study.cells[0]), study.factors(study.cells[1], "json")[1]):
        Path(record).unlink()
    assert list(notes(tracked(study, mode="offline"))) == [
        *("dense", "cospadi 0.2", "cospadi 0.2 int8", "cospadi 0.3", "cospadi 0.3 int8")
    ]


# Nothing depends on it


def test_without_a_key_it_is_offline_at_once():
    reached, took = reach()
    assert (reached.online, reached.why) == (False, "there is no API key for https://api.wandb.ai")
    assert took < 1


@pytest.mark.parametrize("kind", ["closed", "silent", "no such host"])
def test_with_a_key_and_no_server_it_is_offline_within_the_timeout(monkeypatch, kind):
    url = {"closed": CLOSED, "no such host": "http://w-and-b.invalid"}.get(kind) or Server(silent=True).url
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    reached, took = reach(timeout=1.5)
    assert not reached.online
    assert url in reached.why
    assert took < 2.5


@pytest.mark.parametrize(
    ("status", "viewer", "online", "words"),
    [
        (200, {"entity": "me"}, True, "answers"),
        (200, None, False, "does not know the API key"),
        (401, None, False, "does not know the API key"),
        (502, None, False, "answers with HTTP status 502"),
    ],
)
def test_the_server_is_asked_who_the_key_belongs_to(monkeypatch, tmp_path, status, viewer, online, words):
    server = Server(status, viewer)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {server.url.removeprefix('http://')} login user password {KEY}\n")
    monkeypatch.setenv("NETRC", str(netrc))
    reached, _ = reach()
    assert (reached.online, reached.entity) == (online, "me" if online else None)
    assert words in reached.why
    assert len(server.keys) == 1
    assert KEY not in reached.why


def test_the_host_of_a_login_is_asked(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = http://mine.example/\n")
    assert mode.base_url() == "http://mine.example"
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    assert mode.base_url() == CLOSED


@pytest.mark.parametrize("setting", ["offline", "disabled"])
def test_what_a_person_says_to_wandb_counts(monkeypatch, setting):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", setting)
    assert mode.reach(TrackingConfig(name="auto")) == mode.Reach(False, f"WANDB_MODE={setting}")


def test_a_server_that_takes_the_key_and_no_runs_ends_in_files(study, monkeypatch, capfd):
    server = Server(200, {"entity": "me"})
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    before = everything(Path("results"))
    started = time.perf_counter()
    record = tracked(study, upload_timeout=3.0)
    assert time.perf_counter() - started < 30  # most of it is W&B being loaded, twice
    assert {note["mode"] for note in record["runs"]} == {"offline"}
    # W&B waits for an answer that it understands, or gives up before
    assert re.search(
        r"as (the upload took longer than .*upload_timeout=3 s|wandb sync left 7 of 7 runs)", record["told"]
    )
    assert everything(Path("results")) == before
    for path in Path("results").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
    assert KEY not in "".join(capfd.readouterr())


def test_what_was_uploaded_is_known_by_the_mark_that_wandb_leaves(study, monkeypatch):
    server = Server(200, {"entity": "me"})
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    uploads = []

    def upload(runs, tracking):
        uploads.append(len(runs))
        for run in runs[:3]:
            (file,) = run.glob("*.wandb")
            file.with_name(f"{file.name}.synced").touch()
        return "wandb sync left some"

    monkeypatch.setattr(offline, "upload", upload)
    first = tracked(study)
    assert [note["mode"] for note in first["runs"]] == ["online"] * 3 + ["offline"] * 4
    assert first["runs"][0]["url"] == f"{server.url}/me/cospadi/runs/{first['runs'][0]['run']}"
    assert "3 of 7 runs are uploaded. 4 are kept as files, as wandb sync left some" in first["told"]
    assert [note["mode"] for note in tracked(study)["runs"]] == ["online"] * 6 + ["offline"]
    last = tracked(study)
    assert "7 of 7 runs are uploaded." in last["told"]
    assert last["runs"][0] == first["runs"][0]
    tracked(study)
    assert uploads == [7, 4, 1]


def test_with_a_key_and_a_server_everything_is_uploaded_once(study, monkeypatch):
    server = Server(200, {"entity": "me"}, uploads=True)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    write_tables(study)
    record = tracked(study, upload_timeout=60.0)
    assert {note["mode"] for note in record["runs"]} == {"online"}, record["told"]
    assert record["runs"][0]["url"] == f"{server.url}/me/cospadi/runs/{record['runs'][0]['run']}"
    given = [what for operation, what in server.asked if operation == "UpsertBucket" and what["groupName"]]
    assert {run["name"]: run["displayName"] for run in given} == {note["run"]: note["name"] for note in record["runs"]}
    assert {run["groupName"] for run in given} == {"smoke"}
    artifacts = [
        what["input"]["artifactCollectionName"] for operation, what in server.asked if operation == "CreateArtifact"
    ]
    assert "smoke-tables" in artifacts
    for note in record["runs"][1:-1]:
        streamed = [what for path, what in server.asked if path == f"/files/me/cospadi/{note['run']}/file_stream"]
        lines = [
            json.loads(line)
            for part in streamed
            for line in part["files"].get("wandb-history.jsonl", {}).get("content", ())
        ]
        assert [line["layer"] for line in lines if "layer" in line] == [0, 1]
    asked = len(server.asked)
    assert "8 of 8 runs are uploaded." in tracked(study, upload_timeout=60.0)["told"]
    assert len(server.asked) == asked


def test_wandb_sync_is_what_uploads(tmp_path, monkeypatch):
    given = []

    def run(command, env, **options):
        given.append((command[1:4], command[4:], env["WANDB_BASE_URL"], options["timeout"]))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(offline.subprocess, "run", run)
    trouble = offline.upload([tmp_path], TrackingConfig(name="auto", upload_timeout=7.0))
    assert given == [(["-m", "wandb", "sync"], [str(tmp_path)], mode.CLOUD, 7.0)]
    assert trouble == "wandb sync left 1 of 1 runs (exit code 3, see its output)"


def test_a_wandb_that_breaks_is_a_line_in_the_record(study, monkeypatch, capsys):
    import wandb

    calls = []

    def broken(**_):
        calls.append(1)
        raise RuntimeError("no W&B today")

    monkeypatch.setattr(wandb, "init", broken)
    before = everything(Path("results"))
    arguments = ["track", "study=smoke", *OVERRIDES, "--folder", "results/tracking/smoke"]
    assert cli.main(arguments) == 0
    assert "7 were not written: W&B failed on dense: RuntimeError: no W&B today" in capsys.readouterr().out
    record = read_json(Path("results/tracking/smoke/record.json"))
    assert {(note["mode"], note["files"]) for note in record["runs"]} == {("none", None)}
    assert calls == [1]  # each might take as long to fail
    assert everything(Path("results")) == before
    monkeypatch.undo()


def test_a_killed_job_leaves_results_alone_and_the_next_goes_on(study):
    before = everything(Path("results"))
    folder = Path("results/tracking/smoke")
    command = [sys.executable, "-m", "cospadi", "track", "study=smoke", *OVERRIDES, "tracking=offline"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open("log", "w") as log:
        job = subprocess.Popen([*command, "--folder", str(folder)], stdout=log, stderr=log, env=environment)
    give_up = time.monotonic() + 60
    while len(list(folder.rglob("smoke/record.json"))) < 2 and time.monotonic() < give_up:
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    kept = {path: path.read_bytes() for path in folder.rglob("smoke/record.json")}
    assert len(kept) >= 2, Path("log").read_text()
    assert not (folder / "record.json").exists(), "the kill came too late"
    assert everything(Path("results")) == before
    record = tracked(study, mode="offline")
    assert len(record["runs"]) == 7
    assert len(list(folder.glob("wandb/offline-run-*"))) == 7
    done = {note["run"]: note["files"] for note in map(json.loads, kept.values()) if note["files"]}
    assert all(note["files"] == done.get(note["run"], note["files"]) for note in record["runs"])


def test_numerics_and_planning_load_no_wandb():
    code = (
        "import sys, cospadi.pipeline.stages.factorization, cospadi.factorization.methods, cospadi.tracking.mode, cospadi.pipeline.study;"
        "print([m for m in sys.modules if m in ('wandb', 'httpx', 'pandas')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


# Settings


def test_online_without_a_key_is_refused_before_the_first_job(study, refused):
    sentence = "tracking.mode=online and there is no W&B API key for https://api.wandb.ai"
    assert refused("track", "study=smoke", *OVERRIDES, "tracking=online", "--folder", "t").startswith(sentence)
    config = ["study=smoke", f"overrides={' '.join([*OVERRIDES, 'tracking=online'])}"]
    command = [sys.executable, "-m", "snakemake", "-n", "--directory", str(Path.cwd()), "--snakefile"]
    run = subprocess.run(
        [*command, str(ROOT / "Snakefile"), "--config", *config], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert run.returncode != 0
    assert f"error: {sentence}" in run.stdout + run.stderr


def test_disabled_is_no_job(study):
    outputs = {}
    for mode_name in ("auto", "disabled"):
        study.root = replace(study.root, tracking=TrackingConfig(name=mode_name, mode=mode_name))
        outputs[mode_name] = study.outputs
    assert outputs["disabled"] == ["results/tables/smoke/summary.csv"]
    assert outputs["auto"] == ["results/tables/smoke/summary.csv", "results/tracking/smoke/record.json"]
    with pytest.raises(UserError, match=r"tracking\.mode=disabled: there is nothing to do"):
        tracking.track(study, Path("t"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tracking=sometimes", "tracking=sometimes does not exist"),
        (
            "tracking.mode=sometimes",
            "tracking.mode=sometimes is not known. Choose one of: auto, offline, online, disabled",
        ),
        ("tracking.project='a/b'", "tracking.project=a/b is not a name that W&B takes"),
        ("tracking.timeout=0", "tracking.timeout=0.0 is too small"),
        ("tracking.upload_timeout=inf", "tracking.upload_timeout=inf is not finite"),
    ],
)
def test_bad_settings_are_a_sentence(override, words):
    with pytest.raises(UserError) as caught:
        load([override])
    assert words in str(caught.value)


# The workspace


def test_the_workspace_compares_methods(study):
    definition = Path("workspace.json")
    study.root = replace(study.root, tracking=TrackingConfig(name="auto", project="mine"))
    tracking.workspace(study, definition)
    written = read_json(definition)
    assert (written["project"], written["url"]) == ("mine", None)
    section = written["spec"]["section"]
    sections = {s["name"]: s["panels"] for s in section["panelBankConfig"]["sections"]}
    assert list(sections) == ["Quality", "Error per layer", "Tasks and measurements", "Cost"]
    points = {panel["config"]["chartTitle"]: panel["config"] for panel in sections["Quality"]}
    perplexity = points["Token perplexity against ratio"]
    assert perplexity["xAxis"] == "config:compression_ratio.value"
    assert (perplexity["yAxis"], perplexity["yAxisLogScale"]) == ("summary:token_perplexity", True)
    accuracy = points["Average accuracy against ratio"]
    assert (accuracy["xAxis"], accuracy["yAxis"]) == ("config:compression_ratio.value", "summary:average_accuracy")
    lines = [panel["config"] for panel in sections["Error per layer"]]
    assert [(line["xAxis"], line["metrics"]) for line in lines] == [
        ("layer", [f"output_error/{name}"]) for name in ("mean", "q_proj", "down_proj")
    ]
    colours = section["customRunColors"]
    runs = cell_runs("smoke", tables.study_cells(study))
    assert set(colours) == {run.id for run in runs if run.job_type == "cell"}
    assert len({colours[run.id] for run in runs if run.config["method"] == "cospadi"}) == 1
    assert "smoke" in json.dumps(section["runSets"][0]["filters"])
    logged = {key for run in runs for row in run.layers for key in row} | {key for run in runs for key in run.summary}
    assert all(metric in logged for line in lines for metric in line["metrics"])


def test_the_workspace_is_saved_once_and_then_brought_up_to_date(study, monkeypatch):
    from wandb_workspaces.workspaces import Workspace, internal

    server = Server(200, {"entity": "me"})
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    sent = []

    def upsert(view):
        sent.append(view)
        return {"upsertView": {"view": {"name": view.name, "id": view.id or "known"}}}

    def stored(entity, project, name):
        return sent[0].model_copy(update={"id": "known", "name": name})

    monkeypatch.setattr(internal, "upsert_view2", upsert)
    monkeypatch.setattr(internal.View, "from_name", stored)
    monkeypatch.setattr(
        Workspace, "url", property(lambda self: f"https://wandb.ai/me/cospadi?nw={self._internal_name[3:-2]}")
    )
    study.root = replace(study.root, tracking=TrackingConfig(name="auto"))
    definition = Path("workspace.json")
    for _ in range(2):
        tracking.workspace(study, definition)
    assert [(view.entity, view.id) for view in sent] == [("me", ""), ("me", "known")]
    assert sent[0].name == sent[1].name
    assert read_json(definition)["url"] == f"https://wandb.ai/me/cospadi?nw={sent[0].name[3:-2]}"


def test_no_port_of_these_tests_is_open():
    with socket.socket() as tried:
        assert tried.connect_ex(("127.0.0.1", 9)) != 0


@pytest.mark.parametrize("place", ["folder", "home"])
@pytest.mark.parametrize("word", ["offline", "disabled"])
def test_wandb_offline_and_disabled_are_obeyed_as_wandb_itself_obeys(tmp_path, monkeypatch, place, word):
    """The files that these commands write, read by W&B for comparison."""
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "wandb" if place == "folder" else tmp_path / "home" / ".config" / "wandb"
    folder.mkdir(parents=True)
    (folder / "settings").write_text(f"[default]\nmode = {word}\n")
    code = "import wandb; print(wandb.setup().settings.mode)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == word
    assert mode.reach(TrackingConfig(name="auto")) == mode.Reach(False, f"`wandb {word}` was typed here")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert mode.reach(TrackingConfig(name="auto")).why == "WANDB_MODE=offline"


def test_wandb_disabled_of_the_trainer_is_obeyed(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_DISABLED", "true")
    assert mode.reach(TrackingConfig(name="auto")) == mode.Reach(False, "WANDB_DISABLED=true")
