"""Joint training: one forward and backward for rows of many adapters, each with its own optimiser.

An adapter's gradient is that which it would get alone on its rows: the loss is the sum over
adapters of each one's own mean, and no parameter is shared.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from torch import Tensor, nn
from transformers import get_scheduler

from flora.adapters.checkpoint import Checkpoint, Params, parse_config, write_checkpoint
from flora.adapters.config import AdapterConfig
from flora.adapters.core import LayerFactors, all_finite
from flora.adapters.kinds import get_kind
from flora.adapters.targets import ALL_LINEAR, shortest_targets, targeted
from flora.bank import join_factors
from flora.base import ModelBase
from flora.errors import FloraError, InvalidAdapterError, UsageError, faults
from flora.hosts.rows import BASE
from flora.hosts.transformers import patch
from flora.ops.factors import BatchFactors
from flora.training.data import IGNORED, RowBatch, derive_seed


class AdapterRecipe(BaseModel):
    """How one adapter is trained.

    kind, config:  its PEFT type and that kind's config.
    learning_rate: of AdamW; FLoRA likes about 8e-3, LoRA 1e-4 to 1e-3.
    weight_decay:  of AdamW; it draws to zero, which for a FLoRA is not the identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: str
    config: AdapterConfig
    learning_rate: PositiveFloat
    weight_decay: NonNegativeFloat = 0.0


ScheduleName = Literal["constant", "constant_with_warmup", "linear", "cosine"]


class Schedule(BaseModel):
    """How the learning rates change, the same way for all adapters.

    name:         of transformers' schedules.
    warmup_steps: in which they rise from 0; not in "constant".
    steps:        in all; the constant ones need none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ScheduleName = "constant"
    warmup_steps: NonNegativeInt = 0
    steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> "Schedule":
        if self.name in ("linear", "cosine") and self.steps is None:
            raise ValueError(f"the schedule {self.name} needs steps")
        if self.name == "constant" and self.warmup_steps:
            raise ValueError("the schedule constant has no warmup_steps: constant_with_warmup has")
        return self


class TrainedAdapters:
    """Adapters whose factors are filled anew at each step from their parameters."""

    def __init__(self, model: nn.Module, recipes: Mapping[str, AdapterRecipe], seed: int) -> None:
        self.recipes = recipes
        self.base = ModelBase(model)
        self.params: dict[str, Params] = {}
        self.shared: dict[str, Mapping[str, Tensor]] = {}
        if BASE in recipes:
            raise UsageError(f"{BASE!r} is the name for no adapter; choose another")
        for name, recipe in recipes.items():
            modules = sorted(targeted(recipe.config, self.base))
            if not modules:
                raise UsageError(f"{name}: target_modules mean no linear layer of the model")
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            self.params[name] = {
                module: self._start(recipe, module, generator) for module in modules
            }
            shapes = [self.base.shapes[module] for module in modules]
            largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
            device = self.base.specs[modules[0]].device
            self.shared[name] = {
                tensor: value.to(device)
                for tensor, value in recipe.config.derived(*largest).items()
            }

    def __contains__(self, name: str) -> bool:
        return name in self.params

    def factors(self, module: str, names: tuple[str | None, ...]) -> BatchFactors | None:
        layers = [None if name is None else self._fill(name, module) for name in names]
        if not any(layers):
            return None
        return join_factors(layers, self.base.specs[module].dtype)

    def lay(self, names: tuple[str | None, ...]) -> None:
        """None: these are parameters, each for itself."""

    def trained(self, module: str) -> list[Tensor]:
        """A layer's parameters, of all adapters."""
        own = [params[module] for params in self.params.values() if module in params]
        return [tensor for params in own for tensor in params.values()]

    def leaves(self, name: str) -> list[Tensor]:
        """An adapter's parameters, of all layers."""
        return [tensor for own in self.params[name].values() for tensor in own.values()]

    def checkpoint(self, name: str, base_model: str | None) -> Checkpoint:
        """An adapter as its folder holds it, on the CPU."""
        recipe, params = self.recipes[name], self.params[name]
        return Checkpoint(
            kind=recipe.kind,
            config=recipe.config.with_targets(shortest_targets(params, self.base)),
            params={m: {n: t.detach().cpu() for n, t in own.items()} for m, own in params.items()},
            shared={t: self.shared[name][t].cpu() for t in recipe.config.shared()},
            base_model=base_model,
        )

    def _start(
        self, recipe: AdapterRecipe, module: str, generator: torch.Generator
    ) -> dict[str, Tensor]:
        spec = self.base.specs[module]
        exact = torch.promote_types(spec.dtype, torch.float32)
        init = get_kind(recipe.kind).init
        start = init(recipe.config, module, self.base, generator)
        return {n: t.to(spec.device, exact).requires_grad_() for n, t in start.items()}

    def _fill(self, name: str, module: str) -> LayerFactors | None:
        params = self.params[name].get(module)
        if params is None:
            return None
        recipe = self.recipes[name]
        params = {**self.shared[name], **params}
        return get_kind(recipe.kind).fill(recipe.config, module, params, self.base)


class JointTrainer:
    """Trains adapters of any trainable kinds on one model.

    The model is frozen and stays in evaluation mode: its dropout would differ with who trains
    beside whom. Use it as a context manager, or call `close`: the model is then as it was before.
    """

    def __init__(
        self,
        model: nn.Module,
        recipes: Mapping[str, AdapterRecipe],
        seed: int = 0,
        schedule: Schedule | None = None,
    ) -> None:
        """Start every adapter.

        schedule: of the learning rates; None keeps them constant.

        Raises UsageError where a recipe means no layer, or the model has adapters attached.
        """
        self.model = model
        self.adapters = TrainedAdapters(model, recipes, seed)
        groups = [
            {
                "params": self.adapters.leaves(name),
                "lr": recipe.learning_rate,
                "weight_decay": recipe.weight_decay,
            }
            for name, recipe in recipes.items()
        ]
        # Fused, as adapters are thousands of small tensors.
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        schedule = schedule or Schedule()
        self.scheduler = get_scheduler(
            schedule.name,
            self.optimizer,
            num_warmup_steps=schedule.warmup_steps,
            num_training_steps=schedule.steps,
        )
        self._trainable = {p: p.requires_grad for p in model.parameters()}
        self._training = {m: m.training for m in model.modules()}
        self._host = patch(model, self.adapters)
        model.requires_grad_(False)
        model.eval()

    def step(self, batch: RowBatch) -> dict[str, float]:
        """One step of every adapter that the batch names; the mean loss of each, before the step.

        Raises FloraError where a loss is not finite; then no adapter has changed.
        """
        self.optimizer.zero_grad()
        losses = self.losses(batch)
        values = dict(zip(losses, torch.stack([*losses.values()]).tolist(), strict=True))
        if bad := [name for name, value in values.items() if not abs(value) < float("inf")]:
            raise FloraError(f"the loss of {', '.join(bad)} is not finite: lower the learning rate")
        torch.stack([*losses.values()]).sum().backward()
        for name in self.adapters.params.keys() - losses.keys():
            for leaf in self.adapters.leaves(name):
                leaf.grad = None  # compiled code gives zeros, which the optimiser would follow
        self.optimizer.step()
        self.scheduler.step()
        return values

    def losses(self, batch: RowBatch) -> dict[str, Tensor]:
        """Each adapter's mean cross entropy over its own learned tokens of a batch."""
        device = next(self.model.parameters()).device
        logits = self.model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            adapter_names=batch.adapters,
            use_cache=False,
        ).logits
        # Each token's next one. Logits that nothing is learned from stay among the others: to leave
        # them out would copy all others, and their gradients.
        targets = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED).to(device)
        loss = F.cross_entropy(
            logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
            targets.flatten(),
            reduction="none",
            ignore_index=IGNORED,
        )
        names = list(dict.fromkeys(batch.adapters))
        rows = torch.tensor([names.index(name) for name in batch.adapters], device=device)
        zeros = loss.new_zeros(len(names))
        totals = zeros.index_add(0, rows, loss.view_as(targets).sum(1))
        learned = zeros.index_add(0, rows, (targets != IGNORED).sum(1).to(loss))
        means = totals / learned.clamp(min=1)
        return dict(zip(names, means.unbind(), strict=True))

    def save(self, folder: str | os.PathLike[str], base_model: str | None = None) -> None:
        """Write every adapter as `folder/<name>`, in PEFT's layout.

        Raises FloraError where one holds NaN or Inf; then nothing is written.
        """
        for name in self.adapters.params:
            if not all_finite(self.adapters.leaves(name)):
                raise FloraError(f"{name} holds NaN or Inf: lower its learning rate")
        for name in self.adapters.params:
            write_checkpoint(Path(folder, name), self.adapters.checkpoint(name, base_model))

    def close(self) -> None:
        """Give the model back."""
        self._host.unpatch()
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)
        for module, training in self._training.items():
            module.training = training

    def __enter__(self) -> "JointTrainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse_recipe(raw: Mapping[str, Any]) -> AdapterRecipe:
    """A recipe from its settings: the kind's `adapter_config.json` keys, and the optimiser's.

    Without `target_modules` it is for all linear layers. Raises UsageError for what does not hold.
    """
    optimiser = {k: raw[k] for k in ("learning_rate", "weight_decay") if k in raw}
    try:
        known = {"peft_type", *get_kind(raw.get("peft_type")).Config.model_fields}
        if unknown := sorted(set(raw) - known - set(optimiser)):
            there = ", ".join(sorted({*known, *AdapterRecipe.model_fields} - {"kind", "config"}))
            raise UsageError(f"no such settings: {', '.join(unknown)}; there are {there}")
        kind, config = parse_config({k: v for k, v in raw.items() if k not in optimiser})
        if not config.trainable:
            raise UsageError(f"{kind} cannot be trained here; train it with PEFT")
        if config.target_modules is None:
            config = config.model_copy(update={"target_modules": ALL_LINEAR})
        return AdapterRecipe(kind=kind, config=config, **optimiser)
    except InvalidAdapterError as error:
        raise UsageError(str(error)) from None
    except ValidationError as error:
        raise UsageError(faults(error)) from None
