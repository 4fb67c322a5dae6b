"""Autoencoders of other tools: the folders that SAELens, dictionary_learning and sparsify write and read.

None of their packages is imported. The formats of SAELens 5 and 6, dictionary_learning 0.1 and sparsify 1 are read
and written. Where an autoencoder of theirs does more than a linear map, a nonlinearity and a linear map back, that is
folded into the weights if it gives the same numbers, and refused if it does not.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from circuits.autoencoders.autoencoder import About, Autoencoder
from circuits.autoencoders.files import check_tensors, read_tensors
from circuits.files import check_packed, replacing, write_json
from circuits.tensors import write_tensors

Layout = Literal["saelens", "dictionary_learning", "sparsify"]
"""The tools whose folders are read and written."""

_FILES = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "sparsify": ("cfg.json", "sae.safetensors"),
}


def layout_of(folder: Path) -> Layout:
    """The tool that wrote a folder.

    Raises:
        FileNotFoundError: if it has no tool's files.
    """
    for layout in get_args(Layout):
        if all((folder / name).is_file() for name in _FILES[layout]):
            return layout
    wanted = "; ".join(f"{k}: {' and '.join(v)}" for k, v in _FILES.items())
    raise FileNotFoundError(
        f"folder {str(folder)!r} holds no autoencoder of another tool: expected {wanted}"
    )


def import_autoencoder(folder: str | Path, about: About | None = None) -> Autoencoder:
    """Read a folder of SAELens, dictionary_learning or sparsify.

    Args:
        folder: the folder.
        about: what is known in addition; its fields (`name`, `site`, …) override what the files say.

    Raises:
        FileNotFoundError: if it has no tool's files.
        ValueError: if it is damaged, tensors are missing or unknown, or the autoencoder is of a kind that cannot be
            expressed here.
    """
    place = Path(folder)
    layout = layout_of(place)
    config = _config(place / _FILES[layout][0])
    read = {"saelens": _saelens, "dictionary_learning": _dictionary_learning, "sparsify": _sparsify}
    try:
        made, said = read[layout](place / _FILES[layout][1], config)
        code = Autoencoder(**made, about=said)
    except ValueError as error:
        if str(place) in str(error):
            raise
        raise ValueError(f"{str(place)!r} is not a folder that {layout} wrote: {error}") from error
    except KeyError as error:
        raise ValueError(
            f"{str(place)!r} does not say {error.args[0]!r}: it is not a folder that {layout} wrote"
        ) from error
    except (
        TypeError,
        RuntimeError,
    ) as error:  # entries of a wrong type; tensors that do not fit each other
        first = str(error).splitlines()[0]
        raise ValueError(f"{str(place)!r} is not a folder that {layout} wrote: {first}") from error
    settings = {"imported": layout, "config": config}
    known = {k: v for k, v in vars(about or About()).items() if v}
    code.about = replace(said, **{"settings": settings, **known})
    return code


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is not a JSON object: expected settings by name")
    return found


# --- SAELens -------------------------------------------------------------------------------------

_SAELENS = {
    "standard": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "topk": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "jumprelu": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec"),
    "transcoder": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "skip_transcoder": ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"),
    "jumprelu_transcoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
    "jumprelu_skip_transcoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"),
    "batchtopk": ("W_enc", "b_enc", "W_dec", "b_dec", "topk_threshold"),
    "matryoshka_batchtopk": ("W_enc", "b_enc", "W_dec", "b_dec", "topk_threshold"),
}


def _saelens(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], About]:
    """The arguments of `Autoencoder` from a folder of SAELens, whose weights are stored input first."""
    kind, k = _saelens_kind(config)
    if kind not in _SAELENS:
        raise ValueError(
            f"autoencoder {str(path.parent)!r} is of architecture {kind!r}: read are {', '.join(_SAELENS)}"
        )
    normal = config.get("normalize_activations", "none")
    if normal not in ("none", "expected_average_only_in", None, False, True):
        raise ValueError(
            f"autoencoder {str(path.parent)!r} normalises each row ({normal}), which cannot be folded into its "
            "weights: expected none or expected_average_only_in"
        )
    tensors = read_tensors(path)[0]
    # A scaling factor of ones changes nothing.
    if "scaling_factor" in tensors and bool((tensors["scaling_factor"] == 1).all()):
        del tensors["scaling_factor"]
    # A factor for each latent by which SAELens multiplies codes after the nonlinearity: it goes to the decoder.
    fine = ("finetuning_scaling_factor",) if config.get("finetuning_scaling_factor") else ()
    check_tensors(path, tensors, _SAELENS[kind] + fine)
    for name, axes in (("W_enc", 2), ("W_dec", 2), ("b_dec", 1)):
        if tensors[name].ndim != axes:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}: expected {axes} axes")
    W_enc, W_dec, b_dec = tensors["W_enc"].T.contiguous(), tensors["W_dec"], tensors["b_dec"]
    made: dict[str, Any] = {
        "W_enc": W_enc,
        "W_dec": W_dec,
        "b_dec": b_dec,
        "W_skip": tensors.get("W_skip"),
    }
    # An encoder that reads x - b_dec: W (x - b_dec) + b = W x + (b - W b_dec).
    subtracted = bool(config.get("apply_b_dec_to_input", "transcoder" not in kind))
    shift = -W_enc @ b_dec if subtracted else torch.zeros(len(W_enc))
    if kind == "gated":
        made |= _gated(W_enc, shift, tensors["b_gate"], tensors["b_mag"], tensors["r_mag"])
    else:
        made["b_enc"] = tensors["b_enc"] + shift
    if kind == "topk":
        made |= {"activation": "topk", "k": k}
    elif "threshold" in tensors or "topk_threshold" in tensors:
        given = tensors.get("threshold", tensors.get("topk_threshold"))
        assert given is not None, "one of them is there"
        made |= {
            "activation": "jumprelu",
            "threshold": given.float().clamp_min(0).expand(len(W_enc)).clone(),
        }
    # There the choice of the k largest is by code times decoder norm, which is that of unit directions.
    if config.get("rescale_acts_by_decoder_norm") and kind in (
        "topk",
        "batchtopk",
        "matryoshka_batchtopk",
    ):
        length = W_dec.norm(dim=1).clamp_min(1e-8)
        # Codes become longer by the norm and directions shorter, so that the reconstruction stays.
        made["W_enc"], made["b_enc"] = W_enc * length[:, None], made["b_enc"] * length
        made["W_dec"] = W_dec / length[:, None]
    if fine:
        made["W_dec"] = W_dec * tensors[fine[0]][:, None]
    return made, _saelens_about(config, kind)


def _saelens_kind(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """The architecture and k; before version 6 the nonlinearity is a setting of its own."""
    kind = str(config.get("architecture", "standard"))
    name = config.get("activation_fn_str", config.get("activation_fn"))
    if name == "topk" and kind in ("standard", "topk"):
        return "topk", int(config["activation_fn_kwargs"]["k"])
    return kind, int(config["k"]) if kind == "topk" else None


def _gated(
    W_enc: Tensor, shift: Tensor, gate: Tensor, magnitude: Tensor, gain: Tensor
) -> dict[str, Any]:
    """A gated encoder as JumpReLU (Rajamanoharan et al. 2024a, section 3.3).

    With p = W_enc x, the gate is open where p > -b_gate, which is where the magnitude e^r p + b_mag exceeds
    b_mag - e^r b_gate.
    """
    scale = gain.exp()
    threshold = (magnitude - scale * gate).clamp_min(0)
    return {
        "W_enc": W_enc * scale[:, None], "b_enc": magnitude + scale * shift, "activation": "jumprelu",
        "threshold": threshold,
    }  # fmt: skip


def _saelens_about(config: Mapping[str, Any], kind: str) -> About:
    told = {**config, **(config.get("metadata") or {})}
    site = told.get("hook_name", told.get("hook_point")) or ""
    target = told.get("hook_name_out") or site
    model, data = told.get("model_name") or "", told.get("dataset_path") or ""
    return About("", str(site), str(target), str(model), "", str(data), kind)


# --- dictionary_learning ---------------------------------------------------------------------------


def _dictionary_learning(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], About]:
    """The arguments of `Autoencoder` from a folder of dictionary_learning, whose classes name their tensors apart."""
    trainer = config["trainer"]
    kind = trainer["dict_class"]
    tensors = _read_torch_file(path)
    linear = ("encoder.weight", "encoder.bias", "decoder.weight")
    maps = ("W_enc", "b_enc", "W_dec", "b_dec")
    needed = {
        "AutoEncoder": ("bias", *linear), "AutoEncoderNew": (*linear, "decoder.bias"),
        "GatedAutoEncoder": ("decoder_bias", "r_mag", "gate_bias", "mag_bias", "encoder.weight", "decoder.weight"),
        "JumpReluAutoEncoder": (*maps, "threshold"), "AutoEncoderTopK": ("b_dec", "k", "threshold", *linear),
        "BatchTopKSAE": ("b_dec", "k", "threshold", *linear),
        "MatryoshkaBatchTopKSAE": (*maps, "k", "threshold", "group_sizes"),
    }  # fmt: skip
    if kind not in needed:
        raise ValueError(
            f"autoencoder {str(path.parent)!r} is a {kind!r}: read are {', '.join(needed)}"
        )
    check_tensors(path, tensors, needed[kind])
    t = tensors
    W_enc = t["W_enc"].T.contiguous() if "W_enc" in t else t["encoder.weight"]
    W_dec = t["W_dec"] if "W_dec" in t else t["decoder.weight"].T.contiguous()
    b_dec = next(t[n] for n in ("b_dec", "bias", "decoder.bias", "decoder_bias") if n in t)
    made: dict[str, Any] = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec}
    apart = kind in (
        "JumpReluAutoEncoder",
        "AutoEncoderNew",
    )  # these do not subtract b_dec from their input
    shift = torch.zeros(len(W_enc)) if apart else -W_enc @ b_dec
    if kind == "GatedAutoEncoder":
        made |= _gated(W_enc, shift, t["gate_bias"], t["mag_bias"], t["r_mag"])
    else:
        made["b_enc"] = (t["b_enc"] if "b_enc" in t else t["encoder.bias"]) + shift
    if kind == "AutoEncoderTopK":
        made |= {"activation": "topk", "k": int(t["k"])}
    elif "threshold" in t:
        threshold = t["threshold"].float().clamp_min(0).expand(len(W_enc)).clone()
        made |= {"activation": "jumprelu", "threshold": threshold}
    site = trainer.get("submodule_name") or ""
    return made, About("", site, site, trainer.get("lm_name") or "", "", "", kind)


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    check_packed(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        zipfile.BadZipFile,
        OSError,
    ) as error:
        raise ValueError(
            f"{str(path)!r} is not a file of plain tensors: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{str(path)!r} is not a file of plain tensors by name")
    return {n: t.float() if t.is_floating_point() else t for n, t in found.items()}


# --- sparsify --------------------------------------------------------------------------------------


def _sparsify(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], About]:
    """The arguments of `Autoencoder` from a folder of sparsify, which is named after its site."""
    if config.get("activation", "topk") != "topk":
        raise ValueError(
            f"autoencoder {str(path.parent)!r} has activation {config['activation']!r}: read is topk"
        )
    tensors = read_tensors(path)[0]
    skip = ("W_skip",) if config.get("skip_connection") else ()
    check_tensors(path, tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *skip))
    W_enc, b_enc, b_dec = tensors["encoder.weight"], tensors["encoder.bias"], tensors["b_dec"]
    if not config.get("transcode"):
        b_enc = b_enc - W_enc @ b_dec
    made = {
        "W_enc": W_enc, "b_enc": b_enc, "W_dec": tensors["W_dec"], "b_dec": b_dec, "activation": "topk",
        "k": int(config["k"]), "W_skip": tensors.get("W_skip"),
    }  # fmt: skip
    return made, About("", path.parent.name, path.parent.name, "", "", "", "topk")


# --- writing ---------------------------------------------------------------------------------------


def export_autoencoder(code: Autoencoder, folder: str | Path, layout: Layout) -> Path:
    """Write a folder that another tool loads and that computes the same there.

    Args:
        code: the autoencoder.
        folder: the folder, new or empty.
        layout: the tool.

    Returns:
        The folder.

    Raises:
        FileExistsError: if the folder holds something.
        ValueError: if that tool has no such autoencoder.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout {layout!r} is not one of {', '.join(get_args(Layout))}")
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(
            f"folder {str(place)!r} holds something already: expected a new or empty one"
        )
    write = {
        "saelens": _to_saelens,
        "dictionary_learning": _to_dictionary_learning,
        "sparsify": _to_sparsify,
    }
    config, tensors = write[layout](code)
    place.mkdir(parents=True, exist_ok=True)
    names = _FILES[layout]
    if layout == "dictionary_learning":
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        # Into an open file: `torch.save` would put the temporary file's name into it.
        with replacing(place / names[1]) as temporary, temporary.open("wb") as file:
            torch.save(tensors, file)
    else:
        write_tensors(place / names[1], tensors)
    write_json(place / names[0], config)
    return place


def _is_transcoder(code: Autoencoder) -> bool:
    return (
        code.W_skip is not None
        or code.d_in != code.d_out
        or code.about.target not in ("", code.about.site)
    )


def _to_saelens(code: Autoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    kind = {"relu": "standard"}.get(code.activation, code.activation)
    if _is_transcoder(code):
        if kind == "topk":
            raise ValueError(
                "layout 'saelens' has no transcoder with topk: expected relu or jumprelu"
            )
        middle = "skip_transcoder" if code.W_skip is not None else "transcoder"
        kind = middle if kind == "standard" else f"jumprelu_{middle}"
    about = code.about
    config: dict[str, Any] = {
        "architecture": kind, "d_in": code.d_in, "d_sae": code.n_latents, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none",
        "reshape_activations": "hook_z" if "hook_z" in about.site else "none",
        "metadata": {
            "sae_lens_version": "6.54.12", "sae_lens_training_version": "6.54.12", "model_name": about.model,
            "hook_name": about.site, "hook_head_index": None, "dataset_path": about.data,
            "training_architecture": about.architecture,
        },
    }  # fmt: skip
    tensors = {"W_enc": code.W_enc.T, "b_enc": code.b_enc, "W_dec": code.W_dec, "b_dec": code.b_dec}
    if code.activation == "topk":
        config |= {"k": code.k, "rescale_acts_by_decoder_norm": False}
    if code.threshold is not None:
        tensors["threshold"] = code.threshold
    if _is_transcoder(code):
        config |= {"d_out": code.d_out}
        config["metadata"]["hook_name_out"] = about.target
        if code.W_skip is not None:
            tensors["W_skip"] = code.W_skip
    return config, tensors


def _to_dictionary_learning(code: Autoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if _is_transcoder(code):
        raise ValueError("layout 'dictionary_learning' has no transcoders")
    kind, trainer = {
        "relu": ("AutoEncoder", "StandardTrainer"), "topk": ("AutoEncoderTopK", "TopKTrainer"),
        "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer"),
    }[code.activation]  # fmt: skip
    config: dict[str, Any] = {
        "dict_class": kind, "trainer_class": trainer, "activation_dim": code.d_in, "dict_size": code.n_latents,
        "submodule_name": code.about.site, "lm_name": code.about.model, "layer": -1, "lr": None, "seed": None,
        "device": "cpu", "wandb_name": code.about.name,
    }  # fmt: skip
    if code.threshold is not None:
        tensors = {
            "W_enc": code.W_enc.T,
            "b_enc": code.b_enc,
            "W_dec": code.W_dec,
            "b_dec": code.b_dec,
        }
        return {"trainer": config, "buffer": {}}, {**tensors, "threshold": code.threshold}
    # There the encoder reads x - b_dec: W (x - b_dec) + (b + W b_dec) = W x + b.
    centred = code.b_enc + code.W_enc @ code.b_dec
    tensors = {
        "encoder.weight": code.W_enc,
        "encoder.bias": centred,
        "decoder.weight": code.W_dec.T,
    }
    if code.activation == "relu":
        return {"trainer": config, "buffer": {}}, {**tensors, "bias": code.b_dec}
    config["k"] = code.k
    k = torch.tensor(code.k, dtype=torch.int32)
    return {"trainer": config, "buffer": {}}, {
        # A negative threshold makes that tool choose the k largest values instead.
        **tensors, "b_dec": code.b_dec, "k": k, "threshold": torch.tensor(-1.0)
    }  # fmt: skip


def _to_sparsify(code: Autoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if code.activation != "topk" or code.d_in != code.d_out:
        raise ValueError(
            f"layout 'sparsify' has topk from one width to the same: this is {code.activation}, {code.d_in} to "
            f"{code.d_out}"
        )
    transcode = _is_transcoder(code)
    config = {
        "activation": "topk", "expansion_factor": max(1, code.n_latents // code.d_in), "normalize_decoder": True,
        "num_latents": code.n_latents, "k": code.k, "multi_topk": False,
        "skip_connection": code.W_skip is not None, "transcode": transcode, "d_in": code.d_in,
    }  # fmt: skip
    bias = code.b_enc if transcode else code.b_enc + code.W_enc @ code.b_dec
    tensors = {
        "encoder.weight": code.W_enc,
        "encoder.bias": bias,
        "W_dec": code.W_dec,
        "b_dec": code.b_dec,
    }
    if code.W_skip is not None:
        tensors["W_skip"] = code.W_skip
    return config, tensors
