"""Tokens per second of `generate` in the transformers host, beside the base's and PEFT's."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

import flora
from flora.adapters.checkpoint import write_checkpoint
from flora.adapters.core import Adapter
from flora.base import ModelBase
from flora.bench.adapters import BASE, Spec
from flora.bench.limit import bandwidth, synchronize
from flora.bench.sharing import keep_flags, share_weights
from flora.bench.turns import check_systems, measure_in_turns, speed_ratio
from flora.ops.plan import MODULATION_TOKENS

SYSTEMS = ("flora", "peft", "peft-one")
"""What is measured beside the base: flora; PEFT's mixed batch; PEFT with one adapter for all."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is generated: rows of so many random prompt tokens, and so many new ones for each.

    distinct: different adapters in the batch; the rows take them in turns.
    """

    rows: int
    distinct: int
    prompt_tokens: int
    new_tokens: int


def measure(
    model: Any,
    mixes: Sequence[Sequence[Spec]],
    load: Load,
    *,
    systems: Sequence[str] = ("flora",),
    repeats: int,
    after_turn: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """A record of the base and of each system with each mix that it can run, measured in turns.

    model:   in evaluation mode; it has the adapters attached while this runs.
    mixes:   the adapters of a batch, each made as often as `distinct` asks for; one of more kinds
             than that is left out.
    systems: of `SYSTEMS`. PEFT runs its own kinds, and different adapters for LoRA only.

    A record's limit: the base's own time, and what W0's products take more for a copy of a row for
    each pair, or one pass over each adapter's modulated W0, whichever is faster; and the factors
    have to be read. Raises UsageError for another system.
    """
    check_systems(systems, SYSTEMS)
    with keep_flags(model), ExitStack() as stack:
        plain = share_weights(model)
        base = ModelBase(plain)
        runs = {"base": _generates(plain, load)}
        records: list[dict[str, Any]] = [
            {"system": "base", "kind": None, "rank": None, "run": "base", "limit": (Counter(), 0)}
        ]
        adapters: dict[str, Adapter] = {}
        for number, mix in enumerate(mixes):
            if len(mix) > load.distinct:
                continue  # not all of it would be in the batch
            distinct = [mix[i % len(mix)] for i in range(load.distinct)]
            facts = facts_of(mix)
            if "flora" in systems:
                made = {
                    f"{number}-{i}": spec.adapter(base, i)
                    for i, spec in enumerate(distinct)
                    if spec.kind != BASE
                }
                adapters |= made
                numbered = [f"{number}-{i}" for i in range(load.distinct)]
                rows = _rows([name if name in made else None for name in numbered], load)
                limit = _limit(made, rows, load, base)
                runs[run := f"flora {number}"] = _generates(model, load, rows)
                for tokens in limit[0]:
                    runs.setdefault(_products_run(tokens), _products(base, tokens))
                records.append({"system": "flora", "run": run, "limit": limit} | facts)
            for system in systems:
                if (loaded := _in_peft(system, mix, load, plain, base)) is not None:
                    names = list(loaded.peft_config)
                    named = None if system == "peft-one" else _rows(names, load)
                    runs[run := f"{system} {number}"] = _generates(loaded, load, named)
                    records.append({"system": system, "run": run, "distinct": len(names)} | facts)
        if adapters:
            flora.attach(model, adapters)
            stack.callback(flora.detach, model)
        seconds = measure_in_turns(runs, repeats=repeats, after_turn=after_turn)
    for record in records:
        found = seconds[record.pop("run")]
        record["tokens_per_second"] = load.rows * load.new_tokens / median(found)
        record["ratio_to_base"] = speed_ratio(found, seconds["base"])
        if "limit" in record:
            products, bytes_read = record.pop("limit")
            parts = [seconds["base"], [bytes_read / bandwidth(model.device)] * len(found)]
            for tokens, times in products.items():
                parts.append([times * s for s in seconds[_products_run(tokens)]])
            limits = [sum(of_turn) for of_turn in zip(*parts, strict=True)]
            record["ratio_to_limit"] = speed_ratio(found, limits)
        record |= asdict(load) | {"dtype": str(model.dtype).removeprefix("torch.")} | record
    return records


def _rows(names: Sequence[str | None], load: Load) -> list[str | None]:
    return [names[row % len(names)] for row in range(load.rows)]


def _limit(
    adapters: dict[str, Adapter], rows: Sequence[str | None], load: Load, base: ModelBase
) -> tuple[Counter[int], int]:
    """What the base does not do: products of W0 by their tokens, less its own, and bytes to read.

    For each pair its own product, if that is faster; or else each adapter's modulated weights. A
    batch reads its factors once a forward.
    """
    layers = [adapter.layers for adapter in adapters.values()]
    factors = sum(t.nbytes for own in layers for f in own.values() for _, t in f.parts())
    copies = [adapters[name].layers if name in adapters else {} for name in rows]
    pairs = max(sum(max(1, own[m].pairs) if m in own else 1 for own in copies) for m in layers[0])
    if load.prompt_tokens * (pairs - load.rows) <= MODULATION_TOKENS * load.distinct:
        products: Counter[int] = Counter()
        for tokens, times in ((load.prompt_tokens, 1), (1, load.new_tokens - 1)):
            products[pairs * tokens] += times
            products[load.rows * tokens] -= times
        more = Counter({tokens: times for tokens, times in products.items() if times})
        return more, load.new_tokens * factors
    sizes = {m: base.specs[m].dtype.itemsize * o * i for m, (o, i) in base.shapes.items()}
    modulated = sum(sizes[m] for own in layers for m, f in own.items() if f.pairs > 1)
    return Counter(), load.new_tokens * (factors + modulated)


def _products_run(tokens: int) -> str:
    return f"products of {tokens} tokens"


def _products(base: ModelBase, tokens: int) -> Callable[[], None]:
    """A function that takes once the product of each layer but the head."""
    layers = [layer for name, layer in base.layers.items() if name != base.head]
    spec = next(iter(base.specs.values()))
    inputs = {
        width: torch.randn(tokens, width).to(spec.device, spec.dtype)
        for width in {layer.in_features for layer in layers}
    }

    def run() -> None:
        with torch.inference_mode():
            for layer in layers:
                layer.product(inputs[layer.in_features])
        synchronize(spec.device)

    return run


def _in_peft(
    system: str, mix: Sequence[Spec], load: Load, plain: Any, base: ModelBase
) -> Any | None:
    """PEFT's model with the same adapters; None where PEFT does not run them."""
    spec = mix[0]
    if system == "flora" or len(mix) > 1 or spec.kind == "FLORA":
        return None
    if system == "peft" and (spec.kind != "LORA" or "use_dora" in spec.flags):
        return None
    from peft import PeftModel

    count = 1 if system == "peft-one" else load.distinct
    with TemporaryDirectory() as scratch:
        folders = {f"adapter{i}": Path(scratch, str(i)) for i in range(count)}
        for seed, folder in enumerate(folders.values()):
            write_checkpoint(folder, spec.checkpoint(base, seed))
        (first, folder), *others = folders.items()
        model = PeftModel.from_pretrained(share_weights(plain), str(folder), adapter_name=first)
        for name, folder in others:
            model.load_adapter(str(folder), name)
    return model.eval()


def _generates(
    model: Any, load: Load, names: Sequence[str | None] | None = None
) -> Callable[[], None]:
    """A function that generates."""
    generator = torch.Generator().manual_seed(0)
    size = load.rows, load.prompt_tokens
    prompts = torch.randint(model.config.vocab_size, size, generator=generator).to(model.device)
    settings = {} if names is None else {"adapter_names": list(names)}

    def run() -> None:
        model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=load.new_tokens,
            eos_token_id=None,  # no row ends early
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
        synchronize(model.device)

    return run


def facts_of(mix: Sequence[Spec]) -> dict[str, Any]:
    """What a record says of a mix: its kind and rank, or what is mixed."""
    if len(mix) == 1:
        return {"kind": mix[0].name, "rank": mix[0].rank}
    members = [spec.name if spec.rank is None else f"{spec.name}:{spec.rank}" for spec in mix]
    return {"kind": "mixed", "rank": None, "mix": "+".join(members)}
