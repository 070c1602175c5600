"""Random adapters to measure with: of any kind, away from the identity, on every linear layer."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flora.adapters.checkpoint import Checkpoint, parse_config
from flora.adapters.core import Adapter
from flora.adapters.kinds import get_kind
from flora.adapters.targets import ALL_LINEAR, targeted
from flora.base import ModelBase
from flora.errors import UsageError

BASE = "BASE"
"""In place of a kind: rows without an adapter, beside others."""

SHARE_INPUT = "share_input"
"""The flag of FLoRA by which layers that read the same input have one b."""

SPREAD = 0.05
"""Standard deviation around the start: every tensor moves, and the model goes on to work."""


@dataclass(frozen=True)
class Spec:
    """An adapter to be made: its kind, its rank (None for a kind that has none), and flags of its
    config that are set."""

    kind: str
    rank: int | None
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`KIND/flag`, as a record gives it."""
        return "/".join([self.kind, *self.flags])

    def config(self) -> dict[str, Any]:
        """Of an `adapter_config.json`, for all linear layers but the head."""
        raw: dict[str, Any] = {"peft_type": self.kind, "target_modules": ALL_LINEAR}
        raw |= dict.fromkeys(self.flags, True)
        if self.rank and (field := get_kind(self.kind).Config.rank_field):
            raw[field] = self.rank
        return raw

    def adapter(self, base: ModelBase, seed: int) -> Adapter:
        """A random one. Raises InvalidAdapterError."""
        return self.checkpoint(base, seed).adapter(base)

    def checkpoint(self, base: ModelBase, seed: int) -> Checkpoint:
        """The same as its folder holds it, which PEFT reads too. Raises InvalidAdapterError."""
        kind = get_kind(self.kind)
        _, config = parse_config(self.config())
        generator = torch.Generator().manual_seed(seed)
        params: dict[str, dict[str, Tensor]] = {}
        shares = SHARE_INPUT in self.flags
        alone = config.model_copy(update={SHARE_INPUT: False}) if shares else config
        for module in sorted(targeted(config, base)):
            start = kind.init(alone, module, base, generator)
            params[module] = {
                name: value + SPREAD * torch.randn(value.shape, generator=generator)
                for name, value in start.items()
            }
        if shares:
            _share_inputs(params)
        largest = (max(sizes) for sizes in zip(*(base.shapes[m] for m in params), strict=True))
        shared = config.derived(*largest) if config.shared() else {}
        return Checkpoint(kind=self.kind, config=config, params=params, shared=shared)


def _share_inputs(params: dict[str, dict[str, Tensor]]) -> None:
    """Give layers that read the same input the b of the first of them, as `FloraModel` does."""
    from flora.tuner.config import input_of

    shared: dict[tuple[str, torch.Size], Tensor] = {}
    for module, own in params.items():
        first = shared.setdefault((input_of(module), own["flora_B"].shape), own["flora_B"])
        own["flora_B"] = first.clone()  # a file has each layer's own


def parse_specs(text: str, rank: int) -> list[Spec]:
    """The adapters of a batch: `KIND[/flag…][:rank]` or `BASE`, several joined by `+`.

    rank: of those that name none. Raises UsageError, also where there are base rows alone.
    """
    specs = []
    for part in text.split("+"):
        found = re.fullmatch(r"(\w+)((?:/\w+)*)(?::([1-9]\d*))?", part.strip())
        if found is None:
            raise UsageError(f"{part!r} is no KIND[/flag][:rank]")
        name, flags, own = found.groups()
        has_rank = name.upper() != BASE and get_kind(name).Config.rank_field is not None
        if own and not has_rank:
            raise UsageError(f"{name} has no rank")
        specs.append(
            Spec(
                kind=name.upper(),
                rank=int(own or rank) if has_rank else None,
                flags=tuple(flags.split("/")[1:]),
            )
        )
    if all(spec.kind == BASE for spec in specs):
        raise UsageError(f"{text!r}: the base is measured anyhow; name an adapter")
    return specs
