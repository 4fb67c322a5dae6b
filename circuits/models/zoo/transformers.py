"""Transformers as TransformerLens bridges; the only module that imports TransformerLens."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from circuits.models.zoo.weights_files import load_weights


def native_bridge(**config: Any) -> Any:
    """Make a TransformerLens bridge around a small native model, without any download.

    Args:
        config: fields of `TransformerBridgeConfig`; ones it takes only as attributes
            (`positional_embedding_type`, `d_mlp`) work too.
    """
    with _quiet_import():
        from transformer_lens.config import TransformerBridgeConfig
        from transformer_lens.model_bridge import TransformerBridge
    boot: Any = TransformerBridge  # its constructors are added at import, unseen by type checkers
    # A seed, so that a model without weights is the same each time.
    return boot.boot_native(TransformerBridgeConfig(**{"seed": 0, **config})).eval()


def huggingface_bridge(name: str, dtype: torch.dtype = torch.float32, trained: bool = True) -> Any:
    """Make a TransformerLens bridge around a Hugging Face model, by hub name or local folder.

    Args:
        name: what it is called, or where it is.
        dtype: the type of its weights.
        trained: whether its weights are loaded; otherwise they are random.
    """
    with _quiet_import():
        from transformer_lens.model_bridge import TransformerBridge
    bridge = TransformerBridge.boot_transformers(
        name, device="cpu", dtype=dtype, load_weights=trained
    ).eval()
    # A norm that is changed from within is computed by the bridge itself, which multiplies by the norm's weight, and
    # OLMo's norms have none.
    for norm in bridge.modules():
        if type(norm).__name__ == "NormalizationBridge" and not hasattr(norm, "weight"):
            norm.weight = 1.0  # type: ignore[assignment]
    return bridge


def _quiet_import() -> warnings.catch_warnings:
    """Ignore warnings while TransformerLens is imported: they are about deprecations inside its dependencies."""
    return warnings.catch_warnings(action="ignore")


def load_native(bridge: Any, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy weights, with the names of `bridge.state_dict()`, into a native bridge.

    Raises:
        ValueError: if one is missing, unknown or of another shape.
    """
    load_weights(bridge.state_dict(), tensors, source)


def from_hooked_transformer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of the 2022 tutorials' models (W_Q: head x d_head x d_model, W_E: d_model x token) to a
    bridge's.

    Biases, which those models lack, become zero.
    """
    out = {
        "embed.weight": tensors["embed.W_E"].mT,
        "pos_embed.weight": tensors["pos_embed.W_pos"],
        "unembed.weight": tensors["unembed.W_U"].mT,
        "unembed.bias": torch.zeros(tensors["unembed.W_U"].shape[1]),
    }
    blocks = "attn_blocks" if any(k.startswith("attn_blocks") for k in tensors) else "blocks"
    n_layers = 1 + max(int(k.split(".")[1]) for k in tensors if k.startswith(blocks))
    for layer in range(n_layers):
        old, new = f"{blocks}.{layer}", f"blocks.{layer}"
        for letter in "QKV":
            weight = tensors[f"{old}.attn.W_{letter}"]
            name = f"{new}.attn.{letter.lower()}"
            out[f"{name}.weight"] = rearrange(
                weight, "head d_head d_model -> (head d_head) d_model"
            )
            out[f"{name}.bias"] = torch.zeros(weight.shape[0] * weight.shape[1])
        out[f"{new}.attn.o.weight"] = tensors[f"{old}.attn.W_O"]
        out[f"{new}.attn.o.bias"] = torch.zeros(len(tensors[f"{old}.attn.W_O"]))
        if f"{old}.mlp.W_in" in tensors:
            for end in ("in", "out"):
                out[f"{new}.mlp.{end}.weight"] = tensors[f"{old}.mlp.W_{end}"]
                out[f"{new}.mlp.{end}.bias"] = tensors[f"{old}.mlp.b_{end}"]
    return {k: v.contiguous() for k, v in out.items()}


def from_llama2c(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights in the layout of llama2.c (layers stacked, rotary pairs adjacent) to a bridge's."""
    # Embedding and unembedding are tied.
    out = {
        "embed.weight": tensors["tok_emb"],
        "unembed.weight": tensors["tok_emb"],
        "unembed.bias": torch.zeros(len(tensors["tok_emb"])),
        "ln_final.weight": tensors["final_norm"],
    }
    # w1 is the gate, w3 the other input matrix of the gated MLP: w2(silu(w1 x) * w3 x).
    names = {
        "attn.q": "wq", "attn.k": "wk", "attn.v": "wv", "attn.o": "wo",
        "mlp.gate": "w1", "mlp.out": "w2", "mlp.in": "w3", "ln1": "attn_norm", "ln2": "ffn_norm",
    }  # fmt: skip
    for layer in range(len(tensors["wq"])):
        for ours, theirs in names.items():
            out[f"blocks.{layer}.{ours}.weight"] = tensors[theirs][layer]
            if ours.startswith("attn"):
                out[f"blocks.{layer}.{ours}.bias"] = torch.zeros(len(tensors[theirs][layer]))
    return {k: v.contiguous() for k, v in out.items()}
