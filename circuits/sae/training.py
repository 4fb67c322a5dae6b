"""Training autoencoders: several in one pass over the rows, with checkpoints from which a run resumes exactly."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from circuits.autoencoders import About, Autoencoder, load_autoencoder, save_autoencoder
from circuits.autoencoders.files import FILE, is_autoencoder, read_tensors
from circuits.autograd import recording_gradients
from circuits.files import check_inside, check_writable
from circuits.harvesting.ranks import Ranks
from circuits.json_files import parse_json
from circuits.locks import held
from circuits.models.adapter.attaching import check_name
from circuits.sae.batches import Batches, RowFilter, RowSource, default_rule
from circuits.sae.learners import Hyperparameters, Learner
from circuits.tensors import write_tensors

Precision = Literal["float32", "bfloat16"]
"""The precision of the encoder's matrix product: bfloat16 is faster on processors with units for it."""

CHECKPOINT = "checkpoint.safetensors"
"""The file in a run's folder from which an interrupted training resumes."""

LOCK = ".lock"
"""The file in a run's folder that whoever writes into the folder holds."""

_RESERVED = (Path(CHECKPOINT).stem, Path(FILE).stem)

_FORMAT = 2
"""The version of checkpoints: parameters of version 1 are those of rows that were not centred."""

_CURVE_POINTS = 100
"""Points of the training curve that are kept, about."""


@dataclass(frozen=True)
class Schedule:
    """The length of a training and the course of the learning rate.

    Attributes:
        steps: the number of steps, one batch each.
        batch: rows in a batch.
        warmup: steps over which the learning rate rises; if None, 1000 but at most a tenth of all.
        decay: the share of steps, at the end, over which the learning rate falls to zero.
        seed: the seed of the order of rows.
        precision: the precision of the encoder's product.
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
        """The factor of the learning rate at a step, counted from 0: a trapezoid of warm-up, constant and decay."""
        rise = min(1.0, (step + 1) / self.rising) if self.rising else 1.0
        left = (self.steps - step) / max(1.0, self.steps * self.decay)
        return min(rise, left, 1.0)

    def warm(self, step: int) -> float:
        """The factor of the sparsity penalty at a step: it rises over the first twentieth of the training."""
        # A full penalty on random directions would silence latents before they have learned anything.
        return min(1.0, (step + 1) / max(1, self.steps // 20))


@dataclass(frozen=True)
class TrainingProgress:
    """The state of a training after a step, with numbers for each autoencoder by name.

    Attributes:
        step: the number of steps done.
        steps: the number of steps in all.
        fvu: the fraction of variance unexplained, on the last batch.
        l0: the mean number of active latents in a row, on the last batch.
        dead: the share of dead latents.
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
    """A training in progress."""

    learners: dict[str, Learner]
    optimizers: dict[str, torch.optim.Optimizer]
    batches: Batches
    schedule: Schedule
    ranks: Ranks = field(default_factory=Ranks)
    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)


@recording_gradients()
def train(
    source: RowSource,
    settings: Hyperparameters | Mapping[str, Hyperparameters],
    schedule: Schedule,
    folder: str | Path | None = None,
    *,
    rule: RowFilter | None = None,
    name: str = "",
    every: float = 60.0,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    report: Report | None = None,
) -> dict[str, Autoencoder]:
    """Train autoencoders on the same batches of rows.

    With a folder, a checkpoint is written at intervals and when the training is interrupted. The same call resumes
    from it and ends with the same numbers, to the bit on a CPU, as if it had never stopped. Under `torchrun` every
    rank takes its share of each batch, and gradients are averaged.

    Args:
        source: where rows come from.
        settings: the hyperparameters of one autoencoder, or of several by name.
        schedule: the number of steps, and the learning rate.
        folder: the folder for the results: `sae.safetensors`, or `NAME.safetensors` for each of several.
        rule: which rows are left out; if None, the first position of texts and norms above 10 medians.
        name: the name of the run, from which sites of latents get their names; by default the folder's.
        every: seconds between checkpoints.
        overwrite: start over, and overwrite the autoencoders in the folder.
        device: the device; by default a GPU if there is one.
        report: called after each step.

    Returns:
        The autoencoders by name.

    Raises:
        ValueError: if there are fewer rows than latents or than a batch has, rows are not finite, the folder
            holds the results of another training, or a symbolic link leads to what is to be overwritten.
        BlockingIOError: if another process is training into the folder.
    """
    if not every >= 0:
        raise ValueError(f"every {every} must be 0 seconds or more")
    if folder is not None and overwrite:
        check_inside(Path(folder), Path(folder).parent)
    several = settings if isinstance(settings, Mapping) else {"": settings}
    if not several:
        raise ValueError("settings: expected at least one autoencoder")
    place = None if folder is None else Path(folder)
    name = check_name(name or (place.name if place is not None else "sae"))
    _check_settings(source, several, schedule)
    rule = default_rule(source) if rule is None else rule
    plan = _plan(source, several, schedule, rule)
    with Ranks.joined() as ranks:
        if schedule.batch < ranks.size:
            raise ValueError(
                f"batch {schedule.batch} is below the {ranks.size} ranks: each needs a row"
            )
        if place is None:
            run = _start(source, several, schedule, rule, ranks, device)
            _finish_steps(run, None, plan, every, report)
            return _results(run, name, plan)
        _make_folder(place, several, ranks)
        with _exclusive(place, ranks), ranks.together():
            done = _finished(place, several, plan, overwrite)
            if done is not None:
                return done
            # Started before old files are removed: rows that cannot be trained on must not cost earlier results.
            run = _start(source, several, schedule, rule, ranks, device)
            if not overwrite:
                _resume(run, place / CHECKPOINT, plan)
            elif ranks.rank == 0:
                for file in place.glob("*.safetensors"):
                    if file.name == CHECKPOINT or is_autoencoder(file):
                        file.unlink()
            _finish_steps(run, place / CHECKPOINT, plan, every, report)
            made = _results(run, name, plan)
            if ranks.rank == 0:
                for variant, code in made.items():
                    save_autoencoder(code, _file_of(place, variant))
                (place / CHECKPOINT).unlink(missing_ok=True)
            return made


def _file_of(place: Path, variant: str) -> Path:
    """The file of an autoencoder; a single one has no name of its own."""
    return place / (f"{variant}.safetensors" if variant else FILE)


def _make_folder(place: Path, several: Mapping[str, Hyperparameters], ranks: Ranks) -> None:
    """Make the folder on the first rank, if all files can be written into it."""
    with ranks.lead() as lead:
        if lead:
            check_writable(place, "folder")
            for file in (_file_of(place, variant) for variant in several):
                if file.is_dir():
                    raise IsADirectoryError(f"{str(file)!r} is a folder: expected a file, or none")
            place.mkdir(parents=True, exist_ok=True)


def _check_settings(
    source: RowSource, several: Mapping[str, Hyperparameters], schedule: Schedule
) -> None:
    """Raise ValueError if autoencoders cannot be trained on these rows, or not next to each other."""
    for variant in several:
        if variant and check_name(variant) in _RESERVED:
            raise ValueError(f"settings {variant!r}: the folder has another file of that name")
    n = len(source)
    if schedule.batch > n:
        raise ValueError(
            f"batch {schedule.batch}: there are only {n} rows of site {source.about['site']!r}: expected a "
            "batch of at most as many"
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
            "skip: only a transcoder (from one site to another) has a linear map in addition to its latents"
        )
    for i, one in enumerate(each := list(several.values())):
        if one in each[:i]:
            raise ValueError(f"settings {one.label()} are there twice: expected each once")


def _plan(
    source: RowSource, several: Mapping[str, Hyperparameters], schedule: Schedule, rule: RowFilter
) -> dict[str, Any]:
    """Everything that determines the outcome of a training; as JSON, since it is compared with what files hold."""
    made = {
        "rows": {**source.about, "n": len(source)},
        "autoencoders": {name: asdict(s) for name, s in several.items()},
        "schedule": asdict(schedule),
        "rule": asdict(rule),
    }
    return json.loads(json.dumps(made))


def _start(
    source: RowSource, several: Mapping[str, Hyperparameters], schedule: Schedule, rule: RowFilter | None,
    ranks: Ranks, device: str | torch.device | None,
) -> _Run:  # fmt: skip
    """A training before its first step."""
    # Under `torchrun` each rank of a machine has a GPU of its own.
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
    """Do all steps that are left; write checkpoints at intervals, and one before an interruption is passed on."""
    last = time.monotonic()
    stream = iter(run.batches)
    with _interrupts() as interrupted:
        while run.step < run.schedule.steps:
            x, y = next(stream)
            progress = _one_step(run, x, y)
            # A caller's report may raise KeyboardInterrupt itself: then too a checkpoint comes first.
            try:
                if report is not None and run.ranks.rank == 0:
                    report(progress)
            except KeyboardInterrupt:
                interrupted.append(True)
            stop = _any_rank(run.ranks, bool(interrupted))
            due = stop or time.monotonic() - last >= every
            if checkpoint is not None and run.ranks.rank == 0 and due:
                _save(run, checkpoint, plan)
                last = time.monotonic()
            if stop:
                raise KeyboardInterrupt


def _any_rank(ranks: Ranks, own: bool) -> bool:
    """Whether any rank was interrupted: all must stop at the same step, or the others wait for it for ever."""
    if ranks.size == 1:
        return own
    said = torch.tensor(int(own))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said)


@contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """A list that gets an entry at Ctrl-C, so that a step is not interrupted in the middle."""
    interrupted: list[bool] = []
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # others may not set signal handlers
        yield interrupted
        return

    def stop(*_: object) -> None:
        if interrupted:  # at the second Ctrl-C, stop at once
            raise KeyboardInterrupt
        interrupted.append(True)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def _one_step(run: _Run, x: Tensor, y: Tensor) -> TrainingProgress:
    """One step of every autoencoder on the same batch."""
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
    if run.step % max(1, steps // _CURVE_POINTS) == 0 or run.step == steps:
        run.curve.append({"step": run.step, **{name: list(s) for name, s in said.items()}})
    parts: Sequence[dict[str, float]] = [{n: s[i] for n, s in said.items()} for i in range(3)]
    return TrainingProgress(run.step, steps, *parts)


def _averaged(
    learner: Learner, numbers: Tensor, active: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Average gradients, numbers and the threshold over ranks; a latent is active if it is on any rank."""
    tensors = [p.grad for p in learner.parameters() if p.grad is not None]
    counts = active.to(torch.int32)
    for tensor in [*tensors, numbers, learner.bound]:
        dist.all_reduce(tensor)
        tensor.div_(size)
    dist.all_reduce(counts)
    return numbers, counts > 0


# --- files ---------------------------------------------------------------------------------------


@contextmanager
def _exclusive(place: Path, ranks: Ranks) -> Iterator[None]:
    """Lock the folder against other trainings inside the block; remove it at the end if nothing was written."""
    refusal = (
        f"folder {str(place)!r}: somebody else is training into it; wait, or choose another name"
    )
    with ExitStack() as stack:
        with ranks.lead() as lead:
            if lead:
                stack.enter_context(held(place / LOCK, refusal, tidy=True))
        yield


def _finished(
    place: Path, several: Mapping[str, Hyperparameters], plan: Mapping[str, Any], overwrite: bool
) -> dict[str, Autoencoder] | None:
    """The results of an earlier training with the same plan; None if it is not finished.

    Raises:
        ValueError: if the folder holds the results of another training.
    """
    if overwrite:
        return None
    found = {}
    for variant in several:
        file = _file_of(place, variant)
        if not file.exists():
            continue
        code = load_autoencoder(file)
        if code.about.settings.get("plan") != plan:
            raise ValueError(_differs(place, code.about.settings.get("plan"), plan))
        found[variant] = code
    if len(found) == len(several):
        return found
    foreign = [p.name for p in place.glob("*.safetensors") if p.name != CHECKPOINT]
    if foreign and not found:
        raise ValueError(_differs(place, None, plan))
    return None


def _differs(place: Path, theirs: Any, ours: Mapping[str, Any]) -> str:
    """The message for a folder that holds another training; says in which arguments it differs, if that is known."""
    what = "is another one"
    if isinstance(theirs, Mapping):
        differing = [key for key in ours if ours[key] != theirs.get(key)]
        what = f"differs in {', '.join(differing)}"
    return (
        f"folder {str(place)!r} holds a training that {what}: expected the same arguments to resume it, another "
        "name, or --overwrite to overwrite it"
    )


def _save(run: _Run, path: Path, plan: Mapping[str, Any]) -> None:
    """Write a checkpoint: parameters and buffers, Adam's moments, the rows left over, and where the stream stands."""
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
    about = {
        "format": _FORMAT, "plan": plan, "step": run.step, "batches": numbers, "curve": run.curve
    }  # fmt: skip
    write_tensors(path, tensors, {"circuits.training": json.dumps(about)})


def _resume(run: _Run, path: Path, plan: Mapping[str, Any]) -> None:
    """Continue from a checkpoint, if there is one."""
    if not path.is_file():
        return
    try:
        tensors, metadata = read_tensors(path)
        about = parse_json(metadata["circuits.training"], "its header", nan=True)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"checkpoint {str(path)!r} is damaged: start over with --overwrite"
        ) from error
    if (form := about.get("format", 1)) != _FORMAT:
        raise ValueError(
            f"checkpoint {str(path)!r} has format {form}, expected {_FORMAT} (in 1 rows were not centred): start over "
            "with --overwrite"
        )
    if about["plan"] != plan:
        raise ValueError(_differs(path.parent, about["plan"], plan))
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
    run.batches.resume(
        about["batches"], [v for k, v in sorted(tensors.items()) if k.startswith("rest/")]
    )
    run.step, run.curve = about["step"], about["curve"]


def _results(run: _Run, name: str, plan: Mapping[str, Any]) -> dict[str, Autoencoder]:
    """The autoencoders, with the record of how they were trained."""
    rows, b = plan["rows"], run.batches
    c = b.calibration
    limit = c.limit if c.limit < float("inf") else None
    calibration = {
        "scale": c.scale, "target_scale": c.target_scale, "limit": limit, "rows": c.n
    }  # fmt: skip
    made = {}
    for variant, learner in run.learners.items():
        curve = [
            {"step": c["step"], "fvu": c[variant][0], "l0": c[variant][1], "dead": c[variant][2]}
            for c in run.curve
        ]
        last = curve[
            -max(1, len(curve) // 10) :
        ]  # single batches are noisy: the mean of the last tenth
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
