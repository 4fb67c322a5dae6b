"""The authors' EAP-IG on one case, for `benchmarks/peer_eap_ig.py`: runs in an environment of its own, imports nothing
of this project, and answers lines of JSON on its standard input.

Its environment: torch, TransformerLens 2.16 (the last line with `HookedTransformer`), transformers, and a folder with a
snapshot of the repository's `src/eap` in which `device='cuda'` has become `device='cpu'`.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any

import torch


def hooked(case: dict[str, Any]) -> Any:
    """The case's model as a HookedTransformer, with its weights unprocessed."""
    # Imported by name, since they are the other environment's.
    lens, transformers = import_module("transformer_lens"), import_module("transformers")
    conversions = import_module("transformer_lens.pretrained.weight_conversions")
    config = getattr(transformers, case["config_class"])(**case["config"])
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    module.load_state_dict(case["weights"])
    module.eval()
    convert = getattr(conversions, f"convert_{case['family']}_weights")
    cfg = lens.HookedTransformerConfig(**case["hooked_config"], device="cpu")
    model = lens.HookedTransformer(cfg)
    state = convert(module, cfg)
    missing, extra = model.load_state_dict(state, strict=False)
    # Masks and rotary tables are made, not loaded; a bias that GPT-2 has not is zero.
    left = [
        n for n in missing if not n.endswith(("mask", "IGNORE", "rotary_sin", "rotary_cos", "b_U"))
    ]
    assert not [*left, *extra], (left, extra)
    for flag in ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in"):
        model.cfg.__dict__[flag] = True
    if cfg.n_key_value_heads is not None:
        model.cfg.ungroup_grouped_query_attention = True
    model.eval()
    with torch.no_grad():
        made, wanted = model(case["clean"]), module(case["clean"]).logits
    off = float((made - wanted).abs().max() / wanted.abs().max())
    assert off < 1e-4, f"the two models differ by {off:.2g}"
    return model


def main() -> None:
    """Answer requests until the input ends."""
    folder, path = sys.argv[1:3]
    sys.path.insert(0, folder)
    torch.set_num_threads(1)
    methods: Any = import_module("eap.attribute")
    graphs = import_module("eap.graph")
    case = torch.load(path, weights_only=True)
    model = hooked(case)
    graph = graphs.Graph.from_model(model)

    def tokenized(_: Any, tokens: torch.Tensor, max_length: Any = None) -> tuple[Any, ...]:
        n, length = tokens.shape
        return tokens, None, torch.full((n,), length), length

    methods.tokenize_plus = tokenized  # texts of random tokens need no tokenizer
    data = [(case["clean"], case["corrupted"], None)]
    weights = case["metric"]

    def metric(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        # The same weights for all texts, or a row for each.
        own = weights if weights.ndim == 2 else weights[None]
        return (logits[:, -1] * own).sum()

    real = json.dumps({name: list(edge.matrix_index) for name, edge in graph.edges.items()})
    print(json.dumps({"edges": json.loads(real)}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        for parameter in model.parameters():
            parameter.grad = None
        start = time.process_time()
        methods.attribute(
            model, graph, data, metric, asked["method"], ig_steps=asked.get("steps"), quiet=True
        )
        taken = time.process_time() - start
        print(json.dumps({"seconds": taken, "scores": graph.scores.tolist()}), flush=True)


if __name__ == "__main__":
    main()
