"""Autoencoders as modules, as files, and as files of other tools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuits.autoencoders import About, Autoencoder, Code, load_autoencoder, save_autoencoder
from circuits.autoencoders.layouts import export_autoencoder, import_autoencoder
from circuits.autoencoders.sparse import batch_top_k, decode, encode_at, top_k


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def made(
    activation: str = "topk", n: int = 16, d: int = 6, out: int | None = None, skip: bool = False
) -> Autoencoder:
    out = out or d
    kinds = {
        "topk": {"k": 4},
        "jumprelu": {"threshold": drawn(n, seed=5).abs().float()},
        "relu": {},
    }
    return Autoencoder(
        drawn(n, d, seed=1).float(), drawn(n, seed=2).float(), drawn(n, out, seed=3).float(),
        drawn(out, seed=4).float(), activation, **kinds[activation],
        W_skip=drawn(out, d, seed=6).float() if skip else None, about=About("x", "layer", "layer", "net", "", "photos"),
    )  # fmt: skip


# --- sparse products -------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["each row", "whole batch"])
def test_sparse_products_and_gradients_are_those_of_dense_ones(whole: bool) -> None:
    x, W_enc, b, W_dec = drawn(30, 8), drawn(20, 8, seed=1), drawn(20, seed=2), drawn(20, 6, seed=3)
    leaves = [t.requires_grad_() for t in (x, W_enc, b, W_dec)]
    pre = (x @ W_enc.T + b).detach()
    start, latent = batch_top_k(pre, 90) if whole else top_k(pre, 3)
    value = encode_at(x, W_enc, b, pre, start, latent).relu()
    code = Code(start, latent, value, 20)
    out, target = decode(code, W_dec), drawn(30, 6, seed=4)
    own = torch.autograd.grad((out - target).square().sum(), leaves)

    mask = torch.zeros(30, 20, dtype=torch.float64)
    mask[code.row, code.latent] = 1
    dense = ((x @ W_enc.T + b) * mask).relu() @ W_dec
    wanted = torch.autograd.grad((dense - target).square().sum(), leaves)
    torch.testing.assert_close(out, dense)
    for a, c in zip(own, wanted, strict=True):
        torch.testing.assert_close(a, c)
    assert int(mask.sum()) == 90


def test_without_mkl_the_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    W, code = (
        drawn(20, 6).requires_grad_(),
        Code(*top_k(drawn(10, 20, seed=1), 3), drawn(30, seed=2), 20),
    )
    fast = torch.autograd.grad(decode(code, W).square().sum(), W)[0]
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    torch.testing.assert_close(torch.autograd.grad(decode(code, W).square().sum(), W)[0], fast)


@pytest.mark.parametrize("n", [1, 7, 100, 599, 600, 10_000])
def test_the_largest_of_a_batch_are_those_of_a_sort(n: int) -> None:
    pre = drawn(30, 20)
    pre[:5] += 3  # what the sample of rows sees is not what others hold
    start, latent = batch_top_k(pre, n)
    code = Code(start, latent, torch.zeros(len(latent)), 20)
    found = torch.zeros(30, 20, dtype=torch.bool)
    found[code.row, code.latent] = True
    positive = int((pre > 0).sum())
    order = pre.flatten().argsort(descending=True)[: min(n, positive)]
    wanted = torch.zeros(600, dtype=torch.bool)
    wanted[order] = True
    assert torch.equal(found.flatten(), wanted)


def test_the_first_latents_of_a_code() -> None:
    code = Code(torch.tensor([0, 2, 3]), torch.tensor([4, 1, 3]), torch.tensor([1.0, 2.0, 3.0]), 5)
    assert code.prefix(4).dense().tolist() == [[0, 2, 0, 0], [0, 0, 0, 3]]


# --- as modules --------------------------------------------------------------------------------------


def test_codes_are_what_their_definitions_say() -> None:
    x = drawn(9, 6, seed=8).float()
    for activation in ("relu", "topk", "jumprelu"):
        code = made(activation)
        pre = x @ code.W_enc.T + code.b_enc
        for row, own in zip(pre, code.encode(x), strict=True):
            for i, value in enumerate(row.tolist()):
                on = value > 0
                if activation == "topk":
                    on &= sum(v > value for v in row.tolist()) < 4
                if activation == "jumprelu":
                    assert code.threshold is not None
                    on &= value > float(code.threshold[i])
                assert float(own[i]) == pytest.approx(value if on else 0.0, abs=1e-5)
        torch.testing.assert_close(code.code(x).dense(), code.encode(x))
        torch.testing.assert_close(code.decode_code(code.code(x)), code(x))
        torch.testing.assert_close(code(x), code.encode(x) @ code.W_dec + code.b_dec)


def test_a_skip_transcoder_adds_its_straight_way_and_needs_its_input() -> None:
    code, x = made("relu", out=5, skip=True), drawn(3, 6).float()
    assert code.W_skip is not None
    torch.testing.assert_close(
        code(x), code.encode(x) @ code.W_dec + code.b_dec + x @ code.W_skip.T
    )
    with pytest.raises(ValueError, match="decodes with its input"):
        code.decode(code.encode(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 17}, "k 17 of activation 'topk' must be 1 to 16"),
        ({"k": None}, "k None of activation 'topk' must be 1 to 16"),
        ({"activation": "softmax"}, "'softmax' is not one of relu, topk, jumprelu"),
        ({"b_enc": torch.zeros(3)}, "b_enc of shape"),
        ({"W_dec": torch.full((16, 6), float("nan"))}, "W_dec holds numbers that are not finite"),
        ({"activation": "jumprelu", "k": None, "threshold": -torch.ones(16)}, "threshold holds numbers below 0"),
        ({"activation": "jumprelu", "k": None}, "takes one if it is jumprelu"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    own = {
        "W_enc": torch.zeros(16, 6), "b_enc": torch.zeros(16), "W_dec": torch.zeros(16, 6), "b_dec": torch.zeros(6),
        "activation": "topk", "k": 3,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Autoencoder(**(own | change))


# --- as files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_what_is_saved_is_loaded_to_the_bit(activation: str, tmp_path: Path) -> None:
    code = made(activation, out=5, skip=activation == "relu")
    save_autoencoder(code, tmp_path / "one")
    again = load_autoencoder(tmp_path / "one")
    assert again.about == code.about
    assert again.k == code.k
    own, other = code.state_dict(), again.state_dict()
    assert own.keys() == other.keys()
    assert all(torch.equal(own[n], other[n]) for n in own)


def test_a_file_with_missing_or_more_tensors_is_refused(tmp_path: Path) -> None:
    path = save_autoencoder(made(), tmp_path / "a.safetensors")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        metadata = json.loads(file.read(length))["__metadata__"]
    tensors = load_file(path)
    for change, message in (
        ({"b_dec": None}, "lacks b_dec"),
        ({"more": torch.zeros(2)}, "holds unknown more"),
        ({"W_dec": torch.zeros(3, 6)}, "W_dec of shape"),
    ):
        changed = {n: t for n, t in (tensors | change).items() if t is not None}
        save_file(changed, tmp_path / "b.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=message):
            load_autoencoder(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_autoencoder(tmp_path / "c.safetensors")
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="circuits sae import"):
        load_autoencoder(tmp_path / "d.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no autoencoder at"):
        load_autoencoder(tmp_path / "nowhere")


# --- files of other tools: written as their own code writes them, computed as it computes ---------------

N, D = 16, 6
X = drawn(10, D, seed=9, dtype=torch.float32)
P = {
    "W_enc": drawn(D, N, seed=1).float(), "b_enc": drawn(N, seed=2).float(), "W_dec": 2 * drawn(N, D, seed=3).float(),
    "b_dec": drawn(D, seed=4).float(), "threshold": drawn(N, seed=5).abs().float(), "r": drawn(N, seed=6).float(),
    "b_gate": drawn(N, seed=7).float(), "W_skip": drawn(D, D, seed=8).float(),
}  # fmt: skip


def keep(h: Tensor, k: int = 4) -> Tensor:
    cut = h.topk(k, dim=1).values[:, -1:]
    return (h * (h >= cut)).relu()


def gated(p: Tensor) -> Tensor:
    return (p + P["b_gate"] > 0) * (p * P["r"].exp() + P["b_enc"]).relu()


def saelens(folder: Path, kind: str, more: dict | None = None, tensors: dict | None = None) -> None:
    config = {
        "architecture": kind, "d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": "transcoder" not in kind, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.0.hook_resid_pre"},
    }  # fmt: skip
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config | (more or {})))
    own = {n: P[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
    save_file(own if tensors is None else tensors, folder / "sae_weights.safetensors")


CENTRED = (X - P["b_dec"]) @ P["W_enc"]
LENGTH = P["W_dec"].norm(dim=1)
WITH = {n: P[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
GATED = {n: P[n] for n in ("W_enc", "W_dec", "b_dec", "b_gate")} | {
    "b_mag": P["b_enc"],
    "r_mag": P["r"],
}


@pytest.mark.parametrize(
    ("kind", "more", "tensors", "features"),
    [
        ("standard", {}, WITH, (CENTRED + P["b_enc"]).relu()),
        ("standard", {"apply_b_dec_to_input": False}, WITH, (X @ P["W_enc"] + P["b_enc"]).relu()),
        ("topk", {"k": 4}, WITH, keep(CENTRED + P["b_enc"])),
        ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}, WITH, keep((CENTRED + P["b_enc"]) * LENGTH)),
        (
            "jumprelu", {}, WITH | {"threshold": P["threshold"]},
            (CENTRED + P["b_enc"]).relu() * (CENTRED + P["b_enc"] > P["threshold"]),
        ),
        ("gated", {}, GATED, gated(CENTRED)),
        ("skip_transcoder", {"d_out": D}, WITH | {"W_skip": P["W_skip"]}, (X @ P["W_enc"] + P["b_enc"]).relu()),
    ],
)  # fmt: skip
def test_saelens_folders_compute_as_saelens_does(
    kind: str, more: dict, tensors: dict, features: Tensor, tmp_path: Path
) -> None:
    saelens(tmp_path / "s", kind, more, tensors)
    code = import_autoencoder(tmp_path / "s", About("new"))
    torch.testing.assert_close(code.encode(X), features, atol=1e-4, rtol=1e-4)
    scale = LENGTH if more.get("rescale_acts_by_decoder_norm") else 1
    wanted = (features / scale) @ P["W_dec"] + P["b_dec"]
    if "skip" in kind:
        wanted = wanted + X @ P["W_skip"].T
    torch.testing.assert_close(code(X), wanted, atol=1e-4, rtol=1e-4)
    assert (code.about.name, code.about.site, code.about.model) == (
        "new",
        "blocks.0.hook_resid_pre",
        "gpt2",
    )


def test_a_config_of_saelens_5_says_topk_in_its_nonlinearity(tmp_path: Path) -> None:
    saelens(tmp_path / "s", "standard")
    (tmp_path / "s" / "cfg.json").write_text(
        json.dumps(
            {
                "architecture": "standard", "d_in": D, "d_sae": N, "activation_fn_str": "topk",
                "activation_fn_kwargs": {"k": 4}, "apply_b_dec_to_input": True, "hook_name": "blocks.1.hook_mlp_out",
                "normalize_activations": "none",
            }
        )
    )  # fmt: skip
    code = import_autoencoder(tmp_path / "s")
    torch.testing.assert_close(code.encode(X), keep(CENTRED + P["b_enc"]), atol=1e-4, rtol=1e-4)
    assert code.about.site == "blocks.1.hook_mlp_out"


def dictionary(folder: Path, kind: str, tensors: dict, more: dict | None = None) -> None:
    folder.mkdir()
    trainer = {
        "dict_class": kind,
        "activation_dim": D,
        "dict_size": N,
        "submodule_name": "resid",
        "lm_name": "gpt2",
    }
    (folder / "config.json").write_text(
        json.dumps({"trainer": trainer | (more or {}), "buffer": {}})
    )
    torch.save(tensors, folder / "ae.pt")


LINEAR = {
    "encoder.weight": P["W_enc"].T,
    "encoder.bias": P["b_enc"],
    "decoder.weight": P["W_dec"].T,
}
H = X @ P["W_enc"] + P["b_enc"]


@pytest.mark.parametrize(
    ("kind", "tensors", "features"),
    [
        ("AutoEncoder", LINEAR | {"bias": P["b_dec"]}, (CENTRED + P["b_enc"]).relu()),
        ("AutoEncoderNew", LINEAR | {"decoder.bias": P["b_dec"]}, H.relu()),
        (
            "AutoEncoderTopK",
            LINEAR | {"b_dec": P["b_dec"], "k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(0.5)},
            keep(CENTRED + P["b_enc"]),
        ),
        (
            "BatchTopKSAE",
            LINEAR | {"b_dec": P["b_dec"], "k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(0.5)},
            (CENTRED + P["b_enc"]) * (CENTRED + P["b_enc"] > 0.5),
        ),
        ("JumpReluAutoEncoder", WITH | {"threshold": P["threshold"]}, H.relu() * (P["threshold"] < H)),
        (
            "GatedAutoEncoder",
            {
                "decoder_bias": P["b_dec"], "r_mag": P["r"], "gate_bias": P["b_gate"], "mag_bias": P["b_enc"],
                "encoder.weight": P["W_enc"].T, "decoder.weight": P["W_dec"].T,
            },
            gated(CENTRED),
        ),
    ],
)  # fmt: skip
def test_dictionary_learning_folders_compute_as_theirs_do(
    kind: str, tensors: dict, features: Tensor, tmp_path: Path
) -> None:
    dictionary(tmp_path / "d", kind, tensors, {"k": 4})
    code = import_autoencoder(tmp_path / "d")
    torch.testing.assert_close(code.encode(X), features, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(code(X), features @ P["W_dec"] + P["b_dec"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify_folders_compute_as_sparsify_does(transcode: bool, tmp_path: Path) -> None:
    folder = tmp_path / "layers.3"
    folder.mkdir()
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": 0, "k": 4,
        "multi_topk": False, "skip_connection": transcode, "transcode": transcode, "d_in": D,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    tensors = {
        "encoder.weight": P["W_enc"].T.contiguous(), "encoder.bias": P["b_enc"], "W_dec": P["W_dec"],
        "b_dec": P["b_dec"],
    }  # fmt: skip
    save_file(tensors | ({"W_skip": P["W_skip"]} if transcode else {}), folder / "sae.safetensors")
    code = import_autoencoder(folder)
    features = keep(H if transcode else CENTRED + P["b_enc"])
    torch.testing.assert_close(code.encode(X), features, atol=1e-4, rtol=1e-4)
    wanted = features @ P["W_dec"] + P["b_dec"] + (X @ P["W_skip"].T if transcode else 0)
    torch.testing.assert_close(code(X), wanted, atol=1e-4, rtol=1e-4)
    assert code.about.site == "layers.3"


@pytest.mark.parametrize("layout", ["saelens", "dictionary_learning", "sparsify"])
@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu"])
def test_what_is_exported_is_imported_with_the_same_numbers(
    layout: str, activation: str, tmp_path: Path
) -> None:
    code = made(activation)
    if layout == "sparsify" and activation != "topk":
        with pytest.raises(ValueError, match="layout 'sparsify' has topk"):
            export_autoencoder(code, tmp_path / "e", layout)
        assert not (tmp_path / "e").exists()
        return
    export_autoencoder(code, tmp_path / "e", layout)
    again = import_autoencoder(tmp_path / "e")
    torch.testing.assert_close(again.encode(X), code.encode(X), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again(X), code(X), atol=1e-5, rtol=1e-5)
    with pytest.raises(FileExistsError, match="holds something already"):
        export_autoencoder(code, tmp_path / "e", layout)


def test_folders_of_nobody_and_what_cannot_be_folded_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no autoencoder of another tool"):
        import_autoencoder(tmp_path)
    for i, (kind, more, tensors, message) in enumerate(
        (
            ("temporal", {}, None, "architecture 'temporal': read are standard"),
            ("standard", {"normalize_activations": "layer_norm"}, None, "normalises each row"),
            ("standard", {}, {"W_enc": P["W_enc"]}, "lacks b_enc, W_dec, b_dec"),
            ("standard", {}, {**WITH, "b_mag": P["r"]}, "holds unknown b_mag"),
            ("topk", {}, None, "does not say 'k'"),
            ("standard", {}, {**WITH, "b_enc": P["r"][:3]}, "is not a folder that saelens wrote"),
        )
    ):
        saelens(tmp_path / str(i), kind, more, tensors)
        with pytest.raises(ValueError, match=message):
            import_autoencoder(tmp_path / str(i))
    (tmp_path / "0" / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        import_autoencoder(tmp_path / "0")
    dictionary(tmp_path / "d", "AutoEncoder", LINEAR)
    (tmp_path / "d" / "ae.pt").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="is not a file of plain tensors"):
        import_autoencoder(tmp_path / "d")


def test_a_code_that_is_empty_writes_the_bias() -> None:
    code = made("jumprelu")
    code.threshold = torch.full((16,), 1e6)
    x = np.zeros((4, 6), np.float32)
    assert torch.equal(code.decode_code(code.code(torch.from_numpy(x))), code.b_dec.expand(4, 6))
