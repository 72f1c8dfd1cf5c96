"""Settings: every file composes, every bound holds, every message is one line that names the setting."""

import shutil
from pathlib import Path

import pytest

from cospadi import settings as config
from cospadi.errors import UserError
from cospadi.settings import CONF, load

FILES = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml"))
TEXTS = [path.stem for path in FILES if path.parent.name == "text"]
ON_CELL = {"text": "text@calibration.text"}
SHA256 = "0" * 64


def message(*overrides: str) -> str:
    """What a person reads; one line, always."""
    with pytest.raises(UserError) as caught:
        load(overrides)
    told = str(caught.value)
    assert "\n" not in told
    assert "_schema" not in told
    assert "pkg://" not in told
    assert "$" not in told
    return told


@pytest.fixture
def conf(tmp_path, monkeypatch) -> Path:
    """A copy of ``conf/`` that a test may spoil."""
    copy = tmp_path / "conf"
    shutil.copytree(CONF, copy)
    monkeypatch.setattr(config, "CONF", copy)
    return copy


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_file_composes_under_its_own_name(file):
    group, option = file.parent.name, file.stem
    composed = load([f"{ON_CELL.get(group, group)}={option}"])
    section = composed.calibration.text if group == "text" else getattr(composed, group)
    assert section.name == option
    assert section is not None


def test_what_was_composed_before_hides_no_change(conf):
    """Neither one of a file, nor one that somebody made to the settings that were returned."""
    before = load(["factorization=cospadi"])
    before.factorization.seed = 7
    before.study.methods.append("nothing")
    again = load(["factorization=cospadi"])
    assert again.factorization.seed == 42
    assert "nothing" not in again.study.methods
    append(conf / "factorization" / "cospadi.yaml", "seed: 8")
    assert load(["factorization=cospadi"]).factorization.seed == 8


def test_texts_on_disk_travel_with_the_settings():
    """A wheel holds ``conf/``, and nothing of ``tests/``."""
    sources = {
        name: load([f"text@calibration.text={name}"]).calibration.text.source for name in TEXTS if name != "file"
    }
    on_disk = {name: Path(source) for name, source in sources.items() if Path(source).is_absolute()}
    assert set(on_disk) == {"smoke_calibration", "smoke_evaluation"}
    assert all(path.is_file() and path.is_relative_to(CONF) for path in on_disk.values())


def test_there_is_a_file_for_every_room():
    assert {file.parent.name for file in FILES} == {
        "text",
        "model",
        "calibration",
        "factorization",
        "quantization",
        "evaluation",
        "study",
        "tracking",
    }


def test_values_of_the_command_line_win():
    assert load(["factorization=cospadi", "factorization.rho=2.5"]).factorization.rho == 2.5


@pytest.mark.parametrize(
    ("override", "named", "meant"),
    [
        ("factorization.rhoo=3", "factorization.rhoo", "rho"),
        ("+factorization.rhoo=3", "factorization.rhoo", "rho"),
        ("++calibration.n_sample=3", "calibration.n_sample", "n_samples"),
        ("evaluation.windw=3", "evaluation.windw", "window"),
        ("calibration.text.parserr=lines", "calibration.text.parserr", "parser"),
        ("modell.title=x", "modell", "model"),
        ("+modell.title=x", "modell", "model"),
        ("compression_ratio=0.3", "compression_ratio", "factorization.compression_ratio"),
        ("+n_samples=3", "n_samples", "calibration.n_samples"),
        ("rho=3", "rho", "factorization.rho"),
    ],
)
def test_a_misspelt_key_is_refused_by_name(override, named, meant):
    told = message(override)
    assert told.startswith(f"{named} is not a setting.")
    assert f"Did you mean {meant}?" in told


@pytest.mark.parametrize(
    ("file", "line", "named"),
    [
        ("factorization/cospadi_plus.yaml", "rhoo: 3", "factorization.rhoo"),
        ("calibration/news.yaml", "n_sample: 3", "calibration.n_sample"),
        ("evaluation/embedded.yaml", "windw: 3", "evaluation.windw"),
        ("text/lee_news.yaml", "tittle: x", "calibration.text.tittle"),
        ("model/smollm2_135m.yaml", "tittle: x", "model.tittle"),
        ("study/default.yaml", "  method: [svd]", "study.method"),
        ("config.yaml", "modell: x", "modell"),
    ],
)
def test_a_misspelt_key_in_a_file_is_refused_with_the_file(conf, file, line, named):
    append(conf / file, line)
    told = message()
    assert told.startswith(f"{conf / file}: {named} is not a setting.")


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("factorization/cospadi_plus.yaml", "rho: [3", "cospadi_plus.yaml"),
        ("factorization/cospadi_outputs.yaml", "cg_steps: 4", "cospadi_outputs.yaml"),  # a second time
        ("factorization/cospadi_plus.yaml", "tolerance: abc", "factorization.tolerance"),
        ("model/smollm2_135m.yaml", "dtype: int8", "model.dtype=int8"),
    ],
)
def test_a_bad_file_is_named(conf, file, content, named):
    append(conf / file, content)
    assert named in message()


def test_a_study_file_gives_a_method_ratios_of_its_own(conf):
    append(conf / "study/default.yaml", "  ratios_of:\n    svd: [0.4, 0.25]")
    assert load(["study=default"]).study.ratios_of == {"svd": [0.4, 0.25]}


@pytest.mark.parametrize("group", ["calibration", "evaluation", "factorization", "model", "quantization", "study"])
def test_an_unknown_option_lists_those_that_exist(group):
    told = message(f"{group}=nope")
    assert told.startswith(f"{group}=nope does not exist.")
    for file in FILES:
        assert file.parent.name != group or file.stem in told


@pytest.mark.parametrize("ratio", ["0", "1", "20", "-0.1", "nan"])
def test_a_ratio_is_a_fraction_removed(ratio):
    told = message(f"factorization.compression_ratio={ratio}")
    assert told == (
        f"factorization.compression_ratio={float(ratio):g} is not between 0 and 1. "
        "It is the fraction of bits removed: to keep 80 % of them, set 0.2."
    )


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("model.dtype", "int8"),
        ("model.n_layers", 0),
        ("calibration.n_samples", 0),
        ("calibration.sample_length", 1),
        ("calibration.batch_size", 0),
        ("calibration.damping", -1e-9),
        ("calibration.damping", "nan"),
        ("calibration.damping", "inf"),
        ("calibration.gram_dtype", "float16"),
        ("calibration.device", "gpu"),
        ("calibration.text.parser", "csv"),
        ("calibration.text.max_documents", 0),
        ("evaluation.window", 1),
        ("evaluation.max_length", 1),
        ("evaluation.n_windows", 0),
        ("evaluation.limit", 0),
        ("evaluation.batch_size", 0),
        ("evaluation.threads", 0),
        ("evaluation.n_perplexity_documents", 0),
        ("evaluation.n_cloze_documents", 0),
        ("evaluation.document_words", 0),
        ("evaluation.cloze_words", 2),
        ("evaluation.device", "tpu"),
        ("study.layers_per_job", 0),
        ("study.models", []),
        ("study.methods", []),
        ("study.compression_ratios", []),
        ("study.methods", ["svd", "svd"]),
        ("factorization.accounting", "free"),
        ("factorization.storage_dtype", "float32"),
        ("factorization.device", "gpu"),
        ("factorization.solver", "omp"),
        ("factorization.rho", 0.5),
        ("factorization.rho", "inf"),
        ("factorization.n_rounds", 0),
        ("factorization.power_iterations", 0),
        ("factorization.cg_steps", 0),
        ("factorization.tolerance", -1),
        ("factorization.step", -1),
    ],
)
def test_every_bound_names_its_setting(setting, bad):
    value = f"[{','.join(bad)}]" if isinstance(bad, list) else bad
    assert message(f"{setting}={value}").startswith(setting.replace("calibration.text", "text"))


@pytest.mark.parametrize(
    ("method", "setting", "bad"),
    [
        ("asvd", "factorization.alpha", -1),
        ("asvd_search", "factorization.rank_search.truncation_ratios", "[0.5,1]"),
        ("asvd_search", "factorization.rank_search.truncation_ratios", "[]"),
        ("asvd_search", "factorization.rank_search.n_samples", 0),
        ("asvd_search", "factorization.rank_search.perplexity_budget", 0.5),
        ("wanda", "factorization.pattern", "4:2"),
        ("sparsegpt", "factorization.pattern", "many"),
        ("sparsegpt", "factorization.block_size", 0),
        ("sparsegpt", "factorization.damping", -1),
        ("oats", "factorization.rank_ratio", 1),
        ("oats", "factorization.n_rounds", 0),
    ],
)
def test_every_bound_of_another_method_names_its_setting(method, setting, bad):
    assert setting in message(f"factorization={method}", f"{setting}={bad}")


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices_that_exist_somewhere_are_taken(device):
    assert load([f"factorization.device={device}"]).factorization.device == device


@pytest.mark.parametrize("sha256", ["''", "abc"])
@pytest.mark.parametrize("section", ["model", "calibration.text", "evaluation.text"])
def test_a_wheel_needs_its_sha256(section, sha256):
    source = f"{section}.source='wheel:a==1/b.txt'"
    told = message(source, f"{section}.sha256={sha256}")
    assert f"{section.split('.')[-1]}.sha256 of wheel:a==1/b.txt is missing" in told
    assert load([source, f"{section}.sha256='{SHA256}'"])


@pytest.mark.parametrize(
    "override",
    [
        "factorization.rho=abc",
        "factorization.rho=null",
        "factorization.rho=???",
        "calibration.n_samples=1.5",
        "calibration.text=lee_news",
        "model.shared_inputs=3",
        "rubbish",
        "model.title=[1",
        "~factorization.rho",
    ],
)
def test_a_value_of_the_wrong_kind_is_named(override):
    told = message(override)
    assert override.strip("~").split("=")[0] in told
    assert "Correct the setting" in told or "Write key=value" in told
    assert len(told) < 300


def test_a_wrong_value_is_shown():
    assert "'abc'" in message("factorization.rho=abc")


@pytest.mark.parametrize(("old", "new"), [("cospadi_orthogonal", "compot"), ("cospadi_one_shot", "rocket")])
def test_a_renamed_method_is_refused_with_its_new_name(old, new):
    with pytest.raises(UserError, match=f"factorization={old} is called {new} now. Set factorization={new}"):
        load([f"factorization={old}"])
    assert load([f"factorization={new}"]).factorization.name == new


@pytest.mark.parametrize("override", ["quantization=8", "model=135", "factorization=3", "text@calibration.text=2"])
def test_a_number_where_a_name_is_wanted_is_a_name_that_does_not_exist(override):
    told = message(override)
    assert override in told.replace("text=2", "text@calibration.text=2")
    assert "does not exist" in told
