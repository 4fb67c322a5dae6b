"""Transplants: against networks whose transplant is known, and by hand."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuits.examples import as_examples
from circuits.files import Keep, keeping, make_now
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import ImageInput
from circuits.transplant import Tuned, grafted, match_and_fit, match_angles, measure_transplant
from circuits.transplant.grafts import _fit, _moved, apart, shuffled, with_random_weights
from tests.forked import Forked


class Small(nn.Module):
    """A convolution whose channels are read by a classifier."""

    def __init__(self, seed: int, stride: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.pre = nn.Conv2d(3, 6, 3, stride, padding=1)
        self.act = nn.ReLU()
        self.head = nn.Linear(6, 12)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.pre(x)).mean((2, 3)))


SPEC = ImageInput(3, 16, 16, mean=(0.5,), std=(0.25,))
ANGLES = (0.0, 90.0, 180.0, 270.0)


def host() -> HookedModel:
    return HookedModel(Small(0), SPEC, "host")


def twin(seed: int = 0, scale: float = 1.0) -> HookedModel:
    """A donor that takes images in 0..1, as the host sees them after preprocessing: its own weights fold it in."""
    module = Small(seed)
    if seed == 0:
        weight, bias = module.pre.weight.data, module.pre.bias
        assert bias is not None, "has one"
        module.pre = nn.Conv2d(3, 6, 3, padding=1, padding_mode="replicate")
        module.pre.weight.data = weight / 0.25 * scale
        module.pre.bias = nn.Parameter((bias - (weight * 2).sum((1, 2, 3))) * scale)
    return HookedModel(module, (3, 16, 16), "donor")


def images(n: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(SPEC.normalize(torch.rand(n, 3, 16, 16, generator=generator)).split(8))


def tuned(site: str, model: HookedModel, units: range = range(4)) -> list[Tuned]:
    return [Tuned(model.unit(f"{site}:{k}"), ANGLES[k]) for k in units]


def test_matching_by_hand() -> None:
    model = host()
    hosts = [Tuned(model.unit("act:0"), 350.0), Tuned(model.unit("act:1"), 100.0)]
    pairs = match_angles(hosts, tuned("pre", model))
    assert [d.unit.index for _, d in pairs] == [0, 1]
    assert (apart(350, 10), apart(0, 180), apart(10, 10)) == (20, 180, 0)
    with pytest.raises(ValueError, match=r"0 units of the host and 4 of the donor"):
        match_angles([], tuned("pre", model))


def test_its_own_units_are_put_back_as_they_were(monkeypatch) -> None:
    """A donor that computes three times the same comes back with a third of the gain."""
    monkeypatch.setattr("circuits.transplant.grafts.STRENGTHS", (0.5, 1.0, 2.0))
    model, donor = host(), twin(scale=3.0)
    graft = match_and_fit(model, tuned("act", model), donor, [tuned("pre", donor)], images(32, 1))
    for m in graft.matches:
        assert m.gain == pytest.approx(1 / 3, rel=0.1)
        assert m.offset == pytest.approx(0, abs=0.3)
        assert m.shift == (0, 0)
        assert m.correlation > 0.9  # borders differ: padding sees other values
    x = images(8, 2)[0]
    before = model.hash
    with grafted(model, graft):
        inside = model.run(x, read=["act"])["act"]
    own = model.run(x, read=["act"])["act"]
    assert model.hash == before
    assert torch.equal(inside[:, 4:], own[:, 4:]), "other units are left alone"
    assert (inside[:, :4] - own[:, :4]).abs().mean() < 0.3 * own[:, :4].mean()  # borders


def test_a_graft_is_gone_after_an_error() -> None:
    model, donor = host(), twin()
    graft = match_and_fit(model, tuned("act", model), donor, [tuned("pre", donor)], images(16, 1))
    x = images(8, 2)[0]
    before = model.logits(x)
    with grafted(model, graft):
        assert not torch.equal(model.logits(x), before)
    with pytest.raises(ValueError), grafted(model, graft):
        model.logits(torch.zeros(1, 5, 16, 16))
    assert torch.equal(model.logits(x), before)


def test_the_family_that_correlates_is_chosen_and_maps_are_made_as_fine() -> None:
    model, donor = host(), twin()
    wrong = [Tuned(donor.unit(f"pre:{k}"), ANGLES[(k + 1) % 4]) for k in range(4)]
    graft = match_and_fit(
        model, tuned("act", model), donor, [wrong, tuned("pre", donor)], images(32, 1)
    )
    assert [m.donor.index for m in graft.matches] == [0, 1, 2, 3]
    coarse = HookedModel(Small(5, stride=2), (3, 16, 16), "coarse")
    other = match_and_fit(model, tuned("act", model), coarse, [tuned("pre", coarse)], images(8, 1))
    assert other.scale == 2
    assert other.maps(model, images(8, 2)[0]).shape == (8, 4, 16, 16)


def test_shifts_are_found() -> None:
    there = torch.rand(4, 9, 9, generator=torch.Generator().manual_seed(0))
    wanted = (_moved(there, (1, -1)) - 0.6).clamp_min(0) * 5
    gain, offset, shift = _fit(there, wanted)
    assert shift == (1, -1)
    assert gain == pytest.approx(5, rel=0.1)
    assert -offset / gain == pytest.approx(0.6, abs=0.03)
    assert _fit(torch.zeros(4, 9, 9), wanted)[0] == 0


def test_controls_are_wrong_where_they_should_be() -> None:
    model, donor = host(), twin()
    graft = match_and_fit(model, tuned("act", model), donor, [tuned("pre", donor)], images(16, 1))
    generator, shown = torch.Generator().manual_seed(0), as_examples(model, images(16, 1))
    for control in shuffled(model, graft, shown, generator, 3):
        assert sorted(m.donor.index for m in control.matches) == [0, 1, 2, 3]
        assert all(apart(m.angle, m.donor_angle) >= 45 for m in control.matches)
    random = with_random_weights(model, graft, shown, generator)
    own = donor.parameters["pre.weight"]
    assert torch.equal(
        random.weights["pre.weight"].flatten().sort().values, own.flatten().sort().values
    )
    assert not torch.equal(random.weights["pre.weight"], own)


def test_a_report_against_its_definition() -> None:
    model, donor = host(), twin()
    calibration, evaluation = images(32, 1), images(24, 2)
    graft = match_and_fit(model, tuned("act", model), donor, [tuned("pre", donor)], calibration)
    labels = torch.cat([model.logits(x).argmax(-1) for x in evaluation]).tolist()
    done: list[tuple[int, int]] = []
    report = measure_transplant(
        model,
        graft,
        calibration,
        evaluation,
        labels,
        n_random=2,
        progress=lambda *a: done.append(a),
    )
    assert done[-1][0] == done[-1][1]
    assert [d for d, _ in done] == sorted(d for d, _ in done)

    def zeroed(value: Tensor) -> Tensor:
        changed = value.clone()
        changed[:, :4] = 0
        return changed

    intact = torch.cat([model.logits(x) for x in evaluation]).double().log_softmax(-1)

    def divergence(logits: Tensor) -> float:
        changed = logits.double().log_softmax(-1)
        return float((intact.exp() * (intact - changed)).sum(-1).mean())

    zero = divergence(torch.cat([model.logits(x, {"act": zeroed}) for x in evaluation]))
    with grafted(model, graft):
        put = divergence(torch.cat([model.logits(x) for x in evaluation]))
    assert report.condition("intact").accuracy.value == 1
    assert report.condition("zero").kl.value == pytest.approx(zero, rel=1e-6)
    found = report.condition("transplant")
    assert found.kl.value == pytest.approx(put, rel=1e-4)
    assert found.recovered_kl.value == pytest.approx(1 - put / zero, rel=1e-6)
    assert found.recovered_kl.low < found.recovered_kl.value < found.recovered_kl.high
    assert report.condition("zero").recovered_kl.value == 0
    assert report.condition("transplant").recovered_kl.value > 0.9
    assert (
        report.condition("transplant").recovered_kl.value
        > report.condition("mean").recovered_kl.value
    )
    assert report.condition("shuffled orientations").repeats == 2
    assert report.condition("zero").p_kl < 0.01
    facts = report.to_dict()
    assert facts["conditions"][4]["p_kl"] is None
    assert facts["matches"][0]["host"] == "act:0"


def test_the_best_constant_is_found_between_whole_levels() -> None:
    """Against all levels in steps of .01, on images of which half are faint and half are strong."""
    model, donor = host(), twin()
    shown = [torch.cat([x[:4] * 0.2, x[4:] * 3]) for x in images(16, 1)]
    graft = match_and_fit(model, tuned("act", model), donor, [tuned("pre", donor)], shown)
    report = measure_transplant(model, graft, shown, shown, n_random=1)
    mean = torch.cat([model.run(x, read=["act"])["act"] for x in shown]).mean((0, 2, 3))

    def divergence(level: float) -> float:
        def put(value: Tensor) -> Tensor:
            changed = value.clone()
            changed[:, :4] = level * mean[:4, None, None]
            return changed

        own, other = (
            torch.cat([model.logits(x, edits) for x in shown]).double().log_softmax(-1)
            for edits in ({}, {"act": put})
        )
        return float((own.exp() * (own - other)).sum(-1).mean())

    found = report.condition("best constant").kl.value
    whole, all_of_them = (
        min(divergence(float(x)) for x in levels) for levels in (range(4), torch.arange(0, 3, 0.01))
    )
    assert all_of_them <= found + 1e-6
    assert found < whole - 0.5 * (whole - all_of_them)


_KILLED = """
import sys, time
from pathlib import Path
from circuits.files import keeping
from tests.test_transplant import measured

def slowly(name, make):
    value = kept(name, make)
    time.sleep(0.1)
    return value

kept = keeping(Path(sys.argv[1]))
measured(slowly)
"""


def measured(keep: Keep) -> dict[str, Any]:
    """A transplant from matching to its report, in three batches."""
    model, donor = host(), twin()
    calibration, evaluation = images(16, 1), images(24, 2)
    graft = match_and_fit(
        model, tuned("act", model), donor, [tuned("pre", donor)], calibration, keep=keep
    )
    return measure_transplant(
        model, graft, calibration, evaluation, n_random=2, batch=8, keep=keep
    ).to_dict()


def test_killed_it_goes_on_from_its_parts_to_the_same_numbers(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    parts = [
        "answers", "batch-0", "batch-1", "batch-2", "best-level", "fit", "means", "random-weights-1",
        "random-weights-2", "shuffled-1", "shuffled-2",
    ]  # fmt: skip
    whole = measured(make_now)
    start = f"import torch; torch.set_num_threads({threads})\n"
    for n in (1, 4, 8, 10):  # it is killed each time with a few more
        process = Forked(start + _KILLED, tmp_path, out=tmp_path / f"{n}.log")
        while process.running() and len(list(tmp_path.glob("*.json"))) < n:
            time.sleep(0.005)
        assert process.running(), (tmp_path / f"{n}.log").read_text()
        process.kill()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert 10 <= len(before) < len(parts) + 1
    assert measured(keeping(tmp_path)) == whole
    now = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert sorted(now) == [f"{name}.json" for name in parts]
    assert {name: now[name] for name in before} == before, "nothing was made again"

    def refuse(name: str, make: object) -> Any:
        return keeping(tmp_path)(name, lambda: pytest.fail(f"{name} is made again"))

    assert measured(refuse) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evaluation": []}, "examples are empty: expected at least one"),
        ({"labels": [1]}, "labels have 1 entries: expected one for each of the 8 examples"),
        ({"n_random": 0}, "n_random 0 must be at least 1"),
    ],
)
def test_bad_input(change, message: str) -> None:
    model, donor = host(), twin()
    graft = match_and_fit(model, tuned("act", model), donor, [tuned("pre", donor)], images(8, 1))
    given = {
        "calibration": images(8, 1),
        "evaluation": images(8, 2),
        "labels": None,
        "n_random": 1,
    } | change
    with pytest.raises(ValueError, match=message):
        measure_transplant(model, graft, **given)
    with pytest.raises(ValueError, match="of 2 sites: expected one"):
        match_and_fit(
            model,
            [tuned("act", model)[0], tuned("pre", model)[1]],
            donor,
            [tuned("pre", donor)],
            images(8, 1),
        )
    with pytest.raises(ValueError, match="examples are empty: expected at least one"):
        match_and_fit(model, tuned("act", model), donor, [tuned("pre", donor)], [])


def test_nothing_that_is_put_behind_a_relu6_exceeds_it() -> None:
    bounded = host().module
    bounded.act = nn.ReLU6()
    known = HookedModel(bounded, SPEC, "bounded")
    graft = match_and_fit(known, tuned("act", known), twin(), [tuned("pre", twin())], images(16, 0))
    strong = replace(graft, matches=tuple(replace(m, gain=100 * m.gain) for m in graft.matches))
    shown = torch.cat(images(16, 1))
    assert float(strong.maps(known, shown).max()) == 6.0
    unbounded = replace(strong, ceiling=float("inf"))
    torch.testing.assert_close(strong.maps(known, shown), unbounded.maps(known, shown).clamp_max(6))
    assert float(unbounded.maps(known, shown).max()) > 6
