"""Every family of the documentation, tiny and random: compressed, loaded, saved again and densified, with equal logits."""

import re
from pathlib import Path

import pytest
import torch
from cases import cases
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import cospadi
from cospadi.api import compress_to
from cospadi.calibration.fisher import fisher_factors
from cospadi.checkpoint.linear import CompressedLinear
from cospadi.checkpoint.write import densify
from cospadi.errors import UserError
from cospadi.models import Checkpoint, load_tokenizer
from cospadi.settings import load
from cospadi.sources.architecture import auto_class, auto_class_of
from cospadi.sources.checkpoints import prepare_model
from cospadi.sources.families import FAMILIES, fitted
from cospadi.sources.settings import ModelConfig

pytestmark = pytest.mark.slow

DOCUMENTED = Path(__file__).parents[2] / "docs" / "own-model.md"
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0}
LLAMA = SIZES | {"intermediate_size": 96, "num_key_value_heads": 2}
WIDE = LLAMA | {"head_dim": 16}
TINY = {
    "biogpt": SIZES | {"intermediate_size": 96},
    "bloom": {"hidden_size": 64, "n_head": 4},
    "codegen": {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_kv_heads": 4, "multi_query": True},
    "falcon_h1": LLAMA | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    "gpt_bigcode": {"n_embd": 64, "n_head": 4, "n_positions": 128},
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "window_size": 8},
    "gptj": {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "helium": WIDE,
    "hunyuan_v1_dense": WIDE,
    "minicpm3": LLAMA
    | {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16}
    | {"qk_rope_head_dim": 8, "v_head_dim": 16},
    "ministral": WIDE,
    "mpt": {"d_model": 64, "n_heads": 4, "max_seq_len": 128},
    "nanochat": LLAMA,
    "opt": SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "persimmon": SIZES | {"intermediate_size": 96},
    "youtu": LLAMA
    | {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16}
    | {"qk_rope_head_dim": 8, "v_head_dim": 16},
    "xglm": {"d_model": 64, "attention_heads": 4, "ffn_dim": 96, "pad_token_id": 0, "max_position_embeddings": 128},
}
"""Sizes of the families whose config has other fields than Llama's."""
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
RANKS = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
LATENT = RANKS | {"v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
RECURRENT = {
    "layer_types": ["linear_attention", "full_attention"],
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
}
TINY |= {
    "deepseek_v2": LLAMA | EXPERTS | LATENT,
    "deepseek_v3": LLAMA | EXPERTS | LATENT,
    "gpt_neox": SIZES | {"intermediate_size": 96},
    "gpt_oss": WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": LLAMA | {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96, "block_auto_adjust_ff_dim": False},
    "olmo_hybrid": LLAMA | RECURRENT,
    "qwen3_5_text": WIDE | RECURRENT,
    "mixtral": LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": LLAMA | {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": LLAMA | EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": WIDE | EXPERTS,
}
IMAGES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TOWER = IMAGES | {"intermediate_size": 32}
IN_BLOCKS = {"depth": 1, "num_heads": 2}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
BESIDE_IMAGES = {
    "gemma3": ({}, TOWER),
    "llava": ({"model_type": "llama"}, TOWER | {"model_type": "clip_vision_model"}),
    "mistral3": ({"model_type": "mistral"}, TOWER | {"model_type": "pixtral", "head_dim": 16}),
    "qwen2_vl": (ROPE, IN_BLOCKS | {"embed_dim": 32, "hidden_size": 64}),
    "qwen2_5_vl": (ROPE, IN_BLOCKS | {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64}),
    "qwen3_vl": (
        ROPE,
        IN_BLOCKS
        | {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64, "deepstack_visual_indexes": [0]},
    ),
    "smolvlm": ({"model_type": "llama"}, TOWER),
}
"""Of models that read images: what their language model has besides `WIDE`, and the config of what looks at the images."""
RENAMED = ("gpt_neox", "qwen3_moe", "deepseek_v3", "gemma3", "qwen2_5_vl")
"""Families whose files name tensors otherwise than their models."""
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
    *("granite_swa", "internlm3", "iquestcoder", "gemma4_text"),
)
"""Families with Llama's names, which need no row of the table."""
ALL = sorted({*DEFAULT_NAMES, *FAMILIES})
SHARING = ("llama", "phi3", "gpt_neox", "qwen3_moe")
"""Families that are compressed by the default method, in which gate and up share; the others by a quick one."""
OFTEN = {*SHARING, *RENAMED, "bloom", "falcon", "gemma3_text", "lfm2", "llava", "mixtral", "qwen3_5_text"}
"""One family of every kind of names and blocks, for every run of the tests."""
IDS = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))
SETTINGS = ["calibration.n_samples=8", "calibration.sample_length=32", "calibration.damping=1e-3"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("A line is a document, and this one is repeated.\n" * 60)
    return str(file)


def written(family: str, folder: Path) -> None:
    """A random model as transformers saves it, with a tokenizer of bytes."""
    if family in BESIDE_IMAGES:
        of_text, of_images = BESIDE_IMAGES[family]
        text = {"vocab_size": 257, "num_hidden_layers": 2, **WIDE, **of_text}
        config = AutoConfig.for_model(family, text_config=text, vision_config=of_images, tie_word_embeddings=False)
    else:
        sizes = TINY.get(family, LLAMA | ({"num_key_value_heads": 4} if family == "vaultgemma" else {}))
        config = AutoConfig.for_model(family, **{"vocab_size": 257, "num_hidden_layers": 2, **sizes})
    torch.manual_seed(0)
    auto_class(config).from_config(config, dtype=torch.float32).save_pretrained(folder)
    llama = ModelConfig("bytes", "bytes", "random:llama", architecture=LLAMA, n_layers=2)
    prepare_model(llama, folder.with_name("bytes"))
    load_tokenizer(folder.with_name("bytes")).save_pretrained(folder)


def stored(folder: Path) -> set[str]:
    return set(Checkpoint(folder).names)


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("family", cases(ALL, OFTEN))
def test_a_family_goes_all_the_way(family, tmp_path, text):
    written(family, tmp_path / "dense")
    method = "cospadi_outputs" if family in SHARING else "svd_llm"
    compress_to(str(tmp_path / "dense"), tmp_path / "out", [f"factorization={method}", *SETTINGS], text)
    compressed = cospadi.load(tmp_path / "out")
    layers = [name for name, layer in compressed.named_modules() if isinstance(layer, CompressedLinear)]
    assert len(layers) >= 2 * 4

    logits = logits_of(compressed)
    compressed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(cospadi.load(tmp_path / "again")), logits)

    densify(tmp_path / "out", tmp_path / "flat", dtype="float32")
    flat = logits_of(auto_class_of(tmp_path / "flat").from_pretrained(tmp_path / "flat").eval())
    torch.testing.assert_close(flat, logits, rtol=1e-4, atol=1e-5 * float(logits.abs().max()))
    assert stored(tmp_path / "flat") == stored(tmp_path / "dense")
    assert compressed.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape[1] > IDS.shape[1]


@pytest.mark.parametrize("family", cases(ALL, OFTEN))
def test_gradients_come_back_through_a_family(family, tmp_path):
    """Block by block, to every projection but those of experts that no token chose."""
    written(family, tmp_path / "dense")
    settings = load(["model=any", f"model.source={tmp_path / 'dense'}", *SETTINGS])
    prepare_model(settings.model, tmp_path / "model")
    model = fitted(settings.model, AutoConfig.from_pretrained(tmp_path / "model").model_type)
    found = dict(fisher_factors(tmp_path / "model", model, settings.calibration, IDS))
    assert len(found) == 2
    for name, factors in (item for of_layer in found.values() for item in of_layer.items()):
        assert factors.n_tokens > 0 or ".experts." in name
        assert bool((factors.columns > 0).any()) or ".experts." in name


@pytest.mark.parametrize("family", RENAMED)
def test_a_renamed_model_in_memory_is_calibrated_alike_and_saved_for_good(family, tmp_path, text):
    """Its blocks run inside the whole model there, and one by one in ``cospadi compress``."""
    written(family, tmp_path / "dense")
    settings = ["factorization=svd_llm", *SETTINGS]
    compress_to(str(tmp_path / "dense"), tmp_path / "out", settings, text)
    logits = logits_of(cospadi.load(tmp_path / "out"))
    dense = auto_class_of(tmp_path / "dense").from_pretrained(tmp_path / "dense")
    far = float((logits_of(dense) - logits).abs().max())
    tokenizer = load_tokenizer(tmp_path / "dense")
    documents = Path(text).read_text(encoding="utf-8").splitlines()
    smaller = cospadi.compress(dense, tokenizer, texts=documents, overrides=SETTINGS, method="svd_llm")
    assert float((logits_of(smaller) - logits).abs().max()) < 0.02 * far
    smaller.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(cospadi.load(tmp_path / "saved")), logits_of(smaller))


def test_layers_that_differ_share_what_they_have_in_common(tmp_path, text):
    """Every other block has a convolution and no attention."""
    written("lfm2", tmp_path / "dense")
    sharing = ["factorization=cospadi_group", "factorization.n_rounds=2"]
    compress_to(str(tmp_path / "dense"), tmp_path / "out", [*sharing, *SETTINGS], text)
    compressed = cospadi.load(tmp_path / "out")
    layers = {name for name, layer in compressed.named_modules() if isinstance(layer, CompressedLinear)}
    assert {name.split(".")[2] for name in layers if ".conv." in name} == {"0"}
    assert {name.split(".")[2] for name in layers if ".self_attn." in name} == {"1"}
    assert {name.split(".")[2] for name in layers if ".feed_forward." in name} == {"0", "1"}


def test_a_block_whose_file_lacks_a_projection_is_damaged_and_not_different(tmp_path, text):
    written("llama", tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"the files lack model\.layers\.1\.self_attn\.v_proj\.weight"):
        compress_to(str(tmp_path / "dense"), tmp_path / "out", ["factorization=svd_llm", *SETTINGS], text)


def test_blocks_that_hand_on_a_tuple_are_refused_in_a_sentence(tmp_path, text):
    sizes = {"hidden_size": 64, "attention_hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    rwkv = ModelConfig("r", "r", "random:rwkv", architecture=sizes, n_layers=2)
    prepare_model(rwkv, tmp_path / "dense")
    named = ["model.blocks=rwkv.blocks", "model.shared_inputs=[[attention.key]]", "model.attention=attention"]
    with pytest.raises(UserError, match=r"blocks of RwkvModel hand on more than hidden states .* cospadi\.compress"):
        compress_to(str(tmp_path / "dense"), tmp_path / "out", ["factorization=svd_llm", *SETTINGS, *named], text)


def test_the_families_are_those_of_the_documentation():
    listed = re.search(r"<!-- families -->\n(.*?)\n<!-- end -->", DOCUMENTED.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert sorted(re.findall(r"`([\w-]+)`", listed)) == ALL
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


def test_a_block_that_does_not_run_on_its_own_is_refused_in_a_sentence(tmp_path, text, monkeypatch):
    """Whatever it asks for: an argument that only its model computes, a state that it keeps between blocks."""
    written("llama", tmp_path / "dense")

    def needy(self, hidden_states, *, per_layer_state, **kwargs):
        return hidden_states

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward", needy)
    with pytest.raises(
        UserError, match=r"model\.layers\.0, a LlamaDecoderLayer, .*per_layer_state.* cospadi\.compress"
    ):
        compress_to(str(tmp_path / "dense"), tmp_path / "out", ["factorization=svd_llm", *SETTINGS], text)


def test_a_type_without_a_language_model_is_named_without_advice_on_files(tmp_path, text):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    written("llama", tmp_path / "dense")  # for its tokenizer
    AutoModel.from_config(AutoConfig.for_model("vit", **sizes)).save_pretrained(tmp_path / "dense")
    with pytest.raises(UserError, match="model_type vit, so this type is not supported") as refused:
        compress_to(str(tmp_path / "dense"), tmp_path / "out", ["factorization=svd_llm", *SETTINGS], text)
    assert "download" not in str(refused.value)


def test_fused_queries_and_keys_are_told_to_be_unweighted(tmp_path, text, capsys):
    written("phi3", tmp_path / "dense")
    compress_to(str(tmp_path / "dense"), tmp_path / "out", ["factorization=svd_llm", *SETTINGS], text)
    assert "no input is weighted by attention" in capsys.readouterr().out
