"""Every family of the documentation, tiny and random: compressed, loaded, saved again and densified, with equal logits."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import cospadi
from cospadi.api import compress_to
from cospadi.checkpoint.linear import CompressedLinear
from cospadi.checkpoint.write import densify
from cospadi.errors import UserError
from cospadi.sources.checkpoints import prepare_model
from cospadi.sources.families import FAMILIES
from cospadi.sources.settings import ModelConfig

pytestmark = pytest.mark.slow

DOCUMENTED = Path(__file__).parents[2] / "docs" / "own-model.md"
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
LLAMA = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
WIDE = LLAMA | {"head_dim": 16}
TINY = {
    "bloom": {"hidden_size": 64, "n_head": 4},
    "codegen": {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 4, "multi_query": True},
    "falcon_h1": LLAMA | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "window_size": 8},
    "gptj": {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "helium": WIDE,
    "hunyuan_v1_dense": WIDE,
    "minicpm3": LLAMA
    | {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16}
    | {"qk_rope_head_dim": 8, "v_head_dim": 16},
    "ministral": WIDE,
    "mpt": {"d_model": 64, "n_heads": 4, "max_seq_len": 128},
    "opt": SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": SIZES | {"intermediate_size": 96},
    "xglm": {"d_model": 64, "attention_heads": 4, "ffn_dim": 96, "pad_token_id": 0, "max_position_embeddings": 128},
}
"""Sizes of the families whose config has other fields than Llama's."""
TINY["gpt_neo"]["attention_types"] = [[["global", "local"], 1]]
DEFAULT_NAMES = (
    *(
        "llama",
        "qwen2",
        "qwen3",
        "mistral",
        "ministral",
        "ministral3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo",
        "olmo2",
    ),
    *("olmo3", "smollm3", "granite", "stablelm", "cohere", "cohere2", "exaone4", "ernie4_5", "seed_oss", "helium"),
    *("hunyuan_v1_dense", "diffllama", "doge", "bitnet", "cwm", "vaultgemma", "hyperclovax"),
)
"""Families with Llama's names, which need no row of the table."""
ALL = sorted({*DEFAULT_NAMES, *FAMILIES})
SETTINGS = ["calibration.n_samples=8", "calibration.sample_length=32", "calibration.damping=1e-3"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("A line is a document, and this one is repeated.\n" * 60)
    return str(file)


@pytest.mark.parametrize("family", ALL)
def test_a_family_goes_all_the_way(family, tmp_path, text):
    sizes = TINY.get(family, LLAMA | ({"num_key_value_heads": 4} if family == "vaultgemma" else {}))
    model = ModelConfig(
        name=family, title=family, source=f"random:{family}", architecture={"vocab_size": 257, **sizes}, n_layers=2
    )
    prepare_model(model, tmp_path / "dense")
    compress_to(str(tmp_path / "dense"), tmp_path / "out", ["factorization=cospadi_plus", *SETTINGS], text)
    compressed = cospadi.load(tmp_path / "out")
    layers = [name for name, layer in compressed.named_modules() if isinstance(layer, CompressedLinear)]
    assert len(layers) % 2 == 0
    assert len(layers) >= 2 * 4

    ids = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = compressed(ids).logits
    compressed.save_pretrained(tmp_path / "again")
    densify(tmp_path / "out", tmp_path / "flat", dtype="float32")
    with torch.no_grad():
        assert torch.equal(cospadi.load(tmp_path / "again")(ids).logits, logits)
        flat = AutoModelForCausalLM.from_pretrained(tmp_path / "flat").eval()(ids).logits
    torch.testing.assert_close(flat, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))
    assert compressed.generate(ids[:1], max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]


def test_the_families_are_those_of_the_documentation():
    listed = re.search(r"<!-- families -->\n(.*?)\n<!-- end -->", DOCUMENTED.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert sorted(re.findall(r"`(\w+)`", listed)) == ALL
    assert len(ALL) >= 45


def test_an_unknown_family_gets_a_line_that_works(tmp_path, text, monkeypatch):
    """The options of the refusal, pasted."""
    model = ModelConfig(name="o", title="o", source="random:opt", architecture=TINY["opt"], n_layers=2)
    prepare_model(model, tmp_path / "dense")
    monkeypatch.delitem(FAMILIES, "opt")
    with pytest.raises(UserError, match="model_type opt") as refused:
        compress_to(str(tmp_path / "dense"), tmp_path / "out", ["factorization=svd_llm", *SETTINGS], text)
    options = re.findall(r"--set '?(.+?)'?(?= --set| \()", str(refused.value))
    assert len(options) == 3
    compress_to(str(tmp_path / "dense"), tmp_path / "out", ["factorization=svd_llm", *SETTINGS, *options], text)
    assert len([m for m in cospadi.load(tmp_path / "out").modules() if isinstance(m, CompressedLinear)]) == 2 * 6
