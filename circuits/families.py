"""Families: units that are rotated, mirrored, scaled or hue-shifted copies of one unit.

Cammarata et al. 2020, "Curve Detectors", and Olah et al. 2020, "Naturally Occurring Equivariance in Neural Networks"
(Distill). Units are compared by their responses to stimuli at every step of a transformation
(`circuits.stimuli.orbits`), minus each stimulus' mean over the steps, which leaves what the transformation changes. The
agreement of two units is the correlation of these responses at the best shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from circuits.database import Database, Record
from circuits.experiments.statistics import p_value
from circuits.files import finite
from circuits.graph.circuit import UnitGroup
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.stimuli.images import ImageSource
from circuits.stimuli.orbits import Orbit, Transformation, hues, mirrors, rotations, scales
from circuits.stimuli.sources import open_source
from circuits.tables import Table
from circuits.tuning.responding import responses
from circuits.units import Site, Unit

KIND = "family"
_LEAST_CHANGE: dict[str, float] = {"rotation": 0.1, "scale": 0.1, "mirror": 0.005, "hue": 0.005}
"""Units for which the step explains less than this share of the variance of their responses are left out. The
thresholds for mirroring and hue are lower, since these change a photograph little compared with the differences between
photographs.
"""

_LEAST_ACTIVE = 0.3
"""Units whose largest response is below this share of the median unit's are left out too."""

_ITSELF_AGAIN = 0.7
"""If units agree with themselves at least this much after half a turn, their period is half a turn."""

_STEP: dict[str, float] = {"rotation": 15.0, "scale": 1.2, "mirror": 1.0, "hue": 30.0}
"""By how much the phases of two members must differ for one to be a transformed copy of the other: degrees, a factor, 0
against 1, degrees. Units whose phases are nearer are alike, which does not make them a family.
"""

_ALIKE = {
    "rotation": "no member is rotated", "scale": "no member is scaled", "mirror": "no member is mirrored",
    "hue": "no member has another hue",
}  # fmt: skip

Answers = Float[Tensor, "unit stimulus step"]


@dataclass(frozen=True, order=True)
class Member:
    """A unit of a family.

    Attributes:
        phase: its place in the family: the preferred angle in degrees (the direction in which a curve bulges, or the
            normal of a line), the scale factor, or 0 and 1.
        unit: the unit.
        fit: its mean agreement with the other members, at most 1.
    """

    phase: float
    unit: Unit
    fit: float


@dataclass(frozen=True)
class Family:
    """Units that are transformed copies of one unit.

    Attributes:
        name: the family's name.
        site: the site of its units.
        transformation: how the members differ.
        period: the angle in degrees after which a unit repeats (180 for a line); 0 if there is none.
        members: the members, by phase.
        score: the mean agreement of its members.
        p_value: against the null; NaN if the family was put together by hand and not measured.
        null: what the null is.
        n_null: the number of draws from the null.
        model_hash: the hash of the model.
        stimuli: what was shown.
        seed: seed of everything random.
    """

    name: str
    site: str
    transformation: Transformation
    period: float
    members: tuple[Member, ...]
    score: float
    p_value: float
    null: str
    n_null: int
    model_hash: str
    stimuli: str
    seed: int

    @property
    def units(self) -> tuple[Unit, ...]:
        """Its units, by phase."""
        return tuple(member.unit for member in self.members)

    @property
    def group(self) -> UnitGroup:
        """As one node of a circuit."""
        return UnitGroup(self.name, self.units)

    def renamed(self, name: str) -> Family:
        """The same under another name."""
        return replace(self, name=name)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it (NaN as null)."""
        raw = asdict(self)
        raw["members"] = [
            {"unit": str(m.unit), "phase": m.phase, "fit": m.fit} for m in self.members
        ]
        return finite(raw)

    @classmethod
    def from_dict(cls, raw: Any) -> Family:
        """From what `to_dict` gave.

        Raises:
            ValueError: if it is something else.
        """
        try:
            members = tuple(
                Member(m["phase"], Unit.parse(m["unit"]), m["fit"]) for m in raw["members"]
            )
            # JSON has no NaN: null stands for it.
            values: dict[str, Any] = {k: float("nan") if v is None else v for k, v in raw.items()}
            values["members"] = members
            made = cls(**values)
            numbers = (made.period, made.score, made.p_value, made.n_null, made.seed)
            phases = [phase for m in members for phase in (m.phase, m.fit) if phase is not None]
            texts = (made.name, made.site, made.null, made.model_hash, made.stimuli)
            if not all(isinstance(n, int | float) for n in (*numbers, *phases)):
                raise ValueError("a text is where a number should be")
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a number is where a text should be")
            if made.transformation not in get_args(Transformation):
                raise ValueError(f"transformation {made.transformation!r}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"it is no family: {str(error)[:200]}") from error
        return made


def families_table(families: Sequence[Family]) -> Table:
    """Families by name, with their units and phases."""
    rows = [
        (
            f.name, f.site, f.transformation, len(f.members), f.score, f.p_value,
            ", ".join(f"{m.unit.index} ({m.phase:.3g})" for m in f.members),
        )
        for f in families
    ]  # fmt: skip
    note = "no family was found"
    if families:
        f = families[0]
        note = f"p: {f.null}, {f.n_null} times, seed {f.seed}; {f.stimuli}"
    for f in families:  # only those that people put together: they are not found
        if not _differ([m.phase for m in f.members], f.period, f.transformation):
            note += f"\n{f.name}: {_ALIKE[f.transformation]}, its units are alike"
    columns = ("family", "site", "kind", "units", "agreement", "p", "unit (phase)")
    return Table(columns, rows, note=note)


# --- answers -----------------------------------------------------------------------------------


def orbit_for(
    model: HookedModel, transformation: Transformation, size: int | None = None, seed: int = 0
) -> Orbit:
    """The stimuli that families are found with: drawings for rotation, photographs otherwise.

    Args:
        model: an image model with 1 or 3 input channels.
        transformation: the transformation.
        size: height and width in pixels; the model's if not given.
        seed: seed of the choice of photographs.

    Raises:
        ValueError: if the model takes something else, or the transformation is unknown.
    """
    if transformation not in get_args(Transformation):
        known = ", ".join(get_args(Transformation))
        raise ValueError(f"transformation {transformation!r} is not one of {known}")
    spec = model.input
    if not isinstance(spec, ImageInput) or spec.channels not in (1, 3):
        raise ValueError(
            f"model {model.name} takes no photographs: expected images of 1 or 3 channels"
        )
    size = min(spec.height, spec.width) if size is None else size
    if size < 16:
        raise ValueError(f"size {size} must be at least 16 pixels")
    if transformation == "rotation":
        return rotations(size)
    source = open_source("photos")
    assert isinstance(source, ImageSource), "photographs are images"
    order = np.random.default_rng(seed).permutation(len(source))[:48]
    # Always in colour, as hues are turned before a model of grey images averages the channels.
    loader = ImageInput(3, size, size)
    images = torch.stack([_colours(loader, source.image(int(i))) for i in order])
    return {"mirror": mirrors, "scale": scales, "hue": hues}[transformation](images)


def _colours(loader: ImageInput, image: Image.Image | Tensor) -> Tensor:
    assert isinstance(image, Image.Image), "photographs are pictures"
    return loader.load(image)


def answers(
    model: HookedModel,
    site: str | Site,
    orbit: Orbit,
    progress: Callable[[int, int], None] | None = None,
) -> Answers:
    """The response of each unit of a site to each stimulus at each step: its largest activation.

    For stimuli whose content is at their centre only the middle fifth of the map is read, else the whole map.
    """
    n, steps = orbit.images.shape[:2]

    def note(done: int) -> None:
        if progress is not None:
            progress(done, n * steps)

    each = responses(model, site, [orbit.images.flatten(0, 1)], orbit.central, note)
    # From image x unit, stimuli in order with all steps of one together, to unit x stimulus x step.
    return each.unflatten(0, (n, steps)).permute(2, 0, 1).contiguous()


def agreement(
    changes: Answers, cyclic: bool
) -> tuple[Float[Tensor, "unit unit"], Int[Tensor, "unit unit"]]:
    """The best correlation of each pair of units over all shifts, and the shift.

    Args:
        changes: responses minus each stimulus' mean over the steps.
        cyclic: whether the steps form a circle; otherwise at least half of them must overlap.

    Returns:
        The correlation, and by how many steps the second unit (column) is ahead of the first (row).
    """
    # A unit that is the rotated copy of another responds to a rotated stimulus as the other does to the original: their
    # responses are equal up to a shift along the steps.
    steps = changes.shape[2]
    most = steps if cyclic else steps // 2 + 1
    shifts = range(most) if cyclic else range(1 - most, most)
    best = torch.full((len(changes), len(changes)), -2.0, dtype=changes.dtype)
    shift_of = torch.zeros(best.shape, dtype=torch.long)
    for shift in shifts:
        if cyclic:
            mine, other = changes, changes.roll(-shift, 2)
        else:
            # With 5 steps and a shift of 2: mine 0, 1, 2 beside the other's 2, 3, 4; with -2 the other way round.
            mine = changes[:, :, max(0, -shift) : steps - max(0, shift)]
            other = changes[:, :, max(0, shift) : steps - max(0, -shift)]
        # Flattened over stimuli and steps: a correlation of all responses at once, as each stimulus' mean over the
        # steps is taken off already.
        c = _unit_rows(mine.flatten(1)) @ _unit_rows(other.flatten(1)).T
        better = c > best
        best[better], shift_of[better] = c[better], shift
    return best, shift_of


def _unit_rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


# --- finding -----------------------------------------------------------------------------------


def find_families(
    model: HookedModel,
    site: str | Site,
    transformation: Transformation = "rotation",
    *,
    units: Sequence[int] | None = None,
    threshold: float = 0.7,
    least: int = 4,
    permutations: int = 199,
    seed: int = 0,
    size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Family]:
    """Find the families of a site, the largest first.

    Units are clustered by agreement (average linkage); clusters whose mean agreement is at least `threshold` are
    families, if their members differ in the transformation at all (of mirrored units, one is the mirror image of
    another). Each has a permutation p-value: the stimuli of every unit are shuffled (which keeps each unit's responses
    and how they change with the step, but not which stimulus they belong to), units are clustered again, and the size
    of the largest cluster that would be a family is compared with the family's.

    Args:
        model: an image model.
        site: the site to search.
        transformation: how members of a family differ.
        units: the units to search; all if not given.
        threshold: the lowest mean agreement of a family, -1 to 1.
        least: the fewest members of a family.
        permutations: the number of permutations; the p-value is at least 1 / (permutations + 1).
        seed: seed of the permutations and of the choice of photographs.
        size: side of the images in pixels; the model's if not given.
        progress: called with the number of steps done and the total.

    Raises:
        KeyError: if the site is unknown.
        ValueError: if the model takes no photographs, or an argument does not fit.
    """
    place = model.site(site)
    for name, value, low in (("least", least, 2), ("permutations", permutations, 1)):
        if value < low:
            raise ValueError(f"{name} {value} must be at least {low}")
    if not -1 < threshold < 1:
        raise ValueError(f"threshold {threshold} must be between -1 and 1")
    if units is not None and len(set(units)) != len(units):
        raise ValueError(
            f"units {list(units)} of {place.name} are not distinct: expected each once"
        )
    among = [place.unit(u).index for u in (range(place.n_units) if units is None else units)]
    orbit = orbit_for(model, transformation, size, seed)
    shown = orbit.images.shape[0] * orbit.images.shape[1]
    total = shown + permutations

    def showing(done: int, _: int) -> None:
        if progress is not None:
            progress(done, total)

    given = answers(model, place, orbit, showing)[among]
    kept = _responsive(given, orbit)
    if len(kept) < 2:
        return []
    changes = _changes(given)[kept]
    clusters = _transformed(changes, orbit, threshold, least)
    generator = torch.Generator().manual_seed(seed)
    largest: list[float] = []
    for i in range(permutations if clusters else 0):
        shuffled = torch.stack(
            [unit[torch.randperm(len(unit), generator=generator)] for unit in changes]
        )
        # The largest of all clusters, as the family was searched for among all units too.
        found = _transformed(shuffled, orbit, threshold, 2)
        largest.append(float(max(map(len, found), default=1)))
        showing(shown + i + 1, total)
    null = "stimuli shuffled within each unit, clustered again"
    families = []
    for number, cluster in enumerate(clusters):
        p = p_value(float(len(cluster)), largest, "greater")
        which = [among[kept[i]] for i in cluster]
        name = f"{place.name} {transformation} {number + 1}"
        made = _family(name, model, place, which, given, among, orbit, seed)
        families.append(replace(made, p_value=p, null=null, n_null=permutations))
    return families


def measure_family(
    model: HookedModel,
    units: Sequence[str | Unit],
    transformation: Transformation = "rotation",
    *,
    name: str = "",
    permutations: int = 999,
    seed: int = 0,
    size: int | None = None,
) -> Family:
    """Measure whether some units form a family, compared with random groups of equally many units of the site.

    Raises:
        KeyError: if a site is unknown.
        ValueError: if units are of several sites, fewer than two, or listed twice, or `permutations` is
            not positive.
    """
    if permutations < 1:
        raise ValueError(f"permutations {permutations} must be at least 1")
    wanted = [model.unit(unit) for unit in units]
    sites = {unit.site for unit in wanted}
    if len(sites) != 1 or len(set(wanted)) != len(wanted) or len(wanted) < 2:
        raise ValueError(
            f"units {', '.join(map(str, wanted))}: expected at least two different units of one site"
        )
    place = model.site(sites.pop())
    orbit = orbit_for(model, transformation, size, seed)
    given = answers(model, place, orbit)
    table, _ = agreement(_changes(given), orbit.cyclic)
    mine = [unit.index for unit in wanted]
    # The named ones as well: chance draws from all that a person could have named.
    pool = sorted({*_responsive(given, orbit), *mine})
    score = _mean_agreement(table, mine)
    generator = np.random.default_rng(seed)
    chance = [
        _mean_agreement(table, generator.choice(pool, len(mine), replace=False).tolist())
        for _ in range(permutations)
    ]
    p = p_value(score, chance, "greater")
    title = name or f"{place.name} {transformation}"
    made = _family(title, model, place, mine, given, range(place.n_units), orbit, seed)
    null = "random groups of responsive units of the site"
    return replace(made, p_value=p, null=null, n_null=permutations)


def _responsive(given: Answers, orbit: Orbit) -> list[int]:
    """Units whose answers depend on the step, and are not next to nothing."""
    changes = _changes(given)
    spread = (given - given.mean((1, 2), keepdim=True)).square().sum((1, 2))
    # The part of the variance that steps explain, beside that of differences between stimuli.
    share = changes.square().sum((1, 2)) / spread.clamp_min(1e-12)
    most = given.amax((1, 2))
    enough = (
        (share >= _LEAST_CHANGE[orbit.transformation])
        & (most > 0)
        & (most >= _LEAST_ACTIVE * most.median())
    )
    return enough.nonzero()[:, 0].tolist()


def _changes(given: Answers) -> Answers:
    return given - given.mean(2, keepdim=True)


def _clustered(table: Tensor, threshold: float, least: int) -> list[list[int]]:
    """Clusters of at least some members, largest first."""
    distance = 1 - table.double().numpy()
    # Rounding: the halves of the table differ in their last bits, and a distance may come out just below 0.
    distance = np.clip((distance + distance.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average")
    # Average linkage: members agree on average by at least the threshold, where single linkage would chain units whose
    # ends have nothing in common.
    labels = fcluster(tree, 1 - threshold, "distance")
    found = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    return sorted((c for c in found if len(c) >= least), key=lambda c: -len(c))


def _transformed(changes: Answers, orbit: Orbit, threshold: float, least: int) -> list[list[int]]:
    """Clusters of units that agree, largest first, of which some are transformed copies of others."""
    table, shifts = agreement(changes, orbit.cyclic)
    found = []
    for cluster in _clustered(table, threshold, least):
        within = table[cluster][:, cluster], shifts[cluster][:, cluster]
        if _differ(*_phases(changes[cluster], *within, orbit), orbit.transformation):
            found.append(cluster)
    return found


def _differ(phases: Sequence[float], period: float, transformation: Transformation) -> bool:
    """Whether two members are a step of the transformation apart.

    >>> _differ([0.0, 0.0], 0.0, "mirror"), _differ([355.0, 5.0], 360.0, "hue"), _differ([1.0, 1.41], 0.0, "scale")
    (False, False, True)
    """
    if transformation == "scale":
        return max(phases) / min(phases) >= _STEP[transformation]
    gaps = [abs(a - b) for a, b in combinations(phases, 2)]
    return any((min(g, period - g) if period else g) >= _STEP[transformation] for g in gaps)


def _mean_agreement(table: Tensor, units: list[int]) -> float:
    part = table[units][:, units]
    n = len(units)
    return ((part.sum() - part.diagonal().sum()) / (n * (n - 1))).item()


def _family(
    name: str,
    model: HookedModel,
    site: Site,
    units: list[int],
    given: Answers,
    among: Sequence[int],
    orbit: Orbit,
    seed: int,
) -> Family:
    """Some units as a family, not yet compared with chance; `given` are the answers of `among`."""
    changes = _changes(given[[list(among).index(u) for u in units]])
    table, shifts = agreement(changes, orbit.cyclic)
    phases, period = _phases(changes, table, shifts, orbit)
    n = len(units)
    fits = (table.sum(1) - table.diagonal()) / (n - 1)
    members = sorted(
        Member(round(phase, 2), Unit(site.name, unit), round(fit, 4))
        for unit, phase, fit in zip(units, phases, fits.tolist(), strict=True)
    )
    shown, steps = orbit.images.shape[:2]
    kind = "drawings" if orbit.transformation == "rotation" else "photographs"
    return Family(
        name=name,
        site=site.name,
        transformation=orbit.transformation,
        period=period,
        members=tuple(members),
        score=_mean_agreement(table, list(range(n))),
        p_value=float("nan"),
        null="",
        n_null=0,
        model_hash=model.hash,
        stimuli=f"{shown} {kind} in {steps} steps, {orbit.images.shape[-1]} px",
        seed=seed,
    )


def _phases(
    changes: Answers, table: Tensor, shifts: Tensor, orbit: Orbit
) -> tuple[list[float], float]:
    """Where in the family each member is, and the family's period.

    For angles: the direction of the first harmonic of a member's answers, added up over stimuli; of the
    second, if members agree with themselves after half a turn as much as members of a family do.
    Otherwise the shift from the member that agrees most with all.
    """
    if orbit.transformation in ("rotation", "hue"):
        steps = changes.shape[2]
        # The phase of the first harmonic of the response, over all stimuli: a response cos(a - phase) has e^(-i phase)
        # there, hence the minus. If the response is the same after half a turn, the first harmonic is empty and the
        # second, whose angle runs twice as fast, says where the unit is.
        spectrum = torch.fft.rfft(changes.sum(1), dim=1)
        own = _unit_rows(changes.flatten(1))
        after = _unit_rows(changes.roll(steps // 2, 2).flatten(1))
        turns = 2 if (own * after).sum(1).mean() >= _ITSELF_AGAIN else 1
        period = 360.0 / turns
        angles = torch.rad2deg(-spectrum[:, turns].angle()) / turns
        return [angle % period for angle in angles.tolist()], period
    # Without a circle phases are relative: to the member that agrees best with the others.
    middle = int(table.sum(1).argmax())
    ahead = shifts[middle].tolist()
    if orbit.transformation == "mirror":
        return [float(shift) for shift in ahead], 0.0
    # Steps of scale are a geometric series: a shift of s steps is a factor of ratio^s.
    ratio = orbit.steps[1] / orbit.steps[0]
    return [ratio**shift for shift in ahead], 0.0


# --- what people make of them ------------------------------------------------------------------


def save_family(
    database: Database,
    family: Family,
    note: str = "",
    author: str | None = None,
    replaces: int | None = None,
) -> Record:
    """Save a family as a new version of its name.

    Args:
        database: of the workspace.
        family: what to save.
        note: why.
        author: who; the user of the machine if not given.
        replaces: the version that it was made from, 0 for none; not checked if not given.

    Raises:
        ValueError: if the name is empty or a later version is there.
    """
    return database.save(
        KIND, family.model_hash, family.name, family.to_dict(), note, author, replaces
    )


def load_family(
    database: Database, name: str, model_hash: str, version: int | None = None
) -> Family:
    """A saved family, the last version if none is given.

    Raises:
        KeyError: if there is none.
    """
    return Family.from_dict(database.load(KIND, model_hash, name, version).body)


def saved_families(database: Database, model_hash: str) -> list[Family]:
    """The last versions of all families of some weights, by name; without damaged ones (`damaged_families`)."""
    return [Family.from_dict(r.body) for r in _latest(database, model_hash) if not r.fault]


def damaged_families(database: Database, model_hash: str) -> list[str]:
    """What is wrong with each of the saved families of some weights that cannot be read."""
    return [r.fault for r in _latest(database, model_hash) if r.fault]


def _latest(database: Database, model_hash: str) -> list[Record]:
    return database.latest(KIND, model_hash, Family.from_dict)
