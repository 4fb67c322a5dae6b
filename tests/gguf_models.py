"""Small GGUF files of random Llama models, as llama.cpp writes them, and what their tensors compute."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

N_LAYERS, WIDTH, N_HEADS, N_GROUPS, D_HEAD, D_MLP, BASE, EPSILON = 2, 32, 4, 2, 8, 64, 1000.0, 1e-5
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = (*"abcdefghijklmnopqrstuvwxyz", "Ġ", *"0123456789")
MERGES = ("Ġ a", "a b", "Ġ b")
TOKENS = (*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in MERGES))


def words_of(texts: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Tokens and merges of a vocabulary in which every word of some texts, with its space in front, is one token."""
    words = sorted({f"Ġ{word}" for text in texts for word in re.findall("[A-Za-z]+", text)})
    # Each word grows from its front, so that no word stands in the way of another.
    grown = dict.fromkeys((w[:i], w[i]) for w in words for i in range(1, len(w)))
    signs = sorted({c for w in words for c in w} | set(".,"))
    tokens = dict.fromkeys((*SPECIAL, *signs, *(a + b for a, b in grown)))
    return tuple(tokens), tuple(f"{a} {b}" for a, b in grown)


def llama_tensors(
    tied: bool = True, seed: int = 0, n_tokens: int = len(TOKENS)
) -> dict[str, np.ndarray]:
    """The tensors of a model, by the names of GGUF; rows are outputs."""
    generator = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return generator.normal(0, 1.5 / shape[-1] ** 0.5, shape).astype(np.float32)

    made = {"token_embd.weight": drawn(n_tokens, WIDTH)}
    for i in range(N_LAYERS):
        at = f"blk.{i}"
        made |= {
            f"{at}.attn_norm.weight": 1 + 0.3 * drawn(WIDTH),
            f"{at}.attn_q.weight": 2 * drawn(N_HEADS * D_HEAD, WIDTH),
            f"{at}.attn_k.weight": 2 * drawn(N_GROUPS * D_HEAD, WIDTH),
            f"{at}.attn_v.weight": drawn(N_GROUPS * D_HEAD, WIDTH),
            f"{at}.attn_output.weight": drawn(WIDTH, N_HEADS * D_HEAD),
            f"{at}.ffn_norm.weight": 1 + 0.3 * drawn(WIDTH),
            f"{at}.ffn_gate.weight": drawn(D_MLP, WIDTH),
            f"{at}.ffn_up.weight": drawn(D_MLP, WIDTH),
            f"{at}.ffn_down.weight": drawn(WIDTH, D_MLP),
        }
    made["output_norm.weight"] = 1 + 0.3 * drawn(WIDTH)
    return made if tied else {**made, "output.weight": drawn(n_tokens, WIDTH)}


def write_llama(
    path: Path, kind: str = "F32", tensors: Mapping[str, np.ndarray] | None = None, architecture: str = "llama",
    begins_texts: bool | None = False, tokens: Sequence[str] = TOKENS, merges: Sequence[str] = MERGES,
) -> Path:  # fmt: skip
    """Write a model; its matrices quantised as `kind`, its norms in float32."""
    import gguf

    writer: Any = gguf.GGUFWriter(path, architecture)
    for key, value in {
        "context_length": 64, "embedding_length": WIDTH, "block_count": N_LAYERS, "feed_forward_length": D_MLP,
        "head_count": N_HEADS, "head_count_kv": N_GROUPS, "layer_norm_rms_eps": EPSILON, "vocab_size": len(tokens),
        "rope_dimension_count": D_HEAD, "rope_freq_base": BASE,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(tokens))
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if begins_texts is not None:
        writer.add_add_bos_token(begins_texts)
    wanted = gguf.GGMLQuantizationType[kind]
    for name, tensor in (
        llama_tensors(n_tokens=len(tokens)) if tensors is None else tensors
    ).items():
        own = wanted if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(tensor, own)
        writer.add_tensor(name, packed, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, unpacked by the package gguf and otherwise as they are in it."""
    import gguf

    return {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in gguf.GGUFReader(path).tensors
    }


def unpermuted(weight: Tensor, n_heads: int) -> Tensor:
    """Rows of queries or keys in the order of Hugging Face, of those in a GGUF file.

    There rows 2i and 2i + 1 of a head are turned together by the i-th angle; in Hugging Face's, rows i and i + d/2.
    """
    half = len(weight) // n_heads // 2
    rows = [
        head * 2 * half + 2 * pair + which
        for head in range(n_heads)
        for which in range(2)
        for pair in range(half)
    ]
    return weight[rows]


def logits_of(weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The logits (position x token) of one text, in float64: every head and position written out."""
    weights = {name: w.double() for name, w in weights.items()}
    stream = weights["token_embd.weight"][tokens]
    for i in range(N_LAYERS):
        at = f"blk.{i}"
        x = _normed(stream, weights[f"{at}.attn_norm.weight"])
        q = unpermuted(weights[f"{at}.attn_q.weight"], N_HEADS)
        k = unpermuted(weights[f"{at}.attn_k.weight"], N_GROUPS)
        heads = []
        for head in range(N_HEADS):
            group = head // (N_HEADS // N_GROUPS)
            own, shared = (slice(n * D_HEAD, (n + 1) * D_HEAD) for n in (head, group))
            queries, keys = _turned(x @ q[own].T), _turned(x @ k[shared].T)
            values = x @ weights[f"{at}.attn_v.weight"][shared].T
            scores = queries @ keys.T / D_HEAD**0.5
            later = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ values)
        stream = stream + torch.cat(heads, -1) @ weights[f"{at}.attn_output.weight"].T
        x = _normed(stream, weights[f"{at}.ffn_norm.weight"])
        gate = x @ weights[f"{at}.ffn_gate.weight"].T
        inner = gate * gate.sigmoid() * (x @ weights[f"{at}.ffn_up.weight"].T)
        stream = stream + inner @ weights[f"{at}.ffn_down.weight"].T
    last = _normed(stream, weights["output_norm.weight"])
    return last @ weights.get("output.weight", weights["token_embd.weight"]).T


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPSILON).sqrt() * gain


def _turned(x: Tensor) -> Tensor:
    """Rotary positions: entries i and i + d/2 of position p are turned by p / base^(2i/d)."""
    half = D_HEAD // 2
    out = x.clone()
    for position in range(len(x)):
        for i in range(half):
            angle = torch.tensor(position / BASE ** (2 * i / D_HEAD), dtype=torch.float64)
            a, b = x[position, i], x[position, i + half]
            out[position, i] = a * angle.cos() - b * angle.sin()
            out[position, i + half] = a * angle.sin() + b * angle.cos()
    return out
