"""Unit maps: the units of a site laid out in two dimensions, with similar units close together.

What is alike is the cosine between vectors: of responses (how each unit answers to the examples of a store) or
of weights (what each unit is built from). Two dimensions cannot hold all of it, so a map comes with a number
that says how far to believe it, and the same number for a map of vectors that have nothing to do with each
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist
from threadpoolctl import threadpool_limits

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.topology import INPUT
from circuits.store import ActivationStore
from circuits.weights.expanded import expand_weights
from circuits.weights.raw import LayerWeights, raw_weights

Method = Literal["pca", "tsne"]

NEIGHBOURS = 10
"""How many neighbours of a unit are looked for on the map."""

_FEWEST = 3
_COMPONENTS = 50  # before t-SNE: the rest is mostly noise, and it takes its time
_PERPLEXITY = 30.0
_TIE = 1e-6  # cosines in float32 that differ by less are equal

_BLUR = 1.0  # positions
_FEWEST_CENTRED = 4  # of fewer units the mean is mostly each of them

Vectors = Float[np.ndarray, "unit number"]
Branches = Int[np.ndarray, " unit"]


@dataclass(frozen=True, eq=False)
class UnitMap:
    """The units of a site as points.

    A unit is silent if it has no direction: the same response to every example, or no weight but zero. The
    silent ones lie in a row below the map, and count in nothing.

    Attributes:
        site: whose units they are.
        xy: where each unit is; only distances mean something, in t-SNE only those between near units.
        method: how they were laid out: the first two principal components, or t-SNE.
        of: what the vectors are.
        kept: how far to believe the map: the share of a unit's 10 nearest on the map that are among its 10
            nearest in the full space, by cosine (equals of the tenth count too); the mean over units. Of
            fewer than 21 units that are not silent, half of the others take the place of 10. NaN if fewer
            than 3 are not silent.
        shuffled: what chance keeps: the same for a map, made the same way, of the same vectors with every
            column (an example, a weight) shuffled among the units. Higher than for points thrown at
            random: a map keeps some neighbours of whatever it is given, and what is close to the mean of all
            vectors is near to many.
        silent: the units without a direction.
        seed: of the layout and the shuffling.
        model_hash: of the weights.
        data: what the store's examples are; for weights, which weights they are.
        n: how many numbers describe a unit: examples, or weights.
        same_branch: where layers write different units of the site (the branches of an inception module), the share of
            a unit's 10 nearest on the map that its own layer writes; NaN elsewhere.
        same_branch_by_chance: the same for neighbours drawn at random.
    """

    site: str
    xy: Float[np.ndarray, "unit 2"]
    method: Method
    of: Literal["responses", "weights"]
    kept: float
    shuffled: float
    silent: tuple[int, ...]
    seed: int
    model_hash: str
    data: str
    n: int
    same_branch: float = float("nan")
    same_branch_by_chance: float = float("nan")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it (NaN as null)."""
        raw = asdict(self) | {"xy": self.xy.tolist(), "silent": list(self.silent)}
        return {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in raw.items()}


def response_map(
    store: ActivationStore, site: str, method: Method = "tsne", seed: int = 0
) -> UnitMap:
    """Units that answer alike to the examples of a store lie together.

    A unit's vector is its largest activation on each example, less its mean, so that the cosine is the
    correlation. How strong a unit is does not count, then: with the examples' means taken away instead,
    units lie together because they are strong, and neighbours agree less with those by weights (`shapes`
    mixed3b on photographs: 25 % of the ten nearest instead of 31 %).

    Args:
        store: with the site in it.
        site: which.
        method: `tsne`, or `pca` for a map that is the same projection everywhere.
        seed: of the layout and of the baseline.

    Raises:
        KeyError: if the site was not recorded.
        ValueError: if it has fewer than 3 units, or the method or seed is none.
    """
    _check(method, seed)
    # Less their means: maxima behind a ReLU are all positive, and any two units would look alike.
    vectors = _centred(store.summary(site).maximum.T)
    provenance, name = store.provenance, store.sites[site].name
    return _mapped(name, vectors, method, "responses", seed, provenance.model_hash, provenance.data)


def weight_map(model: HookedModel, site: str, method: Method = "tsne", seed: int = 0) -> UnitMap:
    """Units that are built alike lie together.

    A unit's vector is its kernels from all units of the sites that are read directly, as they are: a weight
    of zero means something, so nothing is taken away. Where layers write different units of the site (the
    branches of an inception module) their kernels are from different units, and cosines between branches
    would be zero whatever the units do. There a unit's vector is its linear expanded weights from the first
    of the sites that are read, through everything between, if they reach all units. These still show above all
    which branch a unit is in: what a layer of 5 x 5 reads has another extent than what one of 1 x 1 does. So
    they are blurred by a position, and of each branch the mean direction is taken off. What is left of that is
    in `same_branch`. (GoogLeNet mixed3b, on 100 photographs: of the ten nearest 67 % are in the unit's branch, as
    they come 96 %, by responses 50 %, by chance 29 %; of the ten nearest in other branches 15 % are among the ten
    there that answer most alike, as they come 12 %; anywhere 16 % and 14 %. `shapes` mixed3b: 66 %, 98 %, 54 % and
    28 %; 18 % and 15 %; 28 % and 28 %; mixed3a: 58 %, 73 %, 45 % and 30 %; 21 % and 22 %; 23 % and 25 %.)

    Args:
        model: without edits in force.
        site: which.
        method: `tsne`, or `pca` for a map that is the same projection everywhere.
        seed: of the layout and of the baseline.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if it has fewer than 3 units or none with weights, the method or seed is none, or the
            model is edited.
    """
    _check(method, seed)
    vectors, data, branches = _incoming(model, model.site(site).name)
    return _mapped(
        model.site(site).name, vectors, method, "weights", seed, model.hash, data, branches
    )


def neighbours_kept(vectors: Vectors, xy: Float[np.ndarray, "unit 2"]) -> float:
    """The share of each unit's nearest on a map that are among its nearest by cosine; the mean over units.

    Nearest are `NEIGHBOURS`, or half of the others (rounded down) if they are fewer than twice as many.
    Units whose cosine equals that of the last of them count as well: either could have been it.

    Args:
        vectors: of the units, none of them zero.
        xy: where each is.

    Returns:
        0 to 1; NaN for fewer than 3 units.
    """
    nearest = _nearest(xy)
    k = nearest.shape[1]
    if not k:
        return float("nan")
    directions = _directions(vectors)
    with threadpool_limits(1):  # the bits depend on how many there are
        cosine = directions @ directions.T
    np.fill_diagonal(cosine, -np.inf)
    # The k-th largest cosine of each unit; ties with it count as neighbours too.
    least = np.partition(cosine, -k, axis=1)[:, -k, None]
    return float((np.take_along_axis(cosine, nearest, axis=1) >= least - _TIE).mean())


def _nearest(xy: Float[np.ndarray, "unit 2"]) -> Int[np.ndarray, "unit k"]:
    """The `NEIGHBOURS` units next to each on a map, or half of the others; none for fewer than 3 units."""
    distance = cdist(xy, xy)
    np.fill_diagonal(distance, np.inf)
    k = min(NEIGHBOURS, max(0, len(xy) - 1) // 2)
    return np.argsort(distance, axis=1, kind="stable")[:, :k]


# --- vectors -----------------------------------------------------------------------------------


def _check(method: str, seed: int) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method {method!r} is not one of {', '.join(get_args(Method))}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} must be 0 to {2**32 - 1}")


def _centred(maximum: Float[np.ndarray, "unit example"]) -> Vectors:
    """Each unit's responses less its mean; missing ones are its mean, and count for nothing."""
    finite = np.isfinite(maximum)
    values = np.where(finite, maximum, 0.0).astype(np.float64)
    mean = values.sum(1, keepdims=True) / finite.sum(1, keepdims=True).clip(min=1)
    centred = np.where(finite, values - mean, 0.0)
    # what is left of equal responses is rounding
    rounding = np.abs(centred).max(1, initial=0.0) <= 1e-6 * np.abs(values).max(1, initial=0.0)
    centred[rounding] = 0.0
    return centred


def _incoming(model: HookedModel, site: str) -> tuple[Vectors, str, Branches | None]:
    """What each unit is built from, what the numbers are, and each unit's branch if there are several."""
    order = [INPUT, *(s.name for s in model.sites)]
    layers = [layer for layer in model.weight_layers if any(w.site == site for w in layer.writes)]
    read = {r.site for layer in layers for r in layer.reads if r.direct}
    sources = sorted(read, key=order.index)
    if not sources:
        raise ValueError(_not_built(model, site))
    parts = [part for source in sources for part in raw_weights(model, source, site)]
    raw = _side_by_side(parts, model.n_units(site))
    branches = _branches(parts, model.n_units(site))
    if branches is not None:
        expanded = expand_weights(model, sources[0], site).weight.numpy()
        if not (raw.any(1) & ~expanded.reshape(len(expanded), -1).any(1)).any():
            what = f"expanded weights from {sources[0]}, blurred by a position and centred in each branch"
            return _comparable(expanded, branches), what, branches
    return raw, f"weights from {', '.join(sources)}", branches


def _branches(parts: Sequence[LayerWeights], n_units: int) -> Branches | None:
    """A number for each unit, the same for units that the same layers write; None if they are all the same."""
    writers = [
        tuple(k for k, part in enumerate(parts) if u in set(part.units)) for u in range(n_units)
    ]
    numbers = {layers: number for number, layers in enumerate(dict.fromkeys(writers))}
    return np.array([numbers[layers] for layers in writers]) if len(numbers) > 1 else None


def _comparable(weight: Float[np.ndarray, "unit source *offset"], branches: Branches) -> Vectors:
    """Weights of units of several branches as vectors that say what a unit does, and less where it sits."""
    kernel = tuple(range(2, weight.ndim))
    # A kernel of 1 x 1 has nothing where one of 5 x 5 has most of its weight.
    blurred = gaussian_filter(weight, _BLUR, axes=kernel, mode="constant") if kernel else weight
    vectors = _directions(blurred.reshape(len(weight), -1))
    for number in np.unique(branches):
        mine = np.flatnonzero((branches == number) & vectors.any(1))  # silent units stay zero
        if len(mine) >= _FEWEST_CENTRED:
            vectors[mine] -= vectors[mine].mean(0)
    return vectors


def _same_branch(points: Float[np.ndarray, "unit 2"], branches: Branches) -> tuple[float, float]:
    """The share of each unit's nearest on a map that are in its branch, and that of units drawn at random."""
    n, nearest = len(points), _nearest(points)
    if not nearest.size:
        return float("nan"), float("nan")
    same = branches[:, None] == branches
    share = np.take_along_axis(same, nearest, axis=1).mean()
    return float(share), float((same.sum(1) - 1).mean() / (n - 1))


def _not_built(model: HookedModel, site: str) -> str:
    built = {w.site for layer in model.weight_layers if layer.reads for w in layer.writes}
    names = [s.name for s in model.sites if s.name in built]
    known = f"{', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else "another model"
    return f"site {site!r} of {model.name} is built by no layer from another site; expected {known}"


def _side_by_side(parts: Sequence[LayerWeights], n_units: int) -> Vectors:
    """Kernels of several layers as one vector a unit, zero where a layer does not write it."""
    columns = []
    for part in parts:
        kernels = np.zeros((n_units, part.weight[0].numel()), np.float32)
        kernels[list(part.units)] = part.weight.flatten(1).numpy()
        columns.append(kernels)
    return np.concatenate(columns, axis=1)


def _directions(vectors: Vectors) -> Vectors:
    """Vectors of length 1; zero stays zero."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)


# --- layout ------------------------------------------------------------------------------------


def _mapped(
    site: str,
    vectors: Vectors,
    method: Method,
    of: Literal["responses", "weights"],
    seed: int,
    model_hash: str,
    data: str,
    branches: Branches | None = None,
) -> UnitMap:
    if len(vectors) < _FEWEST:
        raise ValueError(f"site {site!r} has {len(vectors)} units: a map takes at least {_FEWEST}")
    if not np.isfinite(vectors).all():
        raise ValueError(
            f"site {site!r} has {of} that are NaN or infinite: a map takes finite ones"
        )
    directions = _directions(vectors).astype(np.float32)
    loud = np.flatnonzero(directions.any(1))
    silent = np.setdiff1d(np.arange(len(vectors)), loud)
    directions = directions[loud]
    points = _laid_out(directions, method, seed)
    # Each number shuffled among the units by itself: columns keep their values, and units have nothing to do with each
    # other.
    noise = np.random.default_rng(seed).permuted(directions, axis=0)
    noise = _directions(noise[noise.any(1)])
    alike = (float("nan"),) * 2 if branches is None else _same_branch(points, branches[loud])
    return UnitMap(
        site=site,
        xy=_with_silent(points, loud, silent),
        method=method,
        of=of,
        kept=neighbours_kept(directions, points),
        shuffled=neighbours_kept(noise, _laid_out(noise, method, seed)),
        silent=tuple(silent.tolist()),
        seed=seed,
        model_hash=model_hash,
        data=data,
        n=vectors.shape[1],
        same_branch=alike[0],
        same_branch_by_chance=alike[1],
    )


def _laid_out(directions: Vectors, method: Method, seed: int) -> Float[np.ndarray, "unit 2"]:
    """A point for each direction.

    On one thread: the order of sums, and with it the bits, would depend on how many there are, and t-SNE of
    a few hundred points is many times slower where threads wait for each other.
    """
    reduced = _principal(directions, seed)
    n = len(reduced)
    if method == "pca" or n < _FEWEST or not reduced.any():
        return reduced[:, :2].astype(np.float64)
    from sklearn.manifold import TSNE  # here, not at the top: it takes a second

    perplexity = min(_PERPLEXITY, max(2.0, (n - 1) / 3))  # t-SNE looks at three times as many
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed, n_jobs=1)
    with threadpool_limits(1):
        return tsne.fit_transform(reduced).astype(np.float64)


def _principal(directions: Vectors, seed: int) -> Float[np.ndarray, "unit component"]:
    """The first principal components, at least 2; zero where there are fewer, or all units are one."""
    n = min(_COMPONENTS, *directions.shape)
    if not n or not np.ptp(directions, axis=0).any():
        return np.zeros((len(directions), 2), directions.dtype)
    from sklearn.decomposition import PCA

    with threadpool_limits(1):
        components = PCA(n, random_state=seed).fit_transform(directions)
    return np.pad(components, ((0, 0), (0, max(0, 2 - n))))


def _with_silent(
    points: Float[np.ndarray, "loud 2"],
    loud: Int[np.ndarray, " loud"],
    silent: Int[np.ndarray, " silent"],
) -> Float[np.ndarray, "unit 2"]:
    """The points of all units: silent ones in a row a little below the map, from its left to its right."""
    xy = np.zeros((len(loud) + len(silent), 2))
    xy[loud] = points
    corners = points if len(points) else np.array([[0.0, 0.0], [1.0, 1.0]])
    (left, bottom), (right, top) = corners.min(0), corners.max(0)
    # Two more places than silent units, of which the ends stay empty: none lies outside of the map.
    xy[silent, 0] = np.linspace(left, right, len(silent) + 2)[1:-1]
    xy[silent, 1] = bottom - 0.1 * (top - bottom)
    return xy
