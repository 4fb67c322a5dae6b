"""What the axes of sites mean: followed through the operations, asked for where they cannot be known."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.models.adapter.axes import regrouped
from circuits.models.adapter.hooked_model import HookedModel

SIZE = (3, 16, 16)


class Forward(nn.Module):
    """Named modules and a function that uses them."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def temporal(m, x):
    return m.head(m.net(x.flatten(2)).mean(-1))


def patches(m, x):
    return m.patch(x).flatten(2).transpose(1, 2)


def mixer(m, x):
    x = patches(m, x)
    x = x + m.out(F.gelu(m.hidden(m.norm(x).transpose(1, 2)))).transpose(1, 2)
    return m.head(m.stream(x).mean(1))


def windows(m, x):
    """Swin: channels last, attention in windows of 4 x 4, then patches of 2 x 2 are merged."""
    x = m.norm(m.patch(x).permute(0, 2, 3, 1))
    batch, height, width, n = x.shape
    cut = x.view(batch, height // 4, 4, width // 4, 4, n).permute(0, 1, 3, 2, 4, 5)
    rows = cut.reshape(-1, 16, n)
    q, k, v = m.qkv(rows).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    z = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 16, n)
    back = z.view(batch, height // 4, width // 4, 4, 4, n).permute(0, 1, 3, 2, 4, 5)
    x = m.stream(x + back.reshape(batch, height, width, n))
    corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return m.head(m.merge(torch.cat(corners, -1)).mean((1, 2)))


def shuffled(m, x):
    x = m.conv(x)
    batch, n, height, width = x.shape
    x = m.groups(x.view(batch, 2, n // 2, height, width).transpose(1, 2).reshape(x.shape))
    x = m.up(x) * m.gate(m.up(x))
    deep = x.view(batch, 2, height, 2, width, 2).permute(0, 1, 3, 5, 2, 4)
    return m.head(m.deep(deep.reshape(batch, -1, height, width)).flatten(1))


def recurrent(m, x):
    return m.head(m.lstm(patches(m, x))[0][:, -1])


def numpy_names(m, x):
    """Torch takes numpy's `axis` too, and functions that write in place."""
    two = torch.stack([m.conv(x), m.conv(x)], axis=-1)
    x = m.one(two.unbind(axis=-1)[0].unsqueeze(axis=1).squeeze(1))
    return m.two(x.clone().transpose_(1, dim1=2)).mean((2, 3)) @ m.out.T


def mixed_from_the_left(m, x):
    x = m.patch(x).flatten(2)
    return m.head(m.left(torch.matmul(m.weight, x)).mean(-1))


MODELS = {
    "temporal": (
        Forward(
            temporal,
            net=nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ReLU()),
            head=nn.Linear(5, 2),
        ),
        {
            "net.0": "batch channel position",
            "net.1": "batch channel position",
            "net.2": "batch channel position",
            "net": "batch channel position",
            "head": "batch unit",
        },
    ),
    "mixer": (
        Forward(
            mixer,
            patch=nn.Conv2d(3, 8, 4, 4),
            norm=nn.LayerNorm(8),
            hidden=nn.Linear(16, 6),
            out=nn.Linear(6, 16),
            stream=nn.Identity(),
            head=nn.Linear(8, 2),
        ),
        # The units of a linear layer over positions are its own; the stream's are the channels.
        {
            "patch": "batch channel y x",
            "norm": "batch position unit",
            "hidden": "batch position unit",
            "out": "batch position unit",
            "stream": "batch position unit",
        },
    ),
    "windows": (
        Forward(
            windows,
            patch=nn.Conv2d(3, 8, 2, 2),
            norm=nn.LayerNorm(8),
            qkv=nn.Linear(8, 24),
            stream=nn.Sequential(nn.Identity()),
            merge=nn.Linear(32, 10),
            head=nn.Linear(10, 2),
        ),
        {
            "norm": "batch y x unit",
            "stream": "batch y x unit",
            "stream.0": "batch y x unit",
            "merge": "batch y x unit",
            "head": "batch unit",
        },
    ),
    "shuffled": (
        Forward(
            shuffled,
            conv=nn.Conv2d(3, 8, 3, padding=1),
            groups=nn.Identity(),
            up=nn.PixelShuffle(2),
            gate=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1), nn.Sigmoid()),
            deep=nn.Identity(),
            head=nn.Linear(8 * 16 * 16, 2),
        ),
        {
            "groups": "batch channel y x",
            "up@0": "batch channel y x",
            "gate": "batch channel y x",
            "deep": "batch channel y x",
        },
    ),
    "numpy_names": (
        Forward(
            numpy_names, conv=nn.Conv2d(3, 16, 3, padding=1), one=nn.Identity(), two=nn.Identity()
        ),
        {"one": "batch channel y x", "two": "batch y unit x"},
    ),
    "mixed_from_the_left": (
        Forward(
            mixed_from_the_left,
            patch=nn.Conv2d(3, 8, 4, 4),
            left=nn.Identity(),
            head=nn.Linear(5, 2),
        ),
        {"left": "batch channel position"},
    ),
    "recurrent": (
        Forward(
            recurrent,
            patch=nn.Conv2d(3, 8, 4, 4),
            lstm=nn.LSTM(8, 6, batch_first=True),
            head=nn.Linear(6, 2),
        ),
        {"lstm[0]": "batch position unit", "head": "batch unit"},
    ),
}


MODELS["numpy_names"][0].out = nn.Parameter(torch.rand(4, 16))
MODELS["mixed_from_the_left"][0].weight = nn.Parameter(torch.rand(5, 8))


@pytest.mark.parametrize("name", MODELS)
def test_axes_follow_from_the_operations(name: str) -> None:
    module, expected = MODELS[name]
    sites = {site.name: " ".join(site.axes) for site in HookedModel(module, SIZE).sites}
    assert expected.items() <= sites.items()


class Experts(nn.Module):
    """Rows of tokens go to experts: three tokens, then two, whatever the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.expert, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        rows = tokens.reshape(-1, 8)
        chosen = torch.arange({3: 3, 2: 2}.get(len(x), 4))
        rows = rows.index_put((chosen,), self.expert(rows[chosen]))
        return self.head(rows.view(tokens.shape).mean(1))


def test_rows_that_are_as_many_as_examples_by_chance_are_no_site() -> None:
    names = [site.name for site in HookedModel(Experts(), SIZE).sites]
    assert names == ["patch", "head"]


def odd(m, x):
    """Nothing tells what the axes of an averaged spectrum are."""
    spectrum = torch.fft.rfft(m.conv(x).flatten(2)).abs()
    return m.head(m.odd(spectrum.mean(1, keepdim=True).expand(-1, 4, -1)).flatten(1))


def test_what_cannot_be_known_is_asked_for() -> None:
    module = Forward(
        odd, conv=nn.Conv2d(3, 4, 3, padding=1), odd=nn.Identity(), head=nn.Linear(4 * 129, 2)
    )
    model = HookedModel(module, SIZE)
    assert model.unplaced == {"odd": (4, 129)}
    with pytest.raises(KeyError, match=r"shape \(4, 129\) and nothing tells .* axes=\{'odd'"):
        model.site("odd")
    told = HookedModel(module, SIZE, axes={"odd": ("batch", "unit", "frequency")})
    assert (told.site("odd").n_units, told.site("odd").position_axes) == (4, ("frequency",))
    for wrong, message in (
        ({"odd": "batch x y"}, "one of `unit` and `channel`"),
        ({"odd": ("unit", "batch", "x")}, "`batch` first"),
        ({"ood": ("batch", "unit", "x")}, "did you mean odd"),
        ({"odd": ("batch", "unit")}, "do not fit shape"),
    ):
        with pytest.raises(ValueError, match=message):
            HookedModel(module, SIZE, axes=wrong)


def sequence_first(m, x):
    x = patches(m, x).transpose(0, 1) + m.place(torch.arange(16))[:, None]
    return m.head(m.back(m.layer(x).transpose(0, 1)).mean(1))


def test_what_is_left_out_says_why() -> None:
    module = Forward(
        sequence_first, patch=nn.Conv2d(3, 8, 4, 4), place=nn.Embedding(16, 8), layer=nn.Linear(8, 8),
        back=nn.Identity(), head=nn.Linear(8, 2),
    )  # fmt: skip
    model = HookedModel(module, SIZE)
    assert [site.name for site in model.sites] == ["patch", "back", "head"]
    assert model.left_out.keys() == {"place", "layer"}
    assert model.left_out["place"] == "it does not depend on the examples"
    with pytest.raises(
        KeyError, match=r"'layer' of Forward is no site: its axis 1 is the batch, and a site has it"
    ):
        model.site("layer")


@pytest.mark.parametrize(
    ("before", "labels", "after", "expected"),
    [
        ((2, 4, 6), "batch y unit", (2, 24), "batch unit"),
        ((2, 6, 4), "batch unit y", (2, 2, 3, 4), "batch unit/0 unit/1 y"),
        ((2, 2, 3, 4), "batch unit/0 unit/1 y", (2, 6, 4), "batch unit y"),
        ((2, 4, 1, 6), "batch y x unit", (2, 4, 6), "batch y unit"),
        ((2, 4, 6), "batch unit y", (8, 6), "? y"),
        ((2, 4, 6), "batch unit y", (2, 1, 4, 6), "batch ? unit y"),
        ((2, 9, 4), "batch position unit", (2, 3, 3, 4), "batch y x unit"),
        ((2, 3, 4, 6), "? unit y x", (6, 4, 6), "? y x"),
        ((2, 3, 4, 5), "batch unit y x", (2, 5, 4, 3), "batch ? ? ?"),
    ],
)
def test_reshapes(before, labels, after, expected) -> None:
    assert " ".join(regrouped(before, tuple(labels.split()), after)) == expected
