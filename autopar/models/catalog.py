"""The models known by name, as plain figures: nothing here imports torch or transformers, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from autopar.core.errors import UnknownName

IMAGE_SIZE = 224
CLASSES = 1000
DEFAULT_BATCH = 8
"""Samples of the global batch where none is asked for."""


@dataclass(frozen=True, slots=True)
class Family:
    """The classes of transformers that build a model, and the loss it computes of its labels."""

    config: str
    model: str
    loss_type: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One model: a key of FAMILIES or `resnet`, its longest sequence in tokens (None: images), its config."""

    family: str
    longest: int | None = None
    settings: Mapping[str, float | bool] = field(default_factory=lambda: MappingProxyType({}))


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", "ForCausalLM"),
    "bert": Family("BertConfig", "BertForMaskedLM", "ForMaskedLM"),
    "opt": Family("OPTConfig", "OPTForCausalLM", "ForCausalLM"),
    "llama": Family("LlamaConfig", "LlamaForCausalLM", "ForCausalLM"),
    "vit": Family("ViTConfig", "ViTForImageClassification", "ForImageClassification"),
}


def _gpt(layers: int, width: int, heads: int, longest: int = 1024, vocabulary: int = 50257) -> Entry:
    return Entry("gpt2", longest, MappingProxyType({
        "n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": longest, "vocab_size": vocabulary,
        "use_cache": False}))


def _bert(layers: int, width: int, heads: int) -> Entry:
    return Entry("bert", 512, MappingProxyType({
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "intermediate_size": 4 * width}))


def _opt(layers: int, width: int, heads: int) -> Entry:
    return Entry("opt", 2048, MappingProxyType({
        "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads, "ffn_dim": 4 * width,
        "word_embed_proj_dim": width, "use_cache": False}))


def _llama(longest: int, vocabulary: int, wide: int, groups: int, theta: float) -> Entry:
    return Entry("llama", longest, MappingProxyType({
        "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": groups,
        "intermediate_size": wide, "vocab_size": vocabulary, "max_position_embeddings": longest, "rope_theta": theta,
        "use_cache": False}))


# Sources: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019); Brown et al., "Language Models
# are Few-Shot Learners" (2020), its vocabulary rounded up to 50304; Devlin et al., "BERT" (2018), uncased; Zhang et
# al., "OPT" (2022); Touvron et al., "LLaMA" (2023), its 7B; Llama Team, "The Llama 3 Herd of Models" (2024), its 8B;
# Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020); He et al. (2015).
MODELS: dict[str, Entry] = {
    "gpt2": _gpt(12, 768, 12),
    "gpt2-medium": _gpt(24, 1024, 16),
    "gpt2-large": _gpt(36, 1280, 20),
    "gpt2-xl": _gpt(48, 1600, 25),
    "gpt3-175b": _gpt(96, 12288, 96, 2048, 50304),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "opt-125m": _opt(12, 768, 12),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-13b": _opt(40, 5120, 40),
    "llama-7b": _llama(2048, 32000, 11008, 32, 1e4),
    "llama-8b": _llama(8192, 128256, 14336, 8, 5e5),
    "vit-b16": Entry("vit", None, MappingProxyType({"image_size": IMAGE_SIZE, "num_labels": CLASSES})),
    **{f"resnet{depth}": Entry("resnet") for depth in (18, 34, 50, 101, 152)},
}


def is_reference(name: str) -> bool:
    """Whether `name` is the user's own model, `path/to/file.py:factory`, or meant to be."""
    return ":" in name or name.endswith(".py")


def check_name(name: str) -> str:
    """`name`, if it is a model's or a reference. Raises UnknownName."""
    if name not in MODELS and not is_reference(name):
        raise UnknownName("model", name, [*MODELS, "path/to/file.py:factory"])
    return name
