"""Cases: their numbers are held to `expected.json`, and what is asked wrongly is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cases.curve_detector.hosts import images_of
from cases.curve_detector.page import found_in_place, found_of_constants
from cases.curve_detector.stage import Options
from cases.imagenet.evidence import _at_eyes, rate_p
from cases.imagenet.names import _curves, _directions, text_of
from cases.imagenet.photographs import shuffled_model
from cases.ioi.evidence import grown, random_heads
from cases.ioi.heads import _both
from cases.ioi.page import _GPT2, _differences, in_words
from circuits.cli.main import run
from circuits.concepts import read_names
from circuits.discovery.streams import StreamGraph
from circuits.localization import judge_heads
from circuits.models.zoo.loading import load_model
from tests.smollm2 import fetched_smollm2

WHOLE = pytest.mark.nightly  # a whole case takes minutes

CASES = Path(__file__).parents[1] / "cases"
CASE = CASES / "curve_detector"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("case")


@pytest.fixture(scope="module")
def results(workspace: Path) -> dict:
    assert run(["case", "curve-detector", "--fast", "--workspace", str(workspace)]) == 0
    return json.loads((workspace / "cases/curve-detector/results.json").read_text())


def number(results: dict, path: str) -> float:
    value = results
    for part in path.split("/"):
        value = value[part]
    return float(value)


@WHOLE
def test_the_case_is_held_to_its_numbers(results: dict) -> None:
    expected = json.loads((CASE / "expected.json").read_text())["fast"]
    for path, (value, tolerance) in expected.items():
        assert number(results, path) == pytest.approx(value, abs=tolerance), path
    curves = [u for u in results["units"] if u["layer"] == "curve"]
    assert len(curves) == 72
    assert all(28 <= u["fwhm"] <= 68 for u in curves)
    assert max(u["echo"] for u in curves) <= 0.03
    assert max(u["line_share"] for u in curves) < 0.35
    assert results["r_published_min"] >= 0.94
    assert results["echo_without_negative"] > 5 * results["echo"]
    assert min(results["circulant_r2"].values()) >= 0.98
    names = {
        "intact",
        "zero",
        "mean",
        "best constant",
        "transplant",
        "shuffled orientations",
        "random weights",
    }
    assert set(results["transplant"]) == names
    for condition in results["transplant"].values():
        for name in ("accuracy", "top5", "kl", "recovered_kl"):
            assert set(condition[name]) == {"value", "low", "high"}
    assert set(results["hashes"]) == {"cleanroom", "shapes"}


@WHOLE
def test_the_page_shows_the_same_numbers_and_needs_nothing_else(
    results: dict, workspace: Path
) -> None:
    page = (workspace / "cases/curve-detector/report.html").read_text()
    for condition in results["transplant"].values():
        assert f"{condition['recovered_kl']['value']:.2f}" in page
    assert f"{results['r_published_median']:.3f}" in page
    assert page.count("data:image/png;base64,") >= 8
    assert not re.search(r"(src|href)=['\"](?!data:)", page)


@WHOLE
def test_a_second_run_makes_nothing_anew(results: dict, workspace: Path) -> None:
    stages = workspace / "cases/curve-detector/stages"
    before = {p: p.stat().st_mtime_ns for p in stages.rglob("*.json")}
    assert run(["case", "curve-detector", "--fast", "--workspace", str(workspace)]) == 0
    assert {p: p.stat().st_mtime_ns for p in stages.rglob("*.json")} == before
    again = json.loads((workspace / "cases/curve-detector/results.json").read_text())
    assert again == results


def _conditions(**recovered: tuple[float | None, float | None, float | None]) -> dict:
    """Results of a case with these shares of the KL divergence recovered: value, low, high."""
    names = ("transplant", "mean", "best constant", "shuffled orientations", "random weights")
    numbers = {name: recovered.get(name.replace(" ", "_"), (0.1, 0.0, 0.2)) for name in names}
    return {
        "transplant": {
            name: {"recovered_kl": dict(zip(("value", "low", "high"), three, strict=True))}
            for name, three in numbers.items()
        },
        "transplant_facts": {"matches": [{}] * 3, "host": "shapes"},
    }


def test_sentences_of_the_page_say_what_its_table_says() -> None:
    better = _conditions(transplant=(0.7, 0.6, 0.8), best_constant=(0.5, 0.4, 0.55))
    assert found_in_place(better) == (
        "In the place of 3 units of shapes it recovers 0.70 (0.60 to 0.80) of the KL divergence that zeroing them "
        "costs; of the controls best constant recovers most, 0.50 (0.40 to 0.55)."
    )
    assert found_of_constants(better) == (
        "The best constant recovers 0.50 (0.40 to 0.55): that part of what zeroing costs is a missing bias of later "
        "layers."
    )
    near = _conditions(
        transplant=(0.3, 0.1, 0.5), best_constant=(0.1, -0.1, 0.3), mean=(-1.5, -2, -1)
    )
    assert found_in_place(near).endswith(
        "(-0.10 to 0.30): not clearly less than the hand-written units."
    )
    assert (
        found_of_constants(near)
        == "The best constant recovers 0.10 (-0.10 to 0.30), which may be nothing."
    )
    worse = _conditions(transplant=(-0.5, -0.6, -0.4), best_constant=(0.0, 0.0, 0.0))
    assert "more than the hand-written units" in found_in_place(worse)
    assert found_of_constants(worse).endswith(
        "0.00 (0.00 to 0.00): what zeroing costs is no missing bias of later layers."
    )
    nothing = _conditions(**dict.fromkeys(
        ("transplant", "mean", "best_constant", "shuffled_orientations", "random_weights"), (None, None, None)
    ))  # fmt: skip
    assert found_in_place(nothing).startswith("Zeroing 3 units of shapes costs nothing here")
    assert found_of_constants(nothing) == ""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    generator = np.random.default_rng(0)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        for k in range(3):
            pixels = generator.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{k}.png")
    return tmp_path / "one", tmp_path / "other"


def test_bad_input_is_one_line(folders: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    one, other = folders
    (other / "same.png").write_bytes((one / "0.png").read_bytes())
    place = ["--workspace", str(tmp_path / "w")]
    asked = [
        (["curve"], "case 'curve' is not one of curve-detector"),
        (["../x"], "is not one of curve-detector"),
        (["curve-detector", "--calibrate", str(one)], "shapes is shown its own drawings"),
        (["curve-detector", "--transplant", "cleanroom"], "--transplant cleanroom needs images"),
        (
            ["curve-detector", "--transplant", "cleanroom", "--calibrate", str(one), "--evaluate", str(other)],
            "1 images are among those of --calibrate, the first same.png",
        ),
        (
            ["curve-detector", "--transplant", "cleanroom", "--calibrate", str(one), "--evaluate", f"{one}/no"],
            "no",
        ),
        (["curve-detector", "--transplant", "nothing"], "nothing"),
        (["curve-detector", "--seed", "-1"], "seed"),
        (["imagenet", "--calibrate", str(one)], "--calibrate: case imagenet has no such option"),
        (["imagenet", "--transplant", "shapes"], "--transplant: case imagenet has no such option"),
        (["imagenet", "--labels", str(one / "0.png")], "--labels: expected with --evaluate"),
    ]  # fmt: skip
    for arguments, message in asked:
        assert run(["case", *arguments, *place]) == 2, arguments
        said = capsys.readouterr().err
        assert message in said, arguments
        assert "Traceback" not in said
    assert not (tmp_path / "w" / "cases").exists()


def test_a_host_is_shown_what_can_be_read_and_the_rest_is_accounted_for(
    folders: tuple[Path, Path],
) -> None:
    one, other = folders
    (other / "1.png").write_bytes((other / "1.png").read_bytes()[:100])
    (other / "labels.csv").write_text("file,label\n0.png,3\n1.png,4\n2.png,5\n")
    options = Options(calibrate=one, evaluate=other, labels=other / "labels.csv")
    host = load_model(
        "shapes", "untrained"
    )  # its name tells it from the one that is shown drawings
    images = images_of(options, host)
    assert images.facts["calibration"] == f"{one} (3)"
    assert images.facts["evaluation"].startswith(f"{other} (2; skipped 1 × ")
    assert "1.png" in images.facts["evaluation"]
    known, measured = images.load()
    assert (len(known), len(measured), measured.labels) == (3, 2, (3, 5))


# --- what is in a network that recognises photographs ------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[dict, Path]:
    place = tmp_path_factory.mktemp("imagenet")
    assert run(["case", "imagenet", "--fast", "--workspace", str(place)]) == 0
    folder = place / "cases/imagenet"
    return json.loads((folder / "results.json").read_text()), folder


def test_ranks_at_eyes_by_hand() -> None:
    """Two photographs, one unit: highest at the first one's eye, lowest at the second one's."""
    maps = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(2, 1, 1, 1)
    own, gain = _at_eyes(maps, [[(0.9, 0.9), (0.0, 0.0)], [(0.1, 0.1)]])
    assert own.tolist() == [[1.0], [0.0]]  # of several eyes the highest counts
    assert gain.tolist() == [[1.0], [-1.0]]  # beside where the other photograph has its eye


def test_more_curve_units_than_by_chance_by_hand() -> None:
    """Of all that were found, each is the network's with a probability of one in the number of networks."""
    assert rate_p(2, [1]) == pytest.approx(4 / 8)  # 2 or 3 of 3
    assert rate_p(2, [0, 1, 0]) == pytest.approx(3 * 3 / 64 + 1 / 64)
    assert rate_p(0, [0, 0]) == 1


def test_curve_units_are_named_where_there_are_clearly_more_than_by_chance() -> None:
    unit = {
        "preferred": 40.0, "fwhm": 60.0, "echo": 0.0, "radius": 30.0, "line_peak": 0.1, "peak": 2.0, "curve": [1.0],
        "circular_variance": 0.2,
    }  # fmt: skip
    units = [{"unit": f"{site}:1"} | unit for site in ("few", "many")]
    chance = {"few": {"p_corrected": 0.02}, "many": {"p_corrected": 0.001}}
    made = _curves({"curves": {"units": units, "by_chance": chance}})
    assert [(str(n.unit), n.text) for n in made] == [("many:1", "curves that bulge at 40°")]


def test_directions_are_counted_both_ways() -> None:
    others = {"of_others_low": -0.1, "of_others_high": 0.2}
    zeroed = [{"group": "dogs", "change_of_log_p": x} | others for x in (-0.2, -0.1, 0.1, 0.3, 0.4)]
    found = _directions([*zeroed, {"kl": 0.1}])  # one that tells no group
    assert (found["units"], found["raised"]) == (5, 3)
    assert (found["lower_than_all_others"], found["higher_than_all_others"]) == (1, 2)
    assert found["mean_change"] == pytest.approx(0.1)
    assert found["each_by_chance"] == pytest.approx(5 / 7)


def test_names_of_drawings_say_angles_where_there_are_any() -> None:
    assert text_of("line", "dark, thin", 45.0) == "line along 45°: dark, thin"
    assert text_of("curve", "dark", None) == "curve: dark"
    assert text_of("colour spot", "red in cyan", None) == "colour spot: red in cyan"


def test_shuffled_weights_leave_each_channel_its_mean_and_deviation() -> None:
    model = load_model("efficientnet-lite0")
    images = torch.rand((4, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    control = shuffled_model(model, images, 0)
    for site in ("stem_pre_relu", "block2a_depthwise_pre_relu", "block3b_project"):
        own, other = (m.run(images, read=[site])[site] for m in (model, control))
        torch.testing.assert_close(other.mean((0, 2, 3)), own.mean((0, 2, 3)), atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(other.std((0, 2, 3)), own.std((0, 2, 3)), atol=1e-3, rtol=1e-2)
        assert not torch.allclose(other, own, atol=0.1)
    assert model.hash == load_model("efficientnet-lite0").hash


@WHOLE
def test_units_of_imagenet_are_told_beyond_shuffled_weights(found: tuple[dict, Path]) -> None:
    results, _ = found
    expected = json.loads((CASES / "imagenet/expected.json").read_text())["fast"]
    for path, (value, tolerance) in expected.items():
        assert number(results, path) == pytest.approx(value, abs=tolerance), path
    kinds = results["drawings"]["kinds"]
    told = {
        name: sum(n for s in sites.values() for n in s.values()) for name, sites in kinds.items()
    }
    assert told["trained"] > 4 * told["shuffled weights"]
    assert results["thin"]  # of photographs that are installed no class is known
    assert results["classes"]["units"] == results["eyes"]["units"] == []
    for row in results["decision"]["rows"]:
        assert row["lost"]["30"]["attributed"] > row["lost"]["30"]["random_high"]


@WHOLE
def test_names_of_imagenet_have_their_evidence(found: tuple[dict, Path]) -> None:
    results, folder = found
    names = read_names(folder / "names.json")
    assert [str(n.unit) for n in names.names] == [n["unit"] for n in results["names"]]
    for name in names.names:
        assert name.evidence["measured_at"] == f"{name.unit.site}_pre_relu"
        assert len(name.evidence["best_photographs"]) == 3
        assert name.evidence["zeroed"]["kl"] >= 0
    page = (folder / "report.html").read_text()
    assert "no class is known" in page
    assert page.count("data:image/png;base64,") >= 4


# --- indirect objects ----------------------------------------------------------------------------


def test_a_circuit_that_is_too_small_to_reach_the_input_grows_until_it_does() -> None:
    graph = StreamGraph(load_model("induction-by-hand"))
    worth = np.linspace(1, 0, len(graph))
    worth[graph.mask(["1.0 -> logits"])] = 2
    kept = grown(graph, worth, 1)
    assert kept.any()
    assert (graph.connected(kept) == kept).all()
    assert (grown(graph, worth, len(graph)) == graph.connected(np.ones(len(graph), bool))).all()


def test_a_role_of_two_tests_is_held_by_heads_that_pass_both() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 3, 40))
    one[:2] += 3
    other[1:] += 3
    heads = ["0.0", "0.1", "0.2"]
    tests = [judge_heads(n, heads, v, measure="m") for n, v in (("speaks", one), ("copies", other))]
    made = _both(*tests)
    assert (made["found"], made["only_the_first_test"], made["absent"]) == (["0.1"], ["0.0"], False)
    assert made["heads"][0]["speaks"]["holds"]
    assert made["heads"][0]["copies"]["p_value"] < 0.05


@pytest.mark.parametrize(
    ("swapped", "said"), [(0.1, "keeps 0.10."), (0.6, "which is not clearly less")]
)
def test_a_circuit_that_is_no_better_than_with_swapped_answers_is_said_so(
    swapped: float, said: str
) -> None:
    names = (
        "duplicate token", "previous token", "induction", "S-inhibition", "name mover", "negative name mover",
        "backup name mover", "S suppressor",
    )  # fmt: skip
    roles = {name: {"found": ["1.2"] if name == "name mover" else []} for name in names}
    evaluation = {"faithfulness": {"value": 0.7, "low": 0.5, "high": 0.9}}
    circuit = {"evaluation": evaluation, "edges": ["a -> b"], "swapped": {"value": swapped}}
    text = in_words({"heads": {"roles": roles}, "circuit": circuit})
    assert "there are heads of these kinds: name mover; absent are: duplicate token" in text
    assert said in text
    evaluation["faithfulness"] = {"value": None, "low": None, "high": None}
    assert "is undefined: too few examples" in in_words(
        {"heads": {"roles": roles}, "circuit": circuit}
    )


def test_random_heads_in_the_place_of_some_are_different_ones() -> None:
    free, rng = {19: ["19.0", "19.1", "19.3"], 20: ["20.1"]}, np.random.default_rng(0)
    for _ in range(20):
        drawn = random_heads(free, [20, 19, 19, 20], rng)
        assert len(set(drawn)) == len(drawn) == 3
        assert drawn[0] == "20.1", "20 has no other one"


@pytest.mark.parametrize(("place", "name", "said"), [(4.1, 0.1, "position"), (0.2, 1.5, "name")])
def test_what_movers_are_told_is_read_from_paths_into_their_queries(
    place: float, name: float, said: str
) -> None:
    heads = {
        "roles": {role: {"found": []} for role in _GPT2}, "tests": {"direct": {"heads": []}},
        "signals": {"position": {"20.0": {"value": place}}, "token": {"20.0": {"value": name}}},
    }  # fmt: skip
    agrees, differs = "".join(_differences({"heads": heads})).split("<p>Differs:")
    line = f"more is about the {said}"
    assert (line in agrees, line in differs) == (said == "position", said == "name")
    assert f"{place:.2f} logits are lost if the first two names trade places" in agrees + differs


@WHOLE
@pytest.mark.models
def test_indirect_objects_are_held_to_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2").symlink_to(fetched_smollm2())
    assert run(["case", "ioi", "--fast", "--workspace", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "cases/ioi/results.json").read_text())
    expected = json.loads((CASES / "ioi/expected.json").read_text())["fast"]
    for path, (value, tolerance) in expected.items():
        assert number(results, path) == pytest.approx(value, abs=tolerance), path
    page = (tmp_path / "cases/ioi/report.html").read_text()
    assert "coarse (--fast)" in page
    assert page.count("data:image/png;base64,") >= 4
    # Which way the steering directions of the two orders point, and that nothing in front is a sink all the same.
    assert results["edits"]["steering"]["cosine_of_orders"] < 0
    assert (
        results["behaviour"]["sink"]["nothing"]["mean_share"]
        > 2 * results["behaviour"]["sink"]["nothing"]["even_share"]
    )
