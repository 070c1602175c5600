"""Joint training of many adapters, beside PEFT training them one after the other."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from flora.adapters.targets import ALL_LINEAR
from flora.bench.adapters import Spec
from flora.bench.limit import memory_peak, synchronize
from flora.bench.sharing import keep_flags, share_weights
from flora.bench.turns import check_systems, measure_beside
from flora.hosts.loading import load_model
from flora.training.data import RowBatch
from flora.training.trainer import JointTrainer, parse_recipe

SYSTEMS = ("flora", "peft", "peft-one")
"""All adapters in one batch; PEFT's LoRA adapters one after the other on the same rows; one LoRA
adapter of PEFT on all rows at once."""

LEARNING_RATE = 1e-4
MEMORY_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Load:
    """A step: one row of so many random tokens for each of the adapters."""

    adapters: int
    tokens: int


def measure(
    model: Any,
    specs: Sequence[Spec],
    load: Load,
    *,
    systems: Sequence[str] = SYSTEMS,
    repeats: int,
    after_turn: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """A record of each system with each kind that it trains, `seconds` a step, in turns.

    The base's record is its forward and backward for the same rows, without a weight's gradient.
    Raises UsageError for another system.
    """
    rows = load.adapters
    dtype = str(model.dtype).removeprefix("torch.")
    facts = {"rows": rows, "distinct": rows, "tokens": load.tokens, "dtype": dtype}
    with keep_flags(model), ExitStack() as stack:
        runs: dict[str, Callable[[], None]] = {}
        records: list[dict[str, Any]] = [
            {"system": "base", "kind": None, "rank": None, "run": "base"}
        ]
        for spec, system in trainable(specs, systems):
            run = f"{system} {spec.name}:{spec.rank}"
            runs[run] = _step(model, spec, system, load, stack)
            records.append({"system": system, "kind": spec.name, "rank": spec.rank, "run": run})
        turns = measure_beside(
            _base_step(model, load), runs, repeats=repeats, after_turn=after_turn
        )
    for record in records:
        found = turns[record.pop("run")]
        record |= facts | ({"distinct": 1} if record["system"] == "peft-one" else {})
        record["seconds"] = median(found.own)
        record["tokens_per_second"] = rows * load.tokens / median(found.own)
        record["ratio_to_base"] = found.ratio
    return records


def peak_bytes(
    model: str, spec: Spec, system: str, load: Load, *, dtype: str = "auto"
) -> dict[str, int]:
    """The most memory that a training of its own process holds, and how much of it steps added.

    model, dtype: as `flora.hosts.loading.load_model` takes them.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_bytes, (model, dtype, asdict(spec), system, asdict(load)))


def trainable(specs: Sequence[Spec], systems: Sequence[str]) -> Iterator[tuple[Spec, str]]:
    """Each kind with the systems that train it. Raises UsageError for another system."""
    check_systems(systems, SYSTEMS)
    for spec in specs:
        for system in systems:
            if system == "flora" or spec.name == "LORA":
                yield spec, system


def _tokens(model: Any, load: Load) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = load.adapters, load.tokens
    return torch.randint(model.config.vocab_size, size, generator=generator).to(model.device)


def _base_step(model: Any, load: Load) -> Callable[[], None]:
    tokens = _tokens(model, load)
    plain = share_weights(model).requires_grad_(False)
    embed = plain.get_input_embeddings()

    def run() -> None:
        inputs = embed(tokens).detach().requires_grad_()
        plain(inputs_embeds=inputs, labels=tokens, use_cache=False).loss.backward()
        synchronize(model.device)

    return run


def _step(model: Any, spec: Spec, system: str, load: Load, stack: ExitStack) -> Callable[[], None]:
    if system == "flora":
        return _flora_step(model, spec, load, stack)
    return _peft_step(model, spec, load, one=system == "peft-one")


def _flora_step(model: Any, spec: Spec, load: Load, stack: ExitStack) -> Callable[[], None]:
    tokens = _tokens(model, load)
    names = [f"adapter{i}" for i in range(load.adapters)]
    recipe = parse_recipe(spec.config() | {"learning_rate": LEARNING_RATE})
    trainer = stack.enter_context(JointTrainer(share_weights(model), dict.fromkeys(names, recipe)))
    batch = RowBatch(
        adapters=names, input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens
    )

    def run() -> None:
        trainer.step(batch)
        synchronize(model.device)

    return run


def _peft_step(model: Any, spec: Spec, load: Load, *, one: bool) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=spec.rank or 8, target_modules=ALL_LINEAR)
    peft_model: Any = get_peft_model(share_weights(model), config).eval()
    own = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=LEARNING_RATE, fused=True)
    # One adapter stands for all: to change over would only take PEFT more time.
    batches = _tokens(model, load).chunk(1 if one else load.adapters)

    def run() -> None:
        for tokens in batches:
            optimizer.zero_grad()
            loss = peft_model(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                labels=tokens,
                use_cache=False,
            ).loss
            loss.backward()
            optimizer.step()
            loss.item()  # a trainer's log asks for it
        synchronize(model.device)

    return run


def _peak_bytes(
    name: str, dtype: str, spec: dict[str, Any], system: str, load: dict[str, Any]
) -> dict[str, int]:
    model, _ = load_model(name, dtype)
    with ExitStack() as stack:
        run = _step(model, Spec(**spec), system, Load(**load), stack)
        before = memory_peak(model.device, reset=True)
        for _ in range(MEMORY_STEPS):
            run()
        peak = memory_peak(model.device)
    return {"peak_bytes": peak, "added_bytes": peak - before}
