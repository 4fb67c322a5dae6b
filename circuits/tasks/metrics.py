"""Metrics: one number an example from what a model puts out where a task counts.

All are differentiable where what they measure is, and say in which direction a model is better.
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
"""What a metric cannot do without: answers; what they are compared with; the intact model's outputs; answers of one
token; a single row an example."""


@dataclass(frozen=True)
class Metric:
    """A number that a model has on each example.

    Attributes:
        name: as it is written in tables and files.
        unit: `nats`, `logits`, `probability`, `share`, or that of an activation (empty).
        better: 1 if more is better, -1 if less is, 0 if neither.
        needs: what it cannot do without.
    """

    name: str
    unit: str = ""
    better: int = 0
    needs: frozenset[Needs] = frozenset()

    def sites(self) -> tuple[str, ...]:
        """Sites that have to be read for it, besides the output."""
        return ()

    def of(self, reading: Reading, intact: Reading) -> Float[Tensor, " example"]:
        """The metric on each example of a batch.

        Args:
            reading: of the model that is measured.
            intact: of the model as it is.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class _Formula(Metric):
    """A metric that is a function of a reading and the intact model's."""

    formula: Callable[[Reading, Reading], Tensor] = lambda reading, intact: reading.logits

    def of(self, reading: Reading, intact: Reading) -> Float[Tensor, " example"]:
        return self.formula(reading, intact)


def _kl(reading: Reading, intact: Reading) -> Tensor:
    p = intact.log_p
    return reading.by_example((p.exp() * (p - reading.log_p)).sum(-1))


def _first(intact: Reading) -> Tensor:
    return intact.logits.argmax(-1, keepdim=True)


def _changed(reading: Reading, intact: Reading) -> Tensor:
    same = reading.logits.argmax(-1, keepdim=True) != _first(intact)
    return reading.by_example(same[:, 0].to(reading.logits))


def _logit(reading: Reading, intact: Reading) -> Tensor:
    return reading.by_example(reading.logits.gather(1, _first(intact))[:, 0])


def _among(reading: Reading, k: int) -> Tensor:
    """How often an answer is among the k highest outputs at each place, if equal ones are in random order.

    NaN is above and below everything.
    """
    ids = reading.places.wanted
    own = reading.logits.gather(1, ids.clamp_min(0)).masked_fill(ids < 0, -torch.inf)
    best = own.max(-1, keepdim=True).values
    above = (~(reading.logits <= best)).sum(-1)
    tied, answers = ((values == best).sum(-1) for values in (reading.logits, own))
    return ((k - above) * answers / tied.clamp_min(1)).clamp(0, 1)


def _within(k: int) -> Callable[[Reading, Reading], Tensor]:
    def share(reading: Reading, intact: Reading) -> Tensor:
        if reading.places.fed:
            return (reading.log_p_of("wanted") > reading.log_p_of("against")).to(reading.logits)
        return reading.by_example(_among(reading, k).to(reading.logits))

    return share


def _made(
    name: str,
    unit: str,
    better: int,
    needs: set[Needs],
    formula: Callable[[Reading, Reading], Tensor],
) -> Metric:
    return _Formula(name, unit, better, frozenset(needs), formula)


logit_difference = _made(
    "logit_difference", "logits", 1, {"answers", "against", "one_token"},
    lambda r, _: r.logit_of("wanted") - r.logit_of("against"),
)  # fmt: skip
"""The mean logit of the answers minus that of what they are against (Wang et al. 2022)."""

log_probability = _made(
    "log_probability", "nats", 1, {"answers"}, lambda r, _: r.log_p_of("wanted")
)
"""The log-probability of the answers, in nats: of any of a set; of all tokens of an answer of several."""

log_probability_difference = _made(
    "log_probability_difference", "nats", 1, {"answers", "against"},
    lambda r, _: r.log_p_of("wanted") - r.log_p_of("against"),
)  # fmt: skip
"""The log-probability of the answers minus that of what they are against."""

probability_difference = _made(
    "probability_difference", "probability", 1, {"answers", "against"},
    lambda r, _: r.p_of("wanted") - r.p_of("against"),
)  # fmt: skip
"""The probability of the answers minus that of what they are against, both as sets (Hanna et al. 2023)."""

probability = _made("probability", "probability", 1, {"answers"}, lambda r, _: r.p_of("wanted"))
"""The probability of the answers, as a set."""

cross_entropy = _made("cross_entropy", "nats", -1, {"answers"}, lambda r, _: -r.log_p_of("wanted"))
"""Minus the log-probability of the answers, the mean over counted positions, in nats."""

accuracy = _made("accuracy", "share", 1, {"answers"}, _within(1))
"""The share of counted positions at which an answer is the first choice (of n that tie for it, the n-th part); of
answers of several tokens, whether they are more probable than what they are against."""

top5 = _made("top5", "share", 1, {"answers", "one_token"}, _within(5))
"""The share of counted positions at which an answer is among the first five choices."""

kl = _made("kl", "nats", -1, {"intact"}, _kl)
"""The KL divergence from the intact model's prediction to the measured one's, in nats."""

top1_changed = _made("top1_changed", "share", -1, {"intact"}, _changed)
"""The share of counted positions at which the first choice is another than the intact model's."""

logit_of_first = _made("logit_of_first", "logits", 1, {"intact"}, _logit)
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
    """A unit's own number, or an output's: where the intact model is most active, or at a fixed position.

    The position of each example is fixed on the intact model and stays where it is while the model is changed.

    Attributes:
        target: which unit, where, and in which form.
        site: the target's.
    """

    target: Target = field(default_factory=lambda: Target("output", None))
    site: Site | None = None

    @classmethod
    def named(cls, model: HookedModel, target: str | Target) -> UnitActivation:
        """From what people write: `SITE:INDEX`, `class:NAME`, `token:WORD`, `top`, with `@POSITION`.

        Raises:
            KeyError: if a site or class is unknown.
            ValueError: if it is of none of these forms.
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
        """The unit and position of each example, by the intact model."""
        assert self.site is not None, "made by `named`"
        return Aim.at(self.site, self.target, intact.tensors[self.target.site], intact.mask)


@dataclass(frozen=True)
class Custom(Metric):
    """A metric that a person writes: from the model's whole output to one number an example.

    Attributes:
        function: takes the output, batch first, and returns one number a row.
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
                f"metric {self.name!r} returns {shape}: expected one number for each of {n} examples"
            )
        return made.double()


def as_metric(metric: str | Metric | Callable[[Tensor], Tensor]) -> Metric:
    """A metric by its name, a person's own function, or itself.

    Raises:
        KeyError: if there is none of that name.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        return METRICS[metric]
    return Custom(getattr(metric, "__name__", "metric"), function=metric)
