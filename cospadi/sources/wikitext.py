"""Wikipedia articles out of a MediaWiki XML export, as plain prose.

``wikitextparser`` finds the structures (templates, links, tables, tags); what is left is decided line by line.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from io import BufferedIOBase
from typing import Any
from xml.etree.ElementTree import Element, iterparse

MIN_WORDS = 100
"""Shorter articles are disambiguation pages and stubs."""
MIN_PARAGRAPH_WORDS = 6
"""Shorter lines are entries of lists, not prose."""
_NOT_PROSE = re.compile(r"\s*:?\s*(file|image|media|category|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)
_HOLE = "\ufffc"
"""Stands where a formula was: without it the sentence is broken, so its paragraph is dropped."""
_FORMULA_TAGS = frozenset(("math", "chem", "ce", "score", "hiero"))
_DROPPED_TAGS = frozenset(
    [
        "ref",
        "references",
        "gallery",
        "timeline",
        "imagemap",
        "syntaxhighlight",
        "source",
        "pre",
        "templatestyles",
        "section",
        "noinclude",
        "includeonly",
        "graph",
        "mapframe",
        "maplink",
        "inputbox",
    ]
)
_DROPPED_SECTIONS = frozenset(
    [
        "references",
        "external links",
        "see also",
        "notes",
        "further reading",
        "bibliography",
        "footnotes",
        "citations",
        "sources",
        "bibliographies",
        "etymological bibliography",
        "suggested reading",
        "additional reading",
        "resources",
        "notes and references",
        "references and notes",
        "general references",
        "works cited",
        "publications",
        "selected bibliography",
        "discography",
        "filmography",
        "gallery",
        "links",
        "literature",
        "primary sources",
        "secondary sources",
        "in-line references",
    ]
)
# Templates that stand for words of a sentence: which of their unnamed arguments to keep.
_WORDS: dict[str, slice] = {
    **dict.fromkeys(("convert", "cvt"), slice(0, 2)),
    **dict.fromkeys(("lang", "transl"), slice(1, None)),
    **dict.fromkeys(("nowrap", "small", "quote", "blockquote", "nobold", "abbr", "val", "smallcaps"), slice(0, 1)),
    **dict.fromkeys(("ipa", "ipaslink", "ipablink", "angbr", "unicode", "nihongo"), slice(0, 1)),
}
_HEADING = re.compile(r"(={1,6})\s*(.*?)\s*\1")
_LIST_MARK = tuple("*#:;")
_SENTENCE_ENDS = (".", "!", "?", '."', ".”", ".)", ".'")
_LEFT_OVER = re.compile(_HOLE + r"|\[\[|\]\]|\{\{|\}\}|\{\||\|\}|\|\||^[|!]|\bthumb\|")
_REPAIRS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\[?\b(?:https?|ftp)://[^\s\]]*\]?", ""),
        (r"</?[a-zA-Z!][^<>]*>", ""),
        (r"__[A-Z]{3,}__", ""),
        (r"'{2,}", ""),
        # What a removed template leaves behind: "Anarchism (, ; born 1950)".
        (r"\(\s*[,;:]?(?:\s*[,;:])*\s*", "("),
        (r"(?:\s*[,;:])*\s*\)", ")"),
        (r"\(\)", ""),
        (r"\s+([,;:?!)])(?=\s|$)", r"\1"),
        (r"(?<!\.)\s+\.(?=\s|$)(?!\s\.)", "."),
        (r"([,;:])(?:\s*[,;:])+(?=\s|$)", r"\1"),
        (r"\s+", " "),
    )
)


def articles(stream: BufferedIOBase) -> Iterator[str]:
    """The prose of each article of at least ``MIN_WORDS`` words: pages of namespace 0 that are not redirects.

    Raises:
        xml.etree.ElementTree.ParseError: when the export is cut off or is not XML.
    """
    root: Element | None = None
    for event, element in iterparse(stream, events=("start", "end")):
        root = element if root is None else root
        if event == "start" or _local_name(element) != "page":
            continue
        if element.findtext("{*}ns", "0") == "0" and element.find("{*}redirect") is None:
            article = prose(element.findtext("{*}revision/{*}text") or "")
            if len(article.split()) >= MIN_WORDS:
                yield article
        root.clear()  # pages that are done would otherwise pile up in memory


def _local_name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def prose(wikitext: str) -> str:
    """The sentences of an article, a paragraph a line; headings, lists of names, tables and references are dropped.

    >>> prose("The '''cat''' is a [[Felidae|small animal]] of prey.<ref>x</ref>\\n== See also ==\\n* [[Dog]] and others")
    'The cat is a small animal of prey.'
    """
    paragraphs = (_paragraph(block) for block in _blocks(_without_structures(wikitext)))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs (lines that are not parted by a blank one) and entries of lists, without the dropped sections."""
    dropped_level = 0  # of the heading whose section is being dropped; 0: none is
    open_lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        line = line.strip()
        heading = _HEADING.fullmatch(line)
        if not line or heading or line.startswith(_LIST_MARK):
            yield " ".join(open_lines)
            open_lines = []
        if heading is None:
            if not dropped_level and line.startswith(_LIST_MARK):
                yield line
            elif not dropped_level and line:
                open_lines.append(line)
            continue
        level = len(heading[1])
        if not dropped_level or level <= dropped_level:
            dropped_level = level if heading[2].strip(" '").lower() in _DROPPED_SECTIONS else 0


def _without_structures(wikitext: str) -> str:
    """Templates, tables, media and tags removed; links and quotes replaced by their text."""
    import wikitextparser

    parsed = wikitextparser.parse(re.sub(r"<br\s*/?>", " ", wikitext, flags=re.IGNORECASE))
    for link in reversed(parsed.wikilinks):  # from the last: a caption's links go before the picture that holds them
        if _NOT_PROSE.match(link.title):
            link.string = ""
    for tag in reversed(parsed.get_tags()):
        if tag.name.lower() in _DROPPED_TAGS:
            tag.string = ""
        elif tag.name.lower() in _FORMULA_TAGS:
            tag.string = _HOLE
        elif tag.name.lower() == "sup" and re.match(r"[-−\d]", tag.contents):
            tag.string = f"^{tag.contents}"  # 10^3 is not 103
    parsed = wikitextparser.parse(parsed.string)  # spans of what was replaced above are stale
    return parsed.plain_text(replace_templates=_template_words, replace_tables=lambda table: "")


def _template_words(template: Any) -> str:
    kept = _WORDS.get(template.normal_name(capitalize=False).lower())
    if kept is None:
        return ""
    unnamed = [argument.value.strip() for argument in template.arguments if argument.positional]
    return " ".join(unnamed[kept])


def _paragraph(block: str) -> str:
    """``block`` without marks of lists and rests of markup; empty when it is not prose."""
    if _LEFT_OVER.search(block):
        return ""
    text = html.unescape(html.unescape(block)).lstrip("*#:; \t\xa0")
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    text = text.strip().lstrip("*#:;,|! ")
    entry = block.startswith(_LIST_MARK)
    if len(text.split()) < MIN_PARAGRAPH_WORDS or (entry and not text.endswith(_SENTENCE_ENDS)):
        return ""  # an entry that is not a sentence is a name, a link or a number
    return text
