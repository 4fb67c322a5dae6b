"""A person's algorithm as a Python function of named variables, which can be set from outside.

    def algorithm(inputs, let):
        a, b, equals = inputs
        total = let("sum", (a + b) % 113)
        return total

`inputs` are the tokens up to the one after which the answer comes; of an image its label, or its name if it has none.
`let` gives a variable its name and returns its value, which is another one where an intervention sets the variable. The
answer is a token, or a class.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from circuits.checks import clipped
from circuits.cleanroom.addition import FREQUENCIES, N_PHASES
from circuits.errors import their_code
from circuits.factories import from_file, named_function
from circuits.units import unknown

Let = Callable[[str, Any], Any]
"""Names a variable and returns its value: the one that is given to it, unless an intervention sets it."""

Inputs = Sequence[int] | int | str
"""What an algorithm is given: tokens, or the label or name of an image."""

Function = Callable[[Any, Let], Any]

_MOST_VARIABLES = 10_000


@dataclass(frozen=True, eq=False)
class Algorithm:
    """A function of named variables.

    Attributes:
        name: as it is written: a built-in name, or FILE.py:FUNCTION.
        function: takes the inputs and `let`, and returns the answer.
        hash: SHA-256 (hexadecimal) of the file that it is in; empty of a built-in one.

    >>> def total(inputs, let):
    ...     return let("sum", inputs[0] + inputs[1]) % 10
    >>> algorithm = Algorithm("total", total)
    >>> algorithm.answer([7, 8]), algorithm.variables([7, 8]), algorithm.answer([7, 8], given={"sum": 4})
    (5, {'sum': 15}, 4)
    """

    name: str
    function: Function
    hash: str = ""

    def answer(
        self, inputs: Inputs, given: Mapping[str, Any] | None = None, most: int | None = None
    ) -> int:
        """The answer, with some variables set.

        Args:
            inputs: tokens, or the label or name of an image.
            given: values of variables that an intervention sets.
            most: the last token or class that the model puts out; any answer is taken if None.

        Raises:
            KeyError: if the function names no such variable on these inputs.
            ValueError: if the function raises (with its file and line), or its answer is not a whole number, or not
                one from 0 to `most`.
        """
        found = self._run(inputs, given or {})[0]
        if most is not None and not 0 <= found <= most:
            raise ValueError(f"algorithm {self.name!r} answers {found}: expected 0 to {most}")
        return found

    def variables(self, inputs: Inputs) -> dict[str, Any]:
        """The value of each variable, in the order in which the function names them.

        Raises:
            ValueError: as `answer`.
        """
        return self._run(inputs, {})[1]

    def _run(self, inputs: Inputs, given: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        named: dict[str, Any] = {}

        def let(name: str, value: Any) -> Any:
            if not isinstance(name, str) or not name.strip() or len(named) >= _MOST_VARIABLES:
                raise ValueError(
                    f"let({clipped(repr(name))}, …): expected a name, of at most {_MOST_VARIABLES} variables"
                )
            if name in named:
                raise ValueError(f"let({clipped(repr(name))}, …): the variable was named before")
            named[name] = given.get(name, value)
            return named[name]

        with their_code(f"algorithm {self.name!r}: it"):
            # Each run has its own list, so that a function which changes its inputs changes nobody else's.
            own = (
                list(inputs)
                if isinstance(inputs, Sequence) and not isinstance(inputs, str)
                else inputs
            )
            made = self.function(own, let)
        for name in given:
            if name not in named:
                raise unknown(f"variable of algorithm {self.name!r}", name, named)
        try:
            return operator.index(made), named
        except TypeError:
            raise ValueError(
                f"algorithm {self.name!r} returns {clipped(repr(made))}: expected a whole number, the answer's token "
                "or class"
            ) from None


def load_algorithm(name: str, folder: Path = Path()) -> Algorithm:
    """An algorithm by its name: a built-in one, or FILE.py:FUNCTION.

    Args:
        name: as claim files write it.
        folder: that of the claim file, in which the file is looked for.

    Raises:
        KeyError: if there is no such built-in algorithm, or no such function.
        ImportError: if the file is missing or cannot be imported.
        ValueError: if it would run code of a file, and the environment does not say that files are trusted.
    """
    if ":" not in name:
        if name not in ALGORITHMS:
            raise unknown("algorithm", name, ALGORITHMS)
        return Algorithm(name, ALGORITHMS[name])
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not function.isidentifier():
        raise ValueError(
            f"algorithm {clipped(repr(name))}: expected FILE.py:FUNCTION or one of {', '.join(ALGORITHMS)}"
        )
    from_file("algorithm", name, "a claim file", "read the file first")
    place = (folder / file).resolve()
    made = named_function("algorithm", f"{place}:{function}")
    return Algorithm(name, made, hashlib.sha256(place.read_bytes()).hexdigest())


# --- built-in algorithms -----------------------------------------------------------------------------


def addition(inputs: Sequence[int], let: Let) -> int:
    """`a b =`: the sum modulo the number that stands for `=`. Variable: `sum`."""
    a, b, p = inputs
    return let("sum", (a + b) % p)


def addition_by_waves(inputs: Sequence[int], let: Let) -> int:
    """`a b =` as `addition-by-hand` computes it.

    Variables, for each of its frequencies k: `wave k`, the cosines and sines of both numbers summed, and `answer wave
    k`, the cosine and sine of the sum, both times the amplitude that `wave k` has. The second follows from the first
    as the network's neurons have it: rectified at nine phases, which leaves the second harmonic (see
    `cleanroom.addition`).
    """
    a, b, p = inputs
    answers = []
    for k in FREQUENCIES:
        w = 2 * math.pi * k / p
        wave = let(f"wave {k}", _wave(w * a, w * b))
        answers.append((w, let(f"answer wave {k}", _doubled(*wave))))
    score = [
        sum(c * math.cos(w * n) + s * math.sin(w * n) for w, (c, s) in answers) for n in range(p)
    ]
    return max(range(p), key=score.__getitem__)


def _wave(*angles: float) -> tuple[float, float]:
    return sum(map(math.cos, angles)), sum(map(math.sin, angles))


def _doubled(first: float, second: float) -> tuple[float, float]:
    phases = [2 * math.pi * i / N_PHASES for i in range(N_PHASES)]
    rectified = [max(0.0, math.cos(f) * first + math.sin(f) * second) for f in phases]
    return (
        sum(r * math.cos(2 * f) for r, f in zip(rectified, phases, strict=True)),
        sum(r * math.sin(2 * f) for r, f in zip(rectified, phases, strict=True)),
    )


def induction(inputs: Sequence[int], let: Let) -> int:
    """What most often came after the last token before; of all tokens the most frequent one if nothing did.

    Variables: `previous`, the token before each position (before the first, itself), and `copied`, the share that each
    token has of the positions where the previous one is the last token.
    """
    previous = let("previous", (inputs[0], *inputs[:-1]))
    found = [token for token, before in zip(inputs, previous, strict=True) if before == inputs[-1]]
    counts = sorted(Counter(found or inputs).items())
    copied = let("copied", {token: n / len(found or inputs) for token, n in counts})
    return max(copied, key=copied.__getitem__)


ALGORITHMS: Mapping[str, Function] = {
    "addition": addition,
    "addition-by-waves": addition_by_waves,
    "induction": induction,
}
"""Built-in algorithms by name."""
