"""Selecting sites by name, by pattern, or by the short names that users of TransformerLens know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from circuits.models.adapter.hooked_model import HookedModel
from circuits.units import Site, unknown


def select_sites(model: HookedModel, names: str | Site | Iterable[str | Site]) -> list[Site]:
    """The sites that some names select, each once, in the order of the names and then of execution.

    Args:
        model: the model.
        names: names or aliases of sites; patterns in which `*` matches anything (`blocks.*.hook_mlp_out`); or short
            names, the part after `hook_`, which select the site in each block (`resid_pre`, `attn_out`, `z`). A
            string may hold several names, separated by commas.

    Raises:
        KeyError: if a name selects no site.

    >>> from circuits.models.zoo.loading import load_model
    >>> [str(s) for s in select_sites(load_model("induction-by-hand"), "z")]
    ['blocks.0.attn.hook_z', 'blocks.1.attn.hook_z']
    """
    if isinstance(names, str):
        names = [part for part in (p.strip() for p in names.split(",")) if part]
    found: dict[str, Site] = {}
    for name in [names] if isinstance(names, Site) else names:
        found |= {site.name: site for site in _named(model, name)}
    return list(found.values())


def _named(model: HookedModel, name: str | Site) -> list[Site]:
    if isinstance(name, Site):
        return [model.site(name)]
    text = name
    if "*" in text:
        matching = [s for s in model.sites if _any(s, lambda n: fnmatchcase(n, text))]
        if not matching:
            raise KeyError(f"no site of {model.name} matches {name!r}")
        return matching
    # A whole name goes before a short one. With a dot it can only be a whole name: the error then offers those.
    known = any(name in (s.name, *s.aliases) for s in model.sites)
    if known or "." in name:
        return [model.site(name)]
    # A dot before the name, so that `hook_z` is found at the top of a model as well as inside a block.
    ending = [s for s in model.sites if _any(s, lambda n: f".{n}".endswith(f".hook_{name}"))]
    if not ending:
        names = [n for s in model.sites for n in (s.name, *s.aliases)]
        short = [f".{n}".rpartition(".hook_")[2] for n in names if ".hook_" in f".{n}"]
        raise unknown(f"site of {model.name}", name, dict.fromkeys([*short, *names]))
    return ending


def _any(site: Site, fits: Callable[[str], bool]) -> bool:
    return any(fits(name) for name in (site.name, *site.aliases))
