"""The weight matrices of a transformer's direct paths, from what makes a source's output to what its target is given.

A path's matrix is W_out W_in, with the gains of normalisations folded in and their scales left out: W_out is what the
source's last product multiplies with (a head's W_O, an MLP's output matrix, the table of an embedding), W_in what the
target's first one does (W_Q, W_K, W_V, an MLP's input matrix, W_U).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from circuits.models.paths.contributions import norm_of, read_matrices
from circuits.models.paths.residual import NEURONS, Receiver, Sender, Stream


def path_norms(
    stream: Stream, senders: Sequence[Sender], receivers: Sequence[Receiver]
) -> Iterator[Float[np.ndarray, " sender"]]:
    """The Frobenius norm of the matrix of each sender's path, to each receiver in turn.

    Args:
        stream: a transformer's residual stream.
        senders: what writes.
        receivers: what reads.

    Raises:
        ValueError: if the matrices of an MLP, an embedding or the logits cannot be had.
    """
    parts = [_shortened(matrix) for matrix in _written(stream, senders)]
    rows = torch.cat(parts)
    sizes = torch.tensor([len(part) for part in parts], device=rows.device)
    owner = torch.arange(len(parts), device=rows.device).repeat_interleave(sizes)

    def norms(made: Tensor) -> np.ndarray:
        squares = made.new_zeros(len(parts), made.shape[1]).index_add_(0, owner, made)
        return np.sqrt(squares.T.cpu().numpy())

    for (neurons, _), some in groupby(receivers, key=lambda r: (r.kind in NEURONS, r.layer)):
        if neurons:  # each reads by one column, all of a layer by one matrix
            own = list(some)
            columns = [r.head for r in own]
            yield from norms((rows @ read_matrix(stream, own[0], columns)).square())
            continue
        for receiver in some:
            made = (rows @ _shortened(read_matrix(stream, receiver).T).T).square()
            yield norms(made.sum(1, keepdim=True))[0]


def _written(stream: Stream, senders: Sequence[Sender]) -> Iterator[Tensor]:
    """`written_matrix` of each sender; the directions of parts are folded together."""
    known: dict[str, tuple[dict[int, int], Tensor]] = {}
    for sender in senders:
        if sender.kind != "part":
            yield written_matrix(stream, sender)
            continue
        if sender.name not in known:
            split = next(s for s in stream.splits if s.name == sender.name)
            places = {unit: i for i, unit in enumerate(split.units.tolist())}
            known[sender.name] = places, _folded(stream, split.norm, split.directions.double())
        places, directions = known[sender.name]
        yield directions[places[sender.head], None]


def _shortened(matrix: Float[Tensor, "row d_model"]) -> Float[Tensor, "at_most_d_model d_model"]:
    """A matrix with the same products of columns, and so the same norm behind any other, of at most d_model rows."""
    if len(matrix) <= matrix.shape[1]:
        return matrix
    return torch.linalg.qr(matrix, mode="r").R


def written_matrix(stream: Stream, sender: Sender) -> Float[Tensor, "inner d_model"]:
    """What the activations of a sender that is no part are multiplied with as they are added; float64.

    Raises:
        ValueError: if it cannot be had.
    """
    layer = sender.layer
    if sender.kind == "rest":
        raise ValueError(
            f"method weights: {sender} of {stream.model.name} is what is left, not made with weights; expected the "
            "method activations"
        )
    if sender.kind == "head":
        matrix = stream.matrix("W_O", layer)[sender.head].double()
        return _folded(stream, stream.norm("ln1_post", layer), matrix)
    if sender.kind == "mlp":
        matrix = _neurons(stream, layer)[1].double() * (
            stream.scales[layer][1] if stream.scales else 1
        )
        return _folded(stream, stream.norm("ln2_post", layer), matrix)
    if sender.kind == "position":
        return stream.parts.positions().detach().double()
    return _token_table(stream)


def _token_table(stream: Stream) -> Float[Tensor, "token d_model"]:
    """The table of the tokens' embedding, with the factor that some models (Gemma) multiply it with."""
    table = stream.parts.embedding().detach().double()
    tokens = stream.model.input.example(1)
    site = stream.output_site(Sender("token"))
    made = stream.model.run(tokens, read=[site])[site].double()
    rows = table[tokens]
    return table * (made.norm() / rows.norm()) if bool(rows.any()) else table


def _folded(stream: Stream, norm: nn.Module | None, matrix: Tensor) -> Tensor:
    return matrix if norm is None else stream.measured(norm).linear(matrix)


def read_matrix(
    stream: Stream, receiver: Receiver, neurons: Sequence[int] = ()
) -> Float[Tensor, "d_model inner"]:
    """What the stream is multiplied with as a receiver reads it, the gain of its normalisation included; float64.

    Of a gated MLP it is the matrix of the product that does not pass the activation function.

    Args:
        stream: a transformer's residual stream.
        receiver: what reads.
        neurons: if it is a neuron, the numbers of those of its layer that are asked for: a column each.

    Raises:
        ValueError: if it cannot be had.
    """
    if receiver.kind == "neuron":
        matrix = stream.parts.neuron_inputs(receiver.layer)[-1][:, list(neurons)]
    elif receiver.kind == "logits":
        matrix = stream.parts.unembedding()[0]
    elif receiver.kind == "mlp":
        matrix = _neurons(stream, receiver.layer)[0]
    else:
        matrix = read_matrices(stream, [receiver])[0]
    norm = norm_of(stream, receiver)
    if receiver.kind == "mlp" and isinstance(norm, nn.Identity):
        norm = stream.norm("ln2", receiver.layer) or norm
    read = matrix.detach().double()
    return read if isinstance(norm, nn.Identity) else stream.measured(norm).adjoint(read.T).T


def _neurons(stream: Stream, layer: int) -> tuple[Tensor, Tensor]:
    """W_in and W_out of a layer's MLP."""
    found = stream.parts.neurons(layer)
    if found is None:
        raise ValueError(
            f"method weights: the MLP of layer {layer} of {stream.model.name} has no two matrices in a row; expected "
            "the method activations"
        )
    return found
