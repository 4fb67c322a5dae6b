"""The senders and receivers of a transformer's residual stream, and the direct paths between them."""

from __future__ import annotations

from circuits.models.adapter.hooked_model import HookedModel
from circuits.models.adapter.sites import is_bridge
from circuits.models.paths.contributions import check_mlp_inputs, check_stream
from circuits.models.paths.residual import STREAMS, Path, Receiver, Sender, Stream


def stream_of(model: HookedModel) -> Stream:
    """The residual stream of a model, after a test that it is what paths assume.

    Raises:
        ValueError: if the model has no residual stream, lacks a site, or its stream is not the sum of its senders,
            with each receiver reading it through one normalisation.
    """
    stream = Stream.of(model)
    with model.lock:
        with model.outside():
            check_stream(stream)
        if not is_bridge(model.module) and not model.edited:
            check_mlp_inputs(stream)
    return stream


def senders(model: HookedModel, constants: bool = False) -> tuple[Sender, ...]:
    """What writes to a transformer's residual stream, in order.

    Args:
        model: a transformer.
        constants: also list the biases of attention, which are the same in every run.

    Raises:
        ValueError: see `stream_of`.
    """
    found = stream_of(model).senders
    return found if constants else tuple(s for s in found if s.kind != "bias")


def receivers(model: HookedModel, streams: bool = False) -> tuple[Receiver, ...]:
    """What reads a transformer's residual stream, in order.

    Args:
        model: a transformer.
        streams: also list the stream itself before, in the middle of and after each layer.

    Raises:
        ValueError: see `stream_of`.
    """
    found = stream_of(model).receivers
    return found if streams else tuple(r for r in found if r.kind not in STREAMS)


def paths(model: HookedModel) -> tuple[Path, ...]:
    """Every direct path of a transformer, sorted by receiver, without biases and the stream itself.

    Raises:
        ValueError: see `stream_of`.

    >>> from circuits.models.zoo.loading import load_model
    >>> len(paths(load_model("induction-by-hand"))), len(paths(load_model("addition-by-hand")))
    (71, 21)
    """
    return stream_of(model).paths()
