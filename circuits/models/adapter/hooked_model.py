"""`HookedModel`: one way to list, read and change the tensors of any model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from circuits.hooks import Change, Look, Tap, intervene, observe, placed, record
from circuits.models.adapter.attaching import (
    PREFIX,
    Place,
    attached_module,
    check_name,
)
from circuits.models.adapter.composition import bridge_layers
from circuits.models.adapter.generating import Sampling, continued
from circuits.models.adapter.inputs import ImageInput, ModelInput, TokenInput
from circuits.models.adapter.latent_weights import latent_layers
from circuits.models.adapter.matrices import (
    WeightMatrix,
    matrices_of_layers,
    matrices_of_sites,
    parameter_names,
)
from circuits.models.adapter.normalisation import FastNormalisation, NoticedNormalisation
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
from circuits.models.adapter.sites import (
    answers_last,
    evaluating,
    find_embedding,
    find_sites,
    is_bridge,
    main_output,
)
from circuits.models.adapter.topology import INPUT, WeightLayer, find_weight_layers
from circuits.units import Site, Unit, unknown


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

    Sites are found by tracing one forward pass: every module's output is one, and so is each call of
    a module that is called several times (`name@0`, `name@1`). The model always runs in evaluation
    mode and is never changed: whatever a run or an intervention sets up is undone at its end. Runs
    and interventions hold `lock`, so threads that share a model do not see each other's changes.

    Args:
        module: the model. It is used as it is, not copied.
        input: what it takes; `(channels, height, width)` is short for a plain `ImageInput`.
        name: how it is called in reports and file names.
        aliases: other names for sites, alias -> site name.
        classes: names of the outputs, if it is a classifier.
        unit_names: what units are known to be, by site: only where that is true by construction.

    Attributes:
        sites: all sites, in order of execution.
    """

    def __init__(
        self,
        module: nn.Module,
        input: ModelInput | tuple[int, ...] | list[int],
        name: str = "",
        aliases: Mapping[str, str] | None = None,
        classes: Sequence[str] = (),
        unit_names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.module = module
        if isinstance(input, tuple | list):
            if len(input) != 3:
                raise ValueError(f"input {input} must be (channels, height, width)")
            channels, height, width = input
            input = ImageInput(channels, height, width)
        self.input: ModelInput = input
        self.name = name or type(module).__name__
        self.classes = tuple(classes)
        self.unit_names = dict(unit_names or {})
        self.lock = threading.RLock()
        with NoticedNormalisation() as noticed:
            found = find_sites(module, lambda n: self.fitted(self.input.example(n)))
        self._normalises = noticed.seen
        declared = aliases or {}
        self.sites: tuple[Site, ...] = tuple(
            replace(
                site, aliases=(*site.aliases, *(a for a in declared if declared[a] == site.name))
            )
            for site, _ in found
        )
        self._taps: dict[str, Tap] = {site.name: tap for site, tap in found}
        self._interventions = 0
        self._placed = 0  # changes in force that name positions
        self._suspended = False
        self._steady = 0
        self._held: tuple[WeightMatrix, ...] | None = None  # while `steady`
        self._replaced: dict[
            int, Tensor
        ] = {}  # own tensors, by where those are that stand in for them
        self._matrices: tuple[str, tuple[WeightMatrix, ...]] | None = None
        self._layers: tuple[str, tuple[WeightLayer, ...]] | None = None
        self._embedding: Site | None = None
        self._way: Padding | None = None
        self._by_name = {site.name: site for site in self.sites}
        self._aliases = {alias: site.name for site in self.sites for alias in site.aliases}

    # --- sites and units -----------------------------------------------------------------------

    def site(self, name: str | Site) -> Site:
        """The site called `name`, or of which `name` is an alias.

        Raises:
            KeyError: if there is none; the message offers the nearest names.
        """
        key = name.name if isinstance(name, Site) else self._aliases.get(name, name)
        if key not in self._by_name:
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

    def last(self, names: Iterable[str | Site]) -> Site:
        """The site among `names` that is computed last."""
        order = {site.name: i for i, site in enumerate(self.sites)}
        return max((self.site(n) for n in names), key=lambda site: order[site.name])

    # --- running -------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        first = next(chain(self.module.parameters(), self.module.buffers()), None)
        return torch.device("cpu") if first is None else first.device

    def fitted(self, inputs: Tensor) -> Tensor:
        """`inputs` on the model's device and, unless they are tokens, in its precision."""
        if not inputs.is_floating_point():
            return inputs.to(self.device)
        kinds = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return inputs.to(self.device, next(kinds, inputs.dtype))

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
            mask: of tokens, True where a real one is; `pad` makes both. Where it is False, sites hold finite
                numbers without meaning, and edits see them. None: all are real.
            read: the sites to keep.
            edits: site name -> function from its tensor to the tensor to use instead.
            until: stop the pass after this site; `output` is then None.
            grad: keep the autograd history back to `inputs` (parameters are held fixed). Tokens have none: there
                it goes back to the first site that depends on them, the embedding, whose tensor is a leaf.
            reference: compute local response normalisation as torch composes it: to the bit what the module
                alone gives, and visible to torch function modes. Otherwise it is several times as fast and equal
                up to rounding. Models without it are the same either way.

        Raises:
            KeyError: if a site is unknown, or the pass did not reach one of `read`.
            ValueError: if `inputs` or `mask` do not fit the model, edits name positions that texts of different
                lengths do not share, or no site depends on tokens that `grad` is asked for.
        """
        self.check(inputs)
        told = self._told(inputs, mask, edits)
        inputs = self.fitted(inputs)
        sites = [self.site(name) for name in read]
        stop = None if until is None else self.site(until)
        names = list(dict.fromkeys([s.name for s in sites] + ([stop.name] if stop else [])))
        taps = {name: self._taps[name] for name in names}
        output = None
        # a copy: a model that works in place must not change the caller's input
        own = inputs * 1 if grad else inputs.clone()
        with (
            self.intervening(edits or {}),
            self._from_embedding(grad) as leaves,
            evaluating(self.module),
            torch.set_grad_enabled(grad),
            self._fast(reference),
            record(self.module, taps, stop.name if stop else None) as found,
        ):
            output = self.module(own, **told)
        self._check_reached(names, found)
        found = found | leaves
        return ActivationCache({s.name: found[s.name] for s in sites}, self._aliases, output)

    def _fast(self, reference: bool) -> AbstractContextManager[object]:
        """What a forward pass is run in; nothing where it makes no difference, since modes cost time."""
        return nullcontext() if reference or not self._normalises else FastNormalisation()

    def observe(
        self,
        inputs: Tensor,
        looks: Mapping[str, Look],
        until: str | Site,
        *,
        mask: Bool[Tensor, "batch position"] | None = None,
        reference: bool = False,
    ) -> None:
        """Run once up to a site and show each site's tensor as it appears; nothing is kept.

        Args:
            inputs: as the model takes them.
            looks: site name -> what to call with its tensor, which a later step may overwrite.
            until: one of them: where the pass ends.
            reference: see `run`.
            mask: of tokens, True where a real one is (see `run`).

        Raises:
            KeyError: if a site is unknown, or was not reached.
            ValueError: if `mask` does not fit.
        """
        told = self._told(inputs, mask)
        seen: set[str] = set()

        def noting(name: str, look: Look) -> Look:
            def note(value: Tensor) -> None:
                seen.add(name)
                look(value)

            return note

        named = {self.site(name).name: look for name, look in looks.items()}
        taps = {name: (self._taps[name], noting(name, look)) for name, look in named.items()}
        with (
            self.lock,
            evaluating(self.module),
            torch.no_grad(),
            self._fast(reference),
            observe(self.module, taps, self.site(until).name),
        ):
            self.module(self.fitted(inputs).clone(), **told)
        self._check_reached(named, seen)

    def _check_reached(self, names: Iterable[str], reached: Container[str]) -> None:
        missing = [name for name in names if name not in reached]
        if missing:
            raise KeyError(
                f"site {missing[0]!r} was not reached in this forward pass of {self.name}"
            )

    @contextmanager
    def _from_embedding(self, grad: bool) -> Iterator[dict[str, Tensor]]:
        """With `grad`, make of the embedding of tokens a leaf, and yield it by its site's name once it is there."""
        leaves: dict[str, Tensor] = {}
        if not grad or not isinstance(self.input, TokenInput):
            yield leaves
            return
        site = self.embedding.name

        def begin(value: Tensor) -> Tensor:
            if value.requires_grad:  # an edit's, or what counts as one, has a history of its own
                return value
            leaves[site] = value.detach().requires_grad_(True)
            return leaves[site] * 1  # a copy: what follows may work in place

        with self.intervening({site: begin}):
            yield leaves

    @property
    def embedding(self) -> Site:
        """The first site that depends on the tokens, found by trying when it is first asked for.

        Raises:
            ValueError: if there is none, or the model takes images.
        """
        # not a cached property: that holds a lock for all instances, inside which the model's own would be taken
        with self.lock:
            if self._embedding is None:
                self._embedding = self._find_embedding(self._of_tokens("embeds nothing"))
            return self._embedding

    def _find_embedding(self, spec: TokenInput) -> Site:
        first = spec.example(1)
        two = torch.cat([first, (first + 1) % spec.n_vocab])
        name = find_embedding(self._seen(two, {}), [site.name for site in self.sites])
        if name is None:
            raise ValueError(
                f"no site of {self.name} depends on its tokens: there is nothing to take a gradient by"
            )
        return self.site(name)

    def _of_tokens(self, otherwise: str) -> TokenInput:
        if not isinstance(self.input, TokenInput):
            raise ValueError(f"model {self.name} takes images: it {otherwise}")
        return self.input

    def _seen(self, tokens: Tensor, told: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What all sites of the model as it is outside all edits hold in one pass."""
        told = {name: value.to(self.device) for name, value in told.items()}
        with (
            self.lock,
            self.outside(),
            evaluating(self.module),
            torch.no_grad(),
            torch._C.DisableTorchFunction(),  # modes of the caller that replace operations
            record(self.module, self._taps) as found,
        ):
            self.module(self.fitted(tokens), **told)
        return found

    # --- texts of different lengths --------------------------------------------------------------

    @property
    def padding(self) -> Side | None:
        """The side on which shorter texts of a batch are filled up; None if all must be of one length.

        Found by trying when it is first asked for (`circuits.models.adapter.padding`).

        Raises:
            ValueError: if the model takes images.
        """
        return self._padding.side

    @property
    def _padding(self) -> Padding:
        with self.lock:
            if self._way is None:
                self._way = find_padding(self._seen, self._of_tokens("needs no padding"))
            return self._way

    def pad(
        self, rows: Sequence[Int[Tensor, "_"] | Sequence[int]]
    ) -> tuple[Int[Tensor, "batch position"], Bool[Tensor, "batch position"]]:
        """Texts as one batch, filled up where the model takes it, and where its real tokens are.

        What a text is filled up with changes nothing: it is the tokenizer's padding token, or 0.

        Raises:
            ValueError: if a text is empty, or they differ in length and the model takes one length only.
        """
        filler = self._of_tokens("needs no padding").filler
        texts = [row.tolist() if isinstance(row, Tensor) else list(row) for row in rows]
        if len({len(text) for text in texts}) < 2:
            return padded(texts, filler=filler)
        tokens, mask = padded(texts, self.padding or "right", filler)
        check_side(mask, self._padding, self.name)
        return tokens, mask

    def _told(
        self, inputs: Tensor, mask: Tensor | None, edits: Mapping[str, Change] | None = None
    ) -> dict[str, Tensor]:
        """What the module must be told besides its input, so that what is hidden changes nothing."""
        if mask is None:
            return {}
        self._of_tokens("takes no mask")
        check_mask(mask, inputs)
        if mask.all():
            return {}
        if self._placed or any(map(placed, (edits or {}).values())):
            raise ValueError(
                "edits name positions, and the texts of this batch differ in length: expected texts of one length"
            )
        check_side(mask, self._padding, self.name)
        return {MASK: mask.to(self.device, torch.long)} if self._padding.told else {}

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
        """Continue each text from its own end, with edits in force at every forward pass.

        Nothing is kept from one pass to the next, so that an edit is seen by every token: a pass costs more the
        longer the texts are. A text's continuation does not depend on its company.

        Args:
            inputs: the texts.
            n_tokens: how many tokens to add at most.
            mask: True where a real token is (see `run`).
            edits: as `run` takes them; the tensors that they are given grow longer.
            temperature: what logits are divided by before a token is drawn; 0 takes the most likely one.
            seed: of the first text's draws; the next one's is one more, and so on.
            stop: tokens that end a text; the one that did is kept.

        Returns:
            Each text with what was added to it.

        Raises:
            ValueError: if the model takes images, looks both ways, or puts out no logits at every position; if
                texts would grow past its context; or a number is out of range.
        """
        spec = self._of_tokens("continues no texts")
        self.check(inputs)
        self._told(inputs, mask, edits)
        rows = unpadded(inputs, mask)
        sampling = Sampling(n_tokens, temperature, seed, stop)
        sampling.check(rows, spec)
        if self._padding.looks_ahead:
            raise ValueError(
                f"model {self.name} looks both ways along a text: it does not predict what comes next"
            )

        def forward(tokens: Tensor, mask: Tensor) -> Tensor:
            return answers_last(self.sites, self.logits(tokens, edits, mask=mask))

        with self.lock:
            made = continued(forward, self.pad, rows, sampling, spec)
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
        """
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
        own = sum(map(placed, edits.values()))
        with self.lock, intervene(self.module, changes):
            self._interventions += 1
            self._placed += own
            try:
                yield
            finally:
                self._interventions -= 1
                self._placed -= own

    def _unless_suspended(self, change: Change) -> Change:
        return lambda value: value if self._suspended else change(value)

    @contextmanager
    def rewriting(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold other tensors in the place of parameters inside the block; the own ones are not touched.

        A gradient must be taken in the same block as its forward pass.

        Args:
            tensors: by the parameters' names in the state dict, of their shape and type.

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
                    own[name].data = tensor.to(own[name].device)
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
        """Whether changes are in force (see `intervening`, `rewriting`); waits for another thread's to end."""
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
        """A copy of the model in which an autoencoder's latents are units: `sae/NAME:0`, `sae/NAME:1`, …

        The copy does what the model does, to the bit, until latents are changed. What they leave out of the
        site's tensor is a site too, `sae/NAME.error`.

        Args:
            code: a module with `encode` and `decode`, which work on the last axis: any will do.
            name: letters, digits, `_` and `-`.
            site: whose tensor it encodes: one row a position; heads side by side.
            target: whose tensor it writes, if it is a transcoder.

        Raises:
            KeyError: if there is no such site.
            ValueError: if the name is taken or not valid, the model is edited, or the autoencoder is of another
                width than the site.
        """
        source = self.site(site)
        end = source if target is None else self.site(target)
        if PREFIX + check_name(name) in self._by_name:
            raise ValueError(f"name {name!r}: the model has an autoencoder of that name")
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
            raise ValueError(f"target {end.name} does not come behind site {source.name}")
        places = [Place(s, self._taps[s.name]) for s in dict.fromkeys((source, end))]
        with self.lock:
            module = attached_module(self.module, name, code, places[0], (*places, None)[1])
        aliases = {alias: s.name for s in self.sites for alias in s.aliases}
        return HookedModel(
            module,
            self.input,
            f"{self.name}+{PREFIX}{name}",
            aliases,
            self.classes,
            self.unit_names,
        )

    # --- weights -------------------------------------------------------------------------------

    @property
    def weight_layers(self) -> tuple[WeightLayer, ...]:
        """The layers that connect sites, with what each reads and writes; found anew when the
        weights have changed.

        Raises:
            ValueError: if edits are in force, or the model takes tokens and is no bridge.
        """
        if self.edited:
            raise ValueError(f"model {self.name} is edited: ask for its weights outside the edit")
        key = self.hash
        if self._layers is None or self._layers[0] != key:
            self._layers = key, self._find_layers()
        return self._layers[1]

    def _find_layers(self) -> tuple[WeightLayer, ...]:
        layers = self._find_own_layers()
        return (*layers, *latent_layers(self.module, layers, self._by_name))

    def _find_own_layers(self) -> tuple[WeightLayer, ...]:
        if is_bridge(self.module):
            return tuple(bridge_layers(self.module, self.sites))
        example = self.fitted(self.input.example(1))
        if not example.is_floating_point():
            raise ValueError(f"model {self.name}: weights between sites need images or a bridge")
        with self.lock:
            return tuple(find_weight_layers(self.module, example, self.sites, self._taps))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in the state dict; a tied one under its first name."""
        return parameter_names(self.module)

    @property
    def matrices(self) -> tuple[WeightMatrix, ...]:
        """The parameters that connect units, as matrices with the sites that they read and write; of the
        model as it is outside all edits.

        Raises:
            ValueError: if the model takes tokens and is no bridge.
        """
        with self.lock:
            if self._held is not None:
                return self._held
            key = self.intact_hash
            if self._matrices is None or self._matrices[0] != key:
                with self.outside():
                    self._matrices = key, self._find_matrices()
            if self._steady:
                self._held = self._matrices[1]
            return self._matrices[1]

    @contextmanager
    def steady(self) -> Iterator[None]:
        """A block in which the model's own weights do not change: `matrices` looks once only."""
        with self.lock:
            self._steady += 1
            try:
                yield
            finally:
                self._steady -= 1
                if not self._steady:
                    self._held = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Inside the block the model is as it is without the edits that are in force."""
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
        if not is_bridge(self.module):
            return tuple(matrices_of_layers(self.module, self._find_own_layers()))
        tokens = self.fitted(self.input.example(1))
        found = matrices_of_sites(self.module, lambda: self.module(tokens), self.sites, self._taps)
        return tuple(found)

    def n_units(self, site: str) -> int:
        """How many units a site has; `input` counts the model's input channels."""
        if site == INPUT and isinstance(self.input, ImageInput):
            return self.input.channels
        return self.site(site).n_units

    # --- identity ------------------------------------------------------------------------------

    @property
    def intact_hash(self) -> str:
        """The hash of the weights as they are outside all edits."""
        with self.lock:
            return self._digest(self._replaced)

    @property
    def hash(self) -> str:
        """SHA-256 in hexadecimal, over the classes of all modules and the names, types, shapes and
        bytes of all weights.
        """
        return self._digest({})

    def _digest(self, instead: Mapping[int, Tensor]) -> str:
        digest = hashlib.sha256()
        for name, module in self.module.named_modules():
            digest.update(f"{name}|{type(module).__qualname__}|".encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            if not isinstance(tensor, Tensor):
                continue
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            tensor = instead.get(tensor.data_ptr(), tensor)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"HookedModel({self.name}, {len(self.sites)} sites)"
