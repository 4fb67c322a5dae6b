"""Loading models of other packages, by name or from a local folder: TransformerLens, Hugging Face, torchvision, timm.

All of them are imported only when such a model is asked for; torchvision and timm are optional.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.adapter.tokenizing import by_tokenizer
from circuits.models.zoo.placement import precision_named
from circuits.models.zoo.transformers import huggingface_bridge
from circuits.models.zoo.weights_files import (
    Untrained,
    Weights,
    check_numbers,
    load_weights,
    read_weights,
)
from circuits.specs import split_key
from circuits.units import unknown

log = logging.getLogger(__name__)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

PATIENCE = 3.0
"""Seconds that the Hugging Face hub has to answer before only local files are used."""


def refuse_weights(name: str, weights: Weights) -> None:
    """Raise if a file of weights is given for a model that takes none."""
    if isinstance(weights, Path):
        raise ValueError(
            f"weights {str(weights)!r}: model {name} comes with its weights and takes no file"
        )


@contextmanager
def one_try(local: bool) -> Iterator[None]:
    """Ask the Hugging Face hub once whether it can be reached; if not, only files that are there already are used.

    What is `local` never needs the hub. Without this, each file that is looked for is asked for six times, and
    saying that there is no network takes half a minute.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or local or not _hub_answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _hub_answers(endpoint: str) -> bool:
    try:
        with urlopen(Request(endpoint, method="HEAD"), timeout=PATIENCE):
            return True
    except HTTPError:  # an answer, though no page
        return True
    except OSError as error:
        log.debug("%s does not answer: %s", endpoint, error)
        # The hub's client may trust other certificates than Python does, so an error of certificates decides nothing.
        return isinstance(getattr(error, "reason", None), SSLError)


@contextmanager
def quiet(expected: bool) -> Iterator[None]:
    """No progress bars of transformers but at terminals, and no report on a file's weights if it is `expected`."""
    from transformers.utils import logging as reports

    level, bars = reports.get_verbosity(), reports.is_progress_bar_enabled()
    if expected:
        reports.set_verbosity_error()
    if not sys.stderr.isatty():
        reports.disable_progress_bar()
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if bars:
            reports.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error of another library says first; what kind it is if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- TransformerLens ---------------------------------------------------------------------------


def transformer_lens(name: str, weights: Weights) -> HookedModel:
    """A language model as a TransformerLens bridge."""
    refuse_weights(f"tl:{name}", weights)
    _check_memory(f"tl:{name}", Path(name))
    try:
        with one_try(Path(name).is_dir()), quiet(expected=False):
            bridge = huggingface_bridge(
                name, _stored_precision(name), not isinstance(weights, Untrained)
            )
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        first = first_line(error)
        if Path(name).is_dir():
            reason = first.split(". ")[0]  # what follows is a list of a hundred names
            raise ValueError(
                f"model 'tl:{name}' is a folder, but TransformerLens has no bridge for what is in it: {reason}"
            ) from error
        raise FileNotFoundError(
            f"model 'tl:{name}' could not be loaded: it is neither a local folder nor available from "
            f"the Hugging Face hub ({first})"
        ) from error
    spec = _tokens(bridge.tokenizer, bridge.cfg.d_vocab, bridge.cfg.n_ctx)
    return HookedModel(bridge, spec, f"tl:{name}")


def converted(folder: Path, spec: str, weights: Weights, begins_texts: bool) -> HookedModel:
    """A language model that was converted into a folder of the workspace, as a TransformerLens bridge.

    Args:
        folder: where it is.
        spec: the model's name.
        weights: none, or untrained ones.
        begins_texts: whether the token that begins a text is put in front of each. Tokenizers name such a token also
            where no text has it, so that they do not tell.

    Raises:
        ValueError: if TransformerLens has no bridge for it, or the folder is damaged.
    """
    refuse_weights(spec, weights)
    _check_memory(spec, folder)
    try:
        with one_try(local=True), quiet(expected=False):
            bridge = huggingface_bridge(
                str(folder), _stored_precision(str(folder)), not isinstance(weights, Untrained)
            )
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, SafetensorError) as error:
        reason = first_line(error).split(". ")[0]
        raise ValueError(
            f"model {spec!r}: what it was converted to, {str(folder)!r}, cannot be opened: {reason}"
        ) from error
    tokens = _tokens(bridge.tokenizer, bridge.cfg.d_vocab, bridge.cfg.n_ctx)
    return HookedModel(bridge, tokens if begins_texts else replace(tokens, bos=None), spec)


def _check_memory(spec: str, folder: Path) -> None:
    """Raise OSError if a folder's weights take more memory than is free."""
    from circuits.memory import free_memory, in_bytes  # here, since few models need it

    needed = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free = free_memory()
    if free is not None and needed > free:
        # No MemoryError: of one, people are told to take fewer inputs.
        raise OSError(
            f"model {spec!r} has {in_bytes(needed)} of weights, and {in_bytes(free)} of memory are free: end other "
            "programs, or load it on a larger machine"
        )


def _stored_precision(name: str) -> torch.dtype:
    """The type of the weights in a local folder, as its configuration says; float32 for models of the hub."""
    path = Path(name) / "config.json"
    if not path.is_file():
        return torch.float32
    stated = read_json(path, nan=True)
    return precision_named(stated.get("dtype") or stated.get("torch_dtype") or "float32")


def _tokens(tokenizer: Any, n_vocab: int, n_ctx: int) -> TokenInput:
    """What a model with a Hugging Face tokenizer takes; numbers without one."""
    filler = getattr(tokenizer, "pad_token_id", None) or 0
    if filler >= n_vocab:  # a padding token that was added to the tokenizer, but not to the model
        filler = 0
    encoder = None if tokenizer is None else by_tokenizer(tokenizer)
    bos = getattr(tokenizer, "bos_token_id", None)
    return TokenInput(n_vocab, n_ctx, _vocabulary(tokenizer, n_vocab), bos, encoder, filler)


def _vocabulary(tokenizer: object, n_vocab: int) -> tuple[str, ...]:
    """How a Hugging Face tokenizer writes each token; empty without a tokenizer."""
    decode = getattr(tokenizer, "convert_ids_to_tokens", None)
    if decode is None:
        return ()
    known = len(tokenizer)  # type: ignore[arg-type]
    words = decode(list(range(min(known, n_vocab))))
    # Byte-pair tokenizers write a leading space as Ġ (GPT-2) or ▁ (SentencePiece), a line break as Ċ. Models often
    # have more embeddings than tokens, for alignment.
    marked = [str(w).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n") for w in words]
    return tuple(marked + [f"<{i}>" for i in range(len(marked), n_vocab)])


# --- Hugging Face ------------------------------------------------------------------------------


def huggingface(name: str, weights: Weights) -> HookedModel:
    """The model that a folder's `config.json` names; of a model of two towers (CLIP), `NAME:vision` or `NAME:text`.

    Raises:
        FileNotFoundError: if there is no such model, or the hub does not answer.
        ValueError: if it takes neither images nor texts alone, or its file lacks weights of the module.
    """
    refuse_weights(f"hf:{name}", weights)
    place, tower = split_key(name)
    if tower not in ("", "vision", "text"):
        raise ValueError(f"model 'hf:{name}': tower {tower!r}: expected vision or text")
    with one_try(Path(place).is_dir()):
        config = _configuration(name, place)
        kind = _class_of(name, place, config, tower)
        with quiet(expected=bool(tower)):
            module = _pretrained(name, place, kind, _of_tower(config, tower), weights, tower)
        if kind.main_input_name == "input_ids":
            spec = _text_input(place, module.config)
        else:
            spec = _image_input(name, place, module.config)
    # Labels belong to a head; every configuration has two of them by default.
    headed = kind.__name__.endswith("ForImageClassification")
    labels = (getattr(module.config, "id2label", None) or {}) if headed else {}
    return HookedModel(
        module.eval(), spec, f"hf:{name}", classes=[str(labels[i]) for i in sorted(labels)]
    )


def _configuration(name: str, place: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if Path(place).is_dir():
            raise ValueError(
                f"model 'hf:{name}' is a folder whose config.json cannot be used: {first_line(error)}"
            ) from error
        raise FileNotFoundError(
            f"model 'hf:{name}' could not be loaded: it is neither a local folder nor available from "
            f"the Hugging Face hub ({first_line(error)}); language models load as tl:{place}"
        ) from error


def _class_of(name: str, place: str, config: Any, tower: str) -> Any:
    """The class of `transformers` that the configuration names, or of one of its towers."""
    import transformers

    named = next(iter(getattr(config, "architectures", None) or ()), "")
    if not named:
        raise ValueError(
            f"model 'hf:{name}': its config.json names no class under `architectures`, so that nothing tells which "
            "one its weights belong to"
        )
    two = hasattr(config, "vision_config") and hasattr(config, "text_config")
    if two and not tower:
        raise ValueError(
            f"model 'hf:{name}' is a {named} of two towers: load one of them, hf:{place}:vision or hf:{place}:text"
        )
    if tower and not two:
        raise ValueError(
            f"model 'hf:{name}' is a {named}, which has no towers: load it as hf:{place}"
        )
    stem = f"{named.removesuffix('Model')}{tower.title()}Model"
    wanted = [f"{stem}WithProjection", stem] if tower else [named]
    found = next((w for w in wanted if hasattr(transformers, w)), None)
    if found is None:
        raise ValueError(
            f"model 'hf:{name}': {' and '.join(wanted)} are not in transformers {transformers.__version__}"
        )
    kind: Any = getattr(transformers, found)
    if kind.main_input_name != "pixel_values" and not tower:
        raise ValueError(
            f"model 'hf:{name}' is a {named}, which takes {kind.main_input_name} and no images: language models "
            f"load as tl:{place}"
        )
    return kind


def _of_tower(config: Any, tower: str) -> Any:
    """The configuration of a tower, whose projection has the size that the whole model states."""
    if not tower:
        return config
    part = getattr(config, f"{tower}_config")
    if hasattr(config, "projection_dim"):
        part.projection_dim = config.projection_dim
    return part


def _pretrained(
    name: str, place: str, kind: Any, config: Any, weights: Weights, tower: str
) -> nn.Module:
    """The model with the weights of its file, or with random ones if that is what was asked for."""
    if isinstance(weights, Untrained):
        return kind._from_config(config)
    try:
        module, found = kind.from_pretrained(
            place, config=config, dtype="auto", output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"model 'hf:{name}': its weights could not be loaded ({first_line(error)})"
        ) from error
    # What the file lacks has been filled with random numbers, about which transformers only logs.
    lacking = sorted([*found["missing_keys"], *(str(m[0]) for m in found["mismatched_keys"])])
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise ValueError(
            f"model 'hf:{name}': its file lacks weights of {kind.__name__}: {', '.join(lacking[:3])}{more}"
        )
    # The other tower is no surprise; weights of this one that have no place are.
    odd = sorted(k for k in found["unexpected_keys"] if tower and k.startswith(f"{tower}_"))
    if odd:
        log.warning("model hf:%s: %s has no place for %s", name, kind.__name__, ", ".join(odd))
    return module


def _text_input(place: str, config: Any) -> TokenInput:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning(
            "model hf:%s comes without a tokenizer, so that tokens are numbers: %s",
            place,
            first_line(error),
        )
        tokenizer = None
    return _tokens(tokenizer, config.vocab_size, config.max_position_embeddings)


def _image_input(name: str, place: str, config: Any) -> ImageInput:
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    mean, std = _preprocessing(name, place)
    return ImageInput(getattr(config, "num_channels", 3), height, width, mean, std)


def _preprocessing(name: str, place: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation from the model's preprocessor file; those of ImageNet without such a file."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        place, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
    )
    if path is None:
        log.warning(
            "model hf:%s comes without preprocessor_config.json: using ImageNet's mean and std",
            name,
        )
        return IMAGENET_MEAN, IMAGENET_STD
    stated = read_json(path, nan=True)
    if not stated.get("do_normalize", True):
        return (0.0,), (1.0,)
    mean, std = stated.get("image_mean", IMAGENET_MEAN), stated.get("image_std", IMAGENET_STD)
    return tuple(map(float, mean)), tuple(map(float, std))


# --- torchvision and timm ----------------------------------------------------------------------


def _optional(package: str, module: str, spec: str) -> Any:
    """Import what is not installed with this package.

    Raises:
        ImportError: if it is not there; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"model {spec!r} needs {package}, which cannot be imported here ({first_line(error)}): install it with "
            f"`pip install {package}`, in the build that matches your torch"
        ) from error


def torchvision(name: str, weights: Weights) -> HookedModel:
    """A model of torchvision, with its published weights or those of a file in their layout.

    Raises:
        ImportError: if torchvision is not installed.
        ValueError: if it is no classification or segmentation model of images.
        FileNotFoundError: if its weights cannot be downloaded.
    """
    spec = f"torchvision:{name}"
    zoo = _optional("torchvision", "torchvision.models", spec)
    if name not in zoo.list_models():
        raise unknown("torchvision model", name, zoo.list_models())
    published = zoo.get_model_weights(name).DEFAULT
    transforms = published.transforms()
    kind = type(transforms).__name__
    if kind not in ("ImageClassification", "SemanticSegmentation") or name.startswith("quantized_"):
        raise ValueError(
            f"model {spec!r} ({kind}): expected a classifier or segmentation model without quantization, which gives "
            "one tensor for a batch of images: wrap it in a module that does, and load that as python:FILE.py:FUNCTION"
        )
    tensors = read_weights(weights) if isinstance(weights, Path) else None
    try:
        if weights is None:
            module = zoo.get_model(name, weights=published)
        else:
            module = _as_published(zoo.get_model_builder(name), published, tensors)
    except OSError as error:
        raise FileNotFoundError(
            f"model {spec!r} needs its weights: the download failed ({error}); pass --weights FILE, or "
            "--weights untrained for random ones"
        ) from error
    except RuntimeError as error:
        # torch lists all tensors that do not fit, a line for each kind.
        first = str(error).strip().splitlines()[-1].strip().split(", ")[0]
        raise ValueError(f"weights {str(weights)!r} do not fit {spec}: {first}") from error
    if tensors is not None:
        check_numbers(module.state_dict(), tensors, repr(str(weights)))
    cropped = getattr(transforms, "crop_size", None)
    side = (cropped or transforms.resize_size)[0]
    # Segmentation takes whole pictures of any size, of which this is the usual one.
    resize = "margin-crop" if cropped else "crop"
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    return HookedModel(
        module.eval(),
        ImageInput(3, side, side, mean, std, resize=resize),
        spec,
        classes=published.meta.get("categories", ()),
    )


def _as_published(build: Any, published: Any, tensors: Mapping[str, Tensor] | None) -> nn.Module:
    """Build the architecture that goes with the published weights, with other tensors: those of a file, or random ones.

    What `weights=None` builds is another model: GoogLeNet and Inception scale their input and drop their auxiliary
    heads only for published weights, segmentation models have an auxiliary head only with them, and a backbone's
    weights are downloaded without them. So the builder is told to use the published ones, and gets these instead.
    """
    given: Any = tensors
    if given is None:
        known = inspect.signature(build).parameters
        options = {"weights_backbone": None, "aux_loss": True}
        plain: dict[str, Any] = {k: v for k, v in options.items() if k in known}
        # Hidden among **kwargs, and warned about if it is missing.
        if build.__name__ in ("googlenet", "inception_v3"):
            plain["init_weights"] = True
        given = build(weights=None, **plain).state_dict()
    published.get_state_dict = lambda *args, **kwargs: given
    try:
        return build(weights=published)
    finally:
        del published.get_state_dict


def timm(name: str, weights: Weights) -> HookedModel:
    """A model of timm, with its published weights or those of a file.

    Raises:
        ImportError: if timm is not installed.
        FileNotFoundError: if its weights cannot be downloaded.
    """
    spec = f"timm:{name}"
    zoo = _optional("timm", "timm", spec)
    data: Any = importlib.import_module("timm.data")
    if not zoo.is_model(name.partition(".")[0]):
        raise unknown("timm model", name, zoo.list_models())
    try:
        with one_try(weights is not None):
            module = zoo.create_model(name, pretrained=weights is None)
    except Exception as error:
        raise FileNotFoundError(
            f"model {spec!r} needs its weights: they could not be downloaded ({first_line(error)}); pass --weights "
            "FILE, or --weights untrained for random ones"
        ) from error
    if isinstance(weights, Path):
        load_weights(module.state_dict(), read_weights(weights), repr(str(weights)))
    stated = data.resolve_model_data_config(module)
    # Of the two ways to crop, the one whose share of the picture is closer.
    resize = "margin-crop" if stated["crop_pct"] < (0.875 + 1) / 2 else "crop"
    shape, mean, std = stated["input_size"], tuple(stated["mean"]), tuple(stated["std"])
    taken = ImageInput(*shape, mean=mean, std=std, resize=resize)
    return HookedModel(module.eval(), taken, spec, classes=_timm_classes(data, module))


def _timm_classes(data: Any, module: Any) -> Sequence[str]:
    """The names of ImageNet's classes where the model was trained on them, and nothing else."""
    subset = data.infer_imagenet_subset(module.pretrained_cfg)
    if not subset:
        return ()
    names = data.ImageNetInfo(subset).label_descriptions()
    return names if len(names) == module.num_classes else ()
