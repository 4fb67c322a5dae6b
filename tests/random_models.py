"""Small random Hugging Face models, saved to a folder and loaded as a person would load them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model

WORDS = ["<s>", "<unk>", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
KINDS = ("gpt2", "llama", "neox", "bert")


def booted(folder: Path, kind: str, width: int = 32) -> HookedModel:
    """A model of two layers and 4 heads (of which `llama` shares keys and values among 2) that takes 128 tokens."""
    save_tokenizer(folder)
    torch.manual_seed(0)
    module = _modules(width)[kind]()
    with torch.no_grad():
        for parameter in module.parameters():  # as large as trained weights: attention is not flat
            if parameter.ndim > 1:
                parameter.mul_(5)
    module.save_pretrained(folder)
    return load_model(f"tl:{folder}")


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", pad_token="[SEP]"
    ).save_pretrained(folder)


def _modules(width: int) -> dict[str, Callable[[], nn.Module]]:
    import transformers as hf

    ends = {"vocab_size": len(WORDS), "bos_token_id": 0, "eos_token_id": 0}
    common = {
        **ends, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    }  # fmt: skip
    gpt2 = {"n_embd": width, "n_layer": 2, "n_head": 4, "n_positions": 128}
    gemma = {"num_key_value_heads": 2, "head_dim": width // 4, "pad_token_id": 3}
    opt = {
        "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 2 * width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 3,
    }  # fmt: skip
    return {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**ends, **gpt2)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**common, num_key_value_heads=2)),
        "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**common)),
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**common)),
        "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**common, **gemma)),
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**ends, **opt)),
    }
