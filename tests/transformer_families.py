"""Tiny random Hugging Face models of many families, with norm weights and biases that are drawn at random.

Beside each model stands what its own modules compute, read by hooks of torch on the Hugging Face model, so that tests
compare with something that knows nothing of bridges.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.transformers import huggingface_bridge
from tests.random_models import save_tokenizer

N_VOCAB, WIDTH, HEADS, LAYERS, CONTEXT = 20, 16, 4, 2, 12
_ENDS = {"vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
_COMMON = {
    **_ENDS, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "intermediate_size": 24,
    "max_position_embeddings": CONTEXT,
}  # fmt: skip
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 4}
_GPT2 = {**_ENDS, "n_embd": WIDTH, "n_head": HEADS, "n_layer": LAYERS, "n_positions": CONTEXT}
_GEMMA = {**_WIDE, "sliding_window": 4, "query_pre_attn_scalar": 16}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
_SANDWICH = ("post_attention_layernorm", "post_feedforward_layernorm")
_ALIBI = (0.25, 0.0625, 0.015625, 0.00390625)  # 2 ** (-8 * (head + 1) / 4)


@dataclass(frozen=True)
class Family:
    """A family of Hugging Face models.

    Attributes:
        kind: the beginning of its classes' names.
        config: of the tiny model.
        mlp: the module of a layer whose output is the MLP's.
        behind: the norms behind attention and MLP.
        added: what attention's and the MLP's outputs are multiplied by.
        scale: what scores are multiplied by; here one over the square root of d_head, unless a family does otherwise.
        cap: what scores are capped at, by a hyperbolic tangent.
        slopes: the slope of each head's linear bias of scores (ALiBi).
    """

    kind: str
    config: dict[str, Any]
    mlp: str = "mlp"
    behind: tuple[str, str] | None = None
    added: float = 1.0
    scale: float = 0.5
    cap: float | None = None
    slopes: tuple[float, ...] = (0.0,) * HEADS


FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2", _GPT2),
    "gpt-neo": Family(
        "GPTNeo",
        {
            **_COMMON, "num_layers": LAYERS, "num_heads": HEADS, "window_size": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        scale=1.0,
    ),
    "gpt-neox": Family("GPTNeoX", {**_COMMON, "rotary_pct": 0.5}),
    "gpt-neox-serial": Family("GPTNeoX", {**_COMMON, "rotary_pct": 1.0, "use_parallel_residual": False}),
    "gpt-j": Family("GPTJ", {**_GPT2, "rotary_dim": 2}),
    "gpt-bigcode": Family("GPTBigCode", {**_GPT2, "multi_query": True}),
    "opt": Family("OPT", {**_COMMON, "ffn_dim": 24, "word_embed_proj_dim": WIDTH}, mlp="fc2"),
    "bloom": Family(
        "Bloom", {**_ENDS, "hidden_size": WIDTH, "n_head": HEADS, "n_layer": LAYERS}, mlp="mlp.dense_4h_to_h",
        slopes=_ALIBI,
    ),
    "falcon": Family("Falcon", {**_COMMON, "multi_query": True, "parallel_attn": True, "bias": True}),
    "llama": Family("Llama", {**_GROUPED, "attention_bias": True}),
    "mistral": Family("Mistral", {**_WIDE, "sliding_window": 4}),
    "mixtral": Family("Mixtral", {**_GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": Family("Qwen2", _GROUPED),
    "qwen3": Family("Qwen3", {**_WIDE, "attention_bias": True}),
    "qwen3-moe": Family("Qwen3Moe", {**_WIDE, **_EXPERTS, "moe_intermediate_size": 24}),
    "gemma": Family("Gemma", _WIDE),
    "gemma2": Family(
        "Gemma2", {**_GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}, behind=_SANDWICH,
        scale=0.25, cap=5.0,
    ),
    "gemma3": Family("Gemma3", _GEMMA, behind=_SANDWICH, scale=0.25),
    "phi": Family("Phi", {**_COMMON, "partial_rotary_factor": 0.5}),
    "phi3": Family("Phi3", _GROUPED),
    "stablelm": Family("StableLm", {**_GROUPED, "use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "olmo": Family("Olmo", _GROUPED),
    "olmo2": Family("Olmo2", _GROUPED, behind=_SANDWICH),
    "olmo3": Family("Olmo3", _GROUPED, behind=_SANDWICH),
    "olmoe": Family("Olmoe", {**_GROUPED, **_EXPERTS}),
    "cohere": Family("Cohere", {**_GROUPED, "logit_scale": 0.25}),
    "granite": Family(
        "Granite",
        {
            **_GROUPED, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3,
            "logits_scaling": 4.0,
        },
        added=0.5, scale=0.3,
    ),
    "smollm3": Family("SmolLM3", _GROUPED),
    "starcoder2": Family("Starcoder2", {**_GROUPED, "use_bias": True}),
    "mpt": Family(
        "Mpt", {**_ENDS, "d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": CONTEXT},
        mlp="ffn.down_proj", slopes=_ALIBI,
    ),
    "nemotron": Family("Nemotron", _WIDE),
    "glm": Family("Glm", {**_WIDE, "attention_bias": True}),
    "glm4": Family(
        "Glm4", {**_WIDE, "attention_bias": True}, behind=("post_self_attn_layernorm", "post_mlp_layernorm")
    ),
    "exaone4": Family("Exaone4", {**_GROUPED, "sliding_window": 4}, behind=_SANDWICH),
    "xglm": Family(
        "XGLM",
        {
            **_ENDS, "d_model": WIDTH, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": 24,
            "max_position_embeddings": CONTEXT,
        },
        mlp="fc2",
    ),
    "arcee": Family("Arcee", _GROUPED),
    "seed-oss": Family("SeedOss", _WIDE),
    "hunyuan": Family("HunYuanDenseV1", _WIDE),
    "mamba": Family("Mamba", {**_ENDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS}),
    "openai-gpt": Family("OpenAIGPT", _GPT2),
    "codegen": Family("CodeGen", {**_GPT2, "rotary_dim": 2}),
    "phimoe": Family("Phimoe", {**_GROUPED, "num_local_experts": 3}),
}  # fmt: skip


MORE: dict[str, Family] = {
    "stablelm-parallel": Family("StableLm", {**_GROUPED, "use_qkv_bias": True, "use_parallel_residual": True}),
    "gpt-oss": Family("GptOss", {**_WIDE, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4}),
    "deepseek-v2": Family(
        "DeepseekV2",
        {
            **_COMMON, "num_key_value_heads": 4, "head_dim": 4, "kv_lora_rank": 8, "q_lora_rank": None,
            "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4, "n_routed_experts": 4, "n_shared_experts": 1,
            "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_group": 1,
            "topk_group": 1,
        },
    ),
}  # fmt: skip
"""Further families, which few tests are about."""


def huggingface_model(family: str) -> Any:
    """The Hugging Face model, its weights as large as trained ones, its norms' gains and biases random."""
    import transformers

    known = (FAMILIES | MORE)[family]
    kind, config = known.kind, known.config
    given = getattr(transformers, f"{kind}TextConfig", None) or getattr(
        transformers, f"{kind}Config"
    )
    with warnings.catch_warnings(action="ignore"):
        made = given(**config, attn_implementation="eager")
        inner: Any = transformers.AutoModelForCausalLM.from_config(made).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    for parameter in inner.parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        scale = 0.5 if parameter.ndim < 2 else 2 / parameter.shape[-1] ** 0.5
        with torch.no_grad():
            parameter.copy_(drawn * scale)
    return inner


def saved(family: str, folder: Path) -> Any:
    """The Hugging Face model, saved to a folder with a tokenizer."""
    inner = huggingface_model(family)
    inner.save_pretrained(folder)
    save_tokenizer(folder)
    return inner


def bridged(family: str, folder: Path) -> tuple[HookedModel, Any]:
    """The model as a bridge, and the Hugging Face model of the same weights."""
    inner = saved(family, folder)
    return HookedModel(huggingface_bridge(str(folder)), TokenInput(N_VOCAB, CONTEXT), family), inner


@dataclass(frozen=True)
class Watched:
    """What a Hugging Face model's own modules computed, in float64.

    Attributes:
        inner: the model.
        layers: the names of its layers.
        outputs: what every module that was called returned, by name.
        inputs: what it was given.
        patterns: attention patterns of each layer: example x head x query x key.
    """

    inner: Any
    layers: list[str]
    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    patterns: list[Tensor]

    def stream(self, layer: int) -> Tensor:
        """The residual stream before a layer, or after the last."""
        return self.inputs[self.layers[layer]] if layer < LAYERS else self.outputs[self.layers[-1]]

    def output_weights(self, layer: int) -> str:
        """The name of the module with the output weights of a layer's attention."""
        ends = ("o_proj", "out_proj", "c_proj", "dense")
        names = [n for n in self.outputs if n.startswith(f"{self.layers[layer]}.") and "att" in n]
        return next(n for n in names if n.rsplit(".", 1)[-1] in ends)

    def factor(self, norm: str) -> Tensor:
        """What a norm divided its centred input by, inverted."""
        module: Any = self.inner.get_submodule(norm)
        named = [getattr(module, n) for n in ("eps", "variance_epsilon") if hasattr(module, n)]
        size = centred(module, self.inputs[norm]).square().mean(-1, keepdim=True)
        return (size + (named[0] if named else 1e-5)).rsqrt()

    def gain(self, norm: str) -> Tensor:
        """What a norm multiplied each entry of its centred input by, from its weights as its family stores them."""
        module: Any = self.inner.get_submodule(norm)
        weight = getattr(module, "weight", None)
        more = 1 if type(module).__name__.startswith(("Gemma", "Nemotron")) else 0
        gain = (1 if weight is None else weight.detach().double() + more) * self.factor(norm)
        made = gain * centred(module, self.inputs[norm]) + bias_of(module)
        torch.testing.assert_close(made, self.outputs[norm], rtol=1e-4, atol=1e-5)
        return gain

    def read_factor(self, layer: int) -> Tensor:
        """The factor of the norm before a layer's attention; 1 if there is none."""
        inside = [n for n in self.inputs if n.startswith(f"{self.layers[layer]}.")]
        norms = [n for n in inside if "norm" in n or "ln" in n.rsplit(".", 1)[-1]]
        found = [n for n in norms if torch.equal(self.inputs[n], self.stream(layer))]
        return self.factor(found[0]) if found else torch.ones(())

    def qk_factor(self, layer: int, which: str, head: int) -> Tensor:
        """The factor of the norm of a head's queries or keys (`q`, `k`): example x position; 1 if there is none."""
        norms = [
            n
            for n in self.inputs
            if n.startswith(f"{self.layers[layer]}.") and n.endswith(f"{which}_norm")
        ]
        if not norms:
            return torch.ones(self.stream(0).shape[:2])
        found = self.factor(norms[0])[..., 0]
        if found.ndim == 2:  # one for all heads
            return found
        behind = (
            found.shape[1] == self.stream(0).shape[1]
        )  # some families put heads before positions here
        return found.movedim(2 if behind else 1, 0)[
            head // (HEADS // found.shape[2 if behind else 1])
        ]


def watched(inner: Any, tokens: Tensor) -> Watched:
    """Run a Hugging Face model and note what its modules compute."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            made = output[0] if isinstance(output, tuple) else output
            if given and isinstance(made, Tensor):
                inputs[name], outputs[name] = given[0].double(), made.double()

        return hook

    handles = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in inner.named_modules()]
    try:
        with torch.no_grad():
            made = inner(tokens, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    lists = [
        n for n, m in inner.named_modules() if isinstance(m, nn.ModuleList) and len(m) == LAYERS
    ]
    layers = [f"{lists[0]}.{i}" for i in range(LAYERS)]
    return Watched(
        inner,
        layers,
        outputs,
        inputs,
        [p.double() for p in getattr(made, "attentions", None) or ()],
    )


def centred(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm's input less its mean, for layer norms; as it is for norms by the root mean square."""
    return x if "RMS" in type(norm).__name__ else x - x.mean(-1, keepdim=True)


def bias_of(module: nn.Module) -> Tensor:
    """A module's bias; zero if it has none."""
    bias = getattr(module, "bias", None)
    return torch.zeros(()) if bias is None else bias.detach().double()


def weight_of(linear: Any) -> Tensor:
    """The weights of a linear module, inputs first."""
    weight = linear.weight.detach().double()
    return weight if type(linear).__name__ == "Conv1D" else weight.T
