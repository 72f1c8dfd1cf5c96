"""Passages of the held-out text for the two embedded tasks: deterministic, and disjoint from each other."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cospadi.errors import UserError

_WORD = re.compile(r"\S+")
_LEAST_LETTERS = 3


def perplexity_documents(documents: Sequence[str], n_documents: int, document_words: int) -> list[str]:
    """The first ``n_documents`` non-empty documents, each cut at the end of its ``document_words``-th word.

    Raises:
        UserError: when there are fewer documents.

    >>> perplexity_documents(["one two  three", " ", "four"], 2, document_words=2)
    ['one two', 'four']
    """
    documents = [d for d in documents if d.strip()]
    if len(documents) < n_documents:
        raise UserError(
            f"evaluation.n_perplexity_documents={n_documents}, but the evaluation text has {len(documents)} documents. "
            f"Set it to {len(documents)} or less, or give a longer evaluation.text."
        )
    return [_split(document, document_words)[0] for document in documents[:n_documents]]


def cloze_passages(
    documents: Sequence[str], n_passages: int, cloze_words: int, skip_documents: int, skip_words: int
) -> list[dict[str, str]]:
    """Passages of ``cloze_words`` words whose last word is to be predicted, as in LAMBADA (arXiv:1606.06031).

    The last word is alphabetic, has three letters or more and follows a single space. Passages do not overlap, are evenly
    spread over the text, and leave out the first ``skip_words`` words of the first ``skip_documents`` documents, which
    belong to ``heldout_perplexity``. Each has ``context`` and ``target`` (a space and the word).

    Raises:
        UserError: when the text is too short.

    >>> cloze_passages(["skipped words. The cat sat on the mat"], 1, 3, skip_documents=1, skip_words=2)
    [{'context': 'The cat', 'target': ' sat'}]
    """
    documents = [d for d in documents if d.strip()]
    parts = [_split(d, skip_words)[1] for d in documents[:skip_documents]] + documents[skip_documents:]
    passages = [passage for part in parts for passage in _passages(part, cloze_words)]
    if len(passages) < n_passages:
        raise UserError(
            f"evaluation.n_cloze_documents={n_passages}, but the evaluation text has room for {len(passages)} passages of "
            f"evaluation.cloze_words={cloze_words} words besides the documents of heldout_perplexity. "
            "Lower one of the two, or give a longer evaluation.text."
        )
    return [passages[index * len(passages) // n_passages] for index in range(n_passages)]


def _split(document: str, words: int) -> tuple[str, str]:
    """The text up to the end of its ``words``-th word, and the rest."""
    ends = [match.end() for _, match in zip(range(words), _WORD.finditer(document), strict=False)]
    return document[: ends[-1]], document[ends[-1] :]


def _passages(text: str, words: int) -> list[dict[str, str]]:
    spans = [match.span() for match in _WORD.finditer(text)]
    passages = []
    first = 0
    while first + words <= len(spans):
        start = spans[first][0]
        word_start, end = spans[first + words - 1]
        word = text[word_start:end]
        before_word = spans[first + words - 2][1]
        if word.isalpha() and len(word) >= _LEAST_LETTERS and text[before_word:word_start] == " ":
            passages.append({"context": text[start:before_word], "target": f" {word}"})
            first += words
        else:
            first += 1
    return passages
