"""The gate zoo: small networks in which every score of every edge is worked out by hand.

A gate is a function of variables a, b, c that are 0 or 1,

    y = direct . (a, b, c) + out * act(into . (a, b, c) + bias) + constant,

that is, a sum straight to the output and one unit m. Its table says what each way of scoring edges finds; it is derived
in the comments, by wires: `a` is all that the variable a feeds, `a>m` the wire into m, `a>out` the wire straight to the
output, `m>out` what m adds to the output, and `p>out` the direct sum where a network has a unit for it.

`as_transformer` and `as_convolutions` build each gate into a network with edges for these wires and dozens of dead
edges, which every method has to score with exactly 0. All thresholds lie between the values that occur, so that no run
stands on a kink of a ReLU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.inputs import TokenInput
from circuits.models.zoo.transformers import load_native, native_bridge
from circuits.tasks import Question, Task, as_metric
from circuits.tasks.metrics import logit_difference
from tests.plain_transformer import Edge

Relation = Literal["redundant", "conjunctive", "additive", "backup"]

Values = tuple[float, float, float]
"""Of a, b and c."""


class Row(NamedTuple):
    """The scores of a wire. All but `denoising` are changes of y as the wire goes over to the corrupted run.

    Attributes:
        noising: the wire alone replaced by the corrupted run.
        denoising: in the corrupted run the wire alone replaced by the clean run: the change from the corrupted y.
        eap: (corrupted - clean) times the gradient at the clean run.
        ends: the same with the mean of the gradients at the clean and at the corrupted run.
        left: with their mean at corrupted + alpha (clean - corrupted), alpha = 0, .2, .4, .6, .8.
        right: at alpha = .2, .4, .6, .8, 1.
        midpoint: at alpha = 1/12, 3/12, 5/12, 7/12, 9/12, 11/12.
    """

    noising: float
    denoising: float
    eap: float
    ends: float
    left: float
    right: float
    midpoint: float


def linear(change: float) -> Row:
    """The row of a wire on which y depends linearly, whatever the others carry: every method finds the change of y."""
    return Row(change, -change, change, change, change, change, change)


DEAD = linear(0)

COLUMNS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("noising", "exact", {}),
    ("denoising", "exact", {"direction": "denoising"}),
    ("eap", "eap", {}),
    ("ends", "clean-corrupted", {}),
    ("left", "eap-ig", {"steps": 5, "rule": "left"}),
    ("right", "eap-ig", {"steps": 5, "rule": "right"}),
    ("midpoint", "eap-ig", {"steps": 6}),
)
"""Each column of a table, the method that finds it, and its settings."""


@dataclass(frozen=True)
class Gate:
    """A function of variables, and what is known about it.

    Attributes:
        name: what it is called.
        clean: a, b, c in the clean run.
        corrupted: a, b, c in the corrupted run.
        table: rows by wire; a key may name several wires with the same row. Wires that are not named are dead.
        truth: y as a function of a, b, c that are 0 or 1.
        direct: weights of a, b, c straight to the output.
        into: weights of a, b, c into m.
        bias: of m.
        out: the weight of m to the output.
        constant: what is added to the output.
        act: what m does.
        used: how many of a, b, c are the gate's; the others are free to change and do nothing.
        relation: what a and b are to each other; None if none of the four.
        both: noising and denoising of the wires `a` and `b` together; None if there is no b.
        m_adds: out * m in the clean run, and there with wire `a` replaced by the corrupted run; None if it has no part.
        circuits: y where some wires alone are left and all others carry what they carry in the corrupted run.
    """

    name: str
    clean: Values
    corrupted: Values
    table: Mapping[str, Row]
    truth: Callable[[float, float, float], float]
    direct: Values = (0, 0, 0)
    into: Values = (0, 0, 0)
    bias: float = 0
    out: float = 0
    constant: float = 0
    act: Literal["relu", "sigmoid"] = "relu"
    used: int = 2
    relation: Relation | None = None
    both: tuple[float, float] | None = None
    m_adds: tuple[float, float] | None = None
    circuits: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, Row]:
        """The rows, one for each wire."""
        return {wire: row for wires, row in self.table.items() for wire in wires.split()}

    def values(self, pair: int, corrupted: bool) -> list[float]:
        """What a, b, c and a fourth variable d are in a pair; those the gate does not use change in both directions."""
        own = self.corrupted if corrupted else self.clean
        return [*own[: self.used], *((i + pair + corrupted) % 2 for i in range(self.used, 4))]


# --- the gates -----------------------------------------------------------------------------------

# OR: y = 1 - relu(1 - a - b), from (1, 1) to (0, 0), y from 1 to 0.
# Noising: y(0, 1) = y(1, 0) = 1, no change. Denoising: y(1, 0) = y(0, 1) = 1, all of it.
# Gradient: with a = b = alpha, m = relu(1 - 2 alpha) is active below alpha = 1/2, and dy/da = dy/db = 1 there, else 0;
# a score is (0 - 1) times the share of points below 1/2. Clean (1): 0. Ends (0 and 1): 1/2. Left (0 .2 .4 | .6 .8):
# 3/5. Right (.2 .4 | .6 .8 1): 2/5. Midpoint: 3/6.
# m itself goes from 0 to 1, and out * m from 0 to -1.
# Circuits: either variable with m>out is enough; without m>out, which is -1 in the corrupted run, nothing is.
OR = Gate(
    "or", (1, 1, 0), (0, 0, 0),
    {
        #                      noising denoising eap  ends  left right midpoint
        "a a>m b b>m": Row(    0,      1,        0,   -0.5, -0.6, -0.4, -0.5),
        "m>out": linear(-1),
    },
    lambda a, b, c: max(a, b),
    into=(-1, -1, 0), bias=1, out=-1, constant=1,
    relation="redundant", both=(-1, 1), m_adds=(0, 0),
    circuits={"a a>m m>out": 1, "b b>m m>out": 1, "a a>m b b>m": 0},
)  # fmt: skip

# AND: y = relu(a + b - 1), from (1, 1) to (0, 0), y from 1 to 0.
# Noising: y(0, 1) = y(1, 0) = 0, all of it. Denoising: y(1, 0) = y(0, 1) = 0, nothing.
# Gradient: with a = b = alpha, m = relu(2 alpha - 1) is active above alpha = 1/2, with slope 1: as OR with "above".
# m goes from 1 to 0.
AND = Gate(
    "and", (1, 1, 0), (0, 0, 0),
    {
        #                      noising denoising eap  ends  left right midpoint
        "a a>m b b>m": Row(    -1,     0,        -1,  -0.5, -0.4, -0.6, -0.5),
        "m>out": linear(-1),
    },
    lambda a, b, c: min(a, b),
    into=(1, 1, 0), bias=-1, out=1,
    relation="conjunctive", both=(-1, 1), m_adds=(1, 0),
    circuits={"a a>m b b>m m>out": 1, "a a>m m>out": 0},
)  # fmt: skip


def slope(x: float) -> float:
    """The derivative of sigmoid(20 (a - 1/2)) by a, where 20 (a - 1/2) is x."""
    s = 1 / (1 + math.exp(-x))
    return 20 * s * (1 - s)


# Sigmoid: y = sigmoid(20 (a - 1/2)), from a = 1 to 0, so from sigmoid(10) to sigmoid(-10): a change of
# sigmoid(-10) - sigmoid(10) = -tanh(5) = -.99991, noising and denoising.
# Gradient: slope(20 (alpha - 1/2)), the same at x and -x. Clean and both ends: x = 10 or -10, so -slope(10) = -.00091.
# Left: x = -10, -6, -2, 2, 6. Right: x = -6, -2, 2, 6, 10, the same sum. Midpoint: x = +-5/3, +-5, +-25/3.
# Circuits: y is sigmoid(10) = (1 + tanh(5)) / 2, or sigmoid(-10) = (1 - tanh(5)) / 2.
ALL = math.tanh(5)
FIVE = (slope(10) + 2 * slope(6) + 2 * slope(2)) / 5  # .860
SIX = (slope(5 / 3) + slope(5) + slope(25 / 3)) / 3  # .939
SIGMOID = Gate(
    "sigmoid", (1, 0, 0), (0, 0, 0),
    {
        #                      noising denoising eap         ends       left   right midpoint
        "a a>m": Row(          -ALL,   ALL,      -slope(10), -slope(10), -FIVE, -FIVE, -SIX),
        "m>out": linear(-ALL),
    },
    lambda a, b, c: 1 / (1 + math.exp(-20 * (a - 0.5))),
    into=(20, 0, 0), bias=-10, out=1, act="sigmoid", used=1,
    circuits={"a a>m m>out": (1 + ALL) / 2, "a a>m": (1 - ALL) / 2},
)  # fmt: skip

# a - b + c = relu(a - b + c + 2) - 2, from (1, 1, 1) to (0, 0, 0), y from 1 to 0. m is active for all a, b, c from 0
# to 1, so that y is linear: a adds -1, b +1, c -1. With a and b at 0 together, y = c = 1 as before.
# out * m goes from 3 to 2, and to 2 where a is 0.
# Circuits: the sum of their variables. a alone already gives y = 1, and a and c give 2.
SUM = Gate(
    "a-b+c", (1, 1, 1), (0, 0, 0),
    {"a a>m c c>m": linear(-1), "b b>m": linear(1), "m>out": linear(-1)},
    lambda a, b, c: a - b + c,
    into=(1, -1, 1), bias=2, out=1, constant=-2, used=3,
    relation="additive", both=(0, 0), m_adds=(3, 2),
    circuits={"a a>m m>out": 1, "b b>m m>out": -1, "a a>m b b>m m>out": 0, "a a>m c c>m m>out": 2},
)  # fmt: skip

# 2a - b straight to the output, from (1, 1) to (0, 0), y from 1 to 0; b is the negative one, whose removal raises y.
NEGATIVE = Gate(
    "2a-b", (1, 1, 0), (0, 0, 0),
    {"a a>out": linear(-2), "b b>out": linear(1), "p>out": linear(-1)},
    lambda a, b, c: 2 * a - b,
    direct=(2, -1, 0),
    relation="additive", both=(-1, 1),
    circuits={"a a>out p>out": 2, "b b>out p>out": -1, "a a>out b b>out p>out": 1},
)  # fmt: skip

# Backup: y = a + 2 relu(b - a - 1/2), from (1, 1) to (0, 0), y from 1 to 0. The same truth table as OR.
# m = 2 relu(b - a - 1/2) is 0 in both runs, and 1 only for (a, b) = (0, 1).
# a, all: y(0, 1) = 0 + 1 = 1, noising 0; y(1, 0) = 1 + 0, denoising 1.
# a>out: without it in the clean run m still sees a = 1: y = 0 + 0, noising -1; in the corrupted run it adds 1.
# a>m: without it in the clean run m sees (0, 1) and adds 1: y = 2, noising +1. In the corrupted run m sees (1, 0): 0.
# b: y(1, 0) = 1, noising 0; in the corrupted run m sees (0, 1): denoising 1.
# Gradient: with a = b = alpha, m sees alpha - alpha - 1/2 < 0 throughout, so dy/da = 1 (all of it by a>out), dy/db = 0.
# m>out: 0 in both runs, so 0 everywhere. But once a is removed m adds 1 where it added 0: that tells backup from OR,
# in which m adds -relu(1 - 0 - 1) = 0 as before.
# Circuits: either is enough; both without a>m are too much, y = 1 + 1, since m then sees (0, 1).
BACKUP = Gate(
    "backup", (1, 1, 0), (0, 0, 0),
    {
        #                      noising denoising eap  ends  left right midpoint
        "a": Row(              0,      1,        -1,  -1,   -1,  -1,   -1),
        "a>out p>out": linear(-1),
        "a>m": Row(            1,      0,        0,   0,    0,   0,    0),
        "b b>m": Row(          0,      1,        0,   0,    0,   0,    0),
    },
    lambda a, b, c: max(a, b),
    direct=(1, 0, 0), into=(-1, 1, 0), bias=-0.5, out=2,
    relation="backup", both=(-1, 1), m_adds=(0, 1),
    circuits={
        "a a>out p>out": 1, "b b>m m>out": 1, "a a>out p>out b b>m m>out": 2,
        "a a>out p>out a>m b b>m m>out": 1,
    },
)  # fmt: skip

# XOR: y = a + b - 4 relu(a + b - 3/2), from (1, 0) to the swapped (0, 1): y is 1 in both, the total effect is 0.
# out * m is -2 for (1, 1), otherwise 0.
# a: y(0, 0) = 0, noising -1; in the corrupted run y(1, 1) = 0, denoising -1. b: y(1, 1) = 0, noising -1; y(0, 0) = 0,
# denoising -1. Gradient: a + b = 1 all along, m is inactive, dy/da = dy/db = 1: a falls by 1 (-1), b rises by 1 (+1).
# a>out: linear, from 1 to 0: -1. b>out: linear, from 0 to 1: +1. Their sum p>out stays 1: 0.
# a>m: m sees (0, 0), noising 0; in the corrupted run m sees (1, 1), denoising -2.
# b>m: m sees (1, 1), noising -2; in the corrupted run m sees (0, 0), denoising 0. m>out: 0 in both runs.
# Both together are the other run: 0 and 0. None of the four relations: each alone does harm in either direction.
# Circuits: none at all gives y = 1 as well. With a alone going straight to the output y = 1 + 1, with b alone 0 + 0, as
# m>out stays at 0. With b alone going to m, m sees (0, 0) and adds nothing.
XOR = Gate(
    "xor", (1, 0, 0), (0, 1, 0),
    {
        #                      noising denoising eap  ends  left right midpoint
        "a": Row(              -1,     -1,       -1,  -1,   -1,  -1,   -1),
        "b": Row(              -1,     -1,       1,   1,    1,   1,    1),
        "a>out": linear(-1),
        "b>out": linear(1),
        "a>m": Row(            0,      -2,       0,   0,    0,   0,    0),
        "b>m": Row(            -2,     0,        0,   0,    0,   0,    0),
    },
    lambda a, b, c: abs(a - b),
    direct=(1, 1, 0), into=(1, 1, 0), bias=-1.5, out=-4,
    both=(0, 0), m_adds=(0, 0),
    circuits={"": 1, "a a>out p>out": 2, "b b>out p>out": 0, "a a>out b b>out p>out": 1, "b b>m m>out": 1},
)  # fmt: skip

# Dead edge: y = relu(a + 1) - 1, from (1, 1) to (0, 0), y from 1 to 0. m is active and linear in a; b changes and does
# nothing. out * m goes from 2 to 1.
DEAD_EDGE = Gate(
    "dead", (1, 1, 0), (0, 0, 0),
    {"a a>m m>out": linear(-1)},
    lambda a, b, c: a,
    into=(1, 0, 0), bias=1, out=1, constant=-1,
    both=(-1, 1), m_adds=(2, 1),
    circuits={"a a>m m>out": 1, "b b>m b>out": 0},
)  # fmt: skip

GATES = {g.name: g for g in (OR, AND, SIGMOID, SUM, NEGATIVE, BACKUP, XOR, DEAD_EDGE)}
"""All gates by name."""

N_PAIRS = 2
"""Pairs of each task. They differ in the variables that the gate does not use, so their scores are the same."""


# --- networks ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Planted:
    """A gate built into a network.

    Attributes:
        gate: the gate.
        model: the network.
        clean: clean inputs, one for each pair.
        corrupted: their counterparts.
        task: the pairs; its metric is y.
        wires: the edge of each wire that this network has.
    """

    gate: Gate
    model: HookedModel
    clean: Tensor
    corrupted: Tensor
    task: Task
    wires: Mapping[str, Edge]

    def circuit(self, wires: str) -> list[Edge]:
        """The edges of some wires, separated by spaces; those that this network does not have are left out."""
        return [self.wires[wire] for wire in wires.split() if wire in self.wires]

    @property
    def expected(self) -> dict[Edge, Row]:
        """The row of each live edge; all other edges are `DEAD`."""
        rows = self.gate.rows
        return {edge: rows[wire] for wire, edge in self.wires.items() if wire in rows}

    def column(self, name: str, edges: Sequence[Edge]) -> Tensor:
        """A column of the table (`noising`, `eap`, …) for each pair and edge: example x edge, float64."""
        values = [getattr(self.expected.get(edge, DEAD), name) for edge in edges]
        return torch.tensor(values, dtype=torch.float64).expand(N_PAIRS, -1)


WIDTH = 12
"""Of the transformers' residual stream: token value, 5 positions, a, b, c, d, y, and one that nobody reads."""

VALUE, FIRST, CARRIED, Y, UNREAD = 0, 1, 6, 10, 11
"""Dimensions of the stream; position i is FIRST + i, and head i carries its variable to CARRIED + i."""

SURE = 1000.0
"""A difference of attention scores whose exponential is 0 in floating-point numbers, so that attention is exact."""


def as_transformer(gate: Gate) -> Planted:
    """A transformer of one layer with a gate: 37 edges.

    Sequences are `a b c d =`, read at `=`; the metric is the logit of `1` less that of `0`, which is always 0. Head i
    looks from `=` at position i and copies the value there to the stream. Neuron 0 of the MLP is m. Neuron 1 reads
    all variables and writes where nobody reads, neuron 2 reads them and writes nothing.

    The sigmoid is attention: its first head weighs position 0, at which a stands and whose score is 20 a - 10, against
    `=`, whose score is 0, and reads 1 from position 0 and 0 from `=`. So `a` is an edge to its keys, and the head is m.
    """
    shape = {
        "n_heads": 4,
        "d_head": 1,
        "d_model": WIDTH,
        "n_ctx": 5,
        "d_vocab": 3,
        "d_mlp": 3,
        "n_layers": 1,
    }
    bridge = native_bridge(**shape, normalization_type=None, act_fn="relu")
    load_native(bridge, dict(_transformer_weights(gate)), gate.name)
    model = HookedModel(bridge, TokenInput(3, 5, ("0", "1", "=")), f"gate-{gate.name}")
    clean, corrupted = (
        torch.tensor([[*map(int, gate.values(pair, other)), 2] for pair in range(N_PAIRS)])
        for other in (False, True)
    )
    asked = (Question((4,), answers=((1,),), against=((0,),)),) * N_PAIRS
    task = Task(
        gate.name, Examples.given(model, clean), asked, logit_difference,
        counterparts=Examples.given(model, corrupted),
    )  # fmt: skip
    if gate.act == "sigmoid":
        wires = {"a": ("token", "0.0.k"), "m>out": ("0.0", "logits")}
        return Planted(gate, model, clean, corrupted, task, wires)
    wires = {"m>out": ("mlp:0", "logits")}
    for i, letter in enumerate("abc"):
        wires |= {
            letter: ("token", f"0.{i}.v"), f"{letter}>m": (f"0.{i}", "mlp:0"),
            f"{letter}>out": (f"0.{i}", "logits"),
        }  # fmt: skip
    return Planted(gate, model, clean, corrupted, task, wires)


def _transformer_weights(gate: Gate) -> Iterator[tuple[str, Tensor]]:
    """All weights, named as in a native bridge; those that are not set are 0."""
    embed, position = torch.zeros(3, WIDTH), torch.zeros(5, WIDTH)
    embed[1, VALUE] = 1
    position[:, FIRST : FIRST + 5] = torch.eye(5)
    yield from (("embed.weight", embed), ("pos_embed.weight", position))
    q, k, v, o = (torch.zeros(4, WIDTH) for _ in range(4))
    q[:, FIRST + 4] = 1
    for head in range(4):
        k[head, FIRST + head] = SURE
        v[head, VALUE] = 1
        o[head, CARRIED + head] = 1
    direct = gate.direct
    if gate.act == "sigmoid":
        k[0] = 0
        k[0, VALUE], k[0, FIRST], k[0, FIRST + 1 : FIRST + 4] = gate.into[0], gate.bias, -SURE
        v[0, VALUE], v[0, FIRST] = 0, 1
        direct = (gate.out, 0, 0)
    for name, weight in (("q", q), ("k", k), ("v", v), ("o", o.T)):
        yield f"blocks.0.attn.{name}.weight", weight.contiguous()
        yield f"blocks.0.attn.{name}.bias", torch.zeros(len(weight))
    read, write = torch.zeros(3, WIDTH), torch.zeros(WIDTH, 3)
    read[1:, CARRIED : CARRIED + 4] = 1
    write[UNREAD, 1] = 1
    bias = torch.zeros(3)
    if gate.act == "relu":
        read[0, CARRIED : CARRIED + 3] = torch.tensor(gate.into, dtype=torch.float32)
        bias[0] = gate.bias
        write[Y, 0] = gate.out
    yield from (("blocks.0.mlp.in.weight", read), ("blocks.0.mlp.in.bias", bias))
    yield from (("blocks.0.mlp.out.weight", write), ("blocks.0.mlp.out.bias", torch.zeros(WIDTH)))
    unembed, constant = torch.zeros(3, WIDTH), torch.zeros(3)
    unembed[1, CARRIED : CARRIED + 3] = torch.tensor(direct, dtype=torch.float32)
    unembed[1, Y], constant[1] = 1, gate.constant
    yield from (("unembed.weight", unembed), ("unembed.bias", constant))


LIFT = 4.0
"""What is added to the direct sum so that its ReLU never closes."""


def as_convolutions(gate: Gate) -> Planted:
    """A network of two convolutions and a linear layer with a gate: 12 + 12 + 6 = 30 edges between channels.

    Images have 3 channels of 6 x 6, seen as 3 x 3 cells of 2 x 2 pixels. The variables are brightnesses: a of channel 0
    in cell (0, 0), b of channel 1 in cell (1, 1), c of channel 2 in cell (2, 2). Cell (0, 2) changes in all channels,
    and nobody reads it.

    `conv1` averages cells: channels 0 to 2 are the image's channels plus 1 (so that no ReLU closes), channel 3 their
    sum. `conv2` looks at all cells at once: its channel 0 is the direct sum p plus `LIFT`, channel 1 is m, channel 2
    reads channels 0 and 3 and is not read. The metric is class 0 less class 1, which is always 0.
    """
    net = nn.Sequential()
    for name, module in _layers(gate):
        net.add_module(name, module)
    model = HookedModel(net.eval(), (3, 6, 6), f"gate-cnn-{gate.name}")
    clean, corrupted = (
        torch.stack([image_of(gate.values(pair, other), (pair + other) % 2) for pair in range(N_PAIRS)])
        for other in (False, True)
    )  # fmt: skip
    task = Task(
        gate.name, Examples.given(model, clean), (Question(),) * N_PAIRS, as_metric(first_less_second),
        counterparts=Examples.given(model, corrupted),
    )  # fmt: skip
    wires = {"m>out": ("act2:1", "fc:0"), "p>out": ("act2:0", "fc:0")}
    for i, letter in enumerate("abc"):
        wires |= {
            letter: (f"image:{i}", f"conv1:{i}"), f"{letter}>m": (f"act1:{i}", "conv2:1"),
            f"{letter}>out": (f"act1:{i}", "conv2:0"),
        }  # fmt: skip
    return Planted(gate, model, clean, corrupted, task, wires)


def first_less_second(logits: Tensor) -> Tensor:
    """The logit of class 0 less that of class 1."""
    return logits[:, 0] - logits[:, 1]


def image_of(values: Sequence[float], unread: float) -> Tensor:
    """An image, channel x y x x, of a, b and c, with `unread` in cell (0, 2)."""
    cells = torch.zeros(3, 3, 3)
    for i in range(3):
        cells[i, i, i] = values[i]
    cells[:, 0, 2] = unread
    return cells.repeat_interleave(2, 1).repeat_interleave(2, 2)


@torch.no_grad()
def _layers(gate: Gate) -> Iterator[tuple[str, nn.Module]]:
    """The layers by name."""
    conv1, conv2, fc = nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(4, 3, 3), nn.Linear(3, 2)
    for layer in (conv1, conv2, fc):
        for parameter in layer.parameters():
            parameter.zero_()
    conv1.weight[range(3), range(3)] = 0.25
    conv1.weight[3] = 0.25
    conv1.bias[:3] = 1  # type: ignore[index]
    for i in range(3):
        conv2.weight[0, i, i, i] = gate.direct[i]
        conv2.weight[1, i, i, i] = gate.into[i]
    conv2.weight[2, [0, 3]] = 1
    # What conv1 writes is a variable plus 1: the 1 is taken away here.
    conv2.bias[0] = LIFT - sum(gate.direct)  # type: ignore[index]
    conv2.bias[1] = gate.bias - sum(gate.into)  # type: ignore[index]
    through = float(any(gate.direct))
    fc.weight[0] = torch.tensor([through, gate.out, 0])
    fc.bias[0] = gate.constant - LIFT * through
    act = nn.ReLU() if gate.act == "relu" else nn.Sigmoid()
    yield from (("conv1", conv1), ("act1", nn.ReLU()), ("conv2", conv2), ("act2", act))
    yield from (("flat", nn.Flatten()), ("fc", fc))
