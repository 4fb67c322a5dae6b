"""Saliency maps: one function for every method of input attribution."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from circuits.attribution.lrp import relevance
from circuits.attribution.passes import INPUT, Passes, Size, sized
from circuits.attribution.results import Attribution, input_site
from circuits.autograd import recording_gradients
from circuits.examples import Examples, as_examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.progress import Progress
from circuits.saliency import cams, gradients, masking, surrogates
from circuits.saliency.perturbations import MASKS
from circuits.tasks.targets import Target, as_target
from circuits.units import Site, Unit

Method = Literal[
    "gradient", "gradient_x_input", "smoothgrad", "vargrad", "smoothgrad_squared", "guided_backprop",
    "integrated_gradients", "relevance", "occlusion", "rise", "grad_cam", "grad_cam_plus_plus",
    "smooth_grad_cam_plus_plus", "guided_grad_cam", "lime", "kernel_shap",
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)

SLOPES: frozenset[Method] = frozenset(
    {
        "gradient",
        "smoothgrad",
        "vargrad",
        "smoothgrad_squared",
        "guided_backprop",
        "guided_grad_cam",
    }
)
"""Methods that give slopes: their values say how much a pixel matters but not in which direction its presence acts, so
pixels are ranked by absolute value."""

Made = tuple[Tensor, Tensor | None, dict[str, Any]]
"""Values, the residual of their sum, and the values used for adaptive options."""


@recording_gradients()
def saliency_map(
    model: HookedModel,
    examples: Examples | Tensor,
    target: str | Unit | Target = "top",
    method: Method = "integrated_gradients",
    *,
    site: str | Site | None = None,
    seed: int = 0,
    batch: int = 32,
    size: Size = "refuse",
    progress: Progress | None = None,
    **options: Any,
) -> Attribution:
    """Attribute a target's value to the pixels of images.

    Args:
        model: an image model.
        examples: images; tensors are as the model takes them (`input.normalize` converts images in 0..1).
        target: each image's prediction (`top`), a class, or a unit anywhere; see `parse_target`.
        method: the method, documented with its options where it is defined: `circuits.saliency.gradients` (gradient,
            gradient_x_input, smoothgrad, vargrad, smoothgrad_squared, guided_backprop, integrated_gradients),
            `circuits.attribution.relevance`, `.masking` (occlusion, rise), `.cams` (grad_cam, grad_cam_plus_plus,
            smooth_grad_cam_plus_plus, guided_grad_cam), `.surrogates` (lime, kernel_shap).
        site: where class activation maps are taken; the last map before the output if not given.
        seed: seed of noise, masks and subsets.
        batch: versions of an image in one pass, which bounds memory.
        size: what to do with images of another size.
        progress: called with the work done and the total.
        options: options of the method, such as `samples`, `steps`, `window`, `blank`, `segments`.

    Returns:
        The attribution: one value for each channel of a pixel for gradients and relevance, else one for each pixel.

    Raises:
        KeyError: if a site or class is unknown.
        TypeError: if the method has no such option.
        ValueError: if examples, target or an option do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    spec = model.input
    if not isinstance(spec, ImageInput):
        raise ValueError(
            f"model {model.name} takes tokens: expected an image model (use attribute() at a site)"
        )
    check_options(method, options)
    goal = as_target(model, target)
    if site is not None and not (method.endswith("cam") or "cam_" in method):
        raise ValueError(
            f"site {str(site)!r}: only class activation maps take a site, method {method!r} does not"
        )
    # Chosen here and not in `cams`, so that the record says which site it was.
    if site is None and "cam" in method:
        site = cams.last_map(model, goal)
    if method == "relevance":
        made = relevance(
            model, examples, goal, batch=batch, size=size, progress=progress, **options
        )
        return replace(made, seed=seed)
    given = as_examples(model, examples)
    passes = Passes(model, sized(model, given, size), goal, site, batch, size="keep")
    seeded = {"seed": seed} if "seed" in _parameters(method) else {}
    made = _MAKERS[method](passes, progress, **seeded, **options)
    values, residual, used = made if isinstance(made, tuple) else (made, None, {})
    place = input_site(spec)
    settings = _recorded(method, options) | used
    if site is not None:
        settings["site"] = str(site)
    return Attribution(
        method, INPUT, place.axes, 1, values.detach().contiguous(), str(goal), tuple(passes.aim.names()),
        passes.values, residual, {}, str(settings.get("blank", "")), settings, model.name, model.hash,
        given.describe(), seed, ceiling=goal.ceiling(model),
    )  # fmt: skip


def check_options(method: str, options: Mapping[str, Any]) -> None:
    """Raise TypeError if a method, or a mask of `MASKS`, does not have an option, or an option has the wrong type."""
    fitting_options(f"method {method}", _function(method), options, _parameters(method))


def _function(method: str) -> Callable[..., Any]:
    known: dict[str, Callable[..., Any]] = {"relevance": relevance, **_FUNCTIONS, **MASKS}
    return known[method]


def fitting_options(
    what: str, function: Callable[..., Any], options: Mapping[str, Any], known: Iterable[str]
) -> None:
    """Raise TypeError if a function does not have an option, or an option does not have its annotated type."""
    names = [name for name in known if name != "seed"]
    parameters = inspect.signature(inspect.unwrap(function)).parameters
    for name, value in options.items():
        if name not in names:
            raise TypeError(f"{what} has no option {name!r}: expected {', '.join(names) or 'none'}")
        # Annotations are text in these modules (postponed evaluation), such as `float | None`.
        kinds = str(parameters[name].annotation).split(" | ")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = (
            isinstance(value, Tensor)
            or (value is None and "None" in kinds)
            or (number and ("float" in kinds or ("int" in kinds and isinstance(value, int))))
            or (isinstance(value, str) and not {"int", "float"} & set(kinds))
            or not isinstance(value, str | int | float | None)
        )
        if not fits:
            expected = (
                "a whole number" if "int" in kinds else "a number" if "float" in kinds else "a name"
            )
            raise TypeError(f"option {name} {value!r} of {what}: expected {expected}")


def _recorded(method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they are recorded, defaults too."""
    values = {k: v for k, v in _parameters(method).items() if k != "seed"} | dict(options)
    return {k: "given" if isinstance(v, Tensor) else v for k, v in values.items()}


def _parameters(method: str) -> dict[str, Any]:
    """A method's options and their defaults."""
    function = _function(method)
    # What `saliency_map` itself fills in is no option of a method.
    own = (
        "model",
        "examples",
        "target",
        "site",
        "passes",
        "progress",
        "batch",
        "size",
        "of",
        "cam",
        "area",
        "variant",
    )
    found = inspect.signature(function).parameters
    return {name: p.default for name, p in found.items() if name not in own}


def _gradient_x_input(passes: Passes, progress: Progress | None) -> Tensor:
    return passes.inputs * gradients.gradient(passes, progress)


def _cam(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def enlarged(passes: Passes, progress: Progress | None, **options: Any) -> Tensor:
        height, width = passes.inputs.shape[-2:]
        found = cams.enlarged(made(passes, **options), (height, width))
        if progress is not None:
            progress(len(passes), len(passes))
        return found

    return enlarged


def _guided_cam(passes: Passes, progress: Progress | None) -> Tensor:
    cam = _cam(cams.grad_cam)(passes, progress)
    return cams.guided_grad_cam(passes.model, passes.inputs, passes.target, cam, passes.batch)


def _smoothed(of: gradients.Smoothing) -> Callable[..., Tensor]:
    def smooth(passes: Passes, progress: Progress | None, **options: Any) -> Tensor:
        return gradients.smooth_gradient(passes, of=of, progress=progress, **options)

    return smooth


def _with_progress(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda passes, progress, **options: function(passes, progress=progress, **options)


_MAKERS: dict[str, Callable[..., Tensor | Made]] = {
    "gradient": _with_progress(gradients.gradient),
    "gradient_x_input": _gradient_x_input,
    "smoothgrad": _smoothed("mean"),
    "vargrad": _smoothed("variance"),
    "smoothgrad_squared": _smoothed("square"),
    "guided_backprop": _with_progress(gradients.guided_gradient),
    "integrated_gradients": _with_progress(gradients.integrated_gradient),
    "occlusion": _with_progress(masking.occlusion),
    "rise": _with_progress(masking.rise),
    "grad_cam": _cam(cams.grad_cam),
    "grad_cam_plus_plus": _cam(cams.grad_cam_plus_plus),
    "smooth_grad_cam_plus_plus": _cam(cams.smooth_grad_cam_plus_plus),
    "guided_grad_cam": _guided_cam,
    "lime": _with_progress(surrogates.lime),
    "kernel_shap": _with_progress(surrogates.kernel_shap),
}

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gradient": gradients.gradient,
    "gradient_x_input": gradients.gradient,
    "smoothgrad": gradients.smooth_gradient,
    "vargrad": gradients.smooth_gradient,
    "smoothgrad_squared": gradients.smooth_gradient,
    "guided_backprop": gradients.guided_gradient,
    "integrated_gradients": gradients.integrated_gradient,
    "occlusion": masking.occlusion,
    "rise": masking.rise,
    "grad_cam": cams.grad_cam,
    "grad_cam_plus_plus": cams.grad_cam_plus_plus,
    "smooth_grad_cam_plus_plus": cams.smooth_grad_cam_plus_plus,
    "guided_grad_cam": cams.grad_cam,
    "lime": surrogates.lime,
    "kernel_shap": surrogates.kernel_shap,
}
"""Where each method's options are documented."""
