"""Tokens per second of `generate` in the transformers host, against the base model's."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import flora
from flora.adapters.core import Adapter
from flora.base import ModelBase
from flora.bench.adapters import Spec
from flora.bench.turns import tokens_per_second


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
    repeats: int,
    after_turn: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """A record of the base and one of flora for each mix of adapters, all measured in turns.

    model: in evaluation mode; it has the adapters attached while this runs.
    mixes: the adapters of a batch, each made as often as `distinct` asks for.

    A mix's limit is the base's own speed with as many rows as the batch has Hadamard pairs, in
    tokens of the batch.
    """
    # Another model of the same weights, which nothing is attached to.
    plain = copy.deepcopy(model, {id(p): p for p in [*model.parameters(), *model.buffers()]})
    base = ModelBase(plain)
    runs = {f"base of {load.rows} rows": _generates(plain, load, load.rows)}
    records: list[dict[str, Any]] = [{"system": "base", "kind": None, "rank": None}]
    adapters: dict[str, Adapter] = {}
    for mix in mixes:
        made = {
            f"{len(runs)}-{i}": mix[i % len(mix)].adapter(base, seed=i)
            for i in range(load.distinct)
        }
        adapters |= made
        names = [list(made)[row % load.distinct] for row in range(load.rows)]
        pairs = max(
            sum(max(1, made[name].layers[module].pairs) for name in names)
            for module in next(iter(made.values())).layers
        )
        runs[system := f"flora {len(runs)}"] = _generates(model, load, load.rows, names)
        runs.setdefault(f"base of {pairs} rows", _generates(plain, load, pairs))
        records.append({"system": "flora", "run": system, "pairs": pairs} | _facts(mix))
    flora.attach(model, adapters)
    try:
        speeds = tokens_per_second(runs, repeats=repeats, after_turn=after_turn)
    finally:
        flora.detach(model)
    own = speeds[f"base of {load.rows} rows"]
    for record in records:
        limit = speeds[f"base of {record.pop('pairs', load.rows)} rows"]
        speed = speeds[str(record.pop("run"))] if "run" in record else own
        record |= {"tokens_per_second": speed, "ratio_to_base": speed / own}
        record |= {"ratio_to_limit": speed / limit} | asdict(load)
    return records


def _generates(
    model: Any, load: Load, rows: int, names: Sequence[str] | None = None
) -> Callable[[], int]:
    """A function that generates with so many rows, and returns the tokens of the load."""
    generator = torch.Generator().manual_seed(0)
    size = rows, load.prompt_tokens
    prompts = torch.randint(model.config.vocab_size, size, generator=generator).to(model.device)
    settings = {} if names is None else {"adapter_names": names}

    def run() -> int:
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=load.new_tokens,
            eos_token_id=None,  # no row ends early
            do_sample=False,
            pad_token_id=0,
            **settings,
        )
        return load.rows * load.new_tokens

    return run


def _facts(mix: Sequence[Spec]) -> dict[str, Any]:
    if len(mix) == 1:
        return {"kind": mix[0].name, "rank": mix[0].rank}
    members = [spec.name if spec.rank is None else f"{spec.name}:{spec.rank}" for spec in mix]
    return {"kind": "mixed", "rank": None, "mix": "+".join(members)}
