"""Random sequences of apply, undo, redo and replay over all operators: is every bit where it was?

Half of the sequences edit a CNN, half a transformer, each on a branch of its own in one ledger. After each
sequence everything is undone: the weights must be what they were, to the bit. At the end another process makes
every branch's edits again from the models as they are, and every hash must be the same.

    python benchmarks/edit_fuzz.py --n 1000
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from circuits.database import Database
from circuits.edits.auditing import verify
from circuits.edits.ledger import Ledger
from circuits.edits.records import OPERATORS
from circuits.models.zoo.loading import load_model
from tests.random_edits import RandomEdits

MODELS = ("shapes", "induction")


def sequence(ledger: Ledger, branch: str, seed: int, steps: int) -> tuple[collections.Counter, str]:
    """One sequence on a branch; how often each operator was used, and the hash of the weights at its height."""
    draw, chance = RandomEdits(ledger.model, seed), random.Random(seed)
    used: collections.Counter = collections.Counter()
    own = {name: p.data.clone() for name, p in ledger.model.parameters.items()}
    ledger.branch(branch, at=ledger.model_hash)
    for _ in range(steps):
        undone, here = ledger.undone(branch), ledger.head(branch) != ledger.model_hash
        what = chance.random()
        if what < 0.25 and here:
            ledger.undo(branch)
        elif what < 0.4 and undone:
            ledger.redo(branch)
        elif what < 0.45 and here:
            assert all(r.same for r in ledger.replay(branch)), f"replay of {branch} (seed {seed})"
        else:
            edit = draw.edit()
            ledger.apply(edit, branch=branch)
            used[edit.operator] += 1
    height, head = len(ledger.entries(branch)), ledger.head(branch)
    with ledger.edited(branch):
        reached = ledger.model.hash
    assert ledger.model.hash == ledger.model_hash, f"the model was changed (seed {seed})"
    for _ in range(height):
        ledger.undo(branch)
    for name, tensor in ledger.move_to(ledger.model_hash).items():
        assert tensor.equal(own[name]), f"{name} is not what it was (seed {seed})"
    for _ in range(height):
        ledger.redo(branch)
    assert ledger.head(branch) == head, f"redo of {branch} ends elsewhere (seed {seed})"
    return used, reached


def replayed(root: Path) -> dict[str, str]:
    """In a fresh process: make every branch again; the hash of the weights at the end of each."""
    found = {}
    for name in MODELS:
        model = load_model(name)
        ledger = Ledger(Database(root / "workspace.db"), model)
        for branch in ledger.branches()[1:]:
            assert all(r.same for r in ledger.replay(branch)), (
                f"replay of {branch} in a new process"
            )
            with ledger.edited(branch):
                found[branch] = model.hash
    return found


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=Path)
    args = parser.parse_args()
    if args.replay is not None:
        json.dump(replayed(args.replay), sys.stdout)
        return
    start = time.perf_counter()
    used: collections.Counter = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "workspace.db")
        ledgers = [Ledger(database, load_model(name)) for name in MODELS]
        reached = {}
        for i in range(args.n):
            more, final = sequence(ledgers[i % 2], f"s{i}", args.seed + i, args.steps)
            used += more
            reached[f"s{i}"] = final
            if sys.stderr.isatty():
                print(f"\r{i + 1} of {args.n}", end="", file=sys.stderr)
        middle = time.perf_counter()
        again = subprocess.run(
            [sys.executable, __file__, "--replay", folder],
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(again.stdout) == reached, "a fresh process reached other weights"
        faults = verify(database)
        assert not faults, faults[:3]
        size = database.path.stat().st_size / 1e6
    missing = set(OPERATORS) - set(used)
    print(f"{args.n} sequences of {args.steps} steps on {' and '.join(MODELS)}, seed {args.seed}")
    print(f"edits: {sum(used.values())}; " + ", ".join(f"{k} {n}" for k, n in sorted(used.items())))
    print(f"operators not drawn: {', '.join(sorted(missing)) or 'none'}")
    print("undone to the bit: all; same hashes in a fresh process: all; ledger verified: no fault")
    print(
        f"{middle - start:.0f} s, replay {time.perf_counter() - middle:.0f} s, ledger {size:.0f} MB"
    )


if __name__ == "__main__":
    main()
