"""`HookedModel`: lists, reads and changes the tensors of any model in one way."""

from __future__ import annotations

import copy
import logging
import threading
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from circuits.autograd import differentiable, recording_gradients
from circuits.call_points import Address
from circuits.hooks import Change, Look, Tap, intervene, observe, placed, record
from circuits.models.adapter.attaching import (
    PREFIX,
    TappedSite,
    attached_module,
    check_name,
)
from circuits.models.adapter.calling import (
    check_has_numbers,
    check_weights_finite,
    naming_model,
)
from circuits.models.adapter.composition import transformer_layers
from circuits.models.adapter.declaring import read_declarations
from circuits.models.adapter.generating import Sampling, continue_texts
from circuits.models.adapter.head_sites import Points
from circuits.models.adapter.identity import (
    model_digest,
    program_digest,
    weights_digest,
)
from circuits.models.adapter.inputs import ImageInput, ModelInput, TokenInput
from circuits.models.adapter.latent_weights import latent_layers
from circuits.models.adapter.matrices import (
    WeightMatrix,
    matrices_of_layers,
    matrices_of_sites,
    parameter_names,
    with_aliases,
    with_products,
)
from circuits.models.adapter.normalisation import (
    NORMALISATIONS,
    FastNormalisation,
    SoundNormalisation,
)
from circuits.models.adapter.padding import (
    MASK,
    Padding,
    Side,
    check_mask,
    check_side,
    find_padding,
    padded,
    unpadded,
)
from circuits.models.adapter.program import unsteady
from circuits.models.adapter.sites import (
    evaluating,
    find_embedding,
    is_bridge,
    listed_error,
    logits_last,
    main_output,
    trace_model,
    uncompiled,
)
from circuits.models.adapter.topology import INPUT, WeightLayer, find_weight_layers
from circuits.units import Site, Unit, unknown
from circuits.workspace import ModelIdentity

log = logging.getLogger(__name__)

_OUTPUTS = 64
"""How many outputs of a model are kept to know it by."""


class ActivationCache(Mapping[str, Tensor]):
    """The tensors of one run, by site name (aliases work too), and the model's output.

    Attributes:
        output: what the model returned; None if the pass was stopped before its end.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str], output: Any = None
    ) -> None:
        self._tensors = dict(tensors)
        self._aliases = aliases
        self.output = output

    def __getitem__(self, name: str | Site) -> Tensor:
        key = name.name if isinstance(name, Site) else self._aliases.get(name, name)
        if key not in self._tensors:
            raise unknown("recorded site", str(name), self._tensors)
        return self._tensors[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class HookedModel:
    """Any `nn.Module` with its sites: places where a tensor can be read and changed.

    Sites are found by tracing one forward pass: every module's output is one; a module that is called
    several times has one for each call (`name@0`, `name@1`). The model always runs in evaluation mode
    and is never changed: whatever a run or an intervention sets up is undone at its end. Runs and
    interventions hold `lock`, so that threads which share a model do not see each other's changes.

    Args:
        module: the model. It is used as it is, not copied.
        input: what it takes; `(channels, height, width)` is short for a plain `ImageInput`.
        name: its name in reports and file names.
        aliases: other names for sites, alias -> site name.
        classes: names of the outputs, if it is a classifier.
        unit_names: names of units, by site, for models that are built by hand, where a unit's meaning is known.
        axes: what the axes of sites mean where the operations of the pass do not tell, by name, e.g.
            `{"mixer": ("batch", "unit", "position")}`: `batch` first, and one of `unit` and `channel`.
        attention: where attention is that was not found, by its name (see `circuits.models.adapter.declaring`), e.g.
            `{"blocks.0.attn": {"pattern": "layers.0/sigmoid@0"}}`. `left_out` says what was looked for.

    Attributes:
        sites: all sites, in order of execution.
        unplaced: tensors that are no sites since nothing tells which axis holds their units: their shapes for one
            example, by the name that the site would have.
        left_out: why each tensor that a module returns and that is no site is none, by the name that it would have; and
            why what looks like a pattern of attention is none, by the call that puts it out.
        program: the operations of a pass.
        transformer: the norms and weights along its residual stream, if it has one and is no bridge; else why not.
        head_weights: the weights of the heads of each attention by its name, e.g. `blocks.0.attn`, if it is no bridge.
        listed: whether the model returns a list with a record for each example, as detection models do: it has no
            logits then.
    """

    @recording_gradients()
    def __init__(
        self,
        module: nn.Module,
        input: ModelInput | tuple[int, ...] | list[int],
        name: str = "",
        aliases: Mapping[str, str] | None = None,
        classes: Sequence[str] = (),
        unit_names: Mapping[str, Sequence[str]] | None = None,
        axes: Mapping[str, Sequence[str]] | None = None,
        attention: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.module = module = uncompiled(module)
        if isinstance(input, tuple | list):
            if len(input) != 3:
                raise ValueError(f"input {input} is not of the form (channels, height, width)")
            channels, height, width = input
            input = ImageInput(channels, height, width)
        self.input: ModelInput = input
        self.name = name or type(module).__name__
        check_has_numbers(module, self.name)
        self.classes = tuple(classes)
        self.unit_names = dict(unit_names or {})
        # Reentrant: a thread that edits the model also runs it, inside the edit.
        self.lock = threading.RLock()
        self._axes = dict(axes or {})
        self._attention = dict(attention or {})
        declarations = read_declarations(self._attention)
        found = trace_model(
            module,
            lambda n: self.fitted(self.input.example(n)),
            self.input.axes,
            self._axes,
            declarations,
        )
        self.program, self.listed = found.program, found.listed
        self.unplaced, self.left_out = found.unplaced, found.left_out
        self.transformer, self.head_weights = found.transformer, found.head_weights
        self._functions = {operation.name for operation in found.program.operations}
        self._operations = program_digest(found.program)
        self._unsteady = list(dict.fromkeys(unsteady(found.program)))
        self._warn_if_unsteady()
        for changed in found.state:
            log.warning(
                "model %s changes `%s` in every pass: it is put back after each, so that all passes start alike",
                self.name,
                changed,
            )
        declared = aliases or {}
        self.sites: tuple[Site, ...] = tuple(
            replace(
                site,
                aliases=(
                    *site.aliases,
                    *(a for a in declared if declared[a] == site.name and a not in site.aliases),
                ),
            )
            for site, _ in found.sites
        )
        self._taps: dict[str, Tap] = {site.name: tap for site, tap in found.sites}
        self._interventions = 0
        self._changed: Counter[str] = Counter()  # the sites that changes in force are at
        self._placed = 0  # changes in force that name positions (`circuits.hooks.placed`)
        self._suspended = False  # inside `outside`, hooks of changes stay registered but do nothing
        self._steady_blocks = 0
        self._steady_matrices: tuple[WeightMatrix, ...] | None = None  # only inside `steady`
        # The model's own tensors while `rewriting` has put others in their place, by the address of the other's
        # memory. By address, because tied parameters are one tensor under several names.
        self._replaced: dict[int, Tensor] = {}
        # Layers and matrices, each with the hash of the weights that they were found for.
        self._matrices: tuple[str, tuple[WeightMatrix, ...]] | None = None
        self._layers: tuple[str, tuple[WeightLayer, ...]] | None = None
        self._embedding: Site | None = None
        self._found_padding: Padding | None = None
        unread = self._unread() if is_bridge(module) else set()
        self.sites = tuple(site for site in self.sites if site.name not in unread)
        self._by_name = {site.name: site for site in self.sites}
        self._aliases = {alias: site.name for site in self.sites for alias in site.aliases}

    def _unread(self) -> set[str]:
        """Hook points of a bridge whose tensor nothing reads, such as one that is taken for its device only.

        An edit there would do nothing.
        """
        if self._inference_tensor() is not None:  # torch takes no gradient
            return set()
        inputs = self.fitted(self.input.example(1))
        if isinstance(self.input, TokenInput):
            inputs = inputs[
                :, :8
            ]  # as good as the whole context, which takes all memory of a large model

        def output(changes: Mapping[str, Change]) -> Tensor:
            taps = [(self._taps[name], change) for name, change in changes.items()]
            with intervene(self.module, taps), evaluating(self.module):
                return main_output(self.module(inputs))

        # Only what a component takes may be ignored by it; others are parts of what it computes.
        taken = [s.name for s in self.sites if s.name.endswith("hook_in")]
        if not taken:
            return set()
        marks = {name: torch.zeros((), requires_grad=True) for name in taken}
        summed = output({name: lambda t, m=mark: t + m for name, mark in marks.items()}).sum()
        found = torch.autograd.grad(summed, list(marks.values()), allow_unused=True)
        suspects = [name for name, slope in zip(marks, found, strict=True) if slope is None]
        # What is rounded or compared has no gradient, but is read: only an output that stays the same tells. Also
        # without suspects, bridges then keep a pattern that leads back to no other tensor.
        with torch.no_grad():
            intact = output({})
            return {n for n in suspects if torch.equal(output({n: lambda t: t / 2 + 1}), intact)}

    def _warn_if_unsteady(self) -> None:
        if self._unsteady:
            more = f" and {len(self._unsteady) - 3} more" if len(self._unsteady) > 3 else ""
            why = ", ".join(self._unsteady[:3]) + more
            log.warning(
                "model %s: its numbers differ from run to run or batch to batch: %s", self.name, why
            )

    @property
    def has_stream(self) -> bool:
        """Whether the model is a transformer whose residual stream is known (`circuits.models.adapter.transformer`)."""
        return is_bridge(self.module) or not isinstance(self.transformer, str)

    # --- sites and units -----------------------------------------------------------------------

    def site(self, name: str | Site) -> Site:
        """The site called `name`, or of which `name` is an alias.

        Raises:
            KeyError: if there is none; the message offers the nearest names.
        """
        key = name.name if isinstance(name, Site) else self._aliases.get(name, name)
        if key in self.left_out and key not in self._by_name:
            raise KeyError(f"{key!r} of {self.name} is no site: {self.left_out[key]}")
        if key not in self._by_name:
            if not is_bridge(self.module) and key in dict(self.module.named_modules()):
                raise KeyError(
                    f"module {key!r} of {self.name} is no site: it is not called in every pass, or what it returns "
                    "does not hold one row for each example (a router may send an expert some of them only)"
                )
            raise unknown(f"site of {self.name}", key, [*self._by_name, *self._aliases])
        return self._by_name[key]

    def unit(self, unit: str | Unit) -> Unit:
        """The unit that `unit` names, under its site's own name.

        Raises:
            KeyError: if the site is unknown.
            ValueError: if it is not of the form `site:index` or the site has no such unit.
        """
        parsed = Unit.parse(unit) if isinstance(unit, str) else unit
        return self.site(parsed.site).unit(parsed.index)

    def before_ceiling(self, site: str | Site) -> Site:
        """The site whose activations tell apart what is equal at a site's ceiling; the site itself if it has none.

        Its units and positions are the same: for a ReLU6 it is what the ReLU6 is given. While an edit changes the site,
        it is the site itself, since the one before it does not show the edit.

        Raises:
            KeyError: if the site is unknown.
        """
        found = self.site(site)
        with self.lock:  # waits until other threads' changes end
            changed = self._changed[found.name]
        return found if changed else self._by_name.get(found.before, found)

    def last(self, names: Iterable[str | Site]) -> Site:
        """The site among `names` that is computed last."""
        order = {site.name: i for i, site in enumerate(self.sites)}
        return max((self.site(n) for n in names), key=lambda site: order[site.name])

    # --- running -------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        first = next(chain(self.module.parameters(), self.module.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of the model's parameters, judged by the first that has floating-point numbers; None without any."""
        kinds = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(kinds, None)

    def _is_resized(self, inputs: Tensor) -> bool:
        """Whether images have another size than the model was traced with."""
        return isinstance(self.input, ImageInput) and tuple(inputs.shape[-2:]) != (
            self.input.height,
            self.input.width,
        )

    def fitted(self, inputs: Tensor) -> Tensor:
        """`inputs` on the model's device and, unless they are tokens, in its precision."""
        if self.device.type == "meta":  # moved there since it was wrapped
            check_has_numbers(self.module, self.name)
        inputs = differentiable(inputs)
        if not inputs.is_floating_point():
            return inputs.to(self.device)
        return inputs.to(self.device, self.dtype or inputs.dtype)

    def run(
        self,
        inputs: Tensor,
        *,
        mask: Bool[Tensor, "batch position"] | None = None,
        read: Iterable[str | Site] = (),
        edits: Mapping[str, Change] | None = None,
        until: str | Site | None = None,
        grad: bool = False,
        reference: bool = False,
    ) -> ActivationCache:
        """Run the model once, reading some sites and changing others on the way.

        Args:
            inputs: as the model takes them (`input.normalize` makes them from images in 0..1).
            mask: True where a position holds a real token, False where it is padding; `pad` makes tokens and mask.
                At padding, sites hold finite numbers without meaning, and edits see them. None: all are real.
            read: the sites to keep.
            edits: site name -> function from its tensor to the tensor to use instead.
            until: stop the pass after this site; `output` is then None.
            grad: keep the autograd history back to `inputs` (parameters are held fixed). Tokens have no gradient:
                there it goes back to the embedding, the first site that depends on them, whose tensor is a leaf.
            reference: compute local response normalisation by torch's own operations: equal to the bit to calling
                the module, and visible to torch function modes. The default is several times as fast and equal
                up to rounding. Models without that normalisation are not affected.

        Raises:
            KeyError: if a site is unknown, or the pass did not reach one of `read`.
            ValueError: if `inputs` or `mask` do not fit the model, edits name positions while texts differ in
                length, `grad` is asked for and no site depends on the tokens, or the module was made
                inside `torch.inference_mode()`.
        """
        self.check(inputs)
        if grad:
            self._check_differentiable()
        kwargs = self._module_kwargs(inputs, mask, edits)
        sites = [self.site(name) for name in read]
        stop = None if until is None else self.site(until)
        names = list(dict.fromkeys([s.name for s in sites] + ([stop.name] if stop else [])))
        taps = {name: self._taps[name] for name in names}
        output = None
        with (
            self.intervening(edits or {}),
            self._from_embedding(grad) as leaves,
            evaluating(self.module, settings=self._is_resized(inputs)),
            recording_gradients() if grad else torch.no_grad(),
            self._normalising(reference, grad),
            record(self.module, taps, stop.name if stop else None) as found,
        ):
            inputs = self.fitted(inputs)
            # A model that works in place must not change the caller's input. With gradients the copy is an operation,
            # because autograd forbids writing to a leaf in place.
            own = inputs * 1 if grad else inputs.clone()
            with naming_model(self.name, inputs):
                output = self.module(own, **kwargs)
        self._check_reached(names, found)
        if not edits:
            self.check_rows({s.name: found[s.name] for s in sites}, len(inputs))
        found = found | leaves
        return ActivationCache({s.name: found[s.name] for s in sites}, self._aliases, output)

    def _inference_tensor(self) -> str | None:
        # Names are asked for only if there is such a tensor: this is looked at before every pass with gradients.
        own = (
            t
            for m in self.module.modules()
            for t in (*m._parameters.values(), *m._buffers.values())
        )
        if not any(t is not None and t.is_inference() for t in own):
            return None
        named = chain(self.module.named_parameters(), self.module.named_buffers())
        return next((name for name, tensor in named if tensor.is_inference()), None)

    def _check_differentiable(self) -> None:
        bad = self._inference_tensor()
        if bad is not None:
            raise ValueError(
                f"tensor {bad} of model {self.name} was made inside torch.inference_mode(), and torch takes no "
                "gradient through it: expected a model that is made outside"
            )

    @contextmanager
    def _normalising(self, reference: bool, grad: bool = False) -> Iterator[None]:
        """The context of a forward pass: other ways to normalise, only if the model does so, since modes cost time."""
        computed = {name.rpartition(".")[2] for name in self._functions}
        fast = not reference and "local_response_norm" in computed
        sound = grad and not computed.isdisjoint(NORMALISATIONS)
        with (
            FastNormalisation() if fast else nullcontext(),
            SoundNormalisation() if sound else nullcontext(),
        ):
            yield

    def observe(
        self,
        inputs: Tensor,
        looks: Mapping[str, Look],
        until: str | Site,
        *,
        mask: Bool[Tensor, "batch position"] | None = None,
        reference: bool = False,
    ) -> None:
        """Run once up to a site and call a function with each site's tensor as it appears; keep nothing.

        Args:
            inputs: as the model takes them.
            looks: site name -> what to call with its tensor, which the model may overwrite later.
            until: the last site of `looks`; the pass ends there.
            reference: see `run`.
            mask: True where a token is real (see `run`).

        Raises:
            KeyError: if a site is unknown, or the pass did not reach one.
            ValueError: if `mask` does not fit.
        """
        kwargs = self._module_kwargs(inputs, mask)
        seen: set[str] = set()

        def noting(name: str, look: Look) -> Look:
            def note(value: Tensor) -> None:
                seen.add(name)
                self.check_rows({name: value}, len(inputs))
                look(value)

            return note

        named = {self.site(name).name: look for name, look in looks.items()}
        taps = {name: (self._taps[name], noting(name, look)) for name, look in named.items()}
        with (
            self.lock,
            evaluating(self.module, settings=self._is_resized(inputs)),
            torch.no_grad(),
            self._normalising(reference),
            observe(self.module, taps, self.site(until).name),
        ):
            own = self.fitted(inputs).clone()
            with naming_model(self.name, own):
                self.module(own, **kwargs)
        self._check_reached(named, seen)

    def _check_reached(self, names: Iterable[str], reached: Container[str]) -> None:
        missing = [name for name in names if name not in reached]
        if missing:
            raise KeyError(
                f"site {missing[0]!r} was not reached in this forward pass of {self.name}"
            )

    def check_rows(self, found: Mapping[str, Tensor], n: int) -> None:
        """Raise ValueError unless a site has one row for each of n examples: some would pass for others'."""
        for name, value in found.items():
            if len(value) != n and not self._interventions:
                raise ValueError(
                    f"site {name} of {self.name} holds {len(value)} rows for {n} examples: what it is called with "
                    "depends on a router (mixture of experts), and its rows belong to some of the examples only; "
                    "expected a site with a row for each, such as the layer that adds the experts' outputs"
                )

    @contextmanager
    def _from_embedding(self, grad: bool) -> Iterator[dict[str, Tensor]]:
        """If `grad` is asked for on tokens, make the embedding an autograd leaf; yield it by its site's name once
        the pass has computed it.
        """
        leaves: dict[str, Tensor] = {}
        if not grad or not isinstance(self.input, TokenInput):
            yield leaves
            return
        site = self.embedding.name

        def begin(value: Tensor) -> Tensor:
            # An edit at or before the embedding put in a tensor with a history: its caller wants that gradient.
            if value.requires_grad:
                return value
            leaves[site] = value.detach().requires_grad_(True)
            return (
                leaves[site] * 1
            )  # an operation: what follows may write in place, which a leaf forbids

        with self.intervening({site: begin}):
            yield leaves

    @property
    def embedding(self) -> Site:
        """The first site that depends on the tokens, found by running two texts when it is first asked for.

        Raises:
            ValueError: if there is none, or the model takes images.
        """
        # Not a `cached_property`: before Python 3.12 that holds one lock for all instances, and taking the model's
        # lock inside it can deadlock with a thread that holds the model's lock and wants the property.
        with self.lock:
            if self._embedding is None:
                self._embedding = self._find_embedding(self._token_input("embeds nothing"))
            return self._embedding

    def _find_embedding(self, spec: TokenInput) -> Site:
        # Two texts that share no token at any position, so that every site behind the embedding differs.
        first = spec.example(1)
        two = torch.cat([first, (first + 1) % spec.n_vocab])
        name = find_embedding(self._record_all_sites(two, {}), [site.name for site in self.sites])
        if name is None:
            raise ValueError(
                f"no site of {self.name} depends on its tokens: there is nothing to take the gradient with respect to"
            )
        return self.site(name)

    def _token_input(self, otherwise: str) -> TokenInput:
        """The model's input if it is tokens; else a ValueError that says what an image model does not do."""
        if not isinstance(self.input, TokenInput):
            raise ValueError(f"model {self.name} takes images: it {otherwise}")
        return self.input

    def _record_all_sites(self, tokens: Tensor, kwargs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all sites in one pass of the unedited model."""
        kwargs = {name: value.to(self.device) for name, value in kwargs.items()}
        with (
            self.lock,
            self.outside(),
            evaluating(self.module),
            torch.no_grad(),
            # What is found here is kept, so it must not depend on a torch function mode (such as a tape) that
            # the first caller happens to have entered.
            torch._C.DisableTorchFunction(),
            record(self.module, self._taps) as found,
        ):
            own = self.fitted(tokens)
            with naming_model(self.name, own):
                self.module(own, **kwargs)
        return found

    # --- texts of different lengths --------------------------------------------------------------

    @property
    def padding(self) -> Side | None:
        """The side on which shorter texts of a batch are padded; None if all texts must have one length.

        Found by experiment when it is first asked for (`circuits.models.adapter.padding`).

        Raises:
            ValueError: if the model takes images.
        """
        return self._padding.side

    @property
    def _padding(self) -> Padding:
        with self.lock:
            if self._found_padding is None:
                self._found_padding = find_padding(
                    self._record_all_sites, self._token_input("needs no padding")
                )
            return self._found_padding

    def pad(
        self, rows: Sequence[Int[Tensor, "_"] | Sequence[int]]
    ) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
        """Pad texts into one batch, on the side that suits the model; returns tokens and mask.

        The padding token has no effect on results: it is the tokenizer's own, or 0.

        Raises:
            ValueError: if a text is empty, or they differ in length and the model cannot be padded.
        """
        filler = self._token_input("needs no padding").filler
        texts = [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows]
        if len({len(text) for text in texts}) < 2:
            return padded(texts, filler=filler)
        tokens, mask = padded(texts, self.padding or "right", filler)
        check_side(mask, self._padding, self.name)
        return tokens, mask

    def _module_kwargs(
        self, inputs: Tensor, mask: Tensor | None, edits: Mapping[str, Change] | None = None
    ) -> dict[str, Tensor]:
        """The keyword arguments with which the module ignores padding, after checking that it can be padded so."""
        if mask is None:
            return {}
        self._token_input("takes no mask")
        check_mask(mask, inputs)
        if mask.all():
            return {}
        if self._placed or any(map(placed, (edits or {}).values())):
            raise ValueError(
                "edits name positions, and the texts of this batch differ in length: expected texts of one length"
            )
        check_side(mask, self._padding, self.name)
        return {MASK: mask.to(self.device, torch.long)} if self._padding.needs_mask else {}

    def generate(
        self,
        inputs: Int[Tensor, "batch position"],
        n_tokens: int,
        *,
        mask: Bool[Tensor, "batch position"] | None = None,
        edits: Mapping[str, Change] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> list[Int[Tensor, "_"]]:
        """Continue each text token by token, with edits in force at every forward pass.

        There is no cache of keys and values, since an edit may change what every earlier position computes: a pass
        costs more the longer the texts are. A text's continuation does not depend on the other texts.

        Args:
            inputs: the texts.
            n_tokens: how many tokens to add at most.
            mask: True where a token is real (see `run`).
            edits: as `run` takes them; the tensors that they are given grow longer.
            temperature: what logits are divided by before a token is drawn; 0 takes the most likely one.
            seed: of the first text's draws; each further text has the next seed.
            stop: tokens that end a text; the one that ended it is kept.

        Returns:
            Each text with the tokens that were added to it.

        Raises:
            ValueError: if the model takes images, is not causal, or does not return logits at every position; if
                texts would grow past its context; or if a number is out of range.
        """
        spec = self._token_input("continues no texts")
        self.check(inputs)
        self._module_kwargs(inputs, mask, edits)
        rows = unpadded(inputs, mask)
        sampling = Sampling(n_tokens, temperature, seed, stop)
        sampling.check(rows, spec)
        if self._padding.looks_ahead:
            raise ValueError(
                f"model {self.name} is not causal: earlier positions depend on later tokens, so it predicts no next one"
            )

        def forward(tokens: Tensor, mask: Tensor) -> Tensor:
            return logits_last(self.sites, self.logits(tokens, edits, mask=mask))

        with self.lock:
            made = continue_texts(forward, self.pad, rows, sampling, spec)
        return [torch.tensor(row, device=inputs.device) for row in made]

    def logits(
        self,
        inputs: Tensor,
        edits: Mapping[str, Change] | None = None,
        *,
        mask: Bool[Tensor, "batch position"] | None = None,
        reference: bool = False,
    ) -> Tensor:
        """The model's main output: logits of classes (batch x class) or tokens (… x token).

        `edits`, `mask` and `reference` are those of `run`.

        Raises:
            ValueError: if the model returns a list of examples.
        """
        if self.listed:
            raise listed_error(self.name)
        made = self.run(inputs, mask=mask, edits=edits, reference=reference)
        return main_output(made.output)

    @contextmanager
    def intervening(self, edits: Mapping[str, Change]) -> Iterator[None]:
        """Hold changes at sites in place for every forward pass inside the block.

        Raises:
            KeyError: if a site is unknown; nothing has been changed then.
        """

        changes = [
            (self._taps[self.site(name).name], self._unless_suspended(change))
            for name, change in edits.items()
        ]
        own, names = sum(map(placed, edits.values())), [self.site(name).name for name in edits]
        with self.lock, intervene(self.module, changes):
            self._interventions += 1
            self._placed += own
            self._changed.update(names)
            try:
                yield
            finally:
                self._interventions -= 1
                self._placed -= own
                self._changed.subtract(names)

    def _unless_suspended(self, change: Change) -> Change:
        return lambda value: value if self._suspended else change(value)

    @contextmanager
    def rewriting(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace parameters by other tensors inside the block; the model's own tensors are never written to.

        A gradient must be taken in the same block as its forward pass.

        Args:
            tensors: by the parameters' names in the state dict, each of the parameter's shape and dtype.

        Raises:
            KeyError: if there is no such parameter; nothing has been changed then.
            ValueError: if a tensor does not fit.
        """
        with self.lock:
            own = self.parameters
            for name, tensor in tensors.items():
                if name not in own:
                    raise unknown(f"parameter of {self.name}", name, own)
                if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
                    raise ValueError(
                        f"tensor of shape {tuple(tensor.shape)} ({tensor.dtype}) does not fit parameter "
                        f"{name}: {tuple(own[name].shape)} ({own[name].dtype})"
                    )
            before = {name: own[name].data for name in tensors}
            outer = self._replaced
            self._interventions += 1
            try:
                for name, tensor in tensors.items():
                    own[name].data = differentiable(tensor).to(own[name].device)
                # Blocks can be nested: the tensor that was replaced may be a replacement itself; the model's own
                # tensor is then the one that the outer block took out.
                intact = {
                    own[name].data.data_ptr(): outer.get(data.data_ptr(), data)
                    for name, data in before.items()
                }
                self._replaced = outer | intact
                yield
            finally:
                for name, tensor in before.items():
                    own[name].data = tensor
                self._interventions -= 1
                self._replaced = outer

    @property
    def edited(self) -> bool:
        """Whether changes are in force (see `intervening`, `rewriting`); waits until other threads' changes end."""
        with self.lock:
            return self._interventions > 0

    def check(self, inputs: Tensor) -> None:
        """Raise ValueError if `inputs` are not a batch that the model takes."""
        if isinstance(self.input, TokenInput):
            if inputs.ndim != 2 or inputs.is_floating_point():
                raise ValueError(
                    f"inputs of shape {tuple(inputs.shape)} ({inputs.dtype}) are not tokens: "
                    "expected whole numbers, batch x position"
                )
            self.input.check(inputs)
        elif inputs.ndim != 4 or inputs.shape[1] != self.input.channels:
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)} do not fit {self.name}: expected "
                f"batch x {self.input.channels} channels x height x width"
            )

    def attach(
        self, code: nn.Module, name: str, site: str | Site, target: str | Site | None = None
    ) -> HookedModel:
        """Return a copy of the model in which an autoencoder's latents are units: `sae/NAME:0`, `sae/NAME:1`, …

        The copy computes the same as the model, to the bit, until latents are changed. The reconstruction error is
        a site too, `sae/NAME.error`.

        Args:
            code: any module with `encode` and `decode`, which work on the last axis.
            name: letters, digits, `_` and `-`.
            site: the site that it encodes: one row a position, the outputs of all heads concatenated.
            target: the site that it writes, if it is a transcoder.

        Raises:
            KeyError: if there is no such site.
            ValueError: if the name is taken or not valid, the model is edited, the autoencoder's width is not the
                site's, or the target is computed before the site.
        """
        source = self.site(site)
        end = source if target is None else self.site(target)
        if PREFIX + check_name(name) in self._by_name:
            raise ValueError(f"name {name!r} is taken: {self.name} has an autoencoder of that name")
        if self.edited:
            raise ValueError(f"model {self.name} is edited: attach an autoencoder outside the edit")
        for what, wanted, place in (
            ("d_in", source.width, source),
            ("d_out", end.width, end),
        ):
            own = getattr(code, what, wanted)
            if own != wanted:
                raise ValueError(
                    f"autoencoder {name!r} has {what} {own}: site {place.name} has rows of {wanted} numbers"
                )
        if end is not source and self.last([source, end]) is source:
            raise ValueError(
                f"target {end.name} is computed before site {source.name}: expected a later site"
            )
        places = [TappedSite(s, self._taps[s.name]) for s in dict.fromkeys((source, end))]
        with self.lock:
            module = attached_module(self.module, name, code, places[0], (*places, None)[1])
        return self.around(module, f"{self.name}+{PREFIX}{name}")

    def around(self, module: nn.Module, name: str) -> HookedModel:
        """Wrap a changed copy of the module: what is known of this model's input, sites and units holds for it too."""
        return self._again(module, name, self._attention)

    def declaring(self, attention: Mapping[str, Mapping[str, Any]]) -> HookedModel:
        """Wrap the module again, with attention that a person declares as well."""
        return self._again(self.module, self.name, self._attention | dict(attention))

    def _again(
        self, module: nn.Module, name: str, attention: Mapping[str, Mapping[str, Any]]
    ) -> HookedModel:
        # A new trace finds sites under their own names only.
        aliases = {alias: s.name for s in self.sites for alias in s.aliases}
        return HookedModel(
            module, self.input, name, aliases, self.classes, self.unit_names, self._axes, attention
        )

    def showing(self, points: Sequence[tuple[Site, Address, str]]) -> HookedModel:
        """The same model, which shares its module and its lock, with further tensors of its pass as sites.

        Args:
            points: each site with the call where its tensor is, and the name of the site before which it is listed;
                empty: after all.

        Raises:
            ValueError: if a name is taken, or the model is edited.
        """
        if self.edited:
            raise ValueError(f"model {self.name} is edited: show more of it outside the edit")
        made, within = copy.copy(self), Points(self.module)
        made._by_name, made._taps = dict(self._by_name), dict(self._taps)
        sites = list(self.sites)
        for site, address, before in points:
            if site.name in made._by_name or site.name in made._aliases:
                raise ValueError(f"site {site.name} is one of {self.name} already")
            names = [s.name for s in sites]
            sites.insert(names.index(before) if before else len(names), site)
            made._by_name[site.name] = site
            # The model may overwrite any tensor inside a function later.
            made._taps[site.name] = replace(within.tap(address), overwritten=True)
        made.sites = tuple(sites)
        return made

    # --- weights -------------------------------------------------------------------------------

    @property
    def weight_layers(self) -> tuple[WeightLayer, ...]:
        """The layers that connect sites, with what each reads and writes; found again once the weights have changed.

        Raises:
            ValueError: if edits are in force, a weight is NaN or infinite, or the model takes tokens and is not a
                TransformerLens bridge.
        """
        if self.edited:
            raise ValueError(f"model {self.name} is edited: ask for its weights outside the edit")
        key = self.hash
        if self._layers is None or self._layers[0] != key:
            check_weights_finite(self.module, self.name)
            self._layers = key, self._find_layers()
        return self._layers[1]

    def _find_layers(self) -> tuple[WeightLayer, ...]:
        layers = self._find_own_layers()
        return (*layers, *latent_layers(self, layers, self._by_name))

    def _find_own_layers(self) -> tuple[WeightLayer, ...]:
        example = self.fitted(self.input.example(1))
        if is_bridge(self.module) or not example.is_floating_point():
            return tuple(transformer_layers(self))
        self._check_differentiable()
        virtual = filter(_has_weights, transformer_layers(self)) if self.has_stream else ()
        with self.lock:
            own = find_weight_layers(self.module, example, self.sites, self._taps)
        return (*own, *virtual)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in the state dict; a tied parameter has its first name."""
        return parameter_names(self.module)

    @property
    def matrices(self) -> tuple[WeightMatrix, ...]:
        """The parameters that connect units, as matrices with the sites that they read and write, of the unedited
        model: those of layers, and those that functions multiply with.

        Raises:
            ValueError: if the model's tensors were made inside `torch.inference_mode()`.
        """
        with self.lock:
            if self._steady_matrices is not None:
                return self._steady_matrices
            key = self.intact_hash
            if self._matrices is None or self._matrices[0] != key:
                with self.outside():
                    self._matrices = key, self._find_matrices()
            if self._steady_blocks:
                self._steady_matrices = self._matrices[1]
            return self._matrices[1]

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Promise that the model's own weights do not change inside the block: `matrices` then hashes them once
        instead of at every access.
        """
        with self.lock:
            self._steady_blocks += 1
            try:
                yield
            finally:
                self._steady_blocks -= 1
                if not self._steady_blocks:
                    self._steady_matrices = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Suspend the edits that are in force inside the block: the model runs as it is without them."""
        own = list(self.module.parameters())
        inside = [p.data for p in own]
        suspended, self._suspended = self._suspended, True
        try:
            for p in own:
                p.data = self._replaced.get(p.data_ptr(), p.data)
            yield
        finally:
            for p, data in zip(own, inside, strict=True):
                p.data = data
            self._suspended = suspended

    def _find_matrices(self) -> tuple[WeightMatrix, ...]:
        example = self.fitted(self.input.example(1))
        traced = example.is_floating_point()

        def forward() -> object:
            return self.module(example.clone())

        if traced:
            found = matrices_of_layers(self.module, self._find_own_layers())
        else:
            found = matrices_of_sites(self.module, forward, self.sites, self._taps)
        if is_bridge(self.module):
            # It calls a module for each of its weights; some are parts of parameters that it does not use.
            return tuple(found)
        program = self.program
        found = with_products(self.module, program, forward, self.sites, self._taps, found, traced)
        return tuple(with_aliases(self.module, program, found))

    def n_units(self, site: str) -> int:
        """The number of units of a site; `input` stands for the model's input channels."""
        if site == INPUT and isinstance(self.input, ImageInput):
            return self.input.channels
        return self.site(site).n_units

    # --- identity ------------------------------------------------------------------------------

    @property
    def hash(self) -> str:
        """SHA-256 in hexadecimal over all weights and over what is computed with them: classes and settings of modules,
        and the operations of a pass with their constants (`circuits.models.adapter.identity`). Operations are those of
        the pass when the model was wrapped; wrap it again after a change of code or of attributes.
        """
        return self._digest({})

    @property
    def intact_hash(self) -> str:
        """The hash of the unedited model."""
        with self.lock:
            return self._digest(self._replaced)

    def _digest(self, instead: Mapping[int, Tensor]) -> str:
        return model_digest(self.module, self._operations, weights_digest(self.module, instead))

    def has_hash(self, digest: str) -> bool:
        """Whether a hash is the unedited model's, or that of its weights alone, by which earlier versions knew it."""
        return digest == self.intact_hash or digest == self.weights_hash

    @property
    def weights_hash(self) -> str:
        """The hash of the unedited model's weights and classes of modules alone."""
        with self.lock:
            return weights_digest(self.module, self._replaced)

    @property
    def identity(self) -> ModelIdentity:
        """What the unedited model is, with some of its outputs for a fixed input: hashes cannot see everything."""
        with self.lock:
            weights = weights_digest(self.module, self._replaced)
            own = model_digest(self.module, self._operations, weights)
            return ModelIdentity(own, weights, self._known_outputs())

    def _known_outputs(self) -> tuple[float, ...]:
        """Finite outputs for a fixed input; none if they are not the same twice, or there are no logits."""
        if self.listed:
            return ()
        example = self.input.example(2)
        with self.outside(), torch.no_grad():
            numbers, again = (self.logits(example).double().flatten() for _ in range(2))
        if self._unsteady or not torch.equal(numbers.nan_to_num(), again.nan_to_num()):
            return ()
        numbers = numbers[numbers.isfinite()]
        return tuple(numbers[:: max(1, len(numbers) // _OUTPUTS)][:_OUTPUTS].tolist())

    def __repr__(self) -> str:
        return f"HookedModel({self.name}, {len(self.sites)} sites)"


def _has_weights(layer: WeightLayer) -> bool:
    """Whether a virtual layer's weights can be computed: an image model's norms may mix positions, or pool them."""
    try:
        layer.rows(torch.zeros(1, dtype=torch.int64))
    except ValueError:
        return False
    return True
