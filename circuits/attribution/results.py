"""Attributions as results: values, their account, and files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from circuits.files import write_json
from circuits.json_files import read_json
from circuits.models.adapter.inputs import ImageInput
from circuits.tables import Table
from circuits.tensors import write_tensors
from circuits.units import Site

Heat = Literal["absolute", "signed", "positive"]
"""How channels become one number for each position: sum of absolute values, sum, or the sum's positive part."""


@dataclass(frozen=True)
class AblationCheck:
    """How well an attribution ranks units as ablating them does.

    Attributes:
        correlation: Spearman's correlation between a unit's attribution and the target's loss when the unit is ablated;
            the mean over examples.
        by_example: the correlation on each example.
        chance: the 95th percentile of the mean correlation when units are shuffled.
        n_units: how many units were ablated on each example: one half the most active, the other half drawn at random.
        seed: seed of the draw.
    """

    correlation: float
    by_example: tuple[float, ...]
    chance: float
    n_units: int
    seed: int


@dataclass(frozen=True, eq=False)
class Attribution:
    """How much of a target's value each element of a site's tensor, or of the input, accounts for.

    Attributes:
        method: the method's name.
        site: the site; `input` for the model's input.
        axes: the axes of `values`, batch first.
        unit_axis: which of them counts units (for the input, channels).
        values: one value for each element of each example.
        target: what is explained.
        aims: the unit and position explained in each example.
        target_values: the target's value in each example.
        residual: for each example, the target's value (minus the baseline's) less the sum of `values` and `parts`; None
            for methods whose values have no prescribed sum.
        parts: the rest of the target's value, by name, for each example (biases, what bypasses the site).
        baseline: the baseline's name.
        settings: the method's options.
        model: the model's name.
        model_hash: the hash of the model.
        examples: which examples, and how they were chosen (see `Examples.describe`).
        seed: seed of everything random.
        check: the agreement with ablation.
        ceiling: what the target cannot exceed, if its site has a ceiling and the method takes gradients, which vanish
            there.
    """

    method: str
    site: str
    axes: tuple[str, ...]
    unit_axis: int
    values: Float[Tensor, "example *rest"]
    target: str
    aims: tuple[str, ...]
    target_values: Float[Tensor, " example"]
    residual: Float[Tensor, " example"] | None
    parts: Mapping[str, Float[Tensor, " example"]]
    baseline: str
    settings: Mapping[str, Any]
    model: str
    model_hash: str
    examples: Mapping[str, Any]
    seed: int
    check: AblationCheck | None = None
    ceiling: float | None = None

    @property
    def saturated(self) -> int:
        """On how many examples the target is at its ceiling, so that its gradients vanish and credit is 0."""
        return 0 if self.ceiling is None else int((self.target_values >= self.ceiling).sum())

    def problems(self) -> Iterator[str]:
        """What is wrong with it, in lines."""
        if n := self.saturated:
            yield (
                f"target {self.target} is at its ceiling of {self.ceiling:g} on {n} of {len(self.target_values)} "
                "examples, where gradients vanish: name the unit before the ceiling"
            )

    @property
    def layout(self) -> Site:
        """The layout of `values`, described as a site."""
        shape = tuple(self.values.shape[1:])
        return Site(self.site, "channel", self.axes, self.unit_axis, shape)

    def units(self) -> Float[Tensor, "example unit"]:
        """Each unit's share: the sum over positions (and over the inside of a head)."""
        if self.values.ndim == 2:
            return self.values
        return self.layout.by_unit(self.values).flatten(2).sum(2)

    def maps(self) -> Float[Tensor, "example unit *position"]:
        """Each unit's share at each position."""
        values = self.layout.by_unit(self.values)
        return values if self.layout.inner_axis is None else values.sum(-1)

    def heat(self, how: Heat = "signed") -> Float[Tensor, "example *position"]:
        """Each position's share, over all units (the spatial view of Olah et al. 2018)."""
        maps = self.maps()
        if how == "absolute":
            return maps.abs().sum(1)
        total = maps.sum(1)
        return total.clamp_min(0) if how == "positive" else total

    def top(self, example: int = 0, k: int = 10) -> list[tuple[int, float]]:
        """The units with the largest absolute shares, with their shares."""
        shares = self.units()[example]
        order = shares.abs().argsort(descending=True, stable=True)[:k]
        return [(int(i), float(shares[i])) for i in order]

    def table(self, example: int, name: str, k: int) -> Table:
        """The units credited and blamed most on an example, and what all units add up to."""
        rows = [(f"{self.site}:{unit}", share) for unit, share in self.top(example, k)]
        title = f"{name}: {self.aims[example]} = {float(self.target_values[example]):.4g}"
        return Table(("unit", "share"), rows, title, self._sum(example))

    def _sum(self, example: int) -> str:
        if self.residual is None:
            return ""
        parts = "".join(
            f", {name} {float(value[example]):.4g}" for name, value in self.parts.items()
        )
        total = float(self.units()[example].sum())
        return f"  all units {total:.4g}{parts}; residual {float(self.residual[example]):.2g}"

    def facts(self, example: int) -> dict[str, Any]:
        """Of a map of pixels: its sum, its largest pixel, and what is missing to the target's value."""
        heat = self.heat("signed")[example]
        y, x = divmod(int(heat.flatten().argmax()), heat.shape[-1])
        found = {"sum": float(self.values[example].sum()), "largest at (y, x)": f"{y}, {x}"}
        if self.residual is not None:
            found["residual"] = float(self.residual[example])
        if self.saturated and self.ceiling is not None:
            at = float(self.target_values[example]) >= self.ceiling
            found["target at its ceiling"] = "yes" if at else "no"
        return found | {part: float(value[example]) for part, value in self.parts.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the values, for JSON."""
        known = {
            k: getattr(self, k)
            for k in (
                "method", "site", "target", "baseline", "model", "model_hash", "examples", "seed", "unit_axis",
            )
        }  # fmt: skip
        return known | {
            "axes": list(self.axes),
            "aims": list(self.aims),
            "target_values": self.target_values.tolist(),
            "residual": None if self.residual is None else self.residual.tolist(),
            "parts": {k: v.tolist() for k, v in self.parts.items()},
            "settings": dict(self.settings),
            "check": None if self.check is None else asdict(self.check),
            "ceiling": self.ceiling,
            "saturated": self.saturated,
        }

    def save(self, path: str | Path) -> None:
        """Write the values as safetensors and the rest as JSON, under the same name with `.json`.

        Args:
            path: must end in `.safetensors`.

        Raises:
            ValueError: if it does not.
        """
        place = _checked(path)
        tensors = {"values": self.values, "target_values": self.target_values}
        tensors |= {f"part {name}": value for name, value in self.parts.items()}
        if self.residual is not None:
            tensors["residual"] = self.residual
        write_tensors(place, tensors)
        write_json(place.with_suffix(".json"), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if one is not what `save` wrote.
        """
        place = _checked(path)
        try:
            raw = read_json(place.with_suffix(".json"))
            check = raw.pop("check")
            raw.pop("saturated", None)
            if check is not None:
                nan = float("nan")
                each = tuple(nan if v is None else v for v in check["by_example"])
                numbers = (nan if check[k] is None else check[k] for k in ("correlation", "chance"))
                correlation, chance = numbers
                check = AblationCheck(correlation, each, chance, check["n_units"], check["seed"])
            raw["axes"], raw["aims"] = tuple(raw["axes"]), tuple(raw["aims"])
            tensors = load_file(place)
            raw["parts"] = {name: tensors[f"part {name}"] for name in raw["parts"]}
            raw["target_values"] = tensors["target_values"]
            raw["residual"] = tensors.get("residual")
            return cls(values=tensors["values"], check=check, **raw)
        except FileNotFoundError:
            raise
        except Exception as error:  # of JSON, safetensors or what is in them
            raise ValueError(
                f"attribution {str(path)!r} is not a saved attribution: {error}"
            ) from error


def _checked(path: str | Path) -> Path:
    place = Path(path)
    if place.suffix != ".safetensors":
        raise ValueError(f"attribution file {str(path)!r} must end in .safetensors")
    return place


def input_site(spec: ImageInput) -> Site:
    """The input described as a site, so that its pixels can be attributed to."""
    shape = (spec.channels, spec.height, spec.width)
    return Site("input", "channel", ("batch", "channel", "y", "x"), 1, shape)
