"""Tokens per second of `generate` in the transformers host, beside the base's and PEFT's."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
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
from flora.bench.limit import Further, Load, products, sizes_of, synchronize
from flora.bench.sharing import keep_flags, share_weights
from flora.bench.turns import check_systems, measure_beside

SYSTEMS = ("flora", "peft", "peft-one")
"""What is measured beside the base: flora; PEFT's mixed batch; PEFT with one adapter for all."""


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

    None where there is no such mix.

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
        runs: dict[str, Callable[[], None]] = {}
        records: list[dict[str, Any]] = [
            {"system": "base", "kind": None, "rank": None, "run": "base"}
        ]
        limits = {"base": Further(products=Counter(), nbytes=0)}
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
                sizes = {name: sizes_of(adapter.layers, base) for name, adapter in made.items()}
                further = Further.of(sizes, rows, load, base)
                runs[run := f"flora {number}"] = _generates(model, load, rows)
                limits[run] = further
                records.append({"system": "flora", "run": run} | facts)
            for system in systems:
                if (loaded := _in_peft(system, mix, load, plain, base)) is not None:
                    names = list(loaded.peft_config)
                    named = None if system == "peft-one" else _rows(names, load)
                    runs[run := f"{system} {number}"] = _generates(loaded, load, named)
                    records.append({"system": system, "run": run, "distinct": len(names)} | facts)
        if not runs:
            return []
        if adapters:
            flora.attach(model, adapters)
            stack.callback(flora.detach, model)
        of_tokens = {
            tokens: f"products of {tokens} tokens"
            for further in limits.values()
            for tokens in further.products
        }
        alone = {name: products(base, tokens) for tokens, name in of_tokens.items()}
        turns = measure_beside(
            _generates(plain, load), runs, alone, repeats=repeats, after_turn=after_turn
        )
    of_products = {tokens: turns[name].own for tokens, name in of_tokens.items()}
    for record in records:
        found = turns[run := record.pop("run")]
        record["tokens_per_second"] = load.rows * load.new_tokens / median(found.own)
        record["ratio_to_base"] = found.ratio
        if run in limits:
            record["ratio_to_limit"] = limits[run].ratio(*found, of_products, model.device)
        record |= asdict(load) | {"dtype": str(model.dtype).removeprefix("torch.")} | record
    return records


def _rows(names: Sequence[str | None], load: Load) -> list[str | None]:
    return [names[row % len(names)] for row in range(load.rows)]


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
