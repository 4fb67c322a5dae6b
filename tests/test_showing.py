"""Figures as parts of a page: in the person's theme, as wide as there is room, text as text."""

from __future__ import annotations

import json

from streamlit.dataframe_util import convert_arrow_bytes_to_pandas_df
from streamlit.testing.v1 import AppTest

ODD = "<a href='http://a.example'>b</a> [x](y) $z$"


def script(name: str) -> None:
    import numpy as np
    import torch

    from apps.showing import show
    from circuits.effects import Prediction
    from circuits.figures import kernels_figure, layers_figure, predictions_figure
    from circuits.units import Unit
    from circuits.weights import Connection

    show(predictions_figure({"intact": [Prediction(1, name, 0.5)]}), "predictions")
    edge = Connection(Unit("a", 1), Unit("b", 2), torch.ones(2, 2), "conv", (), 1.0)
    show(kernels_figure([edge, edge], "source"), "kernels")
    show(layers_figure({"one": [(name, np.arange(3.0), np.arange(3.0))]}, 0.0), "layers")


def test_figures_are_shown_in_the_theme_and_names_are_data() -> None:
    test = AppTest.from_function(script, default_timeout=120, kwargs={"name": ODD}).run()
    assert not test.exception
    predictions, kernels, layers = (e.proto for e in test.get("vega_lite_chart"))
    for proto in (predictions, kernels, layers):
        assert proto.theme == "streamlit"
        assert '"config"' not in proto.spec, "fonts and backgrounds are the theme's"
        assert '"href"' not in proto.spec
    table = convert_arrow_bytes_to_pandas_df(predictions.data.data)
    assert table["output"].tolist() == [ODD]
    assert ODD not in predictions.spec, "nothing of it is in what the browser compiles"
    specs = [json.loads(p.spec) for p in (predictions, kernels, layers)]
    assert specs[1]["autosize"] == {"type": "pad"}, "panels keep their sizes"
    assert [s.get("autosize", {}).get("type") for s in (specs[0], specs[2])] != ["pad", "pad"]
