"""Loading models by name: from what a person types to a `HookedModel`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from circuits.autoencoders.files import FILE, load_autoencoder
from circuits.autograd import recording_gradients
from circuits.cleanroom import addition
from circuits.cleanroom import induction as by_hand
from circuits.cleanroom.network import UNIT_NAMES, CleanRoom
from circuits.factories import call_factory
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.adapter.tokenizing import by_merges, by_tokenizer
from circuits.models.zoo.inception import googlenet, shapes
from circuits.models.zoo.placement import device_named, in_precision, on_device, precision_named
from circuits.models.zoo.resnet import ResNet20
from circuits.models.zoo.transformers import (
    from_hooked_transformer,
    from_llama2c,
    huggingface_bridge,
    load_native,
    native_bridge,
)
from circuits.models.zoo.weights_files import (
    asset,
    find_weights,
    is_baked,
    load_weights,
    read_weights,
)
from circuits.specs import python_spec, split_attached
from circuits.stimuli.repeats import BOS, N_CTX, N_VOCAB
from circuits.stimuli.shapes import CLASSES
from circuits.units import unknown
from circuits.workspace import ModelIdentity, ModelRecord, Workspace

log = logging.getLogger(__name__)

BUILTIN = Path(__file__).parent / "builtin"
"""Where the trained built-in models' weights and cards are."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Loader = Callable[[str, Path | None], HookedModel]


@dataclass(frozen=True)
class ModelEntry:
    """One line of `circuits models`.

    Attributes:
        name: the name to type, or its form (`tl:NAME`).
        summary: what it is and what it needs.
        load: function from the typed name and an optional weights file to the model.
    """

    name: str
    summary: str
    load: Loader

    @property
    def builtin(self) -> bool:
        """Whether the model comes with the package."""
        return self.name in (
            "cleanroom",
            "shapes",
            "induction",
            "induction-by-hand",
            "addition-by-hand",
        )


@recording_gradients()
def load_model(
    spec: str,
    weights: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> HookedModel:
    """Load a model by name.

    Args:
        spec: a name that `circuits models` lists; `python:module:factory` (a function without required arguments
            that returns a `HookedModel`, or an `nn.Module` with an `input_shape`) or `FILE.py:FUNCTION`; `tl:NAME`,
            `hf:NAME` or `torchvision:NAME`. After it may come `+PATH` for each autoencoder to attach: a file, its
            folder, or its name in the workspace (`googlenet+sae/curves`).
        weights: a safetensors file, or a `.pt` file of plain tensors.
        device: where it computes, such as `cuda`; by default where it is loaded, which is the CPU unless a factory says
            otherwise.
        dtype: float32, float64, bfloat16 or float16; by default as its weights are stored. Other numbers are another
            model, with a hash of its own.

    Raises:
        KeyError: if there is no such model; the message offers the nearest names.
        FileNotFoundError: if its weights are not found.
        ImportError: if it needs a package that is not installed.
        ValueError: if the weights do not fit, or there is no such device or type.
    """
    # Looked at first: loading can take minutes.
    place = None if device is None else device_named(device)
    kind = None if dtype is None else precision_named(dtype)
    spec, *attached = split_attached(spec)
    model = _loaded(spec, weights)
    if kind is not None:
        model = in_precision(model, kind)
    if attached:
        model = attach_files(model, attached)
    return model if place is None else on_device(model, place)


def _loaded(spec: str, weights: str | Path | None) -> HookedModel:
    """A model by name, as it is stored, without autoencoders."""
    spec = _with_scheme(spec)
    path = Path(weights) if weights is not None else None
    scheme, _, rest = spec.partition(":")
    if spec.endswith(":") and spec in MODELS:
        raise ValueError(
            f"model {spec!r} has no name after the colon: expected {MODELS[spec].name}"
        )
    entry = MODELS.get(f"{scheme}:" if rest else spec)
    if entry is None:
        raise unknown("model", spec, [e.name for e in MODELS.values()])
    # A file that `circuits.edits.bake` wrote has the names of `state_dict()`, not those of the published weights,
    # which the loader would convert.
    if path is not None and is_baked(path):
        model = entry.load(rest or spec, None)
        load_weights(model.module.state_dict(), read_weights(path), str(path))
        return model
    return entry.load(rest or spec, path)


def attach_files(model: HookedModel, paths: Sequence[str]) -> HookedModel:
    """Attach autoencoders to a model, each at the site that it was trained on.

    Raises:
        FileNotFoundError: if there is no autoencoder at a path.
        ValueError: if a file is damaged, or its autoencoder was trained on other weights or fits no site.
    """
    # Taken once: attaching changes the hash, and all were trained on the model without autoencoders.
    intact = model
    for path in paths:
        code = load_autoencoder(find_autoencoder(path))
        about = code.about
        if about.model_hash and not intact.has_hash(about.model_hash):
            raise ValueError(
                f"autoencoder {path!r} was trained on {about.model} with hash {about.model_hash[:16]}, not "
                f"{intact.hash[:16]}: its latents would mean something else"
            )
        if not about.site:
            raise ValueError(f"autoencoder {path!r} does not say which site it was trained on")
        target = about.target if about.target != about.site else ""
        model = model.attach(code, about.name, about.site, target or None)
    return model


def list_autoencoders(workspace: Workspace) -> dict[str, Path]:
    """The files of a workspace's autoencoders, by name: `NAME`, or `NAME/VARIANT` where there are several."""
    found = {}
    for path in sorted((workspace.root / "saes").glob("*/*.safetensors")):
        # A checkpoint holds an unfinished training, not an autoencoder.
        if path.is_file() and path.stem != "checkpoint":
            own = path.name == FILE
            found[path.parent.name if own else f"{path.parent.name}/{path.stem}"] = path
    return found


def find_autoencoder(path: str, workspace: Workspace | None = None) -> Path:
    """Find an autoencoder's file or folder by its path, or by its name in a workspace (by default the default one).

    Raises:
        FileNotFoundError: if there is none.
    """
    inside = (workspace or Workspace.default()).autoencoder_path(path.removeprefix("sae/"))
    for candidate in (Path(path).expanduser(), inside):
        if candidate.is_file() or (candidate / FILE).is_file():
            return candidate
    if inside.is_dir() and (several := sorted(p.stem for p in inside.glob("*.safetensors"))):
        names = ", ".join(f"{inside.name}/{name}" for name in several if name != "checkpoint")
        if not names:
            raise FileNotFoundError(
                f"autoencoder {path!r}: its training is not finished; run `circuits sae train` again to continue it"
            )
        raise FileNotFoundError(
            f"autoencoder {path!r} has several variants: expected one of {names}"
        )
    raise FileNotFoundError(
        f"there is no autoencoder {path!r}: neither a file or folder of that name, nor {str(inside)!r}"
    )


# --- built in ----------------------------------------------------------------------------------


def record_of(
    spec: str, weights: Path | None, model: ModelIdentity, dtype: str = ""
) -> ModelRecord:
    """How to load the model again, from any folder."""
    spec, *attached = split_attached(spec)
    if attached:
        base = record_of(spec, weights, model, dtype)
        names = [_in_workspace(find_autoencoder(a).resolve()) for a in attached]
        return replace(base, spec="+".join([base.spec, *names]))
    spec = _with_scheme(spec)
    scheme, _, rest = spec.partition(":")
    if scheme in ("tl", "hf") and rest and Path(rest).exists():  # a local folder
        spec = f"{scheme}:{Path(rest).resolve()}"
    record = ModelRecord.of(spec, model, str(weights.resolve()) if weights else None)
    return replace(record, dtype=dtype)


def _with_scheme(spec: str) -> str:
    """The name of a model with its scheme: `python:` may be left out of a file of their own."""
    scheme, colon, _ = spec.partition(":")
    return spec if scheme != "python" and f"{scheme}{colon}" in MODELS else python_spec(spec)


def _in_workspace(path: Path) -> str:
    """An autoencoder by its name where it is the workspace's own, so that the workspace can be moved."""
    place = Workspace.default().root.resolve() / "saes"
    if not path.is_relative_to(place):
        return str(path)
    return f"sae/{path.relative_to(place).with_suffix('')}"


def _refuse_weights(name: str, weights: Path | None) -> None:
    if weights is not None:
        raise ValueError(
            f"weights {str(weights)!r}: model {name} comes with its weights and takes no file"
        )


def _cleanroom(name: str, weights: Path | None) -> HookedModel:
    _refuse_weights(name, weights)
    return HookedModel(
        CleanRoom(),
        ImageInput(3, 128, 128),
        name,
        classes=UNIT_NAMES["shape"],
        unit_names=UNIT_NAMES,
    )


def _shapes(name: str, weights: Path | None) -> HookedModel:
    path = weights or BUILTIN / "shapes.safetensors"
    module = shapes(len(CLASSES))
    load_weights(module.state_dict(), read_weights(path), repr(str(path)))
    return HookedModel(
        module, ImageInput(3, 64, 64, mean=(0.5,), std=(0.25,)), name, classes=CLASSES
    )


_ADDITION = 113
"""The modulus, the same as that of the trained `modular-addition`, which computes by the same algorithm."""

INDUCTION = {
    "d_model": 64, "d_head": 16, "n_heads": 4, "n_layers": 2, "n_ctx": N_CTX, "d_vocab": N_VOCAB,
    "attn_only": True, "normalization_type": None, "act_fn": "relu",
}  # fmt: skip
"""Configuration of the built-in induction model."""


def _induction(name: str, weights: Path | None) -> HookedModel:
    path = weights or BUILTIN / "induction.safetensors"
    bridge = native_bridge(**INDUCTION)
    load_native(bridge, read_weights(path), repr(str(path)))
    return HookedModel(bridge, TokenInput(N_VOCAB, N_CTX, bos=BOS), name)


def _induction_by_hand(name: str, weights: Path | None) -> HookedModel:
    _refuse_weights(name, weights)
    bridge = native_bridge(**by_hand.config(N_VOCAB, N_CTX))
    load_native(bridge, by_hand.weights(N_VOCAB, N_CTX), name)
    return HookedModel(bridge, TokenInput(N_VOCAB, N_CTX, bos=BOS), name)


def _addition_by_hand(name: str, weights: Path | None) -> HookedModel:
    _refuse_weights(name, weights)
    bridge = native_bridge(**addition.config(_ADDITION))
    load_native(bridge, addition.weights(_ADDITION), name)
    vocabulary = (*map(str, range(_ADDITION)), "=")
    return HookedModel(bridge, TokenInput(_ADDITION + 1, 3, vocabulary), name)


# --- by weights file ---------------------------------------------------------------------------


def _googlenet(name: str, weights: Path | None) -> HookedModel:
    path = find_weights("googlenet/bvlc_googlenet.safetensors", weights, name)
    module = googlenet()
    tensors = {_googlenet_key(k): v for k, v in read_weights(path).items()}
    load_weights(module.state_dict(), tensors, repr(str(path)))
    # Caffe's preprocessing: BGR in 0..255 less the mean colour of ImageNet, not divided by anything.
    spec = ImageInput(3, 224, 224, (104.0, 117.0, 123.0), (1.0,), 255.0, True, "margin-crop")
    aliases = {
        f"inception_{n}/output": f"mixed{n}"
        for n in ("3a", "3b", *(f"4{c}" for c in "abcde"), "5a", "5b")
    }
    return HookedModel(module, spec, name, aliases, classes=_imagenet_classes())


def _googlenet_key(key: str) -> str:
    """Convert the name of a parameter in Caffe: `inception_3a/5x5_reduce/bias` -> `mixed3a_5x5_bottleneck…`.

    >>> _googlenet_key("inception_3b/5x5/weight")
    'mixed3b_5x5_pre_relu.weight'
    """
    if key.count("/") < 1:
        return key
    layer, kind = key.rsplit("/", 1)
    stem = {"conv1/7x7_s2": "conv2d0", "conv2/3x3_reduce": "conv2d1", "conv2/3x3": "conv2d2"}
    if layer == "loss3/classifier":
        return f"softmax2_pre_activation.{kind}"
    if layer in stem:
        return f"{stem[layer]}_pre_relu.{kind}"
    block, _, branch = layer.partition("/")
    branch = branch.replace("pool_proj", "pool_reduce").replace("x3_reduce", "x3_bottleneck")
    branch = branch.replace("x5_reduce", "x5_bottleneck")
    return f"{block.replace('inception_', 'mixed')}_{branch}_pre_relu.{kind}"


def _imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes from the assets folder; numbers if the file is not there."""
    path = asset("images/imagenet500_labels.json")
    if path is None:
        return tuple(f"class {i}" for i in range(1000))
    return tuple(c["name"] for c in json.loads(path.read_text())["classes"])


CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def _cifar10_resnet20(name: str, weights: Path | None) -> HookedModel:
    path = find_weights("cifar_resnet/cifar10_resnet20.safetensors", weights, name)
    module = ResNet20()
    load_weights(module.state_dict(), read_weights(path), repr(str(path)))
    spec = ImageInput(3, 32, 32, IMAGENET_MEAN, IMAGENET_STD, resize="stretch")
    return HookedModel(module, spec, name, classes=CIFAR_CLASSES)


def _induction_infinite(name: str, weights: Path | None) -> HookedModel:
    path = find_weights("tiny/induction_head_infinite.safetensors", weights, name)
    bridge = native_bridge(
        d_model=48, d_head=12, n_heads=4, n_layers=2, n_ctx=85, d_vocab=128,
        attn_only=True, normalization_type=None, act_fn="relu",
    )  # fmt: skip
    _load_tutorial(bridge, path)
    return HookedModel(bridge, TokenInput(128, 85), name)


def _modular_addition(name: str, weights: Path | None) -> HookedModel:
    path = find_weights("tiny/wd_10-1_mod_addition_loss_curve.safetensors", weights, name)
    bridge = native_bridge(
        d_model=128, d_head=32, n_heads=4, n_layers=1, n_ctx=3, d_vocab=114, d_mlp=512,
        normalization_type=None, act_fn="relu",
    )  # fmt: skip
    _load_tutorial(bridge, path)
    return HookedModel(bridge, TokenInput(114, 3, (*map(str, range(113)), "=")), name)


def _load_tutorial(bridge: nn.Module, path: Path) -> None:
    tensors = read_weights(path)
    try:
        converted = from_hooked_transformer(tensors)
    except KeyError as error:
        raise ValueError(f"weights {str(path)!r} lack the tensor {error.args[0]!r}") from error
    load_native(bridge, converted, repr(str(path)))


def _stories260k(name: str, weights: Path | None) -> HookedModel:
    path = find_weights("tiny/stories260K.safetensors", weights, name)
    vocabulary = path.parent / "tok512.json"
    if not vocabulary.is_file():
        raise FileNotFoundError(f"model {name!r} needs its vocabulary {str(vocabulary)!r}")
    bridge = native_bridge(
        d_model=64, d_head=8, n_heads=8, n_key_value_heads=4, n_layers=5, n_ctx=512, d_vocab=512,
        d_mlp=172, gated_mlp=True, act_fn="silu", normalization_type="RMS", final_rms=True,
        positional_embedding_type="rotary",
    )  # fmt: skip
    try:
        converted = from_llama2c(read_weights(path))
    except KeyError as error:
        raise ValueError(f"weights {str(path)!r} lack the tensor {error.args[0]!r}") from error
    load_native(bridge, converted, repr(str(path)))
    try:
        pieces = [(str(piece), float(score)) for piece, score in json.loads(vocabulary.read_text())]
    except (ValueError, TypeError) as error:
        raise ValueError(f"vocabulary {str(vocabulary)!r} is damaged: {error}") from error
    words = tuple(piece for piece, _ in pieces)
    # Encoded by the vocabulary file alone, so that no package for SentencePiece is needed.
    encoder = by_merges(words, [score for _, score in pieces])
    return HookedModel(bridge, TokenInput(512, 512, words, bos=1, encoder=encoder), name)


# --- by package --------------------------------------------------------------------------------


def _tl(name: str, weights: Path | None) -> HookedModel:
    _refuse_weights(f"tl:{name}", weights)
    try:
        bridge = huggingface_bridge(name, _stored_precision(name))
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        if Path(name).is_dir():
            reason = first.split(". ")[0]  # what follows is a list of a hundred names
            raise ValueError(
                f"model 'tl:{name}' is a folder, but TransformerLens has no bridge for what is in it: {reason}"
            ) from error
        raise FileNotFoundError(
            f"model 'tl:{name}' could not be loaded: it is neither a local folder nor available from "
            f"the Hugging Face hub ({first})"
        ) from error
    tokenizer, encoder = bridge.tokenizer, None
    if tokenizer is not None:
        encoder = by_tokenizer(tokenizer)
    vocabulary = _vocabulary(tokenizer, bridge.cfg.d_vocab)
    bos = getattr(tokenizer, "bos_token_id", None)
    filler = getattr(tokenizer, "pad_token_id", None) or 0
    if (
        filler >= bridge.cfg.d_vocab
    ):  # a padding token that was added to the tokenizer, but not to the model
        filler = 0
    spec = TokenInput(bridge.cfg.d_vocab, bridge.cfg.n_ctx, vocabulary, bos, encoder, filler)
    return HookedModel(bridge, spec, f"tl:{name}")


def _stored_precision(name: str) -> torch.dtype:
    """The type of the weights in a local folder, as its configuration says; float32 for models of the hub."""
    path = Path(name) / "config.json"
    if not path.is_file():
        return torch.float32
    stated = json.loads(path.read_text())
    return precision_named(stated.get("dtype") or stated.get("torch_dtype") or "float32")


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


def _huggingface(name: str, weights: Path | None) -> HookedModel:
    _refuse_weights(f"hf:{name}", weights)
    from transformers import AutoModelForImageClassification

    try:
        module = AutoModelForImageClassification.from_pretrained(name, dtype="auto")
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"model 'hf:{name}' could not be loaded: it is neither a local folder nor available from "
            f"the Hugging Face hub ({first}); language models load as tl:{name}"
        ) from error
    config = module.config
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    labels = getattr(config, "id2label", None) or {}
    mean, std = _huggingface_preprocessing(name)
    spec = ImageInput(getattr(config, "num_channels", 3), height, width, mean, std)
    classes = [str(labels[i]) for i in sorted(labels)]
    return HookedModel(module.eval(), spec, f"hf:{name}", classes=classes)


def _huggingface_preprocessing(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation from the model's preprocessor file; those of ImageNet without such a file."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
    )
    if path is None:
        log.warning(
            "model hf:%s comes without preprocessor_config.json: using ImageNet's mean and std",
            name,
        )
        return IMAGENET_MEAN, IMAGENET_STD
    stated = json.loads(Path(path).read_text())
    if not stated.get("do_normalize", True):
        return (0.0,), (1.0,)
    mean, std = stated.get("image_mean", IMAGENET_MEAN), stated.get("image_std", IMAGENET_STD)
    return tuple(map(float, mean)), tuple(map(float, std))


def _torchvision(name: str, weights: Path | None) -> HookedModel:
    try:
        zoo = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"model 'torchvision:{name}' needs torchvision, which cannot be imported here "
            f"({str(error).splitlines()[0]}); install the build that matches your torch"
        ) from error
    if name not in zoo.list_models():
        raise unknown("torchvision model", name, zoo.list_models())
    published = zoo.get_model_weights(name).DEFAULT
    if weights is None:
        try:
            module = zoo.get_model(name, weights=published)
        except OSError as error:
            raise FileNotFoundError(
                f"model 'torchvision:{name}' needs its weights: the download failed ({error}); "
                "pass --weights PATH"
            ) from error
    else:
        module = zoo.get_model(name, weights=None)
        load_weights(module.state_dict(), read_weights(weights), repr(str(weights)))
    transforms = published.transforms()
    crop = transforms.crop_size[0]
    mean, std = tuple(transforms.mean), tuple(transforms.std)
    spec = ImageInput(3, crop, crop, mean, std, resize="margin-crop")
    classes = published.meta.get("categories", ())
    return HookedModel(module.eval(), spec, f"torchvision:{name}", classes=classes)


def _python(name: str, weights: Path | None) -> HookedModel:
    """A factory that the user names; this runs the user's code."""
    made = call_factory("model", name)
    module = made.module if isinstance(made, HookedModel) else made
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"model 'python:{name}': its factory returned {type(made).__name__}, expected a "
            "torch module or a HookedModel"
        )
    if weights is not None:
        load_weights(module.state_dict(), read_weights(weights), repr(str(weights)))
    if isinstance(made, HookedModel):
        return made
    shape = getattr(module, "input_shape", None)
    if shape is None:
        raise ValueError(
            f"model 'python:{name}' has no input_shape: set input_shape = (channels, height, width) on the module, "
            "or return a HookedModel"
        )
    return HookedModel(module, tuple(shape), f"python:{name}")


MODELS: dict[str, ModelEntry] = {
    entry.name.partition("NAME")[0].partition("MODULE")[0]: entry
    for entry in (
        ModelEntry("cleanroom", "a curve detector written by hand, from Gabor filters to circles", _cleanroom),
        ModelEntry("shapes", "small inception-style CNN trained on drawings", _shapes),
        ModelEntry("induction", "2-layer attention-only transformer that copies", _induction),
        ModelEntry("induction-by-hand", "the same algorithm with weights written by hand", _induction_by_hand),
        ModelEntry("addition-by-hand", "addition mod 113 with five frequencies, written by hand", _addition_by_hand),
        ModelEntry("googlenet", "GoogLeNet (BVLC), ImageNet; needs its weights file", _googlenet),
        ModelEntry("cifar10-resnet20", "ResNet-20, CIFAR-10; needs its weights file", _cifar10_resnet20),
        ModelEntry("stories260k", "Llama-style language model, 5 layers; needs its weights file", _stories260k),
        ModelEntry("induction-infinite", "2-layer attention-only; needs its weights file", _induction_infinite),
        ModelEntry("modular-addition", "1 layer, addition mod 113; needs its weights file", _modular_addition),
        ModelEntry("python:MODULE:FACTORY", "your own: an importable function or FILE.py:FUNCTION", _python),
        ModelEntry("tl:NAME", "TransformerLens, by hub name or local folder", _tl),
        ModelEntry("hf:NAME", "Hugging Face image classifier, by hub name or local folder", _huggingface),
        ModelEntry("torchvision:NAME", "torchvision, if it is installed", _torchvision),
    )
}  # fmt: skip
"""Every model that `load_model` knows, by its name or by its scheme with the colon (`tl:`)."""
