"""What others wrote is on the app's pages as it was written: nothing is made of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import pytest

import apps
from apps.address import code, plain
from tests.markdown import live

APPS = Path(apps.__file__).parent

# --- the one way ---------------------------------------------------------------------------------

HOSTILE = (
    "![p](https:host.example?x=a.png).png", "https://a.example", "(www.A.example)", "x@a.example", ":smile:", "a:+1:",
    ":material/home:", ":red[b]", "<s>", "<a href='https://a.example'>", "$x$ $y$", "~~s~~", "`https://a.example`",
    "``", "a`b", "``` x", "\\https://a.example", "&lt;b&gt;", "[x]: https://a.example", "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>", "javascript:alert(1)", "**b** __c__ *d*", "[x](javascript:alert(1))", "| a | b |",
)  # fmt: skip


@pytest.mark.parametrize("words", HOSTILE)
def test_nothing_is_made_of_words_of_others(words: str) -> None:
    for written in (plain(words), code(words), plain(f"a {words} {words}"), f"A {plain(words)}: x"):
        assert not live(written)
    assert re.sub(r"\\(.)|`+ ?", r"\1", plain(words)).count("a") == words.count("a"), "all is there"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("1. one", "1\\. one"), ("- a", "\\- a"), ("# h", "\\# h"), ("    code", "code"), ("a\n\n# b", "a \\# b"),
        ("a -> b", "a `->` b"), ("use --all -- now", "use --all `--` now"), ("curve:30 — 90°", "curve\\:30 — 90°"),
        ("a\u202eb\x00c\ud800", "a�b�c�"), ("", ""),
    ],
)  # fmt: skip
def test_words_are_one_line_as_they_were_written(words: str, shown: str) -> None:
    assert plain(words) == shown
    assert code(words).strip("`") == re.sub(r"\\|`", "", shown)


# --- a lint --------------------------------------------------------------------------------------

MARKDOWN: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(
        (
            "title", "header", "subheader", "markdown", "write", "caption", "info", "warning", "error", "success",
            "exception", "toast", "badge", "button", "form_submit_button", "download_button", "link_button",
            "checkbox", "toggle", "slider", "select_slider", "text_input", "text_area", "number_input", "selectbox",
            "multiselect", "file_uploader", "date_input", "color_picker", "expander", "popover", "spinner", "status",
            "dialog", "chat_message", "action", "choose", "choose_number", "table", "feedback", "latex",
        ),
        (0,),
    ),
    **dict.fromkeys(("radio", "segmented_control", "pills"), (0, 1)),
    "metric": (0, 1, 2), "progress": (1,), "page_link": (), "tabs": (0,), "html": (0,),
}  # fmt: skip
"""Calls that make Markdown (or HTML) of some of their positional arguments."""

NAMED = {
    "label", "body", "help", "text", "caption", "title", "delta", "format_func", "options", "unsafe_allow_html",
}  # fmt: skip
"""Arguments of those calls, and of `image`, that do so by name."""

PLAIN_OPTIONS = {"selectbox", "multiselect", "choose", "select_slider"}
"""Their options are shown as text."""

TAKEN = {
    "address.py choose label": "is checked at its calls",
    "address.py choose_number label": "is checked at its calls",
    "address.py _say_if_odd st.session_state[odd]": "is made with code() in it",
    "address.py action label": "is checked at its calls",
    "address.py action help": "is checked at its calls",
    "address.py action what": "what a click returns, which is checked where it is made",
    "panels/tokens.py texts_panel": "every word of it goes through html.escape in _row and _token",
    "showing.py show_picture f": "the alternative text goes through html.escape",
    "panels/prompting.py said_panel _CSS": "every word of it goes through html.escape in _marked",
    "panels/prompting.py continuation_panel _CSS": "every word of it goes through html.escape in _marked",
    "panels/tokens.py own_text_panel f": "every word of it goes through html.escape in _row and _token",
}
"""Places that are safe by what surrounds them, with the reason."""

NUMBER = re.compile(r"[+]?0?\d*,?(\.\d+)?[defg%]|,")
"""Formats that only numbers have: a text raises an error."""

ESCAPED = {"plain", "line", "code", "not_harvested", "len", "int", "float", "round", "sum"}


class Module:
    """A file of the app, and which of its expressions can be put into Markdown."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(APPS).as_posix()
        self.tree = ast.parse(path.read_text())

    @cached_property
    def functions(self) -> dict[str, ast.FunctionDef]:
        return {n.name: n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)}

    @cached_property
    def calls(self) -> dict[str, list[tuple[ast.Call, list[ast.FunctionDef]]]]:
        """Calls of the module's functions by their names, each with the functions around it."""
        made: dict[str, list[tuple[ast.Call, list[ast.FunctionDef]]]] = {}

        def gather(node: ast.AST, around: list[ast.FunctionDef]) -> None:
            if isinstance(node, ast.FunctionDef):
                around = [*around, node]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                made.setdefault(node.func.id, []).append((node, around))
            for child in ast.iter_child_nodes(node):
                gather(child, around)

        gather(self.tree, [])
        return made

    def found(self) -> Iterator[str]:
        """Expressions that are put into Markdown and may hold words of others."""
        yield from self._in(self.tree, [])

    def _in(self, node: ast.AST, around: list[ast.FunctionDef]) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef):
            around = [*around, node]
        if isinstance(node, ast.Call):
            for expression in _markdown_of(node):
                if not self.safe(expression, around):
                    where = around[-1].name if around else ""
                    yield f"{self.name} {where} {ast.unparse(expression)}"
        for child in ast.iter_child_nodes(node):
            yield from self._in(child, around)

    def safe(self, e: ast.expr, around: list[ast.FunctionDef], depth: int = 0) -> bool:
        """Whether an expression holds nothing but words of the app's own, numbers, and escaped words."""
        if depth > 12:
            return False

        def all_safe(*parts: ast.expr) -> bool:
            return all(self.safe(part, around, depth + 1) for part in parts)

        match e:
            case ast.Constant():
                return True
            case ast.JoinedStr():
                return _apart(e) and all_safe(*e.values)
            case ast.FormattedValue(
                format_spec=ast.JoinedStr(values=[ast.Constant(value=str(spec))])
            ):
                return bool(NUMBER.fullmatch(spec))
            case ast.FormattedValue(conversion=-1):
                return all_safe(e.value)
            case ast.IfExp():
                return all_safe(e.body, e.orelse)
            case ast.BinOp():
                return all_safe(e.left, e.right)
            case ast.BoolOp():
                return all_safe(*e.values)
            case ast.UnaryOp():
                return all_safe(e.operand)
            case ast.List() | ast.Tuple():
                return all_safe(*e.elts)
            case ast.GeneratorExp() | ast.ListComp():
                return all_safe(e.elt)
            case ast.Dict():
                return all_safe(*e.values)
            case ast.Subscript(value=ast.Name(id=name)) if name.isupper():
                return True
            case ast.Call(func=ast.Name(id=name)) if name in ESCAPED:
                return True
            case ast.Call(func=ast.Name(id="get_args")):
                return True
            case ast.Call(func=ast.Attribute(value=ast.Constant(), attr="join")):
                return all_safe(*e.args)
            case ast.Call(func=ast.Attribute(value=text, attr="upper" | "lower")):
                return all_safe(text)
            case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                made = self.functions[name]
                returned = [n.value for n in ast.walk(made) if isinstance(n, ast.Return)]
                return all(r is not None and self.safe(r, [made], depth + 1) for r in returned)
            case ast.Attribute(attr=name) if name.isupper():
                return True
            case ast.Name(id=name):
                return name.isupper() or self._name_is_safe(name, around, depth)
        return False

    def _name_is_safe(self, name: str, around: list[ast.FunctionDef], depth: int) -> bool:
        """Whether all that a name stands for in a function, and at the calls of a private one, is safe."""
        if not around:
            return False
        inner = around[-1]
        given = [(value, around) for value in _values_of(name, inner)]
        parameters = [a.arg for a in (*inner.args.args, *inner.args.kwonlyargs)]
        if name in parameters and inner.name.startswith("_"):
            at = parameters.index(name)
            for call, caller in self.calls.get(inner.name, ()):
                named = [k.value for k in call.keywords if k.arg == name]
                given += [(value, caller) for value in named or call.args[at : at + 1]]
        if given:
            return all(self.safe(value, where, depth + 1) for value, where in given)
        return len(around) > 1 and self._name_is_safe(name, around[:-1], depth)


def _markdown_of(call: ast.Call) -> Iterator[ast.expr]:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name not in MARKDOWN and name != "image":
        return
    yield from (call.args[i] for i in MARKDOWN.get(name, ()) if i < len(call.args))
    for keyword in call.keywords:
        if keyword.arg in NAMED and not (
            keyword.arg in ("options", "format_func") and name in PLAIN_OPTIONS
        ):
            yield keyword.value


def _values_of(name: str, within: ast.FunctionDef) -> Iterator[ast.expr]:
    """All that is assigned to a name, or appended to it."""
    for node in ast.walk(within):
        match node:
            case ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                yield node.value
            case ast.AnnAssign(target=ast.Name(id=found), value=ast.expr() as value) if (
                found == name
            ):
                yield value
            case ast.AugAssign(target=ast.Name(id=found)) if found == name:
                yield node.value
            case ast.Call(func=ast.Attribute(value=ast.Name(id=found), attr="append")) if (
                found == name
            ):
                yield from node.args
            case ast.Assign(targets=[ast.Tuple() as target], value=value):
                options = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
                yield from _looped(name, target, ast.List(elts=options))
            case ast.For() | ast.comprehension():
                yield from _looped(name, node.target, node.iter)


def _matched(name: str, targets: list[ast.expr], values: list[ast.expr]) -> Iterator[ast.expr]:
    for target, value in zip(targets, values, strict=False):
        if isinstance(target, ast.Name) and target.id == name:
            yield value


def _looped(name: str, target: ast.expr, over: ast.expr) -> Iterator[ast.expr]:
    """What a loop over things that are written out gives a name; the loop's whole sequence where they are not."""
    targets = target.elts if isinstance(target, ast.Tuple) else [target]
    if name not in (n.id for n in ast.walk(target) if isinstance(n, ast.Name)):
        return
    match over:
        case ast.Call(func=ast.Attribute(value=ast.Dict() as known, attr="items")):
            rows: list[ast.expr] = [
                ast.Tuple(elts=[k, v])
                for k, v in zip(known.keys, known.values, strict=True)
                if k is not None
            ]
        case ast.Call(func=ast.Name(id="enumerate")) if (
            isinstance(targets[0], ast.Name) and targets[0].id == name
        ):
            yield ast.Constant(value=0)
            return
        case ast.Tuple() | ast.List():
            rows = over.elts
        case _:
            yield over
            return
    for row in rows:
        if isinstance(target, ast.Tuple) and isinstance(row, ast.Tuple):
            yield from _matched(name, targets, row.elts)
        else:
            yield row


def _apart(joined: ast.JoinedStr) -> bool:
    """Whether no two escaped words, nor one and a mark of code, touch: their marks would be read as one."""
    before: object = ""
    for part in joined.values:
        is_value = isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Call)
        if is_value and (before is None or str(before).endswith(("`", "\\"))):
            return False
        text = part.value if isinstance(part, ast.Constant) else ""
        if before is None and str(text).startswith("`"):
            return False
        before = None if is_value else text
    return True


def test_all_that_is_put_into_markdown_is_escaped() -> None:
    """`plain` and `code` are the one way; numbers have a format, which a text does not pass."""
    found = {
        place
        for path in sorted(APPS.rglob("*.py"))
        for place in Module(path).found()
        if not any(place.startswith(known) for known in TAKEN)
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    ("source", "safe"),
    [
        ("st.caption(name)", False), ("st.caption(f'{name}')", False), ("st.caption(plain(name))", True),
        ("st.caption(f'{x:.3g} {len(y)}')", True), ("st.caption(f'{name:>3}')", False),
        ("left.button('a', help=name)", False), ("st.image(x, caption=name)", False),
        ("st.caption(f'{plain(a)}{plain(b)}')", False), ("st.caption(f'`{code(a)}`')", False),
        ("words = 'a'\n  st.info(words)", True), ("words = [a]\n  st.info(', '.join(words))", False),
        ("st.radio('a', names)", False), ("st.selectbox('a', names)", True), ("st.html(name)", False),
        ("for a, b in (('x', y),):\n    st.title(a)", True), ("for a in names:\n    st.title(a)", False),
        ("action(name, do, 'key')", False), ("st.metric('a', name)", False), ("column.caption(name)", False),
    ],
)  # fmt: skip
def test_the_lint_sees_what_is_not_escaped(source: str, safe: bool, tmp_path: Path) -> None:
    module = Module.__new__(Module)
    module.name, module.tree = (
        "page.py",
        ast.parse(f"def page(name, names, a, b, x, y):\n  {source}\n"),
    )
    assert bool(list(module.found())) != safe
