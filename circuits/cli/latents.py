"""What latents mean: `circuits sae name` and `circuits sae bottleneck`."""

# no `from __future__ import annotations`: typer reads the annotations
import json as json_module
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import typer

from circuits.cli.arguments import (
    JsonOption,
    LabelsOption,
    SeedOption,
    TakeOption,
    WeightsOption,
    WorkspaceOption,
    record_of,
    within,
)
from circuits.cli.autoencoders import (
    AllOption,
    CodeArgument,
    DataOfOption,
    ModelOption,
    data_of,
    opened,
)
from circuits.cli.choosing import labels_of
from circuits.cli.output import say, show_json, show_table, warn
from circuits.examples import Examples
from circuits.workspace import Workspace


def name_latents(
    sae: CodeArgument,
    data: DataOfOption = "",
    attributes: Annotated[
        str,
        typer.Option(
            help="JSON: what is true of each example (a list of texts), by its name or in order."
        ),
    ] = "",
    labels: LabelsOption = "",
    unit: Annotated[int | None, typer.Option(help="A person names this latent …")] = None,
    text: Annotated[str, typer.Option("--as", help="… so.")] = "",
    note: Annotated[str, typer.Option(help="Why.")] = "",
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the names that hold in the workspace.")
    ] = False,
    limit: AllOption = None,
    take: TakeOption = "spread",
    level: Annotated[float, typer.Option(help="Of the tests.")] = 0.05,
    top: Annotated[int, typer.Option(callback=within(1), help="How many to list.")] = 20,
    seed: SeedOption = 0,
    model: ModelOption = "",
    weights: WeightsOption = None,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Name latents after the attributes that they tell; names are checked on other examples."""
    from circuits.concepts import name_by_attributes, name_unit, names_of, save_names
    from circuits.stimuli.sources import open_source

    code, loaded, attached = opened(sae, model, weights, workspace)
    place, site = Workspace.default(workspace), attached.site(f"sae/{code.about.name}")
    if unit is not None or text:
        if unit is None or not text:
            raise ValueError("--unit and --as go together: a latent's index and what it is called")
        record = name_unit(place.writable().database, attached.hash, site.unit(unit), text, note)
        say(f"{record.name} is called {text!r} (version {record.version}, by {record.author})")
        return
    if not attributes and not labels:
        known = names_of(place.database, attached.hash)
        rows = [(n, r.body["text"], r.author, r.created, r.note) for n, r in known.items()]
        show_json({n: r.body for n, r in known.items()}) if json else show_table(
            ("latent", "name", "by", "when", "note"), rows
        )
        return
    if not 0 < level < 1:
        raise ValueError(f"--level {level} must be between 0 and 1")
    if attributes and labels:
        raise ValueError("--attributes and --labels: expected one of them")
    source = open_source(data_of(code, data))
    examples = Examples(attached, source, limit, how=take, seed=seed)
    each = _attributes_of(source, attributes, labels, loaded)
    found = name_by_attributes(
        site.name, _pooled(attached, code, site.name, examples, "max"), [each[i] for i in examples.numbers],
        level=level, data=str(examples), by="class labels" if labels else "attributes", seed=seed,
    )  # fmt: skip
    if keep:
        save_names(place.writable().database, attached.hash, found.holding, note)
        known = [r for r in place.models() if r.hash == loaded.hash]
        if not model and known:
            model, weights = known[0].spec, Path(known[0].weights) if known[0].weights else None
        place.register(record_of(f"{model}+{sae}", weights, attached.hash), replace=False)
    if json:
        show_json(found.to_dict())
        return
    rows = [
        (
            n.unit,
            n.text,
            "yes" if n.holds else "no",
            n.score,
            n.p_value,
            n.evidence["top_held_out"],
            n.evidence["base_rate"],
        )
        for n in found.names[:top]
    ]
    columns = ("latent", "name", "holds", "AUROC held out", "p", "of its top ten", "of all")
    show_table(columns, rows)
    say(
        f"{len(found.holding)} of {len(found.names)} names hold on the other half of {found.n_examples} examples "
        f"({found.data}); with attributes shuffled {found.by_chance:g}"
    )


def _pooled(model: Any, code: Any, site: str, examples: Any, pool: Any) -> Any:
    """Activations of latents an example, without the positions that training left out."""
    from circuits.concepts import pooled
    from circuits.sae import rule_of

    return pooled(model, site, examples, pool, rule_of(code).positions)


def _attributes_of(source: Any, attributes: str, labels: str, model: Any) -> list[list[str]]:
    if labels:
        classes = model.classes
        found = labels_of(model, source, labels)
        return [[classes[i] if classes else str(i)] for i in found]
    path = Path(attributes).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"attributes file {attributes!r} does not exist or is not a file")
    try:
        given = json_module.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"attributes file {attributes!r} is no JSON: {error}") from error
    if isinstance(given, dict):
        known = {**{PurePath(k).name: v for k, v in given.items()}, **given}
        given = [known.get(n, known.get(PurePath(n).name)) for n in source.names]
        missing = sum(v is None for v in given)
        if missing == len(given):
            raise ValueError(
                f"attributes {attributes!r}: no key is the name of an example of {source.spec}, such as "
                f"{source.names[0]!r}"
            )
        if missing:
            warn(
                f"attributes {attributes!r}: {missing} of {len(given)} examples are not in it: nothing is true of them"
            )
        given = [[] if v is None else v for v in given]
    if not isinstance(given, list) or len(given) != len(source):
        n = len(given) if isinstance(given, list) else "no"
        raise ValueError(
            f"attributes {attributes!r}: {n} for {len(source)} examples of {source.spec}"
        )
    made = [[v] if isinstance(v, str) else v for v in given]
    for name, v in zip(source.names, made, strict=True):
        if not isinstance(v, list) or not all(isinstance(t, str) for t in v):
            raise ValueError(f"attributes of {name!r} are {v!r}: expected a list of texts")
    return made


def bottleneck(
    sae: CodeArgument,
    labels: LabelsOption,
    data: DataOfOption = "",
    off: Annotated[str, typer.Option(help="Latents to switch off, e.g. 3,17.")] = "",
    scale: Annotated[
        str, typer.Option(help="Latents to multiply: INDICES=FACTOR, e.g. 3,17=2.")
    ] = "",
    set_: Annotated[str, typer.Option("--set", help="Latents to set: INDICES=VALUE.")] = "",
    explain: Annotated[
        int | None, typer.Option(help="An example whose decision is explained.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Write what is switched as a recipe of edits (.json).")
    ] = None,
    pool: Annotated[
        Literal["mean", "max"], typer.Option(help="What becomes of positions.")
    ] = "mean",
    strength: Annotated[float, typer.Option(help="Inverse of the regularisation.")] = 1.0,
    limit: AllOption = None,
    take: TakeOption = "spread",
    top: Annotated[int, typer.Option(callback=within(1), help="How many latents to list.")] = 8,
    seed: SeedOption = 0,
    model: ModelOption = "",
    weights: WeightsOption = None,
    workspace: WorkspaceOption = None,
    json: JsonOption = False,
) -> None:
    """Classify with latents: what decisions rest on, and what changes if latents are switched."""
    import numpy as np

    from circuits.concepts import as_recipe, intervene, train_bottleneck
    from circuits.stimuli.sources import open_source

    code, loaded, attached = opened(sae, model, weights, workspace)
    site = attached.site(f"sae/{code.about.name}")
    done = _interventions(site, off, scale, set_)
    if recipe is not None:
        if not done or recipe.suffix != ".json":
            raise ValueError(
                f"--recipe {str(recipe)!r}: expected a .json file, and something to switch (--off, …)"
            )
        if recipe.exists() or not recipe.absolute().parent.is_dir():
            raise FileExistsError(
                f"--recipe {str(recipe)!r}: expected a new file in a folder that exists"
            )
    if not strength > 0:
        raise ValueError(f"--strength {strength} must be above 0")
    source = open_source(data_of(code, data))
    every = labels_of(loaded, source, labels)
    examples = Examples(attached, source, limit, how=take, seed=seed, labels=every)
    which = examples.numbers
    if explain is not None and explain not in which:
        raise ValueError(
            f"--explain {explain}: expected one of the {len(which)} examples that are read"
        )
    own = np.array(examples.labels)
    units = _pooled(attached, code, site.name, examples, pool)
    first = np.random.default_rng(seed).permutation(len(own)) < len(own) // 2
    found = train_bottleneck(
        site.name, units[first], own[first].tolist(), loaded.classes or tuple(map(str, range(own.max() + 1))),
        pool=pool, strength=strength, model_hash=attached.hash,
        data=str(examples), seed=seed,
    )  # fmt: skip
    rest, kept = units[~first], own[~first].tolist()
    accuracy = found.accuracy(rest, kept, seed)
    present = sorted(set(own.tolist()))
    explained = [found.explain_class(rest, i, top) for i in present]
    local = None if explain is None else found.explain(units[which.index(explain)], top=top)
    changed = intervene(found, rest, kept, done, seed=seed) if done else None
    if recipe is not None:
        as_recipe(attached, done).save(recipe)
    if json:
        from dataclasses import asdict

        show_json(
            {
                "accuracy": asdict(accuracy), "classes": [_explained(e) for e in explained],
                "example": None if local is None else _explained(local),
                "interventions": None if changed is None else changed.to_dict(), "seed": seed,
                "examples": examples.describe(), "model_hash": attached.hash,
            }
        )  # fmt: skip
        return
    say(
        f"{examples}\nright on {100 * accuracy.own:.1f} % of {accuracy.n} held out ({100 * accuracy.low:.1f} to "
        f"{100 * accuracy.high:.1f}); trained on shuffled labels {100 * accuracy.shuffled_labels:.1f} %, always the "
        f"commonest {100 * accuracy.majority:.1f} %"
    )
    for e in [*explained, *([local] if local else [])]:
        what = f"{e.label}: logit {e.logit:.3f} = bias {e.bias:.3f} + latents"
        show_table(
            ("latent", "activation", "weight", "adds"),
            [(s.unit, s.activation, s.weight, s.contribution) for s in e.shares], title=what,
        )  # fmt: skip
    if changed is not None:
        _show_interventions(changed)


def _explained(e: Any) -> dict[str, Any]:
    return {
        "class": e.label, "logit": e.logit, "bias": e.bias, "left": e.left,
        "shares": [
            {"unit": str(s.unit), "activation": s.activation, "weight": s.weight, "adds": s.contribution}
            for s in e.shares
        ],
    }  # fmt: skip


def _show_interventions(found: Any) -> None:
    effect = found.effect
    beside = "; {:+.4f} to {:+.4f} for {}".format(*effect.null_range, effect.null_is)
    say(
        f"switched: {100 * effect.intact:.1f} -> {100 * effect.changed:.1f} % right, {effect.change:+.4f} "
        f"({effect.low:+.4f} to {effect.high:+.4f}){beside if effect.null else ''}"
    )
    rows = [(c.name, c.n, c.intact, c.changed) for c in found.classes]
    show_table(("class", "examples", "right before", "after"), rows)
    show_table(("decisions", "changed"), sorted(found.flips.items(), key=lambda f: -f[1])[:10])


def _interventions(site: Any, off: str, scale: str, set_: str) -> list[Any]:
    from circuits.concepts import Intervention
    from circuits.units import Units

    found = []
    for how, text in (("off", off), ("scale", scale), ("set", set_)):
        if not text:
            continue
        indices, equals, amount = text.partition("=")
        if bool(equals) == (how == "off"):
            form = "INDICES, e.g. 3,17" if how == "off" else "INDICES=NUMBER, e.g. 3,17=2"
            raise ValueError(f"--{how} {text!r} is not of the form {form}")
        try:
            units = Units.parse(f"{site.name}:{indices}")
        except ValueError:
            raise ValueError(
                f"--{how} {text!r}: {indices!r} are no indices of latents, e.g. 3,17"
            ) from None
        try:
            number = float(amount) if equals else 0.0
        except ValueError:
            raise ValueError(f"--{how} {text!r}: {amount!r} is no number") from None
        found.append(Intervention(tuple(site.unit(i) for i in units.among(site)), how, number))  # type: ignore[arg-type]
    return found
