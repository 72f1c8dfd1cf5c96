"""Results are written whole or not at all, and a full disk is one sentence."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cospadi import cli, records
from cospadi.errors import UserError
from cospadi.pipeline.stages import sources
from cospadi.records import new_path, read_json, write_json, write_tensors, write_text


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    with new_path(target) as partial:
        partial.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert names(target.parent) == ["file.txt"]


def test_a_folder_replaces_the_old_one_whole(tmp_path):
    target = tmp_path / "folder"
    for content in ("old", "new"):
        with new_path(target) as partial:
            partial.mkdir()
            (partial / content).write_text(content)
    assert names(target) == [".cospadi", "new"]
    assert names(tmp_path) == ["folder"]


def test_a_folder_of_somebody_else_is_never_touched(tmp_path):
    target = tmp_path / "home"
    target.mkdir()
    (target / "thesis.txt").write_text("ten years of work")
    ran = False
    for write in (lambda path: path.mkdir(), lambda path: path.write_text("{}")):
        with (  # noqa: PT012
            pytest.raises(UserError, match=r"home is a folder that this project did not write"),
            new_path(target) as new,
        ):
            ran = True
            write(new)
    assert not ran, "refused only after the work was done"
    assert names(target) == ["thesis.txt"]
    assert names(tmp_path) == ["home"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "folder").mkdir()
    with new_path(tmp_path / "folder") as partial:
        partial.mkdir()
    assert names(tmp_path / "folder") == [".cospadi"]


def test_what_a_killed_process_left_is_swept_and_a_living_one_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".file.txt.{dead.pid}.partial").write_text("half")
    (tmp_path / f".file.txt.{os.getppid()}.partial").write_text("still being written")
    write_text(tmp_path / "file.txt", "whole")
    assert names(tmp_path) == [f".file.txt.{os.getppid()}.partial", "file.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(error), new_path(target) as partial:  # noqa: PT012
        partial.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    (target / ".cospadi").touch()
    with pytest.raises(RuntimeError), new_path(target) as partial:  # noqa: PT012
        partial.mkdir()
        (partial / "half").write_text("half")
        raise RuntimeError
    assert names(target) == [".cospadi", "old"]
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_sentence(tmp_path, number):
    target = tmp_path / "file.txt"
    target.write_text("old")
    sentence = r"No room left on the disk while writing .*file\.txt.*free some space"
    with pytest.raises(UserError, match=sentence), new_path(target):
        raise OSError(number, os.strerror(number))
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_other_trouble_with_files_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(PermissionError), new_path(tmp_path / "file.txt"):
        raise PermissionError(errno.EACCES, "no")


def test_a_disk_that_fills_up_ends_a_stage_in_a_sentence(tmp_path, monkeypatch, capsys):
    finished = tmp_path / "finished.json"
    write_json(finished, [1])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)  # the last system call of every write
    monkeypatch.setattr(sources, "prepare_text", lambda config, documents, record: write_json(documents, ["a"]))
    code = cli.main(["prepare-text", "study=smoke", "text=smoke_calibration", *files(tmp_path, "documents", "record")])
    message = capsys.readouterr().err
    assert code == 1
    assert message.startswith("error: No room left on the disk while writing ")
    assert message.count("\n") == 1
    assert read_json(finished) == [1]
    assert names(tmp_path) == ["finished.json"]


def files(folder, *options: str) -> list[str]:
    return [word for option in options for word in (f"--{option}", str(folder / f"{option}.json"))]


WRITE = """
import resource, sys
from pathlib import Path
import torch
from cospadi.errors import UserError
from cospadi.records import write_json, write_tensors
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
target = Path(sys.argv[1])
try:
    if target.suffix == ".json":
        write_json(target, list(range(100_000)))
    else:
        write_tensors(target, {"a": torch.zeros(100_000)})
except UserError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.parametrize("name", ["a.json", "a.safetensors"])
def test_a_file_that_the_system_refuses_to_grow_is_a_sentence(tmp_path, name):
    """No stand-in: the kernel itself stops the write."""
    target = tmp_path / name
    target.write_text("old")
    run = subprocess.run([sys.executable, "-c", WRITE, target], check=False, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(f"error: No room left on the disk while writing {target}")
    assert "Traceback" not in run.stderr
    assert target.read_text() == "old"
    assert names(tmp_path) == [name]


def test_json_has_no_nan_so_it_is_told_in_words(tmp_path):
    target = tmp_path / "a.json"
    write_json(
        target, {"a": float("nan"), "b": [float("inf"), -float("inf"), 1.5], "c": (1, None, True, "x"), 3: target}
    )
    strict = json.loads(target.read_text(), parse_constant=pytest.fail)
    assert strict == {"a": "nan", "b": ["inf", "-inf", 1.5], "c": [1, None, True, "x"], "3": str(target)}


def test_tensors_come_back_and_can_be_shared(tmp_path):
    target = tmp_path / "a.safetensors"
    tensors = {"turned": torch.arange(6.0).reshape(2, 3).T, "half": torch.ones(2, dtype=torch.float16)}
    umask = os.umask(0o027)
    try:
        write_tensors(target, tensors, {"turned": "yes"})
    finally:
        os.umask(umask)
    back = load_file(target)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert target.stat().st_mode & 0o777 == 0o640
    assert os.umask(umask) == umask


def test_the_same_tensors_and_metadata_are_the_same_bytes(tmp_path):
    """safetensors itself orders metadata anew in every file."""
    tensors = {name: torch.full((3,), float(i)) for i, name in enumerate("dacb")}
    metadata = {f'name {i} ü \n\t\x01" \\': f"größe/{i}\u2028" for i in range(30)}
    for name in ("a", "b"):
        write_tensors(tmp_path / name, tensors, dict(sorted(metadata.items(), reverse=name == "b")))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", framework="pt") as content:
        assert content.metadata() == metadata
        assert all(torch.equal(content.get_tensor(name), tensor) for name, tensor in tensors.items())


def test_a_record_tells_settings_versions_time_and_memory(tmp_path):
    content = records.Record("calibration", {"a": 1}, {"in": "hash"}).finish(tmp_path / "record.json", tokens=3)
    assert content == read_json(tmp_path / "record.json")
    assert (content["room"], content["settings"], content["inputs"], content["tokens"]) == (
        "calibration",
        {"a": 1},
        {"in": "hash"},
        3,
    )
    assert content["versions"]["torch"] == torch.__version__
    assert 0 <= content["seconds"] < 60
    assert content["peak_memory_mb"] > 10


def test_rows_are_found_again_under_the_same_key_alone(tmp_path):
    result = tmp_path / "losses.json"
    records.FinishedRows(result, "key").keep("a", {"0.2": 0.1, "0.4": float("inf")})
    again = records.FinishedRows(result, "key")
    assert again.get("a") == {"0.2": 0.1, "0.4": float("inf")}
    assert again.get("b") is None
    with again.path.open("a") as file:
        file.write('["b", {"0.2": 0.')  # killed while it wrote
    third = records.FinishedRows(result, "key")
    assert third.get("b") is None
    third.keep("b", {})
    assert records.FinishedRows(result, "key").get("b") == {}
    assert records.FinishedRows(result, "other").get("a") is None
    assert records.FinishedRows(result, "key").get("a") is None
    for spoiled in ("", "key\n3\n[1]\n[[], 2]\n"):
        third.path.write_text(spoiled)
        assert records.FinishedRows(result, "key").get("a") is None
    third.remove()
    assert names(tmp_path) == []
