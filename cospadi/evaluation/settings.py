"""Settings of the evaluation: windows, tasks, prompts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import MISSING

from cospadi.errors import require, require_at_least, require_device, require_one_of
from cospadi.sources.settings import TextConfig

EMBEDDED_TASKS = ("heldout_perplexity", "heldout_cloze")


@dataclass
class EvaluationConfig:
    """What is measured on the dense and on every compressed model."""

    name: str = MISSING
    text: TextConfig = MISSING
    """Held-out text of token perplexity, KL divergence, top-1 agreement and the two embedded tasks."""
    second_text: TextConfig | None = None
    """A further held-out text, for its token perplexity alone (``c4_validation`` beside ``wikitext2``)."""
    window: int = 1024
    """Tokens of a perplexity window; windows do not overlap."""
    n_windows: int | None = None
    """Use only the first windows; ``null``: all of the text."""
    tasks: list[str] = field(default_factory=list)
    """Stock lm-eval tasks (``arc_easy``, ``piqa``, ``wikitext`` …)."""
    embedded_tasks: list[str] = field(default_factory=lambda: ["heldout_perplexity", "heldout_cloze"])
    """The project's own lm-eval tasks over ``text``."""
    n_perplexity_documents: int = 10
    """Documents of ``heldout_perplexity``."""
    n_cloze_documents: int = 100
    """Passages of ``heldout_cloze``."""
    document_words: int = 300
    """A ``heldout_perplexity`` document is cut after so many words."""
    cloze_words: int = 40
    """Words of a ``heldout_cloze`` passage, the last of which is to be predicted."""
    prompts: list[str] = field(
        default_factory=lambda: [
            "The capital of France is",
            "To bake bread, you need",
            "Once upon a time, a king",
        ]
    )
    """What every model continues, greedily, to be read side by side in the report; ``[]``: nothing."""
    continuation_tokens: int = 40
    """Longest continuation of a prompt."""
    mirror: str | None = None
    """Folder laid out like hub data sets (``<owner>/<name>``); ``null``: the hub."""
    leave_out_missing: bool = False
    """Leave out the tasks whose data is not in ``mirror``, and say so in every table, instead of refusing to start. A hub that
    cannot be reached is an error all the same."""
    limit: int | None = None
    """Documents per stock task; ``null``: all."""
    batch_size: int = 4
    max_length: int = 1024
    """Longest context given to the model."""
    threads: int = 1
    """CPU threads of one evaluation, whatever ``--cores`` says: other counts change the last digits."""
    device: str = "auto"
    revision: int = 2

    def __post_init__(self) -> None:
        for setting in ("window", "max_length"):
            require_at_least(f"evaluation.{setting}", getattr(self, setting), 2)
        for setting in ("n_windows", "limit", "batch_size", "threads", "n_perplexity_documents", "n_cloze_documents"):
            require_at_least(f"evaluation.{setting}", getattr(self, setting), 1)
        require_at_least("evaluation.document_words", self.document_words, 1)
        require_at_least("evaluation.cloze_words", self.cloze_words, 3)
        require_at_least("evaluation.continuation_tokens", self.continuation_tokens, 1)
        require("" not in map(str.strip, self.prompts), "evaluation.prompts has an empty prompt. Write a few words.")
        for task in self.embedded_tasks:
            require_one_of("evaluation.embedded_tasks", task, EMBEDDED_TASKS)
        require_device("evaluation.device", self.device)
        self._use_mirror()

    def _use_mirror(self) -> None:
        """Read texts from the mirror too, when they are data sets that are there."""
        if self.mirror is None:
            return
        folder = Path(self.mirror).expanduser().absolute()
        require(
            folder.is_dir(),
            f"evaluation.mirror={self.mirror} is not a folder. It holds data sets as <owner>/<name>.",
        )
        self.mirror = str(folder)
        self.text = _in_mirror(self.text, folder)
        if self.second_text is not None:
            self.second_text = _in_mirror(self.second_text, folder)

    @property
    def texts(self) -> list[TextConfig]:
        """``text`` and, where there is one, ``second_text``."""
        return [self.text] if self.second_text is None else [self.text, self.second_text]


def _in_mirror(text: TextConfig, folder: Path) -> TextConfig:
    lies_there = text.parser == "dataset" and (folder / text.source).is_dir()
    return replace(text, source=str(folder / text.source)) if lies_there else text
