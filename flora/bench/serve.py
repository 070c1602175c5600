"""Tokens per second and latency of vLLM's engines with adapters, beside the base's."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from flora.adapters.checkpoint import write_checkpoint
from flora.base import ModelBase
from flora.bench.adapters import BASE, Spec
from flora.bench.environment import vllm_version
from flora.bench.generate import facts_of
from flora.bench.processes import BASE_MODEL, IDLE_SECONDS, Server, Worker
from flora.bench.systems import SYSTEMS, Engine, Load, engine_options, engines_of
from flora.bench.turns import check_systems, measure_in_turns, speed_ratio
from flora.hosts.loading import load_model

SPARE_TOKENS = 16
"""A server's prompt is text, and may be some tokens longer than those that it was made of."""

LATENCIES = {"ttft": "ttft", "tpot": "tpot", "latency": "e2el"}
"""Times to the first token, for each further one, and of a whole request, as a record calls them
and as vLLM's client does."""

Figures = dict[str, float]
Run = Callable[[], Figures]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What arrives at a server: requests by a Poisson process, with adapters by Zipf's law.

    rate: requests a second.
    zipf: the law's exponent; 0 is the same chance for each adapter.
    """

    rate: float
    requests: int
    zipf: float


class Written(NamedTuple):
    """Adapters' folders by their names, and of the model the type of its weights and how many
    tokens it knows."""

    folders: dict[str, Path]
    dtype: str
    vocabulary: int


def measure(
    model: str,
    mixes: Sequence[Sequence[Spec]],
    load: Load,
    *,
    traffic: Traffic | None = None,
    systems: Sequence[str] = ("flora",),
    dtype: str = "auto",
    eager: bool = False,
    repeats: int,
    after_turn: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """A record of the base and of each system with each mix that it can run, measured in turns.

    model, dtype: as `flora.hosts.loading.load_model` takes them.
    mixes:        the adapters of a batch, each made as often as `distinct` asks for; one of more
                  kinds than that is left out.
    traffic:      what a server gets; without it all rows are generated at once, offline.
    systems:      of `SYSTEMS`. vLLM's own LoRA runs that kind alone.
    eager:        whether vLLM is kept from compiling the model.

    Raises UsageError for another system, FloraError where a process ends or a request fails.
    """
    check_systems(systems, SYSTEMS)
    vllm = vllm_version()
    specs = {
        f"{number}-{i}": (mix[i % len(mix)], i)
        for number, mix in enumerate(mixes)
        if len(mix) <= load.distinct
        for i in range(load.distinct)
    }
    engines = list(engines_of(mixes, systems, load))
    with TemporaryDirectory(prefix="flora-bench-") as scratch, ExitStack() as stack:
        written = write_adapters(model, dtype, specs, Path(scratch))
        tokens = load.prompt_tokens + load.new_tokens + (SPARE_TOKENS if traffic else 0)
        options = engine_options(model, written.dtype, rows=load.rows, tokens=tokens, eager=eager)
        options |= {
            "enable_prefix_caching": False,
            "gpu_memory_utilization": round(0.9 / len(engines), 3),  # they stand side by side
        }
        if traffic is None:
            start = partial(_offline, options, written, load, stack)
        else:
            client = stack.enter_context(Worker("vLLM's client", "base"))
            client.ask(None)
            start = partial(_online, options, written, load, stack, traffic, client)
        records: list[dict[str, Any]] = []
        turns: dict[str, list[Figures]] = {}
        runs: dict[str, Callable[[], None]] = {}
        for engine in engines:
            for number, run in start(engine).items():
                facts = {"kind": None, "rank": None} if number is None else facts_of(mixes[number])
                records.append({"system": engine.system} | facts)
                turns[name := f"{engine.name}, mix {number}"] = []
                runs[name] = partial(_keep, turns[name], run)
        measure_in_turns(runs, repeats=repeats, after_turn=after_turn)
    settings = asdict(load) | {"dtype": written.dtype, "eager": eager, "vllm": vllm}
    settings |= {"load": "offline"} if traffic is None else {"load": "online"} | asdict(traffic)
    base, *_ = turns.values()
    return [
        settings | record | summary(own[1:], base[1:])
        for record, own in zip(records, turns.values(), strict=True)
    ]


def write_adapters(
    model: str, dtype: str, specs: Mapping[str, tuple[Spec, int]], folder: Path
) -> Written:
    """Write a model's adapters, by name, each of a spec and a seed; rows of the base have none."""
    loaded, _ = load_model(model, dtype)
    base = ModelBase(loaded)
    folders = {name: folder / name for name, (spec, _) in specs.items() if spec.kind != BASE}
    for name, path in folders.items():
        spec, seed = specs[name]
        write_checkpoint(path, spec.checkpoint(base, seed))
    return Written(folders, str(loaded.dtype).removeprefix("torch."), loaded.config.vocab_size)


def zipf(requests: int, distinct: int, exponent: float, seed: int = 0) -> list[int]:
    """Each request's adapter: the k-th of them with a chance in proportion to 1/k^exponent."""
    chances = [(k + 1) ** -exponent for k in range(distinct)]
    return random.Random(seed).choices(range(distinct), chances, k=requests)  # noqa: S311


def summary(own: Sequence[Figures], base: Sequence[Figures]) -> Figures:
    """Each figure's median over the turns, and the ratio to the base's of the same turn."""
    figures = {key: median(turn[key] for turn in own) for key in own[0]}
    own_times, base_times = ([1 / t["tokens_per_second"] for t in turns] for turns in (own, base))
    return figures | {"ratio_to_base": speed_ratio(own_times, base_times)}


def _keep(turns: list[Figures], run: Run) -> None:
    time.sleep(IDLE_SECONDS)
    turns.append(run())


def _offline(
    options: dict[str, Any], written: Written, load: Load, stack: ExitStack, engine: Engine
) -> dict[int | None, Run]:
    """All rows at once, in a process of the engine's own."""
    worker = stack.enter_context(Worker(f"the engine {engine.name}", engine.system))
    generator = torch.Generator().manual_seed(0)
    size = load.rows, load.prompt_tokens
    worker.ask(
        {
            "options": options | engine.options,
            "prompts": torch.randint(written.vocabulary, size, generator=generator).tolist(),
            "new_tokens": load.new_tokens,
        }
    )
    numbers = {name: number for number, name in enumerate(written.folders, 1)}

    def run(rows: list[list[Any] | None]) -> Figures:
        start = time.perf_counter()
        answers = worker.ask(rows)
        seconds = time.perf_counter() - start
        return {"tokens_per_second": sum(map(len, answers)) / seconds}

    runs: dict[int | None, Run] = {}
    for mix, names in engine.mixes.items():
        adapters = [
            None if name is None else [name, numbers[name], str(written.folders[name])]
            for name in names
        ]
        runs[mix] = partial(run, [adapters[row % len(adapters)] for row in range(load.rows)])
    return runs


def _online(
    options: dict[str, Any],
    written: Written,
    load: Load,
    stack: ExitStack,
    traffic: Traffic,
    client: Worker,
    engine: Engine,
) -> dict[int | None, Run]:
    """Requests to a server, by vLLM's own client."""
    own = [name for names in engine.mixes.values() for name in names if name]
    server = stack.enter_context(
        Server(
            f"the server {engine.name}",
            engine.system,
            options | engine.options,
            {name: written.folders[name] for name in own},
        )
    )
    server.wait()
    arguments = ["--backend", "openai", "--base-url", server.url, "--model", BASE_MODEL]
    arguments += ["--tokenizer", options["model"], "--dataset-name", "random"]
    arguments += ["--random-input-len", str(load.prompt_tokens)]
    arguments += ["--random-output-len", str(load.new_tokens)]
    arguments += ["--num-prompts", str(traffic.requests), "--request-rate", str(traffic.rate)]
    arguments += ["--temperature", "0", "--percentile-metrics", ",".join(LATENCIES.values())]
    arguments += ["--disable-tqdm"]

    def run(names: list[str]) -> Figures:
        # As many names as requests, so that taking them in turns is the draw.
        draw = ["--lora-assignment", "round-robin", "--lora-modules", *names]
        found = client.ask(arguments + draw)
        if found["failed"]:
            raise server.failure(f"failed {found['failed']} of {traffic.requests} requests")
        figures = {"tokens_per_second": found["output_throughput"]}
        for name, theirs in LATENCIES.items():
            figures[f"median_{name}_seconds"] = found[f"median_{theirs}_ms"] / 1e3
            figures[f"p99_{name}_seconds"] = found[f"p99_{theirs}_ms"] / 1e3
        return figures

    runs: dict[int | None, Run] = {}
    for mix, names in engine.mixes.items():
        drawn = zipf(traffic.requests, len(names), traffic.zipf)
        runs[mix] = partial(run, [names[i] or BASE_MODEL for i in drawn])
    return runs
