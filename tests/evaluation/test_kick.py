"""LLM-KICK's tasks against a slow scorer of our own, over small data sets with the hub's schemas."""

from __future__ import annotations

import json
import re
import string
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, List, Value, load_dataset
from test_evaluation import DOCUMENTS, MIRROR, byte_tokenizer, needs_mirror, settings, tiny_model

import cospadi
from cospadi.errors import UserError
from cospadi.evaluation import kick, task_names, tasks
from cospadi.evaluation import measure as evaluation
from cospadi.evaluation.kick import functions
from cospadi.settings import CONF, load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TASKS = ["kick_factoid", "kick_triviaqa_closed", "kick_triviaqa_open", "kick_summarization"]
TEXT = Value("string")
# question, aliases, what a model says
ANSWERS = [
    ("Which river runs through Cairo?", ["nile", "river nile"], " The Nile."),
    ("Who painted the Night Watch?", ["rembrandt", "rembrandt van rijn"], " It was Rembrandt van Rijn, I think"),
    ("What is the capital of Peru?", ["lima"], " Quito"),
    ("Which band sang Help!?", ["beatles"], ""),
    ("Which of them is it?", ["the", "!", "that one"], " the"),  # two aliases that normalisation leaves nothing of
    ("Which country has St. Basil's?", ["russia"], " us"),  # part of an alias, but not the answer
    ("What is 7 x 6?", ["42", "forty-two"], " Forty_Two"),
    ("Which sea is dead?", ["dead sea"], " The dead, salt sea"),
    ("Who wrote Emma?", ["jane austen", "austen"], " Jane  ‘Austen’"),
    ("Which metal is liquid?", ["mercury"], " quicksilver, also named mercury"),
    ("Where is the Louvre?", ["paris"], " Comparison"),  # letter by letter, as in LLM-KICK
    ("Who was Ali?", ["cassius clay"], " Clay, Cassius"),
]
SUMMARIES = [
    ("The mayors were running for offices again.", "Mayors run for the office again ."),
    ("Nothing in common here", "Rain fell all night ."),
    ("", "Rain fell all night ."),
    ("rain all fell rain night", "Rain fell all night , and rain fell all day ."),
    ("Rain fell all night .\nThe river rose .", "Rain fell all night .\nThe river rose ."),
]


def write(folder: Path, config: str, split: str, rows: list[dict], features: Features) -> None:
    """A data set as the hub has it: Parquet, and a README that names configurations and splits."""
    folder.mkdir(parents=True)
    path = f"{config}/{split}-00000-of-00001.parquet"
    (folder / config).mkdir()
    Dataset.from_list(rows, features=features).to_parquet(folder / path)
    configs = [{"config_name": config, "data_files": [{"split": split, "path": f"{config}/{split}-*"}]}]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def parse(question: str, aliases: list[str], number: int) -> dict:
    return {
        "Parse-Id": f"FreebaseQA-eval-0.P{number}",
        "PotentialTopicEntityMention": question.split()[-1],
        "TopicEntityName": "topic",
        "TopicEntityMid": "m.0",
        "InferentialChain": "people.person",
        "Answers": [{"AnswersMid": "m.1", "AnswersName": aliases}],
    }


def freebase_rows() -> list[dict]:
    """Records of the authors' file: two parses, the second with one more name."""
    return [
        {
            "Question-ID": f"FreebaseQA-eval-{i}",
            "RawQuestion": question,
            "ProcessedQuestion": question.lower().rstrip("?"),
            "Parses": [parse(question, aliases[:1], 0), parse(question, aliases, 1)],
        }
        for i, (question, aliases, _) in enumerate(ANSWERS)
    ]


def columns(records: list[dict]) -> dict[str, list]:
    return {key: [record[key] for record in records] for key in records[0]}


def hub_freebase_rows() -> list[dict]:
    """The same in the hub's schema, a sequence of records being a record of lists."""
    return [
        row | {"Parses": columns([p | {"Answers": columns(p["Answers"])} for p in row["Parses"]])}
        for row in freebase_rows()
    ]


def texts(*names: str) -> dict[str, Value]:
    return dict.fromkeys(names, TEXT)


def lists(*names: str) -> dict[str, List]:
    return dict.fromkeys(names, List(TEXT))


FREEBASE = Features(
    {
        **texts("Question-ID", "RawQuestion", "ProcessedQuestion"),
        "Parses": {
            **lists("Parse-Id", "PotentialTopicEntityMention", "TopicEntityName", "TopicEntityMid", "InferentialChain"),
            "Answers": List({"AnswersMid": List(TEXT), "AnswersName": List(List(TEXT))}),
        },
    }
)
TRIVIA = Features(
    {
        **texts("question", "question_id", "question_source"),
        "entity_pages": lists("doc_source", "filename", "title", "wiki_context"),
        "search_results": {
            **lists("description", "filename", "title", "url", "search_context"),
            "rank": List(Value("int32")),
        },
        "answer": {
            **lists("aliases", "normalized_aliases"),
            **texts("matched_wiki_entity_name", "normalized_matched_wiki_entity_name"),
            **texts("normalized_value", "type", "value"),
        },
    }
)


def evidence(number: int) -> tuple[list[str], list[str]]:
    """Pages of a question: both kinds, wiki only, web only, none."""
    wiki = [f"Wiki page {number}. " * (number + 1) * 20, "Another wiki page."] if number % 4 in (0, 1) else []
    web = [f"Web page {number}. " * 150, "Another web page."] if number % 4 in (0, 2) else []
    return wiki, web


def trivia_rows() -> list[dict]:
    rows = []
    for i, (question, aliases, _) in enumerate(ANSWERS):
        wiki, web = evidence(i)
        pages = {key: ["x"] * len(wiki) for key in ("doc_source", "filename", "title")} | {"wiki_context": wiki}
        found = {key: ["x"] * len(web) for key in ("description", "filename", "title", "url")}
        rows.append(
            {
                "question": question,
                "question_id": f"tc_{i}",
                "question_source": "http://www.example.com/",
                "entity_pages": pages,
                "search_results": found | {"search_context": web, "rank": list(range(len(web)))},
                "answer": {
                    "aliases": [alias.title() for alias in aliases],
                    "normalized_aliases": aliases,
                    "matched_wiki_entity_name": "",
                    "normalized_matched_wiki_entity_name": "",
                    "normalized_value": aliases[0],
                    "type": "WikipediaEntity",
                    "value": aliases[0].title(),
                },
            }
        )
    return rows


def news_rows() -> list[dict]:
    return [
        {"article": f"Story {i} (CNN) " + "It went on and on. " * (5 + 40 * i), "highlights": highlights, "id": f"{i}"}
        for i, (_, highlights) in enumerate(SUMMARIES)
    ]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write(root / "KelvinJiang" / "freebase_qa", "default", "test", hub_freebase_rows(), FREEBASE)
    write(root / "mandarjoshi" / "trivia_qa", "rc", "validation", trivia_rows(), TRIVIA)
    news = Features({"article": TEXT, "highlights": TEXT, "id": TEXT})
    write(root / "abisee" / "cnn_dailymail", "3.0.0", "test", news_rows(), news)
    return root


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def kick_settings(mirror: Path, **changes):
    defaults = {
        "tasks": TASKS,
        "embedded_tasks": [],
        "mirror": str(mirror),
        "n_windows": 1,
        "max_length": 256,
        "prompts": [],
    }
    return settings(**(defaults | changes))


# A scorer of our own: one step at a time


def naive_words(text: str) -> list[str]:
    text = text.lower()
    for symbol in string.punctuation + "‘’´`":
        text = text.replace(symbol, " ")
    return [word for word in text.split() if word not in ("a", "an", "the")]


def naive_f1(said: list[str], wanted: list[str]) -> float:
    left, common = list(wanted), 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def naive_answer_scores(said: str, aliases: list[str]) -> dict[str, float]:
    words = naive_words(said)
    known = [naive_words(alias) for alias in aliases if naive_words(alias)]
    return {
        "contains": float(any(" ".join(alias) in " ".join(words) for alias in known)),
        "exact_match": float(any(alias == words for alias in known)),
        "f1": max(naive_f1(words, alias) for alias in known),
    }


def longest_common(one: list[str], other: list[str]) -> int:
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + longest_common(one[:-1], other[:-1])
    return max(longest_common(one[:-1], other), longest_common(one, other[:-1]))


def naive_rouge(said: str, wanted: str) -> dict[str, float]:
    from nltk.stem.porter import PorterStemmer

    stem = PorterStemmer().stem

    def words(text: str) -> list[str]:
        return [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]

    def f1(common: int, first: int, second: int) -> float:
        return 2 * common / (first + second) if common else 0.0

    one, other = words(said), words(wanted)
    scores = {"rougeL": f1(longest_common(one, other), len(one), len(other))}
    for n in (1, 2):
        grams = [[tuple(w[i : i + n]) for i in range(len(w) - n + 1)] for w in (one, other)]
        common = sum(min(grams[0].count(gram), grams[1].count(gram)) for gram in set(grams[0]))
        scores[f"rouge{n}"] = f1(common, len(grams[0]), len(grams[1]))
    return scores


# Scores and prompts, with a model that says what it is told to


@pytest.fixture(scope="module")
def scripted(mirror, model, tokenizer):
    """Results and rows of a model that gives ``ANSWERS`` and ``SUMMARIES``, and the prompts it saw."""
    from lm_eval.models.huggingface import HFLM

    prompts: dict[str, list[str]] = {}

    def say(self, requests, disable_tqdm=False):
        prompts[self.title] = [request.args[0] for request in requests]
        script = SUMMARIES if self.title == "kick_summarization" else ANSWERS
        return [(row[0] if script is SUMMARIES else row[2]) for row in script]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFLM, "generate_until", say)
        result, rows = evaluation.evaluate(model, tokenizer, DOCUMENTS, kick_settings(mirror))
    return result, rows, prompts


def mean_and_stderr(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, (variance / len(values)) ** 0.5


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_the_slow_scorer(scripted, task):
    result, rows, _ = scripted
    if task == "kick_summarization":
        expected = [naive_rouge(said, wanted) for said, wanted in SUMMARIES]
    else:
        expected = [naive_answer_scores(said, aliases) for _, aliases, said in ANSWERS]
    assert len(rows[task]) == len(expected) == result["tasks"][task]["n_documents"]
    for row, scores in zip(rows[task], expected, strict=True):
        assert row["metrics"] == pytest.approx(scores)
    for metric in expected[0]:
        value, stderr = mean_and_stderr([scores[metric] for scores in expected])
        found = result["tasks"][task]["all_metrics"][metric]
        assert found["value"] == pytest.approx(value)
        assert found["stderr"] == pytest.approx(stderr)
        assert found["higher_is_better"] is True


def test_what_is_right_and_what_is_not(scripted):
    contained = [row["metrics"]["contains"] for row in scripted[1]["kick_factoid"]]
    exact = [row["metrics"]["exact_match"] for row in scripted[1]["kick_factoid"]]
    assert contained == [1, 1, 0, 0, 0, 0, 1, 0, 1, 1, 1, 0]
    assert exact == [1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0]


def test_prompts_are_these(scripted, mirror):
    prompts = scripted[2]
    assert prompts["kick_factoid"][0] == "Question: Which river runs through Cairo?\nThe answer is"
    assert (
        prompts["kick_triviaqa_closed"][0]
        == "Answer the question.\n\nQuestion: Which river runs through Cairo?\nAnswer:"
    )
    asked = "Answer the question from this text.\n\nQuestion: Which river runs through Cairo?\nAnswer:"
    both = "Wiki page 0. " * 20 + "Web page 0. " * 150
    assert prompts["kick_triviaqa_open"][0] == f"{both}\n\n{asked}"
    assert prompts["kick_triviaqa_open"][1].startswith("Wiki page 1. Wiki page 1. ")
    assert prompts["kick_triviaqa_open"][3].startswith("Answer the question from this text.")  # it has no evidence
    cut = prompts["kick_triviaqa_open"][8].split("\n\n")[0]
    assert len(cut) == 3072
    assert cut == ("Wiki page 8. " * 180 + "Web page 8. " * 150)[:3072]
    assert "Another" not in "".join(prompts["kick_triviaqa_open"])
    article = "Story 0 (CNN) " + "It went on and on. " * 5
    assert prompts["kick_summarization"][0] == (
        f"Article: {article.strip()}\n\nA summary of the article in less than 150 words:"
    )
    assert len(prompts["kick_summarization"][4].split("\n\n")[0].split()) == 401  # "Article:" and 400 words


def test_entries_have_what_tables_show(scripted):
    from cospadi.tables import render

    result, rows, _ = scripted
    assert list(result["tasks"]) == TASKS
    for task, entry in result["tasks"].items():
        assert entry["metric"] == ("rougeL" if task == "kick_summarization" else "contains")
        assert entry["higher_is_better"] is True
        assert entry["in_average"] is False
        assert task in render.TASK_TITLES
        assert entry["metric"].startswith(render._FRACTIONS)  # shown as percent
        assert f"{task} version 1 (own task), 0-shot, {entry['metric']}, greedy, at most " in entry["protocol"]
    assert "at most 142 new tokens, first 400 words of the article, ROUGE F1" in entry["protocol"]
    assert "at most 32 new tokens, first 3072 letters of evidence" in result["tasks"]["kick_triviaqa_open"]["protocol"]
    assert result["average_accuracy"]["value"] is None
    assert rows["kick_factoid"][1]["responses"] == [ANSWERS[1][2]]
    assert rows["kick_factoid"][1]["target"] == ["rembrandt", "rembrandt van rijn"]
    json.dumps([result, rows])


# Generation


def naive_greedy(model, tokenizer, prompt: str, new_tokens: int, max_length: int, stop: str) -> str:
    """One prompt, one token at a time, no cache."""
    ids = tokenizer(prompt)["input_ids"][-(max_length - new_tokens) :]
    written: list[int] = []
    while len(written) < new_tokens:
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        written.append(best)
    return tokenizer.decode(written).split(stop)[0]


def cut_like_the_log(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


@pytest.fixture(scope="module")
def generated(mirror, model, tokenizer):
    return evaluation.evaluate(model, tokenizer, DOCUMENTS, kick_settings(mirror, limit=5))


@pytest.mark.parametrize(("task", "new_tokens", "stop"), [(t, 32, "\n") for t in TASKS[:3]] + [(TASKS[3], 142, "\n\n")])
def test_what_is_written_is_what_slow_greedy_decoding_writes(
    generated, scripted, model, tokenizer, task, new_tokens, stop
):
    result, rows = generated
    prompts = scripted[2][task][:5]
    written = [naive_greedy(model, tokenizer, prompt, new_tokens, 256, stop) for prompt in prompts]
    assert [row["responses"] for row in rows[task]] == [[cut_like_the_log(text)] for text in written]
    assert len(set(written)) > 1
    too_long = sum(len(tokenizer(prompt)["input_ids"]) > 256 - new_tokens for prompt in prompts)
    protocol = result["tasks"][task]["protocol"]
    assert ("requests cut from the left" in protocol) == (too_long > 0)
    if too_long:
        assert f"limit 5, {too_long} requests cut from the left" in protocol


def test_a_second_run_gives_the_same(generated, mirror, model, tokenizer):
    again = evaluation.evaluate(model, byte_tokenizer(), DOCUMENTS, kick_settings(mirror, limit=5))
    assert json.dumps(again) == json.dumps(generated)


def test_progress_has_every_step_and_the_time_left(mirror, model, tokenizer, capsys):
    evaluation.evaluate(model, tokenizer, DOCUMENTS, kick_settings(mirror, tasks=["kick_factoid"]))
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("kick_factoid: 12 requests, "))
    steps = [line for line in lines[start + 1 :] if "left" in line]
    assert [line.split()[0] for line in steps] == [f"{i}/6" for i in range(1, 7)]


def test_a_compressed_model_writes_what_its_own_layers_say(mirror, tokenizer):
    smaller = cospadi.compress(
        tiny_model(),
        tokenizer,
        compression_ratio=0.3,
        method="cospadi",
        texts=DOCUMENTS * 4,
        overrides=["calibration.n_samples=8", "calibration.sample_length=64"],
    )
    result, rows = evaluation.evaluate(
        smaller, tokenizer, DOCUMENTS, kick_settings(mirror, tasks=["kick_factoid"], limit=4)
    )
    prompts = [functions.factoid_prompt(row) for row in freebase_rows()[:4]]
    written = [naive_greedy(smaller, tokenizer, prompt, 32, 256, "\n") for prompt in prompts]
    assert [row["responses"] for row in rows["kick_factoid"]] == [[text] for text in written]
    assert result["tasks"]["kick_factoid"]["n_documents"] == 4


def test_no_room_for_the_prompt_names_the_setting(mirror, model, tokenizer):
    config = kick_settings(mirror, tasks=["kick_summarization"], max_length=142, window=48)
    with pytest.raises(UserError, match=r"kick_summarization writes 142 tokens, and evaluation\.max_length=142 leaves"):
        evaluation.evaluate(model, tokenizer, DOCUMENTS, config)


# Data


def test_missing_data_names_the_data_set(model, tokenizer, tmp_path):
    for task, data in (
        ("kick_factoid", "KelvinJiang/freebase_qa"),
        ("kick_triviaqa_open", "mandarjoshi/trivia_qa"),
        ("kick_summarization", "abisee/cnn_dailymail"),
    ):
        told = rf"task {task} \({data}.*was not found in evaluation\.mirror=.*no folder {data}.*evaluation\.tasks"
        with pytest.raises(UserError, match=told):
            evaluation.evaluate(model, tokenizer, DOCUMENTS, kick_settings(tmp_path, tasks=[task]))


def test_a_hub_out_of_reach_is_one_sentence(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    for task, data in (
        ("kick_factoid", "KelvinJiang/freebase_qa"),
        ("kick_triviaqa_closed", "mandarjoshi/trivia_qa, rc"),
    ):
        with pytest.raises(UserError, match=rf"task {task} \({data}\) was not found on the hub.*evaluation\.mirror"):
            tasks.load_stock(task, None)


def test_the_authors_file_stands_in_for_the_hubs_script(tmp_path, monkeypatch):
    """Without a mirror FreebaseQA comes from the JSON file its hub script read: same questions, same aliases."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "FreebaseQA-eval.json"
    file.write_text(json.dumps({"Dataset": "FreebaseQA-eval", "Version": "1.0", "Questions": freebase_rows()}))
    source = kick.HUB_SOURCES["KelvinJiang/freebase_qa", None]
    assert source["data_files"]["test"].endswith("/FreebaseQA-eval.json")
    replaced = source | {"data_files": {"test": str(file)}}
    monkeypatch.setitem(kick.HUB_SOURCES, ("KelvinJiang/freebase_qa", None), replaced)
    (task,) = tasks.load_stock("kick_factoid", None)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [aliases for _, aliases, _ in ANSWERS]
    assert [doc["RawQuestion"] for doc in task.eval_docs] == [question for question, _, _ in ANSWERS]


def test_one_split_of_triviaqa_is_read_where_the_card_names_three(mirror, tmp_path, monkeypatch):
    """The hub's card, whose other splits are not here: `data_files` keeps them from being fetched."""
    import shutil

    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "trivia_qa"
    shutil.copytree(mirror / "mandarjoshi" / "trivia_qa", folder)
    splits = ("train", "validation", "test")
    card = {
        "dataset_info": [
            {
                "config_name": "rc",
                "features": TRIVIA._to_yaml_list(),
                "splits": [{"name": split, "num_bytes": 9, "num_examples": 17944} for split in splits],
            }
        ],
        "configs": [
            {"config_name": "rc", "data_files": [{"split": split, "path": f"rc/{split}-*"} for split in splits]}
        ],
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    shutil.copy(folder / "rc" / "validation-00000-of-00001.parquet", folder / "rc" / "train-00000-of-00001.parquet")
    (folder / "rc" / "test-00000-of-00001.parquet").write_bytes(b"not to be opened")
    found = load_dataset(**(kick.HUB_SOURCES["mandarjoshi/trivia_qa", "rc"] | {"path": str(folder)}))
    assert list(found) == ["validation"]
    assert found["validation"]["question"] == [question for question, _, _ in ANSWERS]


def test_the_wheel_holds_the_task_files():
    """hatch packs what lies in the package, unless git ignores it or a setting leaves it out."""
    files = sorted(path.relative_to(ROOT).as_posix() for path in task_names.KICK.glob("*.yaml"))
    assert [Path(file).stem for file in files] == sorted(["_question", *TASKS])
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["packages"] == ["cospadi", "snakemake_logger_plugin_cospadi"]
    assert not {"exclude", "only-include", "include"} & (build.keys() | build["targets"]["wheel"].keys())
    ignored = subprocess.run(["git", "check-ignore", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout == ""


# Settings


def test_a_task_name_close_to_ours_is_told(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(task_names, "stock_manager", lambda: SimpleNamespace(all_tasks=["arc_easy", "mmlu"]))
    task_names.check_tasks(settings(tasks=TASKS))
    with pytest.raises(UserError, match=r"no task kick_factoids\. Did you mean kick_factoid"):
        task_names.check_tasks(settings(tasks=["kick_factoids"]))


def test_the_study_asks_for_every_task():
    config = load(["study=kick"])
    assert config.evaluation.name == "kick"
    assert config.evaluation.tasks == [*TASKS, "mmlu"]
    assert {0.25, 0.3} <= set(config.study.compression_ratios)
    assert (CONF / "evaluation" / "kick.yaml").is_file()


def test_the_study_can_be_planned(tmp_path):
    command = [sys.executable, "-m", "snakemake", "--directory", str(tmp_path), "--cores", "2", "-n"]
    ours = f"overrides=evaluation.tasks=[{','.join(TASKS)}]"  # looking for mmlu, a group, reads lm-eval's index: 15 s
    run = subprocess.run(
        [*command, "--config", "study=kick", ours], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "tabulate" in run.stdout


@needs_mirror
def test_mmlu_alone_makes_the_average(mirror, model, tokenizer, tmp_path, monkeypatch):
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"  # the whole index takes 15 s
    manager = TaskManager(include_defaults=False, include_path=folder)
    monkeypatch.setattr(task_names, "stock_manager", lambda: manager)
    for source in (mirror / "KelvinJiang", MIRROR / "cais"):
        (tmp_path / source.name).symlink_to(source)
    config = kick_settings(tmp_path, tasks=["kick_factoid", "mmlu"], limit=1, max_length=1024, batch_size=8)
    result, rows = evaluation.evaluate(model, tokenizer, DOCUMENTS, config)
    assert result["average_accuracy"]["tasks"] == ["mmlu"]
    assert result["tasks"]["mmlu"]["metric"] == "acc"
    assert result["tasks"]["mmlu"]["n_documents"] == 57
    assert len(rows) == 58
