"""The systems that serve: what vLLM's engine of each is started with, and which mixes it runs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flora.bench.adapters import BASE, Spec
from flora.bench.limit import Load

SYSTEMS = ("flora", "vllm-lora", "bmm")
"""What is measured beside vLLM without adapters: the plugin; vLLM's own LoRA; LoRA by bmm, the
paper's baseline, which is what the plugin does in plain torch."""

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""

LEAST_SEQUENCES = 8


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine that is measured: its system, its options beside those that all have, and for each
    mix that it runs, by its number, the adapters' names; None is the base."""

    name: str
    system: str
    options: dict[str, Any]
    mixes: dict[int | None, list[str | None]]


def engine_options(
    model: str, dtype: str, *, rows: int, tokens: int, eager: bool
) -> dict[str, Any]:
    """What all engines of a measurement have, as `LLM` takes it.

    rows:   that run at once.
    tokens: of a prompt and its answer.
    """
    return {
        "model": model,
        "dtype": dtype,
        "enforce_eager": eager,
        "max_model_len": tokens,
        "max_num_seqs": max(rows, LEAST_SEQUENCES),
    }


def engines_of(
    mixes: Sequence[Sequence[Spec]], systems: Sequence[str], load: Load
) -> Iterator[Engine]:
    """The base's engine, one of flora for all mixes, one of bmm for those of LoRA, and one of
    vLLM's LoRA for each of them.

    That of flora also runs without an adapter: what it costs who uses none.
    """
    yield Engine(name="base", system="base", options={}, mixes={None: [None]})
    fitting: dict[int | None, list[str | None]] = {
        number: [
            None if mix[i % len(mix)].kind == BASE else f"{number}-{i}"
            for i in range(load.distinct)
        ]
        for number, mix in enumerate(mixes)
        if len(mix) <= load.distinct
    }
    options = {"enable_lora": True, "max_loras": load.distinct}
    paged = options | {"max_cpu_loras": load.distinct * len(fitting)}
    own: dict[int | None, list[str | None]]
    if "flora" in systems and fitting:
        own = {None: [None], **fitting}
        yield Engine(name="flora", system="flora", options=paged, mixes=own)
    ranks = {n: max_lora_rank(mix) for n, mix in enumerate(mixes) if n in fitting}
    of_lora = {number: rank for number, rank in ranks.items() if rank}
    if "bmm" in systems and of_lora:
        plain = {"additional_config": {"flora": {"backend": "eager"}}}
        own = {number: fitting[number] for number in of_lora}
        yield Engine(name="bmm", system="bmm", options=paged | plain, mixes=own)
    if "vllm-lora" in systems:
        for number, rank in of_lora.items():
            yield Engine(
                name=f"vllm-lora of mix {number}",
                system="vllm-lora",
                options=options | {"max_lora_rank": rank},
                mixes={number: fitting[number]},
            )


def max_lora_rank(mix: Sequence[Spec]) -> int | None:
    """The least that vLLM's own LoRA can run a mix with; None where it cannot."""
    if any(spec.kind != "LORA" or "use_dora" in spec.flags for spec in mix):
        return None
    largest = max(spec.rank or 0 for spec in mix)
    return next((rank for rank in MAX_LORA_RANKS if rank >= largest), None)
