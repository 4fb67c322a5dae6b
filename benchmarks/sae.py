"""Training a TopK autoencoder, against SAELens and dictionary_learning, each in an environment of its own.

    python -m venv /tmp/saelens && /tmp/saelens/bin/pip install -c constraints.txt sae-lens==6.54.12
    python -m venv /tmp/dl && /tmp/dl/bin/pip install -c constraints.txt dictionary-learning==0.1.0
    /tmp/dl/bin/pip uninstall torchvision    # where it does not fit a CPU build of torch
    python benchmarks/sae.py --saelens /tmp/saelens/bin/python --dictionary-learning /tmp/dl/bin/python

Rows are those of GoogLeNet's mixed4c on photographs (all 14 x 14 positions, shuffled) if `$CIRCUITS_ASSETS` has them,
else sums of 16 of 2048 random directions; d = 512, 8192 latents, batches of 4096, k = 32, float32, Adam at one
constant rate, AuxK as each has it by default. Libraries take turns, a process each; the median step of each counts,
without the first three. FVU is that of the last 4096 rows, which nobody trains on. `--precision bfloat16` adds ours
with the encoder's product in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH, WIDTH, LATENTS, K = 4096, 512, 8192, 32


# --- one library, in its own process -----------------------------------------------------------------


def batches(rows: np.ndarray) -> Iterator[Tensor]:
    """Rows in order, over and over, but for the last batch."""
    n, at = len(rows) - BATCH, 0
    while True:
        yield torch.from_numpy(np.take(rows, np.arange(at, at + BATCH) % n, axis=0))
        at = (at + BATCH) % n


def ours(rows: np.ndarray, steps: int, seed: int, lr: float, precision: str) -> Any:
    """Times of steps, and what encodes and decodes."""
    from circuits.sae import ArrayRows, Hyperparameters, RowFilter, Schedule, train

    times: list[float] = []
    last = [time.perf_counter()]

    def report(progress: Any) -> None:
        now = time.perf_counter()
        times.append(now - last[0])
        last[0] = now

    schedule = Schedule(steps, BATCH, warmup=0, decay=0, seed=seed, precision=precision)  # type: ignore[arg-type]
    settings = Hyperparameters("topk", LATENTS, k=K, lr=lr, seed=seed)
    made = train(
        ArrayRows(rows[:-BATCH]),
        settings,
        schedule,
        rule=RowFilter(norms=0, hold_out=0),
        report=report,
    )
    return times, made[""]


def saelens(rows: np.ndarray, steps: int, seed: int, lr: float, precision: str) -> Any:
    """SAELens' own training step, at its defaults."""
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    torch.manual_seed(seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=K, dtype="float32", device="cpu")
    )
    config = SAETrainerConfig(
        total_training_samples=steps * BATCH, train_batch_size_samples=BATCH, lr=lr, lr_end=lr, device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(cfg=config, sae=sae, data_provider=batches(rows))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        trainer.maybe_reset_sparsity()
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
        times.append(time.perf_counter() - start)
    return times, lambda x: sae.decode(sae.encode(x))


def dictionary_learning(rows: np.ndarray, steps: int, seed: int, lr: float, precision: str) -> Any:
    """dictionary_learning's own training step, at its defaults but for the warm-up."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

    trainer = TopKTrainer(
        steps=steps, activation_dim=WIDTH, dict_size=LATENTS, k=K, layer=0, lm_name="none", dict_class=AutoEncoderTopK,
        lr=lr, warmup_steps=0, seed=seed, device="cpu",
    )  # fmt: skip
    stream, times = batches(rows), []
    for step in range(steps):
        start = time.perf_counter()
        trainer.update(step, next(stream))
        times.append(time.perf_counter() - start)
    return times, lambda x: trainer.ae.decode(trainer.ae.encode(x))


LIBRARIES: dict[str, Callable[..., Any]] = {
    "ours": ours, "ours, bfloat16": ours, "saelens": saelens, "dictionary_learning": dictionary_learning
}  # fmt: skip


def child(library: str, file: str, steps: int, seed: int, lr: float, threads: int) -> None:
    """Train, and print a line of JSON."""
    torch.set_num_threads(threads)
    rows = np.load(file, mmap_mode="r")
    precision = "bfloat16" if "bfloat16" in library else "float32"
    times, code = LIBRARIES[library](rows, steps, seed, lr, precision)
    x = torch.from_numpy(np.array(rows[-BATCH:]))
    with torch.no_grad():
        error = sum(float((part - code(part)).double().square().sum()) for part in x.split(1024))
    fvu = error / float((x.double() - x.double().mean(0)).square().sum())
    speed = BATCH / statistics.median(times[3:] or times)
    print(json.dumps({"library": library, "rows_per_second": speed, "fvu": fvu, "seed": seed}))


# --- all of them -------------------------------------------------------------------------------------


def made_rows(folder: Path) -> Path:
    """The rows, as a file."""
    path = folder / "rows.npy"
    if "CIRCUITS_ASSETS" in os.environ:
        from circuits.models.zoo.loading import load_model
        from circuits.sae import ModelRows
        from circuits.stimuli.sources import open_source

        photos = Path(os.environ["CIRCUITS_ASSETS"]) / "images" / "imagenet500"
        source = ModelRows(load_model("googlenet"), open_source(f"folder:{photos}"), "mixed4c")
        order = source.order(0)
        rows = torch.cat(
            [source.load(order, group).x for group in range(source.n_groups())]
        ).numpy()
    else:
        from circuits.sae import known_dictionary

        rows = known_dictionary(2048, WIDTH, 65_536, active=16)[1]
    np.save(path, rows[np.random.default_rng(0).permutation(len(rows))])
    return path


def main() -> None:
    """Run libraries in turn and print what each does, and the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saelens", default="", help="the interpreter of SAELens' environment")
    parser.add_argument("--dictionary-learning", default="", help="that of dictionary_learning's")
    parser.add_argument("--precision", default="", help="bfloat16: ours in that, too")
    parser.add_argument("--n", type=int, default=3, help="seeds")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        library, file, steps, seed, lr, threads = options.child
        child(library, file, int(steps), int(seed), float(lr), int(threads))
        return
    known = {
        "ours": sys.executable, "ours, bfloat16": sys.executable if options.precision else "",
        "saelens": options.saelens, "dictionary_learning": options.dictionary_learning,
    }  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {
        name: [] for name, python in known.items() if python
    }
    with tempfile.TemporaryDirectory() as folder:
        rows = made_rows(Path(folder))
        for seed in range(options.n):
            for name in found:
                numbers = (options.steps, seed, options.lr, options.threads)
                command = [known[name], __file__, "--child", name, str(rows), *map(str, numbers)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{name}: {done.stderr.strip().splitlines()[-1]}")
                line = json.loads(done.stdout.strip().splitlines()[-1])
                found[name].append(line)
                print(
                    f"seed {seed}, {name}: {line['rows_per_second']:.0f} rows a second, FVU {line['fvu']:.4f}",
                    flush=True,
                )
    speed = {
        name: statistics.median(line["rows_per_second"] for line in lines)
        for name, lines in found.items()
    }
    peers = [speed[name] for name in speed if not name.startswith("ours")]
    for name, lines in found.items():
        shares = [line["fvu"] for line in lines]
        spread = f"{statistics.fmean(shares):.4f} ({min(shares):.4f} to {max(shares):.4f})"
        print(f"{name}: {speed[name]:.0f} rows a second, FVU {spread}")
    peer = max(peers) if peers else None
    ratio = None if peer is None else round(speed["ours"] / peer, 2)
    print(
        json.dumps(
            {
                "name": "sae training",
                "ours": speed["ours"],
                "peer": peer,
                "ratio": ratio,
                "n": options.n,
            }
        )
    )


if __name__ == "__main__":
    main()
