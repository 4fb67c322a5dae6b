"""How well an autoencoder reconstructs rows, compared with null models of the same size."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuits.autoencoders import Autoencoder
from circuits.sae.batches import Batches, Group, Part, RowFilter, RowSource
from circuits.stimuli.sources import Source
from circuits.tables import Table

_FIT = 2**14
"""Rows that PCA and NMF are fitted on, which are other rows than those measured."""

_EDGES = tuple(np.arange(-6.0, 0.5, 0.5).tolist())
"""Edges of the histogram of densities, as exponents of ten."""


@dataclass(frozen=True)
class Reconstruction:
    """How well rows are reconstructed.

    Attributes:
        fvu: the fraction of the variance, about the mean of the rows, that is unexplained.
        fvu_all: the same including the rows that the rule leaves out.
        cosine: the mean cosine between rows and their reconstructions.
        l2_ratio: the sum of the norms of reconstructions over the sum of the norms of rows.
        l0: the mean number of active latents in a row.
        dead: the share of latents that were never active in these rows.
    """

    fvu: float
    fvu_all: float
    cosine: float
    l2_ratio: float
    l0: float
    dead: float


@dataclass(frozen=True)
class Metrics:
    """An autoencoder's reconstruction of rows, compared with null models.

    Attributes:
        own: the autoencoder on rows of examples that it was not trained on, if some were held out.
        trained: the autoencoder on rows of examples that it was trained on; None if none were held out.
        nulls: by name: `random dictionary` (see `random_dictionary`); `shuffled rows` (the autoencoder on rows whose
            units were shuffled independently of each other); `pca` (with as many components as latents are active in
            a row); `nmf` (likewise; only for rows without negative numbers).
        density: for each latent, the share of rows in which it is active.
        density_edges: the edges of the histogram, as exponents of ten.
        density_histogram: the number of latents with a density below the first edge (those never active are not
            counted), between edges, and above the last.
        n_rows: the number of rows measured.
        left_out: the number of rows that the rule left out.
        data: the name of the data.
        seed: the seed of rows and null models.
        model_hash: the hash of the model.
    """

    own: Reconstruction
    trained: Reconstruction | None
    nulls: dict[str, Reconstruction]
    density: tuple[float, ...]
    density_edges: tuple[float, ...]
    density_histogram: tuple[int, ...]
    n_rows: int
    left_out: int
    data: str
    seed: int
    model_hash: str

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        return asdict(self)

    def tables(self, title: str) -> Iterator[Table]:
        """How well rows are described, by the autoencoder and by each null."""
        described = {"the autoencoder, held out" if self.trained else "the autoencoder": self.own}
        described |= {"the autoencoder, in training": self.trained} if self.trained else {}
        rows = [
            (name, r.fvu, r.fvu_all, r.cosine, r.l2_ratio, r.l0, r.dead)
            for name, r in (described | self.nulls).items()
        ]
        columns = ("on rows", "fvu", "fvu with rows left out", "cosine", "norm ratio", "l0", "dead")
        yield Table(columns, rows, f"{title}, {self.n_rows} rows of {self.data}")


def reconstruction(
    code: Autoencoder,
    source: RowSource,
    *,
    rule: RowFilter | None = None,
    rows: int = 2**16,
    seed: int = 0,
    nulls: bool = True,
) -> Metrics:
    """Measure an autoencoder's reconstruction of rows, and that of a random dictionary, of shuffled rows, PCA and NMF.

    Args:
        code: the autoencoder.
        source: where rows come from.
        rule: which rows are left out; as in its training if None.
        rows: the number of rows to measure, drawn at random.
        seed: the seed of everything random.
        nulls: whether null models are measured too.

    Raises:
        ValueError: if the autoencoder's width is not that of the rows, or it was trained on another model.
    """
    check_source(code, source)
    if rows < 1:
        raise ValueError(f"rows {rows} must be at least 1")
    rule = rule or rule_of(code)
    part: Part = "held out" if rule.hold_out else "all"
    here, every, fitted = _rows(code, source, rule, part, rows, seed)
    trained = None
    if rule.hold_out:
        seen, seen_every, fitted = _rows(code, source, rule, "training", rows, seed)
        trained = _described(code, seen, seen_every)[0]
    own, density = _described(code, here, every)
    null_results: dict[str, Reconstruction] = {}
    generator = torch.Generator().manual_seed(seed)
    if nulls:
        random = random_dictionary(code, here.x, generator)
        null_results["random dictionary"] = _described(random, here, every)[0]
        shuffled = _shuffled(here.x, generator)
        target = shuffled if here.y is here.x else here.y
        mixed = Group(shuffled, target, here.example, here.position)
        null_results["shuffled rows"] = _described(code, mixed, mixed)[0]
        if here.y is here.x:  # PCA and NMF of a transcoder's input would not reconstruct its output
            null_results |= _linear_nulls(fitted, here, every, own.l0)
    # Latents that are never active have no logarithm.
    active = density[density > 0]
    histogram = np.histogram(np.log10(active), [-np.inf, *_EDGES, np.inf])[0]
    return Metrics(
        own, trained, null_results, tuple(density.tolist()), _EDGES, tuple(histogram.tolist()), len(here.x),
        len(every.x) - len(here.x), str(source.about["data"]), seed, str(source.about["model_hash"]),
    )  # fmt: skip


def check_source(code: Autoencoder, source: RowSource) -> None:
    """Raise ValueError if an autoencoder does not fit rows in width, or was trained on another model."""
    about = source.about
    for what, own in (("width", code.d_in), ("target_width", code.d_out)):
        if about[what] != own:
            raise ValueError(
                f"autoencoder {code.about.name!r} reads {code.d_in} numbers and writes {code.d_out}: rows of "
                f"{about['site']!r} have {about['width']} and {about['target_width']}"
            )
    theirs, ours = code.about.model_hash, about["model_hash"]
    if theirs and ours and theirs != ours:
        raise ValueError(
            f"autoencoder {code.about.name!r} was trained on weights {theirs[:16]}, rows are of {ours[:16]}"
        )


def rule_of(code: Autoencoder) -> RowFilter:
    """The rule of an autoencoder's training; for one of another tool it is not known, and no rows are left out."""
    known = code.about.settings.get("rule")
    return RowFilter(**known) if isinstance(known, Mapping) else RowFilter(norms=0, hold_out=0)


def unseen(code: Autoencoder, source: Source) -> list[int] | None:
    """The examples that an autoencoder's training held out; None if it used other data, or held out none."""
    plan, rule = code.about.settings.get("plan"), rule_of(code)
    trained = plan.get("rows") if isinstance(plan, Mapping) else None
    known = trained.get("data_hash") if isinstance(trained, Mapping) else None
    if known != source.hash or not rule.hold_out:
        return None
    return np.flatnonzero(rule.held_out(np.arange(len(source)))).tolist() or None


def _rows(
    code: Autoencoder, source: RowSource, rule: RowFilter, part: Part, n: int, seed: int
) -> tuple[Group, Group, Group]:
    """Draw rows of a part: those of `n` that the rule keeps, all `n`, and others to fit null models on (some of the
    same, if there are no more).
    """
    batches = Batches(source, 4096, rule, seed, part)
    known = code.about.settings.get("calibration")
    # The limit of norms that training used: measuring leaves out the same rows.
    limit = known.get("limit") if isinstance(known, Mapping) else None
    # Another order than that of the training or the calibration with the same seed.
    order = source.order(seed + 2_000_003)
    parts: list[Group] = []
    for group in range(source.n_groups()):
        found = batches.of_part(source.load(order, group))
        left = n + _FIT - sum(len(p.x) for p in parts)
        drawn = np.random.default_rng([seed, group]).permutation(len(found.x))[:left]
        parts.append(found.kept(drawn))
        if left <= len(found.x):
            break
    if not sum(len(p.x) for p in parts):
        raise ValueError(
            f"rows: no example is in the part {part!r}: expected more examples, or another share to hold out"
        )
    x = torch.cat([p.x for p in parts])
    y = x if parts[0].y is parts[0].x else torch.cat([p.y for p in parts])
    example, position = (
        np.concatenate([getattr(p, k) for p in parts]) for k in ("example", "position")
    )
    mixed = Group(x, y, example, position).kept(
        np.random.default_rng([seed, 1]).permutation(len(x))
    )
    every = mixed.kept(np.arange(len(mixed.x)) < n)
    return (
        batches.kept(every, limit),
        every,
        batches.kept(mixed.kept(np.arange(len(mixed.x))[-_FIT:]), limit),
    )


class _Sums:
    """Sums over rows, from which the measures follow; in float64, since small errors of many rows are added up."""

    def __init__(self, rows: Group) -> None:
        self.mean = rows.y.double().mean(0)
        self.variance = float((rows.y.double() - self.mean).square().sum())
        self.error = self.cosine = self.made = self.norms = 0.0
        self.n = 0

    def add(self, y: Tensor, made: Tensor) -> None:
        self.error += float((y.double() - made.double()).square().sum())
        self.cosine += float(torch.cosine_similarity(y, made, dim=1).sum())
        self.made += float(made.norm(dim=1).sum())
        self.norms += float(y.norm(dim=1).sum())
        self.n += len(y)

    @property
    def l2_ratio(self) -> float:
        return self.made / self.norms if self.norms > 0 else float("nan")

    @property
    def fvu(self) -> float:
        return self.error / self.variance if self.variance > 0 else float("nan")


def _described(code: Autoencoder, rows: Group, every: Group) -> tuple[Reconstruction, np.ndarray]:
    """The reconstruction by an autoencoder, and each latent's density."""
    sums, counts = _Sums(rows), torch.zeros(code.n_latents)
    for x, y, codes in _encoded(code, rows):
        on = codes.value > 0
        counts += torch.bincount(codes.latent[on], minlength=code.n_latents).cpu()
        sums.add(y, code.decode_code(codes, x))
    # Once more with the rows that the rule leaves out, of which a few with huge norms can dominate the error.
    beyond = _Sums(every)
    for x, y, codes in _encoded(code, every):
        beyond.add(y, code.decode_code(codes, x))
    density = (counts / max(1, sums.n)).double().numpy()
    n = max(1, sums.n)
    found = Reconstruction(
        sums.fvu,
        beyond.fvu,
        sums.cosine / n,
        sums.l2_ratio,
        float(counts.sum()) / n,
        float((density == 0).mean()),
    )
    return found, density


def _encoded(code: Autoencoder, rows: Group) -> Iterable[tuple[Tensor, Tensor, Any]]:
    device = code.W_enc.device
    for x, y in zip(rows.x.split(4096), rows.y.split(4096), strict=True):
        here = x.to(device)
        yield here, y.to(device), code.code(here)


def random_dictionary(
    code: Autoencoder, rows: Float[Tensor, "row input"], generator: torch.Generator
) -> Autoencoder:
    """Replace an autoencoder's directions by random ones of the same lengths, with the same L0; all else stays.

    An autoencoder reads along the directions that it writes, about the decoder's bias. A transcoder reads along other
    random directions, about the mean of the rows, and its linear map from input to output stays.

    Args:
        code: the autoencoder.
        rows: some rows, on which the L0 is matched.
        generator: the source of the directions.
    """
    length = code.W_dec.detach().norm(dim=1, keepdim=True)
    rows = rows[:4096].to(code.W_enc)
    written = _directions(code.W_dec, generator)
    transcoder = code.about.site != code.about.target or code.d_in != code.d_out
    read = _directions(code.W_enc, generator) if transcoder else written
    bias = -read @ (rows.mean(0) if transcoder else code.b_dec.detach())
    how, k, threshold = code.activation, code.k, None
    if how != "topk":
        pre = torch.nn.functional.linear(rows, read, bias).flatten()
        active = int((code.code(rows).value > 0).sum())
        # The threshold is the value just below the `active` largest ones, the same for all latents.
        bound = pre.topk(active + 1).values[-1] if active < len(pre) else pre.min()
        how, threshold = "jumprelu", bound.clamp_min(0).expand(code.n_latents).clone()
    return Autoencoder(
        read, bias, written * length, code.b_dec.detach(), how, k, threshold, code.W_skip
    )


def _directions(like: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=generator).to(like)
    return drawn / drawn.norm(dim=1, keepdim=True)


def _shuffled(x: Float[Tensor, "row width"], generator: torch.Generator) -> Tensor:
    """Shuffle each column independently: the distribution of every unit stays, all correlations are lost."""
    columns = [x[torch.randperm(len(x), generator=generator), i] for i in range(x.shape[1])]
    return torch.stack(columns, 1)


def _linear_nulls(fitted: Group, here: Group, every: Group, l0: float) -> dict[str, Reconstruction]:
    """PCA and NMF with as many components as latents are active in a row on average."""
    # Imported here: scikit-learn takes a second to load, and only this needs it.
    from sklearn.decomposition import MiniBatchNMF
    from sklearn.exceptions import ConvergenceWarning

    k = max(1, min(round(l0), fitted.x.shape[1], len(fitted.x) - 1))
    mean = fitted.x.double().mean(0)
    _, _, v = torch.linalg.svd((fitted.x.double() - mean)[:_FIT], full_matrices=False)
    basis = v[:k].float()

    def project(x: Tensor) -> Tensor:
        return (x - mean.float()) @ basis.T @ basis + mean.float()

    found = {"pca": _projected(project, k, here, every)}
    if bool((fitted.x >= 0).all()) and bool((here.x >= 0).all()) and bool((every.x >= 0).all()):
        options: dict[str, Any] = {
            "n_components": k, "init": "nndsvda", "batch_size": 4096, "max_iter": 50, "random_state": 0
        }  # fmt: skip
        nmf = MiniBatchNMF(**options)
        with (
            warnings.catch_warnings()
        ):  # an NMF that has not quite converged is good enough for a null model
            warnings.simplefilter("ignore", ConvergenceWarning)
            nmf.fit(fitted.x[:_FIT].numpy())

        def positive(x: Tensor) -> Tensor:
            return torch.from_numpy(nmf.transform(x.numpy()) @ nmf.components_).float()

        found["nmf"] = _projected(positive, k, here, every)
    return found


def _projected(project: Any, k: int, here: Group, every: Group) -> Reconstruction:
    """The reconstruction by a projection with k components, all of which are active in every row."""
    sums, beyond = _Sums(here), _Sums(every)
    for sum_, rows in ((sums, here), (beyond, every)):
        for x in rows.x.split(4096):
            sum_.add(x, project(x))
    n = max(1, sums.n)
    return Reconstruction(sums.fvu, beyond.fvu, sums.cosine / n, sums.l2_ratio, float(k), 0.0)
