"""Labels by the names that people give files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from circuits.stimuli.labels import read_attributes, read_labels
from circuits.stimuli.sources import Source, open_source

CLASSES = ("cat", "dog")
FILES = ("cat/1.png", "cat/2.png", "dog/1.png", "dog/3.png")


@pytest.fixture
def val(tmp_path: Path) -> Source:
    for name in FILES:
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "val" / name)
    return open_source(f"folder:{tmp_path / 'val'}")


def labelled(source: Source, given: object, classes: tuple[str, ...] = CLASSES) -> list[int]:
    path = Path(source.spec.removeprefix("folder:")).parent / "labels.json"
    path.write_text(json.dumps(given))
    return read_labels(source, classes, path)


@pytest.mark.parametrize("front", ["", "./", "val/", "../val/", "/elsewhere/val/", "{val}/"])
def test_files_are_named_by_any_part_of_their_path_that_tells_them_apart(
    front: str, val: Source
) -> None:
    front = front.replace("{val}", val.spec.removeprefix("folder:"))
    given = {f"{front}{name}": name[:3] for name in FILES}
    assert labelled(val, given) == [0, 0, 1, 1]
    backwards = {name: "dog" if label == "cat" else "cat" for name, label in given.items()}
    assert labelled(val, backwards) == [1, 1, 0, 0], "not by the files' folders"
    assert labelled(val, {"cat/1.png": 0, "val/dog/1.png": 1, "2.png": 1, "3.PNG": 0}) == [
        0,
        1,
        1,
        0,
    ]
    assert labelled(val, {n.upper(): n[:3] for n in FILES}) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"1.png": "cat"}, r"'1\.png' may be 'cat/1\.png' or 'dog/1\.png'"),
        ({"cat/1.png": "cat", "1.png": "dog"}, r"'1\.png' may be 'cat/1\.png' or 'dog/1\.png'"),
        ({"a/cat/1.png": "cat", "b/cat/1.png": "dog"},
         r"'cat/1\.png' may be 'a/cat/1\.png' \('cat'\) or 'b/cat/1\.png' \('dog'\)"),
        ({"Cat/1.png": "cat", "CAT/1.png": "dog"},
         r"'cat/1\.png' may be 'Cat/1\.png' \('cat'\) or 'CAT/1\.png' \('dog'\)"),
        ({"else/where/1.png": "cat"}, r"'cat/1\.png' has no label"),
    ],
)  # fmt: skip
def test_what_a_name_leaves_open_is_refused(
    given: dict[str, str], message: str, val: Source
) -> None:
    with pytest.raises(ValueError, match=message):
        labelled(val, given)


def test_files_in_the_folder_itself_keep_their_names_to_themselves(tmp_path: Path) -> None:
    for name in ("1.png", "sub/1.png"):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "f" / name)
    source = open_source(f"folder:{tmp_path / 'f'}")
    with pytest.raises(ValueError, match=r"'sub/1\.png' has no label"):
        labelled(source, {"1.png": "cat"})


def test_tables_arrays_and_json_say_the_same(val: Source, tmp_path: Path) -> None:
    pairs = [(f"val/{name}", name[:3]) for name in FILES]
    lines = [f"{name},{label}" for name, label in pairs]
    files = {
        "head.csv": "\ufeff" + "\n".join(["Label,id,Path", *(f"{b},0,{a}" for a, b in pairs)]),
        "bare.csv": "\r\n".join(lines),
        "tabs.tsv": "\n".join(["name\tlabel", *(line.replace(",", "\t") for line in lines)]),
        "order.csv": "label\ncat\ncat\ndog\ndog\n",
        "beside.json": json.dumps({"names": [a for a, _ in pairs], "labels": [b for _, b in pairs]}),
        "inside.json": json.dumps({"labels": dict(pairs)}),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    np.savez(tmp_path / "a.npz", names=[a for a, _ in pairs], labels=[b for _, b in pairs])
    np.savez(tmp_path / "b:c.npz", y=np.array([0, 0, 1, 1]))
    np.save(tmp_path / "d.npy", np.array([0, 0, 1, 1]))
    for name in (*files, "a.npz", "b:c.npz:y", "d.npy"):
        assert read_labels(val, CLASSES, tmp_path / name) == [0, 0, 1, 1], name
    for text, message in (
        ("a,b,c\n1,2,3\n", "expected the first line name,label"),
        ("name,label,class\na,b,c\n", "expected the first line name,label"),
        ("cat/1.png,cat\ncat/1.png,dog\n", "'cat/1.png' is there twice, with 'cat' and 'dog'"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(val, CLASSES, tmp_path / "bad.csv")


def test_attributes_are_matched_as_labels_are(val: Source, tmp_path: Path) -> None:
    path = tmp_path / "attributes.json"
    path.write_text(json.dumps({"val/cat/1.png": "furry", "val/dog/1.png": ["loud"]}))
    assert read_attributes(val, path) == ([["furry"], [], ["loud"], []], 2)
    path.write_text(json.dumps({"1.png": "furry"}))
    with pytest.raises(ValueError, match=r"'1\.png' may be 'cat/1\.png' or 'dog/1\.png'"):
        read_attributes(val, path)


def test_classes_in_names_of_folders(tmp_path: Path) -> None:
    for name in ("tabby #2/x.png", "Big: a+b/cat #7.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = open_source(f"folder:{tmp_path}")
    assert read_labels(source, ("big: a+b", "tabby #2", "tabby")) == [0, 1]
    with pytest.raises(ValueError, match="may be class 'Tabby #2' or 'TABBY #2'"):
        read_labels(source, ("big: a+b", "Tabby #2", "TABBY #2"))
