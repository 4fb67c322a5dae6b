"""Training autoencoders: many in one pass over the rows, stopped and gone on with at any time."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from circuits.autoencoders import About, Autoencoder, load_autoencoder, save_autoencoder
from circuits.autoencoders.files import FILE, read_tensors
from circuits.files import check_writable, replacing
from circuits.harvesting.ranks import Ranks
from circuits.models.adapter.attaching import check_name
from circuits.sae.batches import Batches, RowFilter, RowSource, default_rule
from circuits.sae.learners import Hyperparameters, Learner

Precision = Literal["float32", "bfloat16"]
"""What the encoder's product is computed in: bfloat16 is faster where the processor has units for it."""

CHECKPOINT = "checkpoint.safetensors"
"""Where a run stands, in its folder."""

_TAKEN = (Path(CHECKPOINT).stem, Path(FILE).stem)

_SAID = 100
"""How many points of a run's progress are kept."""


@dataclass(frozen=True)
class Schedule:
    """How long is trained, and how the learning rate changes.

    Attributes:
        steps: how many batches.
        batch: rows in each.
        warmup: steps over which the learning rate rises; 1000 or a tenth of all if None.
        decay: the share of steps at the end over which it falls to zero.
        seed: of the order of rows.
        precision: of the encoder's product.
    """

    steps: int
    batch: int = 4096
    warmup: int | None = None
    decay: float = 0.2
    seed: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay {self.decay} must be from 0 to 1")
        if self.warmup is not None and not 0 <= self.warmup <= self.steps:
            raise ValueError(f"warmup {self.warmup} must be from 0 to the {self.steps} steps")
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision {self.precision!r} is not one of {', '.join(get_args(Precision))}"
            )

    @property
    def rising(self) -> int:
        """Steps over which the learning rate rises."""
        return min(1000, self.steps // 10) if self.warmup is None else self.warmup

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.rising) if self.rising else 1.0
        left = (self.steps - step) / max(1.0, self.steps * self.decay)
        return min(rise, left, 1.0)

    def warm(self, step: int) -> float:
        """How much of the sparsity counts at a step: it rises over the first twentieth."""
        return min(1.0, (step + 1) / max(1, self.steps // 20))


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands.

    Attributes:
        step: how many are done.
        steps: how many there are.
        fvu: of each autoencoder, on the last batch: the share of variance that it leaves.
        l0: latents active in a row.
        dead: the share of latents that have been silent for too long.
    """

    step: int
    steps: int
    fvu: Mapping[str, float]
    l0: Mapping[str, float]
    dead: Mapping[str, float]

    def __str__(self) -> str:
        each = [
            f"{name + ': ' if name else ''}fvu {fvu:.3f}, l0 {self.l0[name]:.1f}, dead {100 * self.dead[name]:.1f} %"
            for name, fvu in self.fvu.items()
        ]
        return f"step {self.step} of {self.steps}: {'; '.join(each)}"


Report = Callable[[TrainingProgress], None]


@dataclass
class _Run:
    """Autoencoders in training."""

    learners: dict[str, Learner]
    optimizers: dict[str, torch.optim.Optimizer]
    batches: Batches
    schedule: Schedule
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


def train(
    source: RowSource,
    settings: Hyperparameters | Mapping[str, Hyperparameters],
    schedule: Schedule,
    folder: str | Path | None = None,
    *,
    rule: RowFilter | None = None,
    name: str = "",
    every: float = 60.0,
    anew: bool = False,
    device: str | torch.device | None = None,
    report: Report | None = None,
) -> dict[str, Autoencoder]:
    """Train autoencoders on the same batches of rows.

    With a folder, where the run stands is written every so many seconds, and when it is interrupted; called
    again with the same arguments it goes on from there, and ends with the same numbers, bit for bit on a CPU,
    as if it had never stopped. Under `torchrun` every rank takes its share of each batch; gradients are averaged.

    Args:
        source: where rows come from.
        settings: of one autoencoder, or of several by name.
        schedule: how long, and the learning rate.
        folder: where to write: `sae.safetensors`, or `NAME.safetensors` each.
        rule: which rows are left out; the first position of texts and norms above 10 medians if None.
        name: of the run: how sites of latents are called; the folder's if not given.
        every: seconds between checkpoints.
        anew: begin anew, and overwrite what is in the folder.
        device: where to compute; a GPU if there is one.
        report: called after each step.

    Returns:
        The autoencoders by name.

    Raises:
        ValueError: if there are fewer rows than latents or than a batch has, rows are not finite, or the folder
            holds another run.
        BlockingIOError: if somebody else is training into the folder.
    """
    if not every >= 0:
        raise ValueError(f"every {every} must be 0 seconds or more")
    several = settings if isinstance(settings, Mapping) else {"": settings}
    if not several:
        raise ValueError("settings: expected at least one autoencoder")
    place = None if folder is None else Path(folder)
    name = check_name(name or (place.name if place is not None else "sae"))
    for variant in several:
        if variant and check_name(variant) in _TAKEN:
            raise ValueError(f"settings {variant!r}: the folder has another file of that name")
    _check_rows(source, several, schedule)
    rule = default_rule(source) if rule is None else rule
    plan = _plan(source, several, schedule, rule)
    with Ranks.joined() as ranks:
        if schedule.batch < ranks.size:
            raise ValueError(
                f"batch {schedule.batch} is below the {ranks.size} ranks: each needs a row"
            )
        if place is None:
            run = _begun(source, several, schedule, rule, ranks, device)
            _finish_steps(run, None, plan, every, report)
            return _made(run, name, plan)
        with ranks.lead() as lead:
            if lead:
                check_writable(place, "folder")
                for variant in several:
                    file = place / (f"{variant}.safetensors" if variant else FILE)
                    if file.is_dir():
                        raise IsADirectoryError(
                            f"{str(file)!r} is a folder: expected a file, or none"
                        )
                place.mkdir(parents=True, exist_ok=True)
        with _alone(place, ranks), ranks.together():
            done = _finished(place, several, plan, anew)
            if done is not None:
                return done
            run = _begun(source, several, schedule, rule, ranks, device)
            if anew and ranks.rank == 0:
                for file in place.glob("*.safetensors"):
                    file.unlink()
            if not anew:
                _go_on(run, place / CHECKPOINT, plan)
            _finish_steps(run, place / CHECKPOINT, plan, every, report)
            made = _made(run, name, plan)
            if ranks.rank == 0:
                for variant, code in made.items():
                    save_autoencoder(code, place / (f"{variant}.safetensors" if variant else FILE))
                (place / CHECKPOINT).unlink(missing_ok=True)
            return made


def _check_rows(
    source: RowSource, several: Mapping[str, Hyperparameters], schedule: Schedule
) -> None:
    n = len(source)
    if schedule.batch > n:
        raise ValueError(
            f"batch {schedule.batch}: there are only {n} rows of site {source.about['site']!r}"
        )
    wide = max(s.n_latents for s in several.values())
    if n < wide:
        raise ValueError(
            f"n_latents {wide}: there are only {n} rows of site {source.about['site']!r}: expected at most as many "
            "latents as rows"
        )
    transcoder = source.about["site"] != source.about["target"]
    if not transcoder and any(s.skip for s in several.values()):
        raise ValueError(
            "skip: only a transcoder (from one site to another) has a way beside its latents"
        )
    for i, one in enumerate(each := list(several.values())):
        if one in each[:i]:
            raise ValueError(f"settings {one.label()} are there twice")


def _plan(
    source: RowSource, several: Mapping[str, Hyperparameters], schedule: Schedule, rule: RowFilter
) -> dict[str, Any]:
    """Everything that a run's outcome follows from."""
    made = {
        "rows": {**source.about, "n": len(source)},
        "autoencoders": {name: asdict(s) for name, s in several.items()},
        "schedule": asdict(schedule),
        "rule": asdict(rule),
    }
    return json.loads(json.dumps(made))


def _begun(
    source: RowSource, several: Mapping[str, Hyperparameters], schedule: Schedule, rule: RowFilter | None,
    ranks: Ranks, device: str | torch.device | None,
) -> _Run:  # fmt: skip
    here = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    place = torch.device(device or here)
    batches = Batches(source, schedule.batch, rule, schedule.seed)
    transcoder = source.about["site"] != source.about["target"]
    half = schedule.precision == "bfloat16"
    learners = {
        name: Learner(s, batches.calibration, schedule.steps, schedule.batch, transcoder, half).to(
            place
        )
        for name, s in several.items()
    }
    optimizers = {
        name: torch.optim.Adam(learner.parameters(), lr=learner.settings.rate, fused=True)
        for name, learner in learners.items()
    }
    return _Run(learners, dict(optimizers), batches, schedule, ranks)


def _finish_steps(
    run: _Run, checkpoint: Path | None, plan: Mapping[str, Any], every: float, report: Report | None
) -> None:
    """All steps that are left; a checkpoint on the way, and when interrupted, between two steps."""
    last = time.monotonic()
    stream = iter(run.batches)
    with _interrupts() as interrupted:
        while run.step < run.schedule.steps:
            x, y = next(stream)
            progress = _one_step(run, x, y)
            try:
                if report is not None and run.ranks.rank == 0:
                    report(progress)
            except KeyboardInterrupt:
                interrupted.append(True)
            stop = _any(run.ranks, bool(interrupted))
            due = stop or time.monotonic() - last >= every
            if checkpoint is not None and run.ranks.rank == 0 and due:
                _save(run, checkpoint, plan)
                last = time.monotonic()
            if stop:
                raise KeyboardInterrupt


def _any(ranks: Ranks, own: bool) -> bool:
    """Whether any rank says so: all stop at the same step."""
    if ranks.size == 1:
        return own
    said = torch.tensor(int(own))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


@contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """A list that gets an entry when the person presses Ctrl-C, instead of an error in the middle of a step."""
    interrupted: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def stop(*_: object) -> None:
        if interrupted:  # twice: at once
            raise KeyboardInterrupt
        interrupted.append(True)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _one_step(run: _Run, x: Tensor, y: Tensor) -> TrainingProgress:
    size, rank = run.ranks.size, run.ranks.rank
    said: dict[str, tuple[float, float, float]] = {}
    for name, learner in run.learners.items():
        device = learner.W_dec.device
        mine_x = x[rank::size].to(device)
        mine_y = mine_x if y is x else y[rank::size].to(device)
        optimizer = run.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = learner.settings.rate * run.schedule.factor(run.step)
        optimizer.zero_grad()
        found = learner(mine_x, mine_y, run.schedule.warm(run.step))
        found.loss.backward()
        numbers = torch.stack([found.fvu, found.l0.to(found.fvu), found.loss.detach()])
        active = found.active
        if size > 1:
            numbers, active = _averaged(learner, numbers, active, size)
        if not bool(torch.isfinite(numbers[2])):
            raise ValueError(
                f"autoencoder {name or learner.settings.label()}: the loss is not finite at step {run.step}: expected "
                f"a smaller learning rate than {learner.settings.rate:g}, or a smaller sparsity than "
                f"{learner.settings.sparsity:g}"
            )
        learner.before_step()
        optimizer.step()
        learner.after_step(active, len(x))
        said[name] = (float(numbers[0]), float(numbers[1]), learner.dead)
    run.step += 1
    steps = run.schedule.steps
    if run.step % max(1, steps // _SAID) == 0 or run.step == steps:
        run.curve.append({"step": run.step, **{name: list(s) for name, s in said.items()}})
    parts: Sequence[dict[str, float]] = [{n: s[i] for n, s in said.items()} for i in range(3)]
    return TrainingProgress(run.step, steps, *parts)


def _averaged(
    learner: Learner, numbers: Tensor, active: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Gradients, numbers and the bound, averaged over ranks; latents that were active in any."""
    tensors = [p.grad for p in learner.parameters() if p.grad is not None]
    counts = active.to(torch.int32)
    for tensor in [*tensors, numbers, learner.bound]:
        dist.all_reduce(tensor)
        tensor.div_(size)
    dist.all_reduce(counts)
    return numbers, counts > 0


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def _alone(place: Path, ranks: Ranks) -> Iterator[None]:
    """Nobody else trains into the folder meanwhile; it goes away again if nothing was written."""
    with ranks.lead() as lead:
        handle = None
        if lead:
            handle = os.open(place / ".lock", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise BlockingIOError(
                    f"folder {str(place)!r}: somebody else is training into it; wait, or take another name"
                ) from None
    try:
        yield
    finally:
        if handle is not None:
            if [p.name for p in place.iterdir()] == [".lock"]:
                (place / ".lock").unlink()
                place.rmdir()
            os.close(handle)


def _finished(
    place: Path, several: Mapping[str, Hyperparameters], plan: Mapping[str, Any], anew: bool
) -> dict[str, Autoencoder] | None:
    """What an earlier run with the same plan made; None if it is not finished.

    Raises:
        ValueError: if the folder holds another run's.
    """
    if anew:
        return None
    found = {}
    for variant in several:
        file = place / (f"{variant}.safetensors" if variant else FILE)
        if not file.exists():
            continue
        code = load_autoencoder(file)
        if code.about.settings.get("plan") != plan:
            raise ValueError(_other(place, code.about.settings.get("plan"), plan))
        found[variant] = code
    if len(found) == len(several):
        return found
    foreign = [p.name for p in place.glob("*.safetensors") if p.name != CHECKPOINT]
    if foreign and not found:
        raise ValueError(_other(place, None, plan))
    return None


def _other(place: Path, theirs: Any, ours: Mapping[str, Any]) -> str:
    what = "is another"
    if isinstance(theirs, Mapping):
        differing = [key for key in ours if ours[key] != theirs.get(key)]
        what = f"differs in {', '.join(differing)}"
    return (
        f"folder {str(place)!r} holds a training that {what}: expected the same arguments to go on, another name, "
        "or --anew to overwrite it"
    )


def _save(run: _Run, path: Path, plan: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    for i, (name, learner) in enumerate(run.learners.items()):
        for key, value in learner.state_dict().items():
            tensors[f"{i}/{key}"] = value
        state = run.optimizers[name].state_dict()["state"]
        for number, entry in state.items():
            for key, value in entry.items():
                tensors[f"{i}/adam/{number}/{key}"] = value
    numbers, rest = run.batches.state()
    for i, rows in enumerate(rest):
        tensors[f"rest/{i}"] = rows
    about = {"plan": plan, "step": run.step, "batches": numbers, "curve": run.curve}
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"circuits.training": json.dumps(about)})


def _go_on(run: _Run, path: Path, plan: Mapping[str, Any]) -> None:
    """Stand where a checkpoint stands, if there is one."""
    if not path.is_file():
        return
    try:
        tensors, metadata = read_tensors(path)
        about = json.loads(metadata["circuits.training"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"checkpoint {str(path)!r} is damaged: --anew begins anew") from error
    if about["plan"] != plan:
        raise ValueError(_other(path.parent, about["plan"], plan))
    for i, (name, learner) in enumerate(run.learners.items()):
        own = {k.partition("/")[2]: v for k, v in tensors.items() if k.startswith(f"{i}/")}
        learner.load_state_dict({k: v for k, v in own.items() if not k.startswith("adam/")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in own.items():
            if key.startswith("adam/"):
                _, number, entry = key.split("/")
                state.setdefault(int(number), {})[entry] = value
        optimizer = run.optimizers[name]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    run.batches.go_on(
        about["batches"], [v for k, v in sorted(tensors.items()) if k.startswith("rest/")]
    )
    run.step, run.curve = about["step"], about["curve"]


def _made(run: _Run, name: str, plan: Mapping[str, Any]) -> dict[str, Autoencoder]:
    """The autoencoders, with how they were made."""
    rows, b = plan["rows"], run.batches
    c = b.calibration
    limit = c.limit if c.limit < float("inf") else None
    calibration = {
        "scale": c.scale, "target_scale": c.target_scale, "variance": c.variance, "limit": limit, "rows": c.n
    }  # fmt: skip
    made = {}
    for variant, learner in run.learners.items():
        curve = [
            {"step": c["step"], "fvu": c[variant][0], "l0": c[variant][1], "dead": c[variant][2]}
            for c in run.curve
        ]
        last = curve[-max(1, len(curve) // 10) :]
        metrics = {
            "fvu": sum(c["fvu"] for c in last) / len(last), "l0": sum(c["l0"] for c in last) / len(last),
            "dead": last[-1]["dead"], "rows": b.seen, "left_out": b.left_out, "curve": curve,
        }  # fmt: skip
        about = About(
            "-".join(filter(None, (name, variant))), rows["site"], rows["target"], rows["model"],
            rows["model_hash"], rows["data"], learner.settings.architecture,
            {"plan": plan, "rule": asdict(b.rule), "calibration": calibration}, metrics,
        )  # fmt: skip
        made[variant] = learner.folded(about)
    return made
