"""What vLLM's workers ask of adapters: load, unload, pin, and which of them each token uses."""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping, LoRAMappingType
from vllm.lora.request import LoRARequest

from flora.adapters.checkpoint import read_checkpoint
from flora.adapters.core import Adapter, LayerFactors
from flora.bank import AdapterBank, PagedAdapter
from flora.errors import FloraError, OutOfBudgetError, UsageError
from flora.hosts.programs import together
from flora.hosts.rows import BatchAdapters, Call
from flora.hosts.vllm.base import VllmBase
from flora.hosts.vllm.encoder import Items
from flora.hosts.vllm.layers import AdaptedLayer, Current, Step
from flora.hosts.vllm.model import adapt
from flora.hosts.vllm.reader import Reader
from flora.hosts.vllm.settings import Settings

if TYPE_CHECKING:  # the kernels are loaded where they are run
    from flora.ops.model_layers import LaidAdapters

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """An adapter as it was read.

    same_input: the merged layers whose input it scales as one.
    """

    adapter: PagedAdapter
    same_input: frozenset[str]


KEPT_STEPS = 16
"""Of so many mixes of adapters a worker keeps what it prepared; a mix comes back at each step."""


class AdapterManager:
    """Stands for vLLM's `LRUCacheWorkerLoRAManager`: adapters of any kind, in a paged bank.

    A slot of vLLM's costs nothing here: an adapter is in the bank, or it is not. What vLLM calls
    `max_cpu_loras` is how many may be.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,  # noqa: ARG002  (each layer has its own)
        embedding_modules: dict[str, str],  # noqa: ARG002
    ) -> None:
        self.settings = Settings.of(vllm_config)
        self.capacity: int = vllm_config.lora_config.max_cpu_loras
        self.slots: int = vllm_config.lora_config.max_loras
        self.has_encoder: bool = vllm_config.model_config.is_encoder_decoder
        self.current, self.items = Current(), Items()
        self._shared: dict[str, frozenset[str]] = {}
        self._requests: dict[int, LoRARequest] = {}
        self._sizes: dict[int, int] = {}
        self._pinned: set[int] = set()
        self._identities: dict[int, str] = {}
        self._held: list[str] = []
        self._roster: BatchAdapters | None = None
        self._laid: LaidAdapters | None = None  # the roster's, where layers have programs
        self._steps: OrderedDict[tuple[int, ...], Step | None] = OrderedDict()

    @property
    def is_enabled(self) -> bool:
        return True

    def create_lora_manager(self, model: nn.Module, vllm_config: VllmConfig) -> nn.Module:
        """Put the adapters around the model's layers; it stays the same model."""
        self.layers = adapt(model, self.current, self.items, vllm_config)
        self.base = VllmBase(self.layers)
        self.base.measure_costs(self.settings.backend)
        compiled = [layer.compiled for layer in self.layers if layer.compiled is not None]
        self.compiled = together(compiled, self.settings.backend)
        self.bank = AdapterBank(self.base.specs, self.settings.adapter_bytes)
        # While a step runs, no kind may ask for a layer's own product, nor ranks for each other's.
        readable = all(part.weight is not None for part in self.base.parts.values())
        aside = readable and not self.base.is_sharded
        # Those of a step, and those that are asked for meanwhile.
        self._reader = Reader(self._read, aside=aside, kept=2 * self.slots)
        return model

    def supports_tower_connector_lora(self) -> bool:
        """Whether vLLM is to say the adapter of each item that an encoder takes."""
        return self.has_encoder

    def list_adapters(self) -> set[int]:
        """Those that are resident."""
        return set(self._identities)

    def add_adapter(self, request: LoRARequest) -> bool:
        """Take an adapter up; the first step that uses it makes it resident.

        Returns True once it is read. False, where it is being read: then it is to be asked again.

        Raises UsageError, InvalidAdapterError or OutOfBudgetError; then all is as it was. The text
        begins with the error's name, which is all that reaches another process.
        """
        if request.lora_int_id not in self._requests:
            if not self._reader.has(request):
                return False
            self._know(request, self._reader.get(request))
        return True

    def is_read(self, request: LoRARequest) -> bool:
        """Whether a step with this adapter would not wait for it; if not, it is being read.

        Raises what reading it again raised.
        """
        return request.lora_int_id in self._identities or self._reader.has(request)

    def _make_resident(self, number: int) -> None:
        if number not in self._identities:
            request = self._requests[number]
            loaded = self._reader.take(request)
            self._know(request, loaded)
            # Not by `number`: of a step it may be numpy's, which vLLM does not send back.
            self._load(request.lora_int_id, loaded)

    def remove_adapter(self, number: int) -> bool:
        """Forget an adapter, at once; a step that runs goes on with what it was lent."""
        identity = self._forget(number)
        if identity is not None and identity not in self._identities.values():
            if identity in self._held:
                self._held.remove(identity)
                self.bank.release(identity)
            self.bank.unload(identity)
        self._sizes.pop(number, None)
        self._pinned.discard(number)
        return self._requests.pop(number, None) is not None

    def remove_all_adapters(self) -> None:
        for number in list(self._requests):
            self.remove_adapter(number)
        self.current.step = self.items.step = None

    def pin_adapter(self, number: int) -> bool:
        """Keep an adapter resident until it is removed. Raises UsageError for one not known."""
        if number not in self._requests:
            raise UsageError(f"adapter {number} is not loaded; load it before it is pinned")
        self._check_budget({}, self._pinned | {number})
        self._make_resident(number)
        self._pinned.add(number)
        self.bank.pin(self._identities[number])
        return True

    def set_active_adapters(
        self, requests: Iterable[LoRARequest], mapping: LoRAMapping | None
    ) -> None:
        """Which adapters the next step uses, and for which of its tokens.

        An encoder's items come after the tokens of their step, whose adapters hold theirs.

        requests: the adapters that run; of two with one name vLLM may leave one out, which then was
                  added before.
        """
        for request in requests:
            self._requests.setdefault(request.lora_int_id, request)
        if mapping is None:
            return
        numbers = mapping.index_mapping
        if mapping.type is LoRAMappingType.TOWER:
            self.items.step = self._step(numbers)
            return
        used = sorted(set(numbers) - {0})
        self._hold(n for n in used if n in self._identities)
        for number in used:
            if number not in self._identities:
                self._make_resident(number)
                self._hold(n for n in used if n in self._identities)
        self.current.step, self.items.step = self._step(numbers), None

    def _step(self, numbers: tuple[int, ...]) -> Step | None:
        """The step of units with these adapters, which are resident."""
        if numbers not in self._steps:
            self._steps[numbers] = self._make_step(numbers)
            if len(self._steps) > KEPT_STEPS:
                self._steps.popitem(last=False)
        self._steps.move_to_end(numbers)
        return self._steps[numbers]

    def _make_step(self, numbers: tuple[int, ...]) -> Step | None:
        identities = {n: self._identities[n] for n in set(numbers) if n}
        if not identities:
            return None
        roster = self._roster_with(set(identities.values()))
        group = {name: number for number, name in enumerate(roster.names)}
        of = {n: group[identity] for n, identity in identities.items()} | {0: 0}
        units = tuple(of[n] for n in numbers)
        shared = frozenset.intersection(*(self._shared[name] for name in identities.values()))
        laid = None
        if self._laid is not None:
            same = [layer.name in shared for layer in self.layers if layer.compiled is not None]
            laid = self._laid.step(units, same_input=same)
        return Step(Call(roster, len(units), 1, units), shared, laid)

    def _roster_with(self, identities: set[str]) -> BatchAdapters:
        """These adapters, and others that late steps used: what layers have of them stays the same.

        Else each request that comes or goes would have all layers ask the bank anew.
        """
        if self._roster is None or identities - {*self._roster.names}:
            self._disband()
            others = [r.identity for r in self.bank.residents if r.identity not in identities]
            names = (None, *others[-self.slots :], *sorted(identities))
            self._roster = BatchAdapters(names, self.bank.factors)
            if self.compiled is not None:
                self._laid = self.compiled.lay(self.bank.lay(names), len(names))
        return self._roster

    def _disband(self) -> None:
        """Forget what was prepared of the roster, and so give its pages back to the bank."""
        self._roster = self.current.step = self.items.step = None
        self._laid = None
        self._steps.clear()

    def _hold(self, numbers: Iterable[int]) -> None:
        """Keep these from being evicted, and no longer those of before; of all that are resident
        they are used last, in this order (which `Arrivals` goes by)."""
        before, self._held = self._held, list(dict.fromkeys(self._identities[n] for n in numbers))
        for identity in self._held:
            self.bank.acquire(identity)
        for identity in before:
            self.bank.release(identity)

    def _read(self, request: LoRARequest) -> Loaded:
        try:
            adapter = read_checkpoint(request.lora_path, self.base).adapter(self.base)
            adapter = self.base.shard(adapter)
            return Loaded(self.bank.paged(adapter), _same_input(adapter, self.layers))
        except FloraError as error:
            raise _named(error) from error

    def _know(self, request: LoRARequest, loaded: Loaded) -> None:
        """Take an adapter up among those that a step may ask for. Raises OutOfBudgetError."""
        self._check_budget({request.lora_int_id: loaded.adapter.nbytes}, self._pinned)
        self._sizes[request.lora_int_id] = loaded.adapter.nbytes
        self._requests[request.lora_int_id] = request

    def _check_budget(self, more: dict[int, int], pinned: set[int]) -> None:
        """Raise OutOfBudgetError unless the pinned adapters and a batch of the largest others fit:
        no step may find that there is no room."""
        budget, sizes = self.bank.budget, self._sizes | more
        if budget is None:
            return
        kept = sum(sizes.pop(number, 0) for number in pinned)
        largest = sum(sorted(sizes.values())[-self.slots :])
        if kept + largest > budget:
            raise _named(
                OutOfBudgetError(
                    f"a batch of the {min(self.slots, len(sizes))} largest adapters would take "
                    f"{largest} bytes, those that are pinned {kept}, and adapter_bytes is {budget}"
                )
            )

    def _load(self, number: int, loaded: Loaded) -> None:
        adapter = loaded.adapter
        if adapter.identity not in self.bank:
            self._disband()  # the bank's pools may move, and what was lent would keep the old ones
            idle = (r.identity for r in self.bank.residents if not (r.uses or r.pinned))
            while len(self.bank.residents) >= self.capacity and (oldest := next(idle, None)):
                self.bank.unload(oldest)
        self.bank.load(adapter)
        self._forget(number)
        self._identities[number] = adapter.identity
        self._shared[adapter.identity] = loaded.same_input
        for other in [n for n, i in self._identities.items() if i not in self.bank]:
            self._forget(other)  # to make room

    def _forget(self, number: int) -> str | None:
        """The identity that a number had, of which nothing prepared is kept."""
        identity = self._identities.pop(number, None)
        if identity and self._roster is not None and identity in self._roster.names:
            self._disband()
        if identity not in self._identities.values():
            self._shared.pop(identity or "", None)
        return identity

    # vLLM's warm-up steps, which it sizes and compiles by.

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        return default_rank

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:  # noqa: ARG002
        """An adapter that touches nothing: no shape depends on adapters."""
        if request.lora_int_id in self._identities:
            return False
        nothing = Adapter(kind="base", identity=request.lora_name, layers={})
        self._requests[request.lora_int_id] = request
        self._load(request.lora_int_id, Loaded(self.bank.paged(nothing), frozenset()))
        return True


def _named(error: FloraError) -> FloraError:
    """With its name in front, which is all that reaches another process."""
    return type(error)(f"{type(error).__name__}: {error}")


def _same_input(adapter: Adapter, layers: Iterable[AdaptedLayer]) -> frozenset[str]:
    """The merged layers whose input an adapter scales as one: the same b for all of its parts."""
    shared = set()
    for layer in layers:
        first, *others = (adapter.layers.get(part.name, LayerFactors()) for part in layer.parts)
        if all(_equal(first.hadamard_in, other.hadamard_in) for other in others):
            shared.add(layer.name)
    return frozenset(shared)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
