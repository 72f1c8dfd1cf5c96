"""What the YAML files beside this call: prompts, aliases, scores."""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

EVIDENCE_LETTERS = 3072
ARTICLE_WORDS = 400
_PUNCTUATION = str.maketrans(dict.fromkeys(f"{string.punctuation}‘’´`", " "))  # the underscore is among them


def normalized(text: str) -> str:
    """As TriviaQA's official script has it.

    >>> normalized("The  Rolling_Stones' “Aftermath”, an LP!")
    'rolling stones “aftermath” lp'
    """
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split())


def factoid_prompt(doc: dict[str, Any]) -> str:
    return f"Question: {doc['RawQuestion']}\nThe answer is"


def closed_prompt(doc: dict[str, Any]) -> str:
    return f"Answer the question.\n\nQuestion: {doc['question']}\nAnswer:"


def open_prompt(doc: dict[str, Any]) -> str:
    return f"{evidence(doc)}\n\nAnswer the question from this text.\n\nQuestion: {doc['question']}\nAnswer:".lstrip()


def summary_prompt(doc: dict[str, Any]) -> str:
    words = " ".join(doc["article"].split()[:ARTICLE_WORDS])
    return f"Article: {words}\n\nA summary of the article in less than 150 words:"


def evidence(doc: dict[str, Any]) -> str:
    """The first wiki page and the first web page of a question, one after the other, cut from the right."""
    pages = [*doc["entity_pages"]["wiki_context"][:1], *doc["search_results"]["search_context"][:1]]
    return "".join(pages)[:EVIDENCE_LETTERS]


def factoid_aliases(doc: dict[str, Any]) -> list[str]:
    """Names of the answers of every parse, each once.

    Rows of the authors' file are lists of records, rows in the hub's schema records of lists: the names are looked for in both.
    """
    return list(dict.fromkeys(_under("AnswersName", doc["Parses"])))


def trivia_aliases(doc: dict[str, Any]) -> list[str]:
    return list(doc["answer"]["normalized_aliases"])


def score_factoid(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return score_answer(results[0], factoid_aliases(doc))


def score_trivia(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    return score_answer(results[0], trivia_aliases(doc))


def score_answer(answer: str, aliases: Sequence[str]) -> dict[str, float]:
    """Whether an alias occurs in ``answer``, whether one is all of it, and the best token F1.

    >>> score_answer(" It was the GoldenEye.", ["goldeneye", "golden eye"])
    {'contains': 1.0, 'exact_match': 0.0, 'f1': 0.5}
    """
    said = normalized(answer)
    answers = [name for alias in aliases if (name := normalized(alias))]  # nothing is part of everything
    return {
        "contains": float(any(name in said for name in answers)),
        "exact_match": float(said in answers),
        "f1": max((_token_f1(said.split(), name.split()) for name in answers), default=0.0),
    }


def score_summary(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-L, -1 and -2 against the highlights, words stemmed."""
    scores = _rouge().score(doc["highlights"], results[0])
    return {name: float(scores[name].fmeasure) for name in ("rougeL", "rouge1", "rouge2")}


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _token_f1(said: list[str], answer: list[str]) -> float:
    common = (Counter(said) & Counter(answer)).total()
    return 2 * common / (len(said) + len(answer)) if common else 0.0


def _under(key: str, value: Any, inside: bool = False) -> Iterator[str]:
    """Every text under ``key``, however deep."""
    if isinstance(value, str):
        if inside:
            yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _under(key, part, inside or name == key)
    elif isinstance(value, list):
        for part in value:
            yield from _under(key, part, inside)
