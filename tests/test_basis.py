"""Whether a site's units are a privileged basis."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from circuits.concepts.basis import basis_test
from circuits.examples import Examples
from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.zoo.loading import load_model
from circuits.stimuli.texts import TextSource


class Sparse(nn.Module):
    """Rare features along channels (`features`), and the same features in a rotated basis (`mixed`)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Threshold(2.0, 0.0)  # normal numbers, rarely above 2
        self.mixed = nn.Conv2d(8, 8, 1, bias=False)
        self.alone = nn.Conv2d(8, 3, 1, bias=False)
        with torch.no_grad():
            turned = torch.linalg.qr(torch.randn(8, 8))[0]
            self.mixed.weight.copy_(turned[:, :, None, None])
            self.alone.weight.zero_()
            self.alone.weight[0] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.alone(self.mixed(self.features(x)))


@pytest.fixture(scope="module")
def model() -> HookedModel:
    torch.manual_seed(0)
    return HookedModel(Sparse(), (8, 12, 12), "sparse")


def test_rare_features_are_told_from_a_rotation_of_them(model: HookedModel) -> None:
    x = torch.randn(40, 8, 12, 12, generator=torch.Generator().manual_seed(1))
    along = basis_test(model, "features", x, n_random=39)
    assert along.p == pytest.approx(1 / 40)
    assert along.median > 2 * along.random.max()
    assert along.share_above == 1.0
    rotated = basis_test(model, "mixed", x, n_random=39)
    assert rotated.p > 0.05
    # By its definition, over all positions (there are fewer than are looked at).
    seen = (
        model.run(x, read=["features"])["features"].permute(1, 0, 2, 3).flatten(1).double().numpy()
    )
    seen = seen - seen.mean(1, keepdims=True)
    wanted = (seen**4).mean(1) / (seen**2).mean(1) ** 2
    np.testing.assert_allclose(along.kurtosis, wanted, rtol=1e-9)
    assert along.n_rows == 40 * 144


def test_normal_numbers_have_a_kurtosis_of_three_in_every_basis() -> None:
    net = HookedModel(nn.Conv2d(3, 6, 1), (3, 16, 16), "linear")
    x = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    found = basis_test(net, net.sites[0].name, x, n_random=19)
    assert found.median == pytest.approx(3.0, abs=0.15)
    assert float(np.median(found.random)) == pytest.approx(3.0, abs=0.15)


def test_padding_does_not_count() -> None:
    """Texts of different lengths in one batch have the rows that each has alone."""
    model, site = load_model("induction"), "blocks.0.hook_resid_post"
    drawn = torch.randint(1, 20, (3, 40), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [tuple(row[:n]) for row, n in zip(drawn, (40, 17, 22), strict=True)]
    examples = Examples(model, TextSource("some", ("a", "b", "c"), "some", tuple(texts)))
    found = basis_test(model, site, examples, n_random=1)
    alone = [Examples(model, TextSource("one", ("a",), "one", (text,))).inputs for text in texts]
    rows = torch.cat([model.run(x, read=[site])[site][0] for x in alone]).double().numpy()
    assert found.n_rows == len(rows)
    rows = rows - rows.mean(0)
    wanted = (rows**4).mean(0) / (rows**2).mean(0) ** 2
    np.testing.assert_allclose(found.kurtosis, wanted, rtol=1e-3)


def test_bad_input_is_refused_in_a_line(model: HookedModel) -> None:
    x = torch.randn(2, 8, 12, 12)
    with pytest.raises(ValueError, match="site alone: 1 of its units vary, expected at least 2"):
        basis_test(model, "alone", x)
    with pytest.raises(ValueError, match="n_random 0 must be at least 1"):
        basis_test(model, "features", x, n_random=0)
    with pytest.raises(ValueError, match="its units are heads"):
        basis_test(
            load_model("induction"), "blocks.0.attn.hook_z", torch.zeros(1, 8, dtype=torch.long)
        )
