"""transformers, in process: the same model, whose rows name their adapters.

Layers keep their class, their parameters and their place: only the instance's `forward` is set,
as some models read `module.weight` themselves.
"""

import inspect
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from flora.adapters.checkpoint import read_checkpoint
from flora.adapters.core import Adapter
from flora.bank import AdapterBank
from flora.base import BaseLayer, ModelBase, plain_weight
from flora.errors import ShapeError, UsageError
from flora.hosts import opaque, whisper
from flora.hosts.programs import LaidBatch, Programs
from flora.hosts.rows import (
    BASE,
    Batch,
    BatchAdapters,
    Call,
    Generation,
    PreparedLayer,
    RowAdapter,
    make_batch,
)
from flora.ops import Linear, get_backend
from flora.ops.adapted_linear import prepare
from flora.ops.factors import BaseProduct, BatchFactors, LayersPages, WeightProduct
from flora.store import fetch

HOST = "_flora_host"

Model = TypeVar("Model", bound=nn.Module)


def attach(
    model: Model,
    adapters: Mapping[str, str | os.PathLike[str] | Adapter],
    *,
    backend: str = "auto",
    budget: int | None = None,
) -> Model:
    """Let each row of the model's batches use its own adapter.

    The same model comes back; its `forward` and `generate` take `adapter_names=[…]`, one entry a
    row: a name, `"__base__"` or None for none, or a list of (name, tokens) spans. A model that has
    adapters already gets these beside them; a name that it has is given its new meaning.

    model:    a transformers model; its linear layers are `nn.Linear` or GPT-2's `Conv1D`, or have a
              forward that is a black box with `in_features` and `out_features`.
    adapters: for each name a folder, a repository of the hub, or an Adapter.
    backend:  of `flora.ops`; "auto" chooses by the device.
    budget:   the most bytes that the adapters may take on the device.

    Raises UsageError, InvalidAdapterError, OutOfBudgetError or BackendError; then the model is as
    it was.
    """
    if BASE in adapters:
        raise UsageError(f"{BASE!r} is the name for no adapter; choose another")
    host: Host | None = getattr(model, HOST, None)
    base = host.base if host else ModelBase(model)
    for device in {spec.device for spec in base.specs.values()}:
        get_backend(backend, device)
    read = {
        name: source
        if isinstance(source, Adapter)
        else read_checkpoint(fetch(source), base).adapter(base)
        for name, source in adapters.items()
    }
    source = host.source if host else ResidentAdapters(AdapterBank(base.specs, budget))
    if not isinstance(source, ResidentAdapters):
        raise UsageError("the model is in training; close its trainer first")
    if host and (backend not in ("auto", host.backend) or budget not in (None, source.bank.budget)):
        raise UsageError("backend and budget are those of the first attach; detach the model first")
    source.add(read)
    if host is None:
        patch(model, source, backend)
    return model


def detach(model: Model) -> Model:
    """Give the model back as it was before `attach`, bit for bit.

    Raises UsageError where nothing is attached.
    """
    host: Host | None = getattr(model, HOST, None)
    if host is None:
        raise UsageError("the model has no adapters attached")
    host.unpatch()
    return model


def merge(model: nn.Module, adapter: Adapter) -> None:
    """Fold an adapter into a model's own weights.

    Raises UsageError for a layer whose weight cannot be written, or is another module's too; then
    nothing has changed.
    """
    modules = dict(model.named_modules())
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name in adapter.layers:
        if name not in modules or plain_weight(modules[name]) is None:
            raise UsageError(f"{name} cannot be merged into: it is no plain linear layer")
        if uses[id(modules[name].weight)] > 1:
            raise UsageError(f"{name} cannot be merged into: its weight is another module's too")
    for name, factors in adapter.layers.items():
        module = modules[name]
        weight: Any = module.weight
        turned = isinstance(module, Conv1D)
        merged = factors.merge(weight.data.T if turned else weight.data)
        weight.data = merged.T.contiguous() if turned else merged
        if factors.bias is not None:
            bias = factors.bias.to(weight.device, weight.dtype)
            module.bias = nn.Parameter(bias, requires_grad=False)


class FactorSource(Protocol):
    """Where a batch's factors come from: resident adapters, or those in training."""

    def __contains__(self, name: str) -> bool: ...

    def factors(self, module: str, names: tuple[str | None, ...]) -> BatchFactors | None:
        """A layer's factors for the adapters of these names; None where none touches it."""

    def lay(self, names: tuple[str | None, ...]) -> Sequence[LayersPages] | None:
        """The pages of these adapters in all layers; None where they lie in no pages."""

    def trained(self, module: str) -> list[Tensor]:
        """What is trained of a layer's factors: the same tensors in the same order each time."""


class ResidentAdapters:
    """Adapters in a bank, by name."""

    def __init__(self, bank: AdapterBank) -> None:
        self.bank = bank
        self.identities: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.identities

    def add(self, adapters: Mapping[str, Adapter]) -> None:
        """Load adapters, all or none; each is pinned, as its name must go on to work."""
        before = {resident.identity for resident in self.bank.residents}
        try:
            for adapter in adapters.values():
                self.bank.load(adapter, pinned=True)
        except BaseException:
            for resident in self.bank.residents:
                if resident.identity not in before:
                    self.bank.unload(resident.identity)
            raise
        self.identities |= {name: adapter.identity for name, adapter in adapters.items()}
        for resident in self.bank.residents:
            if resident.identity not in self.identities.values():
                self.bank.unload(resident.identity)

    def factors(self, module: str, names: tuple[str | None, ...]) -> BatchFactors | None:
        return self.bank.factors(module, self._identities(names))

    def lay(self, names: tuple[str | None, ...]) -> Sequence[LayersPages]:
        return self.bank.lay(self._identities(names))

    def _identities(self, names: tuple[str | None, ...]) -> list[str | None]:
        return [None if name is None else self.identities[name] for name in names]

    def trained(self, module: str) -> list[Tensor]:  # noqa: ARG002
        return []


def patch(model: nn.Module, source: FactorSource, backend: str = "auto") -> "Host":
    """Set the forwards of a model and of its linear layers; `Host.unpatch` takes them back."""
    if hasattr(model, HOST):
        raise UsageError("the model has adapters attached; detach it first")
    return Host(model, source, backend)


class Host:
    """A patched model, and the batch that runs on it.

    The batch is the model's state, so one model runs one batch at a time.
    """

    def __init__(self, model: nn.Module, source: FactorSource, backend: str) -> None:
        self.model, self.source, self.backend = model, source, backend
        self.call: Call | None = None
        self.running = False
        self.checkpointing = False
        self._replayed: Call | None = None
        self._generating: Generation | None = None
        self._programs: Programs | None = None
        self.base = ModelBase(model)
        config = getattr(model, "config", None)
        self._is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.layers = {
            name: AdaptedLayer(self, name, layer, is_head=name == self.base.head)
            for name, layer in self.base.layers.items()
        }
        self._patched = [
            (layer.base.module, "forward", layer.forward) for layer in self.layers.values()
        ]
        self._patched.append((model, "forward", self._wrap_forward(model.forward)))
        if generate := getattr(model, "generate", None):
            self._patched.append((model, "generate", self._wrap_generate(generate)))
        self._before = [vars(module).get(name) for module, name, _ in self._patched]
        for module, name, wrapper in self._patched:
            vars(module)[name] = wrapper
        vars(model)[HOST] = self

    def unpatch(self) -> None:
        for (module, name, _), before in zip(self._patched, self._before, strict=True):
            if before is None:
                del vars(module)[name]
            else:
                vars(module)[name] = before
        del vars(self.model)[HOST]

    def __deepcopy__(self, _: object) -> "Host":
        """A copy's forwards would run the layers of this model. Raises UsageError."""
        raise UsageError("a model with adapters attached cannot be copied; detach it first")

    def current_call(self) -> Call | None:
        """The call whose layer runs: the forward's, that of an encoder which `generate` calls, or
        in a backward the one that is replayed."""
        if self.running:
            return self.call
        if self._generating is not None:
            batch = self._generating.encoder
            return batch.call(len(batch.spans), 0, 0)
        return self._replayed

    def _batch(
        self, adapters: Sequence[RowAdapter], mask: Tensor | None, columns: int | None
    ) -> Batch:
        """Raises ShapeError for spans in an encoder-decoder model: in which half would they be?"""
        if self._is_encoder_decoder:
            mask = columns = None
        batch = make_batch(adapters, self.source.__contains__, self.source.factors, mask, columns)
        if self._is_encoder_decoder and batch.by_column:
            raise ShapeError("a row of an encoder-decoder model has one adapter, and no spans")
        return batch

    def _shape(self, named: Mapping[str, Any], *names: str) -> tuple[int, int]:
        """The rows and columns of a call's input, under one of these names or the model's own.

        Raises ShapeError where there is no such tensor.
        """
        if self._is_encoder_decoder:
            main: str = getattr(self.model, "main_input_name", "input_ids")
            names = (*names, main, "encoder_outputs")
        for name in names:
            value = named.get(name)
            if name == "encoder_outputs" and value is not None and not isinstance(value, Tensor):
                value = value[0]
            if isinstance(value, Tensor):
                # The two halves have columns of their own.
                return value.shape[0], 0 if self._is_encoder_decoder else value.shape[1]
        raise ShapeError(f"adapter_names needs the batch as a tensor: {' or '.join(names)}")

    def _wrap_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(forward).parameters)

        # Not traced itself: the rows' names would be compiled in. What it calls is compiled.
        @wraps(forward)
        @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]
        def wrapper(
            *args: Any, adapter_names: Sequence[RowAdapter] | None = None, **kwargs: Any
        ) -> Any:
            before = self.call, self.running
            named = dict(zip(parameters, args, strict=False)) | kwargs
            self.call, self.running = self._next_call(adapter_names, named), True
            if torch.is_grad_enabled():
                self.checkpointing = getattr(self.model, "is_gradient_checkpointing", False)
            try:
                output = forward(*args, **kwargs)
                if torch.is_grad_enabled():
                    self._replay_in_backward(output, self.call)
                return output
            finally:
                self.call, self.running = before

        return wrapper

    def _next_call(
        self, adapters: Sequence[RowAdapter] | None, named: Mapping[str, Any]
    ) -> Call | None:
        if adapters is None and self._generating is None:
            return None
        rows, columns = self._shape(named, "input_ids", "inputs_embeds")
        past = named.get("past_key_values")
        if adapters is None and self._generating is not None:
            step = not self._is_encoder_decoder or named.get("encoder_outputs") is not None
            batch = self._generating.steps if step else self._generating.whole
        else:
            mask = named.get("attention_mask")
            # Spans count what is cached as well.
            batch = self._batch(adapters or (), mask, columns if past is None else None)
        first = int(past.get_seq_length()) if batch.by_column and past is not None else 0
        call = batch.call(rows, columns, first)
        return None if batch.only_base else call

    def laid(self, adapters: BatchAdapters) -> LaidBatch | None:
        """A batch's adapters in the layers that run without Python; None where there are none."""
        if HOST not in adapters.kept:
            adapters.kept[HOST] = self._lay(adapters.names)
        laid: LaidBatch | None = adapters.kept[HOST]
        return laid

    def _lay(self, names: tuple[str | None, ...]) -> LaidBatch | None:
        pages = self.source.lay(names)
        if pages is None:
            return None
        if self._programs is None or not self._programs.are_current:
            self._programs = Programs(self.base, self.backend)
        return self._programs.lay(pages, len(names))

    def _replay_in_backward(self, output: Any, call: Call | None) -> None:
        """Set the call again when a backward comes through: checkpointed layers run once more."""

        def forget() -> None:
            self._replayed = None

        def replay(_: Tensor) -> None:
            self._replayed = call
            torch.autograd.Variable._execution_engine.queue_callback(forget)

        for value in tree_leaves(output):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(replay)

    def _wrap_generate(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(generate).parameters)

        @wraps(generate)
        def wrapper(
            *args: Any, adapter_names: Sequence[RowAdapter] | None = None, **kwargs: Any
        ) -> Any:
            if adapter_names is None:
                return generate(*args, **kwargs)
            named = dict(zip(parameters, args, strict=False)) | kwargs
            rows, columns = self._shape(named, "inputs", "input_ids", "inputs_embeds")
            if rows != len(adapter_names):
                raise ShapeError(
                    f"adapter_names has {len(adapter_names)} entries, the batch {rows} rows"
                )
            mask = named.get("attention_mask")
            with self._generate_batch(self._batch(adapter_names, mask, columns)):
                return generate(*args, **kwargs)

        return wrapper

    @contextmanager
    def _generate_batch(self, batch: Batch) -> Iterator[None]:
        """Make a batch that of all forwards, its rows followed where `generate` moves them.

        Raises UsageError where the model has no way of its own to generate.
        """
        model: Any = self.model
        if not hasattr(type(model), "_expand_inputs_for_generation"):
            raise UsageError(
                f"{type(model).__name__} leaves `generate` to a model in it, whose rows cannot be "
                f"followed from outside; attach to that one"
            )
        expand = model._expand_inputs_for_generation
        generation = Generation(batch)

        @wraps(expand)
        def follow(*args: Any, expand_size: int = 1, **kwargs: Any) -> Any:
            generation.steps = generation.encoder.repeat(expand_size)
            return expand(*args, expand_size=expand_size, **kwargs)

        wrappers: dict[str, Callable[..., Any]] = {"_expand_inputs_for_generation": follow}
        if hasattr(model, "generate_with_fallback"):
            wrappers |= whisper.wrappers(model, generation)
        outer, own = self._generating, vars(model).copy()
        self._generating = generation
        vars(model).update(wrappers)
        try:
            yield
        finally:
            for name in wrappers:
                del vars(model)[name]
                if name in own:
                    vars(model)[name] = own[name]
            self._generating = outer


class AdaptedLayer:
    """One linear layer: its own forward, or the operator where an adapter touches it."""

    def __init__(self, host: Host, name: str, base: BaseLayer, *, is_head: bool) -> None:
        self.host, self.name, self.base, self.is_head = host, name, base, is_head
        self.device_type = host.base.specs[name].device.type
        self.trained = host.source.trained(name)
        self.handle = opaque.register(self)
        self._known: WeightProduct | None = None
        self.forward = self._make_forward()

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def prepare(self, x: Tensor, call: Call) -> PreparedLayer:
        """The layer for every x of this shape and type in this call, without gradients."""
        linear = self._program(x, call) or self._prepare(x, call)
        prepared = PreparedLayer(x.shape, x.dtype, linear)
        call.prepared[self.handle] = prepared
        return prepared

    def _program(self, x: Tensor, call: Call) -> Linear | None:
        """The same without Python, where the layer has a program for such x."""
        laid = self.host.laid(call.adapters)
        layer = None if laid is None else laid.layers.get(self.name)
        if laid is None or layer is None or x.dtype is not layer.dtype:
            return None
        if not laid.adapters.touched[layer.number]:
            return self.base.forward
        units, x_SNI = self._units(x, call)
        sizes = units, x_SNI.shape[1]
        if sizes not in call.steps:
            call.steps[sizes] = laid.adapters.step(*sizes)
        return layer.on(call.steps[sizes])

    def _prepare(self, x: Tensor, call: Call) -> Callable[[Tensor], Tensor]:
        """The layer as a function of x, for every x of this shape and type in this call."""
        factors = call.adapters.factors(self.name)
        if factors is None:
            return self.base.forward
        units, x_SNI = self._units(x, call)
        weight = self.base.weight
        linear = prepare(
            x_SNI,
            self._product(weight),
            factors,
            units,
            bias=self.base.bias,
            weight=weight,
            pure=weight is not None,
            backend=self.host.backend,
        )
        if x_SNI is x:
            return linear
        inner, outer = x_SNI.shape, x.shape[:-1]
        return lambda x: linear(x.reshape(inner)).reshape(*outer, -1)

    def _product(self, weight: Tensor | None) -> BaseProduct:
        """The base's; of the weight that it has now, which `nn.Module`s may be given anew."""
        if weight is None:
            return self.base.product
        if self._known is None or self._known.weight is not weight:
            self._known = WeightProduct(weight)
        return self._known

    def current_call(self) -> Call | None:
        return self.host.current_call()

    def _make_forward(self) -> Callable[[Tensor], Tensor]:
        """What is set on the module.

        A step of decoding comes here some hundred times, and feels each call that is made here.
        """
        host, base, device_type, handle = self.host, self.base, self.device_type, self.handle

        @wraps(base.forward)
        def forward(x: Tensor) -> Tensor:
            if is_compiling():
                return traced(x)
            call = host.call if host.running else host.current_call()
            if call is None:
                return base.forward(x)  # type: ignore[no-any-return]
            if torch.is_grad_enabled() or torch.is_autocast_enabled(device_type):
                return self._prepare(x, call)(x)
            prepared = call.prepared.get(handle)
            if prepared is None or prepared.shape != x.shape or prepared.dtype is not x.dtype:
                prepared = self.prepare(x, call)
            return prepared.linear(x)

        traced = self._make_traced(torch.compiler.disable(forward))
        return forward

    def _make_traced(self, outside: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The forward in compiled code: one opaque operator, or `outside` of it."""
        trained, handle, out_features = self.trained, self.handle, self.base.out_features

        def traced(x: Tensor) -> Tensor:
            y: Tensor
            if not torch.is_grad_enabled():
                y = torch.ops.flora.adapted_layer(x, handle, out_features)
            elif self.host.checkpointing or torch.is_autocast_enabled(self.device_type):
                y = outside(x)
            else:
                y, _ = torch.ops.flora.trained_layer(x, trained, handle, out_features)
            return y

        return traced

    def _units(self, x: Tensor, call: Call) -> tuple[tuple[int, ...], Tensor]:
        """The call's units, and x as `[units, tokens, in]`. Raises ShapeError for other shapes."""
        if x.ndim == 3 and x.shape[0] == call.rows and not call.by_column:
            return call.units, x
        tokens = x.numel() // x.shape[-1]
        whole = tokens == call.rows * call.columns
        # Rows of some tokens only are the head's: an expert's tokens could be as many by chance.
        if (x.shape[0] == call.rows and (whole or x.ndim > 2 or self.is_head)) or (
            whole and x.shape[0] == tokens
        ):
            columns = tokens // call.rows
            if not call.by_column:
                return call.units, x.reshape(call.rows, columns, x.shape[-1])
            if columns == call.columns:
                return call.units, x.reshape(tokens, 1, x.shape[-1])
            if self.is_head and columns < call.columns:
                # The models' own `logits_to_keep` counts from the end.
                kept = [
                    call.units[row * call.columns + column]
                    for row in range(call.rows)
                    for column in range(call.columns - columns, call.columns)
                ]
                return tuple(kept), x.reshape(tokens, 1, x.shape[-1])
        raise ShapeError(
            f"{self.name} was given the shape {list(x.shape)}, which says nothing of whose tokens "
            f"these are in a batch of {call.rows} rows; leave this layer out"
        )
