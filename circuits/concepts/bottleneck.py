"""Concept bottlenecks: linear classifiers on units, whose decisions can be explained and corrected.

After Discover-then-Name (Rao et al. 2024): concepts are found first, then named, and then used to classify.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from circuits.checks import number
from circuits.concepts.pooling import Pool
from circuits.edits.activations import Scale, Set
from circuits.edits.recipes import Recipe
from circuits.edits.records import Edit
from circuits.experiments.ablation import ClassChange, by_class
from circuits.experiments.outcomes import Effect, effect_of
from circuits.experiments.statistics import corrected, interval
from circuits.experiments.twins import N_RANDOM, Draw
from circuits.files import finite
from circuits.means import Activity
from circuits.models.adapter.hooked_model import HookedModel
from circuits.tables import Table
from circuits.tasks.metrics import accuracy
from circuits.units import Site, Unit, Units

_FEW = 5
"""A class with fewer examples than this is not tested."""


@dataclass(frozen=True)
class Share:
    """What a unit contributes to a decision.

    Attributes:
        unit: the unit.
        activation: its activation on the example; in the explanation of a class, its mean over examples.
        weight: its weight on the class.
        contribution: the product of the two.
    """

    unit: Unit
    activation: float
    weight: float
    contribution: float


@dataclass(frozen=True)
class Explanation:
    """Why a bottleneck decides as it does.

    Attributes:
        label: the class.
        logit: the class's logit, which is the bias plus all contributions.
        bias: the class's bias.
        shares: the units with the largest contributions, positive or negative.
        left: the sum of the contributions that are not listed.
    """

    label: str
    logit: float
    bias: float
    shares: tuple[Share, ...]
    left: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "class": self.label, "logit": self.logit, "bias": self.bias, "left": self.left,
            "shares": [
                {"unit": str(s.unit), "activation": s.activation, "weight": s.weight, "adds": s.contribution}
                for s in self.shares
            ],
        }  # fmt: skip

    def tables(self) -> Iterator[Table]:
        """What each unit adds to the logit."""
        rows = [(s.unit, s.activation, s.weight, s.contribution) for s in self.shares]
        title = f"{self.label}: logit {self.logit:.3f} = bias {self.bias:.3f} + latents"
        yield Table(("latent", "activation", "weight", "adds"), rows, title)


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of a bottleneck, with two baselines.

    Attributes:
        own: the bottleneck's accuracy.
        low: the lower end of its 95 % interval, by bootstrap over examples.
        high: the upper end.
        shuffled_labels: the accuracy of a bottleneck trained on shuffled labels.
        majority: the accuracy of always predicting the most frequent class.
        n: the number of examples.
    """

    own: float
    low: float
    high: float
    shuffled_labels: float
    majority: float
    n: int


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """A linear classifier on units.

    Attributes:
        site: the site of the units.
        classes: the names of the classes.
        weights: class x unit, for activations that are not scaled.
        bias: one number for each class.
        pool: how activations are pooled over positions.
        null: weights and bias of a classifier trained on shuffled labels.
        model_hash: the hash of the model that the units belong to.
        data: the data that it was trained on.
        seed: the seed of the training.
    """

    site: str
    classes: tuple[str, ...]
    weights: Float[np.ndarray, "class unit"]
    bias: Float[np.ndarray, " class"]
    pool: Pool
    null: tuple[Float[np.ndarray, "class unit"], Float[np.ndarray, " class"]]
    model_hash: str
    data: str
    seed: int

    def logits(
        self, units: Float[np.ndarray, "example unit"]
    ) -> Float[np.ndarray, "example class"]:
        """The logits of examples, from the activations of their units."""
        return units @ self.weights.T + self.bias

    def predict(self, units: Float[np.ndarray, "example unit"]) -> Int[np.ndarray, " example"]:
        """The predicted class of each example."""
        return self.logits(units).argmax(1)

    def accuracy(
        self, units: Float[np.ndarray, "example unit"], labels: Sequence[int], seed: int = 0
    ) -> Accuracy:
        """The accuracy on examples, compared with shuffled labels and the most frequent class."""
        own = np.asarray(labels)
        right = (self.predict(units) == own).astype(float)
        low, high = interval(right, seed=seed, within=(0, 1))
        # The null's classifier was fitted to shuffled labels of the training examples: what this number of weights
        # reaches without a connection.
        chance = ((units @ self.null[0].T + self.null[1]).argmax(1) == own).mean()
        majority = np.bincount(own).max() / len(own)
        return Accuracy(float(right.mean()), low, high, float(chance), float(majority), len(own))

    def explain(
        self, units: Float[np.ndarray, " unit"], label: str | int | None = None, top: int = 10
    ) -> Explanation:
        """Explain the decision on an example: what each unit adds to a class's logit.

        Args:
            units: the activations of the example's units.
            label: the class; the predicted one if None.
            top: how many units to list.

        Raises:
            KeyError: if there is no such class.
        """
        logits = self.logits(units[None])[0]
        index = int(logits.argmax()) if label is None else self._index(label)
        added = units * self.weights[index]
        return self._explanation(index, float(logits[index]), units, added, top)

    def explain_class(
        self, units: Float[np.ndarray, "example unit"], label: str | int, top: int = 10
    ) -> Explanation:
        """Explain a class: what each unit adds to its logit, on average over the examples predicted to be of it."""
        index = self._index(label)
        logits = self.logits(units)
        chosen = units[logits.argmax(1) == index]
        mean = (
            chosen.mean(0) if len(chosen) else units.mean(0)
        )  # no example is predicted to be of the class
        own = float((mean * self.weights[index]).sum() + self.bias[index])
        return self._explanation(index, own, mean, mean * self.weights[index], top)

    def _explanation(
        self, index: int, logit: float, units: np.ndarray, added: np.ndarray, top: int
    ) -> Explanation:
        # By size: what speaks against a class explains a decision as well.
        order = np.argsort(-np.abs(added), kind="stable")[:top]
        shares = tuple(
            Share(
                Unit(self.site, int(i)),
                float(units[i]),
                float(self.weights[index, i]),
                float(added[i]),
            )
            for i in order
        )
        return Explanation(
            self.classes[index],
            logit,
            float(self.bias[index]),
            shares,
            # What the units that are not listed add together, so that bias, shares and the rest sum to the logit.
            float(added.sum() - added[order].sum()),
        )

    def _index(self, label: str | int) -> int:
        if isinstance(label, int) and 0 <= label < len(self.classes):
            return label
        if label in self.classes:
            return self.classes.index(str(label))
        raise KeyError(
            f"class {label!r} is not one of the bottleneck's classes: {', '.join(self.classes[:12])}"
        )


def train_bottleneck(
    site: str,
    units: Float[np.ndarray, "example unit"],
    labels: Sequence[int],
    classes: Sequence[str],
    *,
    pool: Pool = "mean",
    strength: float = 1.0,
    model_hash: str = "",
    data: str = "",
    seed: int = 0,
) -> Bottleneck:
    """Train a linear classifier (logistic regression) on units.

    Args:
        site: the site of the units.
        units: the activations, one row for each example.
        labels: the class of each example.
        classes: the names of the classes.
        pool: how activations were pooled over positions, for the record.
        strength: the inverse of the regularisation (scikit-learn's C), with units scaled to standard deviation 1.
        model_hash: the hash of the model, for the record.
        data: where examples come from, for the record.
        seed: the seed of the shuffled labels.

    Raises:
        ValueError: if activations and labels do not fit each other or the classes, there are fewer than two classes,
            or `strength` is not positive.
    """
    own = np.asarray(labels)
    if len(units) != len(own) or not np.isfinite(units).all():
        raise ValueError(
            f"units of {len(units)} examples, labels of {len(own)}: expected finite units, one label each"
        )
    if len(np.unique(own)) < 2 or own.min() < 0 or own.max() >= len(classes):
        raise ValueError(
            f"labels {sorted(set(own.tolist()))[:8]} of {len(classes)} classes: expected at least two classes"
        )
    if not strength > 0:
        raise ValueError(f"strength {strength} must be above 0")
    weights, bias = _fitted(units, own, len(classes), strength)
    null = _fitted(units, np.random.default_rng(seed).permutation(own), len(classes), strength)
    return Bottleneck(site, tuple(classes), weights, bias, pool, null, model_hash, data, seed)


def _fitted(
    units: np.ndarray, own: np.ndarray, n: int, strength: float
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of a logistic regression, of which the weights are for units that are not scaled."""
    from sklearn.linear_model import LogisticRegression

    scale = units.std(0)
    # A unit that never changes is divided by 1; its weight stays 0, as nothing depends on it.
    scale[scale == 0] = 1
    # Scaled, so that the penalty on weights treats strong and weak units alike.
    fitted = LogisticRegression(C=strength, max_iter=2000).fit(units / scale, own)
    present = fitted.classes_
    # A class without examples is never predicted.
    weights, bias = np.zeros((n, units.shape[1])), np.full(n, -1e9)
    # For two classes scikit-learn fits one row, the difference of the two logits: it is split evenly.
    if len(present) == 2:
        weights[present[0]], bias[present[0]] = -fitted.coef_[0] / 2, -fitted.intercept_[0] / 2
        weights[present[1]], bias[present[1]] = fitted.coef_[0] / 2, fitted.intercept_[0] / 2
    else:
        weights[present], bias[present] = fitted.coef_, fitted.intercept_
    # w (x / s) = (w / s) x: weights for activations as they are, which explanations and interventions multiply.
    return weights / scale, bias


# --- interventions -------------------------------------------------------------------------------


Switch = Literal["off", "scale", "set"]


@dataclass(frozen=True)
class Intervention:
    """A change of units before a bottleneck decides.

    Attributes:
        units: the units, all of one site.
        how: `off`, `scale` (by the factor `amount`) or `set` (to `amount`, at all positions).
        amount: the factor or the value.
    """

    units: tuple[Unit, ...]
    how: Switch = "off"
    amount: float = 0.0

    def __post_init__(self) -> None:
        if not self.units or len({u.site for u in self.units}) != 1:
            raise ValueError(
                f"units of an intervention are of {len({u.site for u in self.units})} sites: expected some of one site"
            )
        if self.how not in ("off", "scale", "set"):
            raise ValueError(f"how {self.how!r} is not one of off, scale, set")
        if not abs(self.amount) < 1e30 or (self.how == "scale" and self.amount < 0):
            raise ValueError(
                f"amount {self.amount} to {self.how} must be below 1e30 in size, and 0 or more to scale"
            )

    @classmethod
    def parse(cls, site: Site, how: Switch, text: str) -> Intervention:
        """Units of a site written as `3,17` (to switch off) or `3,17=2` (to scale or set).

        Raises:
            ValueError: if it is not of this form.
        """
        indices, equals, amount = text.partition("=")
        if bool(equals) == (how == "off"):
            form = "INDICES, e.g. 3,17" if how == "off" else "INDICES=NUMBER, e.g. 3,17=2"
            raise ValueError(f"{how} {text!r} is not of the form {form}")
        try:
            units = Units.parse(f"{site.name}:{indices}")
        except ValueError:
            raise ValueError(
                f"{how} {text!r}: {indices!r} are no indices of latents, e.g. 3,17"
            ) from None
        found = number(amount) if equals else 0.0
        if found is None:
            raise ValueError(f"{how} {text!r}: {amount!r} is no finite number")
        return cls(tuple(site.unit(i) for i in units.among(site)), how, found)

    def on(self, units: Float[np.ndarray, "example unit"]) -> Float[np.ndarray, "example unit"]:
        """Pooled activations as the edit of the model would make them.

        Scaling commutes with the maximum (factors are not negative) and with the mean, and so does setting.
        """
        # Scaling and setting change places with pooling: the mean or maximum of a x is a times that of x (a of 0 or
        # more), and that of a constant is the constant.
        changed = units.copy()
        places = [u.index for u in self.units]
        if self.how == "set":
            changed[:, places] = self.amount
        else:
            changed[:, places] *= 0.0 if self.how == "off" else self.amount
        return changed

    def of(self, swap: Mapping[Unit, Unit]) -> Intervention:
        """The same change of other units: each unit is replaced by its substitute, if it has one."""
        return replace(self, units=tuple(swap.get(u, u) for u in self.units))

    @property
    def edit(self) -> Edit:
        """The same change as an edit of the model."""
        units = Units.of(self.units)
        if self.how == "set":
            return Set(units, values=torch.tensor(float(self.amount)), origin="intervention")
        return Scale(units, factor=0.0 if self.how == "off" else self.amount)


@dataclass(frozen=True)
class InterventionReport:
    """The effect of interventions.

    Attributes:
        effect: the effect on the bottleneck's accuracy, compared with the same interventions on random other units
            that are about as active.
        classes: the classes whose accuracy changed, the largest change first.
        flips: the number of decisions that changed, by `class -> class`.
        seed: the seed of the random interventions and the interval.
    """

    effect: Effect
    classes: tuple[ClassChange, ...]
    flips: dict[str, int]
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary for JSON; numbers that are not finite become None."""
        return finite(asdict(self))

    def tables(self) -> Iterator[Table | str]:
        """The accuracy before and after, by class, and which decisions changed."""
        e = self.effect
        null = "; {:+.4f} to {:+.4f} for {}".format(*e.null_range, e.null_is) if e.null else ""
        yield (
            f"switched: {100 * e.intact:.1f} -> {100 * e.changed:.1f} % right, {e.change:+.4f} "
            f"({e.low:+.4f} to {e.high:+.4f}){null}"
        )
        rows = [(c.name, c.n, c.intact, c.changed) for c in self.classes]
        yield Table(("class", "examples", "right before", "after"), rows)
        flips = sorted(self.flips.items(), key=lambda flip: -flip[1])
        yield Table(("decisions", "changed"), flips[:10])


def intervene(
    bottleneck: Bottleneck,
    units: Float[np.ndarray, "example unit"],
    labels: Sequence[int],
    interventions: Sequence[Intervention],
    *,
    n_random: int = N_RANDOM,
    seed: int = 0,
) -> InterventionReport:
    """Measure how decisions change when units are switched off, scaled or set to a value.

    Args:
        bottleneck: the classifier.
        units: the activations of examples.
        labels: the classes of the examples.
        interventions: the interventions, in order.
        n_random: the number of random interventions: the same on other units that are alive and about as active; fewer
            if there are not that many different groups of such units.
        seed: the seed of the random interventions and of the interval.

    Raises:
        ValueError: if a unit is of another site, or does not exist.
    """
    for i in interventions:
        site, most = i.units[0].site, max(u.index for u in i.units)
        if site != bottleneck.site or most >= units.shape[1]:
            raise ValueError(
                f"units {Units.of(i.units)}: the bottleneck reads {bottleneck.site}:0 to {units.shape[1] - 1}"
            )
    own = np.asarray(labels)
    # "About as active" is judged by the root mean square over examples.
    size = np.sqrt(np.square(units).mean(0))
    seen = Activity(torch.from_numpy(units.mean(0)), size, len(units), np.ptp(units, 0))
    draw = Draw(dict.fromkeys(u for i in interventions for u in i.units), {bottleneck.site: seen})
    each = [
        bottleneck.predict(_applied(units, [i.of(swap) for i in interventions]))
        # The first, without substitutes, is the intervention itself; all others are its random controls.
        for swap in ({}, *draw.different(min(n_random, draw.ways), seed))
    ]
    before = bottleneck.predict(units)
    right, changed, *random = ((made == own).astype(float) for made in (before, *each))
    pairs = zip(before.tolist(), each[0].tolist(), strict=True)
    flips = Counter(
        f"{bottleneck.classes[a]} -> {bottleneck.classes[b]}" for a, b in pairs if a != b
    )
    null_is = draw.described(len(random)) if random else draw.why_not()
    return InterventionReport(
        effect_of(accuracy, right, changed, random, null_is, seed=seed),
        by_class(own.tolist(), right, changed, bottleneck.classes), dict(flips), seed,
    )  # fmt: skip


def _applied(units: np.ndarray, interventions: Sequence[Intervention]) -> np.ndarray:
    """The activations after all interventions, in order."""
    for i in interventions:
        units = i.on(units)
    return units


def as_recipe(model: HookedModel, interventions: Sequence[Intervention]) -> Recipe:
    """Interventions as a recipe of edits, for the model with the autoencoder attached."""
    return Recipe.of(
        model, [i.edit for i in interventions], "interventions of a concept bottleneck"
    )


@dataclass(frozen=True)
class Suspect:
    """A unit that supports a class on the training examples but not on other examples of the class.

    Attributes:
        unit: the unit.
        label: the class.
        training: its mean contribution to the class's logit, over training examples of the class.
        elsewhere: the same over the other examples of the class.
        drop: the difference.
        t: Welch's t of the drop.
        p_value: the one-sided p-value, corrected for all units and classes (Benjamini-Hochberg).
    """

    unit: Unit
    label: str
    training: float
    elsewhere: float
    drop: float
    t: float
    p_value: float


def suspects(
    bottleneck: Bottleneck,
    training: Float[np.ndarray, "example unit"],
    training_labels: Sequence[int],
    elsewhere: Float[np.ndarray, "other unit"],
    elsewhere_labels: Sequence[int],
    level: float = 0.01,
) -> list[Suspect]:
    """Find units that support a class in training and not on other examples of it: likely confounds.

    A unit is suspect for a class if what it adds to the class's logit is smaller elsewhere than in training (Welch's
    test, corrected for all units and classes); the largest drop comes first.

    Args:
        bottleneck: the classifier.
        training: the activations of the training examples.
        training_labels: the classes of the training examples.
        elsewhere: the activations of examples from another source, which should give the same contributions.
        elsewhere_labels: the classes of those.
        level: the level of the test.

    Raises:
        ValueError: if no class has five examples in both sets.
    """
    from scipy.stats import ttest_ind

    a, b = np.asarray(training_labels), np.asarray(elsewhere_labels)
    both = [c for c in np.intersect1d(a, b).tolist() if min((a == c).sum(), (b == c).sum()) >= _FEW]
    if not both:
        raise ValueError(f"elsewhere_labels: no class has {_FEW} examples there and in training")
    found, t_values, p_values = [], [], []
    for c in both:
        here, there = (
            x[y == c] * bottleneck.weights[c] for x, y in ((training, a), (elsewhere, b))
        )
        drop = here.mean(0) - there.mean(0)
        # Most latents are silent on all examples of a class; their test statistic would be 0 / 0.
        vary = (here.std(0) > 0) | (there.std(0) > 0)
        t, p = np.zeros_like(drop), np.ones_like(drop)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # loss of precision for units that hardly vary
            # Welch's test: the two sources of examples may differ in their spread. One-sided, as only a loss of support
            # is suspect.
            tested: Any = ttest_ind(
                here[:, vary], there[:, vary], equal_var=False, alternative="greater"
            )
        t[vary], p[vary] = tested.statistic, tested.pvalue
        found += [
            (i, c, float(here[:, i].mean()), float(there[:, i].mean()), float(drop[i]))
            for i in range(len(drop))
        ]
        t_values.append(np.nan_to_num(t))
        p_values.append(np.nan_to_num(p, nan=1.0))
    t_all = np.concatenate(t_values)
    # Over all classes together: each unit is tested once for each class.
    p_all = corrected(np.concatenate(p_values), "benjamini-hochberg")
    listed = [
        Suspect(Unit(bottleneck.site, i), bottleneck.classes[c], here, there, d, t, q)
        for (i, c, here, there, d), t, q in zip(found, t_all.tolist(), p_all, strict=True)
        if q <= level and d > 0
    ]
    return sorted(listed, key=lambda s: -s.drop)
