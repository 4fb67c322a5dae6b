"""What a page shows is in its URL: choices, links, and what a page says of trouble.

The URL is the single truth: widgets are set from it and write to it, so that every view can be linked to.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import wraps
from shlex import quote
from typing import Literal, ParamSpec, TypeVar

import streamlit as st

from apps import cached
from circuits import errors
from circuits.checks import seen
from circuits.figures.charts import short
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.units import Site, Unit
from circuits.workspace import ModelRecord

TROUBLE = (ValueError, KeyError, OSError, ImportError)
"""What loading and reading raise for things a person can mend; anything else is a bug and shows as one."""

AGAIN = "run again for what was recalled"
"""In a session whose page runs once more though nobody asked for it: what it has said has to be said again."""

TITLES: Mapping[str, str] = {
    "home": "Home", "unit": "Unit", "site": "Site", "compare": "Compare", "heads": "Heads", "prompts": "Prompts",
    "find": "Find circuits", "circuit": "Circuit", "claims": "Claims", "edits": "Edits", "yours": "Your own input",
    "concepts": "Concepts", "case": "Case: curve detector", "jobs": "Jobs",
}  # fmt: skip
"""The pages by their path in the URL."""


def line(error: BaseException) -> str:
    """An error as one line, which shows as it is."""
    return plain(errors.line(error))


def plain(text: str) -> str:
    r"""Words of a URL, a file or a person, for Markdown: they are shown as they are, and nothing is made of them.

    Markdown's marks are escaped. Some things are made of a text after Markdown is read, whatever was escaped in it
    (links of addresses, emoji, arrows): such a word is shown as code, which is left alone.

    >>> plain("![x](b) :red[b] see https://a.example")
    '\\!\\[x\\]\\(b\\) \\:red\\[b\\] see `https://a.example`'
    """
    words = [code(w) if _MADE_LATER.fullmatch(w) else _MARKS.sub(r"\\\1", w) for w in visible(text)]
    return _BEGINS.sub(r"\1\\\2", " ".join(words), count=1)


def code(text: str) -> str:
    """Words of a URL, a file or a person as one piece of code, for Markdown.

    >>> code("a `b` c"), code("`b`")
    ('``a `b` c``', '`` `b` ``')
    """
    shown = " ".join(visible(text))
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    gap = " " if shown.startswith("`") or shown.endswith("`") else ""
    return shown and f"{fence}{gap}{shown}{gap}{fence}"


def visible(text: str) -> list[str]:
    """The words of a text; a mark stands for what is not a character or turns those around it."""
    return [seen(word) for word in text.split()]


_MARKS = re.compile(r"([\\`*_\[\](){}<>$~:!#|@&])")
_MADE_LATER = re.compile(
    r".*(://|www\.|@|:[\w+-]+:|:material/).*|<->|->|<-|--|[<>~]=", re.IGNORECASE | re.DOTALL
)
"""Words that Streamlit turns into links, emoji, icons or arrows wherever they stand in a text."""

_BEGINS = re.compile(r"^(\d*)([-+=.)])")
"""At the beginning of a text: of a list, a heading, a ruler."""


def link(page: str, label: str, help: str | None = None, **choices: object) -> None:
    """A link to a page with choices in its URL; it stays in the session, or opens in a new tab."""
    st.page_link(
        st.Page(_elsewhere, title=TITLES[page], url_path=page), label=plain(label), help=plain(help) if help else None,
        query_params={name: str(value) for name, value in choices.items()},
    )  # fmt: skip


def open_page(page: str, **choices: object) -> None:
    """Go to a page, as a click on a link would."""
    st.switch_page(
        st.Page(_elsewhere, title=TITLES[page], url_path=page),
        query_params={name: str(value) for name, value in choices.items()},
    )


def _elsewhere() -> None:
    """Stands for the page of the same path, which `workbench` has."""


def choose(
    label: str,
    options: Sequence[str],
    parameter: str,
    show: Callable[[str], str] = str,
    *,
    sidebar: bool = True,
    help: str | None = None,
) -> str:
    """A select box whose choice is the URL's `parameter`; `show` says how options look, `help` what they are."""
    key = f"choose-{parameter}"
    wanted = st.query_params.get(parameter)
    if wanted is None and (before := st.session_state.get(_last(parameter))) in options:
        wanted = before
    known = wanted is None or wanted in options
    _say_if_odd(label, parameter, known, options[0])
    wanted = wanted if known else None
    value = wanted or options[0]
    st.session_state[key] = value
    st.query_params[parameter] = value
    if parameter in _REMEMBERED:
        st.session_state[_last(parameter)] = value

    def changed() -> None:
        st.query_params[parameter] = st.session_state[key]

    with st.sidebar if sidebar else nullcontext():
        return st.selectbox(
            label,
            options,
            key=key,
            on_change=changed,
            format_func=show,
            help=plain(help) if help else None,
        )


_REMEMBERED = {"model": (), "site": ("model",), "unit": ("model", "site")}
"""What goes along from page to page where the URL says nothing, and of what else each is remembered apart."""


def _last(parameter: str) -> str:
    """Where the session keeps the last choice, of the same model and site."""
    within = [st.query_params.get(other, "") for other in _REMEMBERED.get(parameter, ())]
    return f"last {parameter} {within}"


N = TypeVar("N", int, float)


def choose_number(label: str, low: N, high: N, default: N, parameter: str) -> N:
    """A field for a number whose value is the URL's `parameter`; a whole number if the default is one."""
    key = f"choose-{parameter}"
    try:
        value = type(default)(st.query_params.get(parameter, default))
    except (ValueError, OverflowError):
        value = None
    known = value is not None and low <= value <= high
    _say_if_odd(label, parameter, known, str(default))
    shown = value if value is not None and known else default
    st.session_state[key] = shown
    st.query_params[parameter] = str(shown)

    def changed() -> None:
        st.query_params[parameter] = str(st.session_state[key])

    step, form = (1, "%d") if isinstance(default, int) else (None, "%.4g")
    return type(default)(
        st.number_input(label, low, high, step=step, format=form, key=key, on_change=changed)
    )


def _say_if_odd(label: str, parameter: str, known: bool, shown: str) -> None:
    """Say that the URL asks for what is not there, as long as the page shows something else instead."""
    odd = f"odd-{parameter}"
    if not known:
        wanted = st.query_params[parameter]
        st.session_state[odd] = (
            f"There is no {label.lower()} {code(wanted[:80])} here: showing {code(shown)}."
        )
    elif AGAIN not in st.session_state:
        st.session_state.pop(odd, None)
    if odd in st.session_state:
        st.warning(st.session_state[odd])


def choose_model() -> tuple[ModelRecord, HookedModel] | None:
    """A model of the workspace, loaded; None, after saying why, if there is none to show."""
    records = sorted(cached.workspace().models(), key=lambda r: (r.spec != "cleanroom", r.spec))
    if not records:
        st.info(
            f"The workspace {code(str(cached.workspace().root))} is empty. Build it with "
            "`circuits demo`, or harvest a model: `circuits harvest MODEL --data DATA --sites SITES`."
        )
        return None
    by_label = {cached.label_of(r): r for r in records}
    record = by_label[choose("Model", list(by_label), "model")]
    try:
        return record, cached.model_of(record)
    except TROUBLE as error:
        st.error(line(error))
        return None


MOST_LISTED = 4096
"""Units that fit into a list; of more (the tokens of a vocabulary) the number is typed."""

FEW = 60
"""Sites that fit into one list; more are listed layer by layer."""

_LAYER = re.compile(r"((?:[A-Za-z_]\w*\.)+[0-9]+)\.(.+)")
OUTSIDE = "outside the layers"


def choose_site(record: ModelRecord, model: HookedModel) -> str:
    """A site of the model, harvested ones first; of a model with many, first the layer and then a site of it."""
    stores = cached.stores_of(record)
    harvested = dict.fromkeys(s.name for store in stores for s in store.provenance.sites)
    names = list(harvested | dict.fromkeys(s.name for s in model.sites))
    if len(names) <= FEW:
        return choose("Site", names, "site")
    layers = by_layer(names, [s.name for s in model.sites])
    wanted = st.query_params.get("site", "") or str(st.session_state.get(_last("site"), ""))
    now = _layer_of(wanted if wanted in names else names[0])[0]
    st.session_state["choose-layer"] = now

    def moved() -> None:
        """To the same place in another layer, if there is one."""
        sites = layers[st.session_state["choose-layer"]]
        same = [s for s in sites if _layer_of(s)[1] == _layer_of(wanted)[1]]
        st.query_params["site"] = (same or sites)[0]

    def shown(name: str) -> str:
        return _layer_of(name)[1] + (" ✓" if name in harvested else "")

    with st.sidebar:
        st.selectbox("Layer", list(layers), key="choose-layer", on_change=moved)
    return choose("Site", layers[now], "site", shown, help="✓: activations have been harvested.")


def by_layer(names: Sequence[str], order: Sequence[str]) -> dict[str, list[str]]:
    """Sites by the layer that their names begin with, layers in the order in which the model has them.

    >>> by_layer(["h.1.b", "embed"], ["embed", "h.0.a", "h.1.b"])
    {'outside the layers': ['embed'], 'h.1': ['h.1.b']}
    """
    found: dict[str, list[str]] = {_layer_of(name)[0]: [] for name in order}
    for name in names:
        found.setdefault(_layer_of(name)[0], []).append(name)
    return {layer: sites for layer, sites in found.items() if sites}


def _layer_of(name: str) -> tuple[str, str]:
    """The layer that a site's name begins with, and the rest of it."""
    match = _LAYER.fullmatch(name)
    return (match[1], match[2]) if match else (OUTSIDE, name)


def not_harvested(record: ModelRecord, site: str) -> str:
    """What to do about a site without activations, for Markdown."""
    harvest = f"circuits harvest {record.arguments} --data DATA --sites {quote(site)}"
    return f"No activations of {plain(site)} yet: {code(harvest)}"


def choose_unit(record: ModelRecord, model: HookedModel) -> Unit:
    """A site and a unit of it."""
    site = choose_site(record, model)
    n = model.site(site).n_units
    if n > MOST_LISTED:
        with st.sidebar:
            return Unit(site, choose_number("Unit", 0, n - 1, 0, "unit"))
    index = choose("Unit", [str(i) for i in range(n)], "unit")
    return Unit(site, int(index))


def go_to(unit: Unit) -> None:
    """Make `unit` the page's choice."""
    st.query_params["site"] = unit.site
    st.query_params["unit"] = str(unit.index)


def names_at(model: HookedModel, site: Site) -> Sequence[str]:
    """What a site's units are known to be: classes, tokens, or what they were written to detect; empty if unknown."""
    own = model.unit_names.get(site.name, ())
    return own or (cached.output_names(model) if site.kind == "logit" else ())


def name_of(model: HookedModel, unit: Unit) -> str:
    """What a unit is known to be; empty if nothing is known."""
    known = unit.site in model.unit_names or unit.site in {s.name for s in model.sites}
    names = names_at(model, model.site(unit.site)) if known else ()
    return names[unit.index] if unit.index < len(names) else ""


def named(model: HookedModel, unit: Unit) -> str:
    """A unit with what it is known to be."""
    name = name_of(model, unit)
    return f"{unit} · {name}" if name else str(unit)


def brief(model: HookedModel, unit: Unit) -> str:
    """A unit as briefly as it can be said: a token as it is written, another unit of a block as `16 mlp post:214`."""
    name = name_of(model, unit)
    is_token = bool(name) and isinstance(model.input, TokenInput)
    return f"“{name}”" if is_token else (f"{unit} · {name}" if name else short(str(unit)))


def python(code: str, key: str = "") -> None:
    """What was shown, as the Python that makes it."""
    with st.popover("Python", help="The same from a script"):
        st.code(code.strip("\n"), language="python")


def action(
    label: str,
    do: Callable[[], object],
    key: str,
    *,
    form: bool = False,
    disabled: bool = False,
    primary: bool = False,
    help: str | None = None,
) -> None:
    """A button whose work is done before the page is drawn again.

    A run of the page is stopped when a newer one is asked for (by what the tab has kept, or by the next click), and
    what `if st.button(...)` guards is then never reached: the click is lost. Callbacks are always called.

    Args:
        label: on the button.
        do: what a click does; it reads what is true at the click, and not what was when the button was drawn. A text
            that it returns is said below the button, and so is what is wrong.
        key: of the button on the page.
        form: whether it submits the form that it stands in.
        disabled: whether it cannot be clicked.
        primary: whether it is set off.
        help: shown when a pointer rests on it.
    """
    told = f"said by {key}"

    def clicked() -> None:
        try:
            said = do()
            st.session_state[told] = (st.success, said if isinstance(said, str) else "")
        except TROUBLE as error:
            st.session_state[told] = (st.error, line(error))

    button = st.form_submit_button if form else st.button
    kind: Literal["primary", "secondary"] = "primary" if primary else "secondary"
    button(label, key=key, on_click=clicked, disabled=disabled, type=kind, help=help)
    say, what = st.session_state.get(told, (st.success, ""))
    if what:
        say(what)
    if AGAIN not in st.session_state:
        st.session_state.pop(told, None)


_P = ParamSpec("_P")


def guarded(view: Callable[_P, None]) -> Callable[_P, None]:
    """A page, or a part of one, that says what is wrong with damaged files instead of where it happened."""

    @wraps(view)
    def shown(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            view(*args, **kwargs)
        except TROUBLE as error:
            st.error(line(error))

    return shown


def part(view: Callable[_P, None]) -> Callable[_P, None]:
    """A part of a page that runs again by itself when something in it is changed."""
    return st.fragment(guarded(view))
