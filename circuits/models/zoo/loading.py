"""Loading models by name: from what a person types to a `HookedModel`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from circuits.autoencoders.files import FILE, load_autoencoder
from circuits.autograd import recording_gradients
from circuits.cleanroom import addition
from circuits.cleanroom import induction as by_hand
from circuits.cleanroom.network import UNIT_NAMES, CleanRoom
from circuits.environment import ASSETS
from circuits.factories import call_factory
from circuits.json_files import read_json
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput, TokenInput
from circuits.models.adapter.tokenizing import by_merges
from circuits.models.zoo.declarations import declared_attention
from circuits.models.zoo.efficientnet import VARIANTS, EfficientNetLite, folded, stream_names
from circuits.models.zoo.inception import googlenet, shapes
from circuits.models.zoo.packages import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    converted,
    huggingface,
    refuse_weights,
    timm,
    torchvision,
    transformer_lens,
)
from circuits.models.zoo.placement import device_named, in_precision, on_device, precision_named
from circuits.models.zoo.resnet import ResNet20
from circuits.models.zoo.transformers import (
    from_hooked_transformer,
    from_llama2c,
    load_native,
    native_bridge,
)
from circuits.models.zoo.weights_files import (
    Untrained,
    Weights,
    asset,
    find_weights,
    load_weights,
    packaged_weights,
    parse_weights,
    read_baked,
    read_weights,
)
from circuits.specs import python_spec, split_attached, split_key
from circuits.stimuli.repeats import BOS, N_CTX, N_VOCAB
from circuits.stimuli.shapes import CLASSES
from circuits.units import unknown
from circuits.workspace import ModelIdentity, ModelRecord, Workspace

BUILTIN = Path(__file__).parent / "builtin"
"""Where the trained built-in models' weights and cards are."""

Loader = Callable[[str, Weights], HookedModel]
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class ModelEntry:
    """One line of `circuits models`.

    Attributes:
        name: the name to type, or its form (`tl:NAME`).
        summary: what it is and what it needs.
        load: function from the typed name and which weights it gets to the model.
    """

    name: str
    summary: str
    load: Loader

    @property
    def by_hand(self) -> bool:
        """Whether its weights are what the package or a factory makes, so that there are no untrained ones."""
        return self.name in (
            "cleanroom", "induction-by-hand", "addition-by-hand", "python:MODULE:FACTORY",
        )  # fmt: skip

    @property
    def builtin(self) -> bool:
        """Whether the model comes with the package."""
        return self.name in (
            "cleanroom",
            "shapes",
            "induction",
            "addition",
            "induction-by-hand",
            "addition-by-hand",
            "efficientnet-lite0",
        )


@recording_gradients()
def load_model(
    spec: str,
    weights: str | Path | None = None,
    seed: int | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> HookedModel:
    """Load a model by name.

    Args:
        spec: a name that `circuits models` lists; `python:module:factory` (a function without required arguments
            that returns a `HookedModel`, or an `nn.Module` with an `input_shape`) or `FILE.py:FUNCTION`; `tl:NAME`,
            `gguf:PATH`, `hf:NAME`, `torchvision:NAME` or `timm:NAME`. After it may come `+PATH` for each autoencoder to
            attach: a file, its folder, or its name in the workspace (`googlenet+sae/curves`).
        weights: a safetensors file, a `.pt` file of plain tensors, or `untrained` for random weights, which the
            model's name then says.
        seed: of untrained weights, 0 if not given; `weights="untrained:SEED"` is the same in one word.
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
    model = _named(spec, weights, seed)
    if kind is not None:
        model = in_precision(model, kind)
    if attached:
        model = attach_files(model, attached)
    return model if place is None else on_device(model, place)


def _named(spec: str, weights: str | Path | None, seed: int | None) -> HookedModel:
    """A model by name, as it is stored, without autoencoders."""
    chosen = parse_weights(weights)
    if seed is not None:
        if chosen != Untrained():
            raise ValueError(
                f"seed {seed} is for untrained weights: expected weights 'untrained', got {str(weights)!r}"
            )
        chosen = parse_weights(f"untrained:{seed}")
    spec = _with_scheme(spec)
    scheme, _, rest = spec.partition(":")
    if spec.endswith(":") and spec in MODELS:
        raise ValueError(
            f"model {spec!r} has no name after the colon: expected {MODELS[spec].name}"
        )
    entry = MODELS.get(f"{scheme}:" if rest else spec)
    if entry is None:
        raise unknown("model", spec, [e.name for e in MODELS.values()])
    # A file that `circuits.edits.bake` wrote has the names of `state_dict()`, not those of the published weights,
    # which the loader would convert: it replaces all weights of a model that needs no others before.
    if isinstance(chosen, Path) and (about := read_baked(chosen)):
        model = _loaded(entry, rest or spec, None if entry.by_hand else Untrained())
        _fill(model.module, chosen)
        _check_baked(model, chosen, about)
        return model
    model = _loaded(entry, rest or spec, chosen)
    if isinstance(chosen, Untrained):
        model.name = chosen.named(model.name)
    return model


def _check_baked(model: HookedModel, path: Path, about: Mapping[str, str]) -> None:
    """Raise ValueError if baked weights are those of another model, which happens to have the same shapes."""
    # By the name, too: other versions of the libraries below may give the same model another hash.
    name, made = about.get("circuits.model", ""), about.get("circuits.hash", "")
    if name != model.name and not model.has_hash(made):
        raise ValueError(
            f"weights {str(path)!r} were baked from {name!r}, with a model of hash {made[:16]!r} as result: "
            f"in {model.name} they give {model.hash[:16]}; expected the model that they were baked from"
        )


def _loaded(entry: ModelEntry, name: str, weights: Weights) -> HookedModel:
    """The model of an entry; untrained weights are drawn by their seed, which leaves the caller's generator alone."""
    if not isinstance(weights, Untrained):
        return entry.load(name, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights.seed)
        return entry.load(name, weights)


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
    place = workspace or Workspace.default()
    inside = place.autoencoder_path(path.removeprefix("sae/"))
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
    names = list(list_autoencoders(place))
    known = f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}" or "none"
    raise FileNotFoundError(
        f"there is no autoencoder {path!r}: it is neither a file or folder, nor in the workspace {str(place.root)!r}, "
        f"which has {known}"
    )


# --- built in ----------------------------------------------------------------------------------


def record_of(
    spec: str, weights: str | Path | None, model: ModelIdentity, dtype: str = ""
) -> ModelRecord:
    """How to load the model again, from any folder."""
    spec, *attached = split_attached(spec)
    if attached:
        base = record_of(spec, weights, model, dtype)
        names = [_in_workspace(find_autoencoder(a).resolve()) for a in attached]
        return replace(base, spec="+".join([base.spec, *names]))
    spec = _with_scheme(spec)
    scheme, _, rest = spec.partition(":")
    place, tower = split_key(rest) if scheme == "hf" else (rest, "")
    # A local folder or file; what was fetched or converted is found by the workspace that is looked at.
    if scheme in ("tl", "hf", "gguf") and rest and Path(place).expanduser().exists():
        spec = ":".join(
            [scheme, str(Path(place).expanduser().resolve()), *([tower] if tower else [])]
        )
    chosen = parse_weights(weights)
    kept = str(chosen.resolve() if isinstance(chosen, Path) else chosen) if chosen else None
    return replace(ModelRecord.of(spec, model, kept), dtype=dtype)


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


def _refuse_weights(name: str, weights: Weights) -> None:
    refuse_weights(name, weights)
    if weights is not None:
        raise ValueError(
            f"weights {str(weights)!r}: model {name} is written by hand and was never trained: leave weights out"
        )


def _fill(module: nn.Module, weights: Path | Untrained, convert: Convert = dict) -> None:
    """Copy a file's weights into a model, named by `convert`; nothing is to be done for untrained ones."""
    if isinstance(weights, Untrained):
        return
    tensors = read_weights(weights)
    try:
        converted = convert(tensors)
    except KeyError as error:
        raise ValueError(f"weights {str(weights)!r} lack the tensor {error.args[0]!r}") from error
    except (IndexError, RuntimeError) as error:  # converting takes tensors apart by their axes
        raise ValueError(
            f"weights {str(weights)!r} have tensors of other shapes than the model's: expected those that it was "
            "published with"
        ) from error
    load_weights(module.state_dict(), converted, repr(str(weights)))


def _seed(weights: Weights) -> int:
    """The seed of a native bridge, which draws its weights by a generator of its own."""
    return weights.seed if isinstance(weights, Untrained) else 0


def _cleanroom(name: str, weights: Weights) -> HookedModel:
    _refuse_weights(name, weights)
    return HookedModel(
        CleanRoom(),
        ImageInput(3, 128, 128),
        name,
        classes=UNIT_NAMES["shape"],
        unit_names=UNIT_NAMES,
    )


def _shapes(name: str, weights: Weights) -> HookedModel:
    module = shapes(len(CLASSES))
    _fill(module, weights or BUILTIN / "shapes.safetensors")
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

ADDITION = {
    "d_model": 128, "d_head": 32, "n_heads": 4, "n_layers": 1, "n_ctx": 3, "d_vocab": _ADDITION + 1, "d_mlp": 512,
    "normalization_type": None, "act_fn": "relu",
}  # fmt: skip
"""Configuration of networks that learned addition mod 113, as in Nanda et al. (2023)."""


def _addition(name: str, weights: Weights) -> HookedModel:
    bridge = native_bridge(seed=_seed(weights), **ADDITION)
    _fill(bridge, weights or BUILTIN / "addition.safetensors")
    return HookedModel(
        bridge, TokenInput(_ADDITION + 1, 3, (*map(str, range(_ADDITION)), "=")), name
    )


def _induction(name: str, weights: Weights) -> HookedModel:
    bridge = native_bridge(seed=_seed(weights), **INDUCTION)
    _fill(bridge, weights or BUILTIN / "induction.safetensors")
    return HookedModel(bridge, TokenInput(N_VOCAB, N_CTX, bos=BOS), name)


def _induction_by_hand(name: str, weights: Weights) -> HookedModel:
    _refuse_weights(name, weights)
    bridge = native_bridge(**by_hand.config(N_VOCAB, N_CTX))
    load_native(bridge, by_hand.weights(N_VOCAB, N_CTX), name)
    return HookedModel(bridge, TokenInput(N_VOCAB, N_CTX, bos=BOS), name)


def _addition_by_hand(name: str, weights: Weights) -> HookedModel:
    _refuse_weights(name, weights)
    bridge = native_bridge(**addition.config(_ADDITION))
    load_native(bridge, addition.weights(_ADDITION), name)
    vocabulary = (*map(str, range(_ADDITION)), "=")
    return HookedModel(bridge, TokenInput(_ADDITION + 1, 3, vocabulary), name)


# --- by weights file ---------------------------------------------------------------------------


def _googlenet(name: str, weights: Weights) -> HookedModel:
    path = find_weights("googlenet/bvlc_googlenet.safetensors", weights, name)
    module = googlenet()
    _fill(module, path, lambda tensors: {_googlenet_key(k): v for k, v in tensors.items()})
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
    """The names of ImageNet's 1000 classes, as torchvision lists them."""
    return tuple((BUILTIN / "imagenet_classes.txt").read_text(encoding="utf-8").split("\n")[:1000])


def _efficient(name: str, weights: Weights) -> HookedModel:
    variant = VARIANTS[name]
    path = weights or packaged_weights(name)
    tensors = {} if isinstance(path, Untrained) else read_weights(path)
    module, n_classes = EfficientNetLite(variant), 1000
    if not isinstance(path, Untrained):
        source = repr(str(path))
        try:
            converted = folded(tensors, name)
            n_classes = len(converted["logits.weight"])
            module = EfficientNetLite(variant, n_classes)
        except KeyError as error:
            raise ValueError(f"weights {source} lack the tensor {error.args[0]!r}") from error
        except ValueError as error:
            raise ValueError(f"weights {source} {error}") from error
        load_weights(module.state_dict(), converted, source)
    # As in training: (x - 127) / 128 of bytes, from a photograph whose shorter side is 32 pixels more than the input's.
    spec = ImageInput(3, variant.size, variant.size, (127.0,), (128.0,), 255.0, False, "margin-32")
    classes = _imagenet_classes() if n_classes == 1000 else ()
    return HookedModel(module, spec, name, stream_names(variant), classes=classes)


CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def _cifar10_resnet20(name: str, weights: Weights) -> HookedModel:
    path = find_weights("cifar_resnet/cifar10_resnet20.safetensors", weights, name)
    module = ResNet20()
    _fill(module, path)
    spec = ImageInput(3, 32, 32, IMAGENET_MEAN, IMAGENET_STD, resize="stretch")
    return HookedModel(module, spec, name, classes=CIFAR_CLASSES)


def _induction_infinite(name: str, weights: Weights) -> HookedModel:
    path = find_weights("tiny/induction_head_infinite.safetensors", weights, name)
    bridge = native_bridge(
        seed=_seed(weights), d_model=48, d_head=12, n_heads=4, n_layers=2, n_ctx=85, d_vocab=128,
        attn_only=True, normalization_type=None, act_fn="relu",
    )  # fmt: skip
    _fill(bridge, path, from_hooked_transformer)
    return HookedModel(bridge, TokenInput(128, 85), name)


def _modular_addition(name: str, weights: Weights) -> HookedModel:
    path = find_weights("tiny/wd_10-1_mod_addition_loss_curve.safetensors", weights, name)
    bridge = native_bridge(seed=_seed(weights), **ADDITION)
    _fill(bridge, path, from_hooked_transformer)
    return HookedModel(bridge, TokenInput(114, 3, (*map(str, range(113)), "=")), name)


def _stories260k(name: str, weights: Weights) -> HookedModel:
    path = find_weights("tiny/stories260K.safetensors", weights, name)
    untrained = isinstance(path, Untrained)
    vocabulary = asset("weights/tiny/tok512.json") if untrained else path.parent / "tok512.json"
    if vocabulary is None or not vocabulary.is_file():
        where = vocabulary or f"weights/tiny/tok512.json in the folder that {ASSETS} names"
        raise FileNotFoundError(f"model {name!r} needs its vocabulary {str(where)!r}")
    bridge = native_bridge(
        seed=_seed(weights), d_model=64, d_head=8, n_heads=8, n_key_value_heads=4, n_layers=5, n_ctx=512, d_vocab=512,
        d_mlp=172, gated_mlp=True, act_fn="silu", normalization_type="RMS", final_rms=True,
        positional_embedding_type="rotary",
    )  # fmt: skip
    _fill(bridge, path, from_llama2c)
    try:
        pieces = [(str(piece), float(score)) for piece, score in read_json(vocabulary, "it")]
    except (ValueError, TypeError) as error:
        raise ValueError(f"vocabulary {str(vocabulary)!r} is damaged: {error}") from error
    words = tuple(piece for piece, _ in pieces)
    # Encoded by the vocabulary file alone, so that no package for SentencePiece is needed.
    encoder = by_merges(words, [score for _, score in pieces])
    return HookedModel(bridge, TokenInput(512, 512, words, bos=1, encoder=encoder), name)


# --- converted: `circuits.models.zoo.converting`, which is imported when it is needed -------------


def _smollm2(name: str, weights: Weights) -> HookedModel:
    from circuits.models.zoo.fetching import fetched_folder

    folder, begins_texts = fetched_folder(name, Workspace.default())
    return converted(folder, name, weights, begins_texts)


def _gguf(name: str, weights: Weights) -> HookedModel:
    from circuits.models.zoo.converting import convert_gguf, read_source

    spec = f"gguf:{name}"
    folder = convert_gguf(spec)
    again = f"delete {str(folder)!r} to have it made again"
    stated = read_source(folder, f"model {spec!r}", again)
    return converted(folder, spec, weights, bool(stated.get("begins_texts")))


# --- by package: `circuits.models.zoo.packages` -------------------------------------------------


def _python(name: str, weights: Weights) -> HookedModel:
    """A factory that the user names; this runs the user's code."""
    made = call_factory("model", name)
    module = made.module if isinstance(made, HookedModel) else made
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"model 'python:{name}': its factory returned {type(made).__name__}, expected a "
            "torch module or a HookedModel"
        )
    if isinstance(weights, Untrained):
        raise ValueError(
            f"weights {str(weights)!r}: the factory of model 'python:{name}' makes its weights: leave weights out, and "
            "load none in the factory"
        )
    if weights is not None:
        _fill(module, weights)
    declared = declared_attention(name)
    if isinstance(made, HookedModel):
        return made.declaring(declared) if declared else made
    shape = getattr(module, "input_shape", None)
    if shape is None:
        raise ValueError(
            f"model 'python:{name}' has no input_shape: set input_shape = (channels, height, width) on a module that "
            "takes images, or return circuits.HookedModel(module, circuits.TokenInput(n_vocab, n_ctx)) for one that "
            "takes tokens"
        )
    return HookedModel(module, tuple(shape), f"python:{name}", attention=declared)


MODELS: dict[str, ModelEntry] = {
    re.split("NAME|MODULE|PATH", entry.name)[0]: entry
    for entry in (
        ModelEntry("cleanroom", "a curve detector written by hand, from Gabor filters to circles", _cleanroom),
        ModelEntry("shapes", "small inception-style CNN trained on drawings", _shapes),
        ModelEntry("induction", "2-layer attention-only transformer that copies", _induction),
        ModelEntry("addition", "1-layer transformer that learned addition mod 113", _addition),
        ModelEntry("induction-by-hand", "the same algorithm with weights written by hand", _induction_by_hand),
        ModelEntry("addition-by-hand", "addition mod 113 with five frequencies, written by hand", _addition_by_hand),
        ModelEntry("efficientnet-lite0", "EfficientNet-Lite0, ImageNet, 4.7 million weights", _efficient),
        *(
            ModelEntry(f"efficientnet-lite{i}", f"EfficientNet-Lite{i}, ImageNet; needs its weights", _efficient)
            for i in range(1, 5)
        ),
        ModelEntry("googlenet", "GoogLeNet (BVLC), ImageNet; needs its weights file", _googlenet),
        ModelEntry("cifar10-resnet20", "ResNet-20, CIFAR-10; needs its weights file", _cifar10_resnet20),
        ModelEntry("smollm2", "SmolLM2-135M-Instruct, a language model; `circuits fetch smollm2` gets it", _smollm2),
        ModelEntry("stories260k", "Llama-style language model, 5 layers; needs its weights file", _stories260k),
        ModelEntry("induction-infinite", "2-layer attention-only; needs its weights file", _induction_infinite),
        ModelEntry("modular-addition", "1 layer, addition mod 113; needs its weights file", _modular_addition),
        ModelEntry("python:MODULE:FACTORY", "your own: an importable function or FILE.py:FUNCTION", _python),
        ModelEntry("tl:NAME", "TransformerLens, by hub name or local folder", transformer_lens),
        ModelEntry("gguf:PATH", "language model in a GGUF file, as llama.cpp has them; needs the extra `gguf`", _gguf),
        ModelEntry("hf:NAME", "Hugging Face image model, by hub name or local folder", huggingface),
        ModelEntry("torchvision:NAME", "classifiers and segmentation of torchvision, if it is installed", torchvision),
        ModelEntry("timm:NAME", "image models of timm, if it is installed", timm),
    )
}  # fmt: skip
"""Every model that `load_model` knows, by its name or by its scheme with the colon (`tl:`)."""
