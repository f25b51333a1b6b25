"""Tiny random models of Hugging Face families, as their authors wrote them, with and without dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.builders import Case

VOCAB, WIDTH, HEADS, LAYERS, LENGTH, BATCH = 96, 32, 4, 2, 16, 8
_IDS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "use_cache": False}
_DECODER = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "max_position_embeddings": 2 * LENGTH}
_VISION = {"image_size": 32, "num_labels": 4}
TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", "OPTConfig", {**_IDS, **_DECODER, "ffn_dim": 64, "word_embed_proj_dim": WIDTH}),
    "bert": ("BertForMaskedLM", "BertConfig", {"vocab_size": VOCAB, **_DECODER, "intermediate_size": 64}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_IDS, **_DECODER, "num_key_value_heads": 2,
                                                  "intermediate_size": 64}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_IDS, **_DECODER, "num_key_value_heads": 2, "head_dim": 8,
                                                  "intermediate_size": 64}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_IDS, **_DECODER, "intermediate_size": 64}),
    "t5": ("T5ForConditionalGeneration", "T5Config",
           {"vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 8, "num_layers": LAYERS, "num_heads": HEADS, "d_ff": 64,
            "decoder_start_token_id": 0, "use_cache": False}),
    "bart": ("BartForConditionalGeneration", "BartConfig",
             {**_IDS, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_ffn_dim": 64,
              "decoder_ffn_dim": 64, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS,
              "max_position_embeddings": 2 * LENGTH, "decoder_start_token_id": 0, "forced_eos_token_id": 1}),
}
IMAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig",
            {**_VISION, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
             "intermediate_size": 64, "patch_size": 8}),
    "swin": ("SwinForImageClassification", "SwinConfig",
             {**_VISION, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig",
                 {"num_labels": 4, "hidden_sizes": [16, 32], "depths": [2, 2], "num_stages": 2}),
}
FAMILIES = [*TEXT, *IMAGES]
OWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {**_IDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS,
                                               "n_positions": 2 * LENGTH}),
    "resnet": ("ResNetForImageClassification", "ResNetConfig",
               {"num_labels": 4, "embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 2]}),
}
"""Families that `tests.builders` has of its own for tests that run them."""
SEEN = [*OWN, *FAMILIES]


def family(name: str) -> Case:
    """The model of a family without dropout, with a batch for it."""
    case = as_written(name)
    _without_dropout(case.model)
    return case


def as_written(name: str) -> Case:
    """The model of a family in train mode, all its dropout included, with a batch for it."""
    import transformers
    transformers.logging.set_verbosity_error()
    model_name, config_name, arguments = (TEXT | IMAGES | OWN)[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**arguments)).train()
    if name in IMAGES or name == "resnet":
        return Case(model, {"pixel_values": torch.randn(BATCH, 3, 32, 32), "labels": torch.randint(0, 4, (BATCH,))})
    tokens = torch.randint(2, VOCAB, (BATCH, LENGTH))
    return Case(model, {"input_ids": tokens, "labels": tokens})


def _without_dropout(model: nn.Module) -> None:
    rates = ("p", "drop_prob", "dropout", "attention_dropout", "activation_dropout", "attn_dropout", "dropout_prob")
    for module in model.modules():
        for rate in rates:
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)

