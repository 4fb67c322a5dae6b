"""Metrics: one number for each example, from a model's output at the positions that a task counts.

Each says in which direction a model is better, and is differentiable wherever what it measures is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.models.adapter.hooked_model import HookedModel
from circuits.tasks.reading import Reading
from circuits.tasks.targets import Aim, Target, as_target
from circuits.units import Site, unknown

Needs = Literal["answers", "against", "intact", "one_token", "rows"]
"""What a metric needs: answers; wrong answers to compare them with; the intact model's outputs; answers of one token;
one row for each example."""


@dataclass(frozen=True)
class Metric:
    """A number that is measured on each example.

    Attributes:
        name: as it is written in tables and files.
        unit: `nats`, `logits`, `probability` or `share`; empty for an activation.
        better: 1 if more is better, -1 if less is better, 0 if neither.
        needs: what a task has to have for this metric.
    """

    name: str
    unit: str = ""
    better: int = 0
    needs: frozenset[Needs] = frozenset()

    def sites(self) -> tuple[str, ...]:
        """The sites, besides the output, that have to be read for the metric."""
        return ()

    def of(self, reading: Reading, intact: Reading) -> Float[Tensor, " example"]:
        """The metric on each example of a batch.

        Args:
            reading: the output of the model that is measured.
            intact: the output of the unchanged model.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _FormulaMetric(Metric):
    """A metric given by a function of the measured model's reading and the intact model's."""

    formula: Callable[[Reading, Reading], Tensor] = lambda reading, intact: reading.logits

    def of(self, reading: Reading, intact: Reading) -> Float[Tensor, " example"]:
        return self.formula(reading, intact)


def _kl(reading: Reading, intact: Reading) -> Tensor:
    # KL(p || q) = sum over outputs of p (log p - log q), with p the intact model and q the measured one.
    p = intact.log_p
    return reading.by_example((p.exp() * (p - reading.log_p)).sum(-1))


def _first_choice(intact: Reading) -> Tensor:
    return intact.logits.argmax(-1, keepdim=True)


def _first_choice_changed(reading: Reading, intact: Reading) -> Tensor:
    changed = reading.logits.argmax(-1, keepdim=True) != _first_choice(intact)
    return reading.by_example(changed[:, 0].to(reading.logits))


def _logit_of_first_choice(reading: Reading, intact: Reading) -> Tensor:
    return reading.by_example(reading.logits.gather(1, _first_choice(intact))[:, 0])


def _share_in_top_k(reading: Reading, k: int) -> Tensor:
    """The chance that an answer is among the k highest outputs at each place, ties being broken at random.

    An output that is NaN counts as higher than the answers.
    """
    # Let `above` outputs lie above the best answer and `tied` be equal to it, `answers` of them being answers. The
    # tied ones fill the k - above places that are left in random order, and (k - above) * answers / tied of these
    # are answers on average. `~(x <= best)` rather than `x > best`: comparisons with NaN are false, and an output of
    # NaN must not make an answer look right.
    ids = reading.places.wanted
    own = reading.logits.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    best = own.max(-1, keepdim=True).values
    above = (~(reading.logits <= best)).sum(-1)
    tied, answers = ((values == best).sum(-1) for values in (reading.logits, own))
    return ((k - above) * answers / tied.clamp_min(1)).clamp(0, 1)


def _in_top_k(k: int) -> Callable[[Reading, Reading], Tensor]:
    def share(reading: Reading, intact: Reading) -> Tensor:
        if reading.places.fed:
            return (reading.log_p_of("wanted") > reading.log_p_of("against")).to(reading.logits)
        return reading.by_example(_share_in_top_k(reading, k).to(reading.logits))

    return share


def _metric(
    name: str,
    unit: str,
    better: int,
    needs: set[Needs],
    formula: Callable[[Reading, Reading], Tensor],
) -> Metric:
    return _FormulaMetric(name, unit, better, frozenset(needs), formula)


logit_difference = _metric(
    "logit_difference", "logits", 1, {"answers", "against", "one_token"},
    lambda r, _: r.logit_of("wanted") - r.logit_of("against"),
)  # fmt: skip
"""The mean logit of the answers minus that of the wrong answers (Wang et al. 2022)."""

log_probability = _metric(
    "log_probability", "nats", 1, {"answers"}, lambda r, _: r.log_p_of("wanted")
)
"""The log-probability, in nats, that one of the answers comes; of an answer of several tokens, that all of them
come."""

log_probability_difference = _metric(
    "log_probability_difference", "nats", 1, {"answers", "against"},
    lambda r, _: r.log_p_of("wanted") - r.log_p_of("against"),
)  # fmt: skip
"""The log-probability of the answers minus that of the wrong answers."""

probability_difference = _metric(
    "probability_difference", "probability", 1, {"answers", "against"},
    lambda r, _: r.p_of("wanted") - r.p_of("against"),
)  # fmt: skip
"""The total probability of the answers minus that of the wrong answers (Hanna et al. 2023)."""

probability = _metric("probability", "probability", 1, {"answers"}, lambda r, _: r.p_of("wanted"))
"""The total probability of the answers."""

cross_entropy = _metric(
    "cross_entropy", "nats", -1, {"answers"}, lambda r, _: -r.log_p_of("wanted")
)
"""Minus the log-probability of the answers, averaged over counted positions, in nats."""

accuracy = _metric("accuracy", "share", 1, {"answers"}, _in_top_k(1))
"""The share of counted positions at which an answer is the first choice; a first choice tied between n outputs counts
1/n. For answers of several tokens: whether they are more probable than the wrong answers."""

top5 = _metric("top5", "share", 1, {"answers", "one_token"}, _in_top_k(5))
"""The share of counted positions at which an answer is among the first five choices."""

kl = _metric("kl", "nats", -1, {"intact"}, _kl)
"""The KL divergence from the intact model's prediction to the measured one's, in nats."""

top1_changed = _metric("top1_changed", "share", -1, {"intact"}, _first_choice_changed)
"""The share of counted positions at which the first choice is another than the intact model's."""

logit_of_first = _metric("logit_of_first", "logits", 1, {"intact"}, _logit_of_first_choice)
"""The logit of the intact model's first choice."""

METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        logit_difference, log_probability, log_probability_difference, probability_difference,
        probability, cross_entropy, accuracy, top5, kl, top1_changed, logit_of_first,
    )
}  # fmt: skip
"""Metrics by name."""


@dataclass(frozen=True)
class UnitActivation(Metric):
    """The activation of a unit, or an output, at its most active position or at a given one.

    The most active position is found in the intact model and kept while the model is changed.

    Attributes:
        target: which unit, at which position, and as which quantity.
        site: the target's site.
    """

    target: Target = field(default_factory=lambda: Target("output", None))
    site: Site | None = None

    @classmethod
    def named(cls, model: HookedModel, target: str | Target) -> UnitActivation:
        """The metric of a target as it is written: `SITE:INDEX`, `class:NAME`, `token:WORD` or `top`, with `@POSITION`.

        Raises:
            KeyError: if a site or class is unknown.
            ValueError: if the text has none of these forms.
        """
        made = as_target(model, target)
        return cls(str(target), better=1, target=made, site=model.site(made.site))

    def sites(self) -> tuple[str, ...]:
        return (self.target.site,)

    def of(self, reading: Reading, intact: Reading) -> Float[Tensor, " example"]:
        aim = self.aim(intact)
        value = reading.tensors[self.target.site]
        return aim.value(value, torch.arange(len(value), device=value.device)).double()

    def aim(self, intact: Reading) -> Aim:
        """The unit and position of each example, chosen on the intact model."""
        assert self.site is not None, "made by `named`"
        return Aim.at(self.site, self.target, intact.tensors[self.target.site], intact.mask)


@dataclass(frozen=True)
class Custom(Metric):
    """A metric that a user writes as a function of the model's whole output.

    Attributes:
        function: takes the output, batch first, and returns one number for each row.
    """

    function: Callable[[Tensor], Tensor] = lambda output: output
    needs: frozenset[Needs] = frozenset({"rows"})

    def of(self, reading: Reading, intact: Reading) -> Float[Tensor, " example"]:
        assert reading.output is not None, "the whole output is kept for it"
        made = self.function(reading.output)
        n = reading.places.n_examples
        if not isinstance(made, Tensor) or tuple(made.shape) != (n,):
            shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"metric {self.name!r} returns {shape}: expected one number for each of the {n} examples"
            )
        return made.double()


def as_metric(metric: str | Metric | Callable[[Tensor], Tensor]) -> Metric:
    """A metric from its name or from a user's function; a `Metric` is returned as it is.

    Raises:
        KeyError: if there is no metric of that name.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        return METRICS[metric]
    return Custom(getattr(metric, "__name__", "metric"), function=metric)
