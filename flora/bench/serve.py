"""Tokens per second and latency of vLLM's engines with adapters, beside the base's."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial
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
from flora.bench.limit import Further, Load, Size, sizes_of
from flora.bench.processes import BASE_MODEL, IDLE_SECONDS, Server, Worker
from flora.bench.systems import SYSTEMS, Engine, engine_options, engines_of
from flora.bench.turns import check_systems, measure_in_turns, speed_ratio
from flora.errors import UsageError
from flora.hosts.loading import load_model

SPARE_TOKENS = 16
"""A server's prompt is text, and may be some tokens longer than those that it was made of."""

LATENCIES = {"ttft": "ttft", "tpot": "tpot", "latency": "e2el"}
"""Times to the first token, for each further one, and of a whole request, as a record calls them
and as vLLM's client does."""

Figures = dict[str, float]
Run = Callable[[], Figures]


class Started(NamedTuple):
    """A system's runs, one for each of its mixes, and on a CPU, offline, a function that takes the
    product of each layer once, of as many tokens as it is told."""

    runs: Sequence[Run]
    take_products: Callable[[int], None] | None = None


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
    """Adapters' folders by their names, and of the model its layers, the type of its weights and
    how many tokens it knows."""

    folders: dict[str, Path]
    base: ModelBase
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

        @cache
        def sizes(spec: Spec) -> dict[str, Size]:
            return sizes_of(spec.adapter(written.base, 0).layers, written.base)

        (base_run, *_), take_products = start(engines[0])
        beside: dict[str, Beside] = {}
        for engine in engines[1:]:
            for (number, names), own in zip(engine.mixes.items(), start(engine).runs, strict=True):
                facts = {"kind": None, "rank": None} if number is None else facts_of(mixes[number])
                further = None
                if take_products and number is not None:
                    made = {name: sizes(specs[name][0]) for name in names if name}
                    rows = [names[row % len(names)] for row in range(load.rows)]
                    further = Further.of(made, rows, load, written.base)
                beside[f"{engine.name}, mix {number}"] = Beside(
                    facts={"system": engine.system} | facts, base=base_run, own=own, further=further
                )
        if not beside:
            raise UsageError(f"{', '.join(systems)}: none of them runs one of these mixes")
        more = {tokens for own in beside.values() if own.further for tokens in own.further.products}
        of_tokens = {tokens: f"products of {tokens} tokens" for tokens in more}
        runs: dict[str, Callable[[], None]] = dict(beside)
        if take_products:
            runs |= {name: partial(take_products, tokens) for tokens, name in of_tokens.items()}
        seconds = measure_in_turns(runs, repeats=repeats, after_turn=after_turn)
    settings = asdict(load) | {"dtype": written.dtype, "eager": eager, "vllm": vllm}
    settings |= {"load": "offline"} if traffic is None else {"load": "online"} | asdict(traffic)
    of_product = {tokens: seconds[name] for tokens, name in of_tokens.items()}
    records = [own.record(load, of_product) for own in beside.values()]
    of_base = [base for own in beside.values() for base, _ in own.turns[1:]]
    base_record = {"system": "base", "kind": None, "rank": None} | summary(of_base, of_base)
    return [settings | record for record in [base_record, *records]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Beside:
    """A system with one mix, each run of it with one of the base in front: a turn of many systems
    takes minutes, in which a machine may change its speed.

    facts:   that a record begins with.
    further: offline on a CPU, what its limit has beside the base's time.
    turns:   the base's figures and its own.
    """

    facts: dict[str, Any]
    base: Run
    own: Run
    further: Further | None
    turns: list[tuple[Figures, Figures]] = field(default_factory=list)

    def __call__(self) -> None:
        time.sleep(IDLE_SECONDS)
        base = self.base()
        time.sleep(IDLE_SECONDS)
        self.turns.append((base, self.own()))

    def record(self, load: Load, of_product: Mapping[int, Sequence[float]]) -> dict[str, Any]:
        """Of the turns that count, as those of W0's products by their tokens."""
        base, own = zip(*self.turns[1:], strict=True)
        record = self.facts | summary(own, base)
        if self.further is not None:
            own_seconds, base_seconds = (
                [load.rows * load.new_tokens / turn["tokens_per_second"] for turn in turns]
                for turns in (own, base)
            )
            record["ratio_to_limit"] = self.further.ratio(
                own_seconds, base_seconds, of_product, torch.device("cpu")
            )
        return record


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
    dtype = str(loaded.dtype).removeprefix("torch.")
    return Written(folders, base, dtype, loaded.config.vocab_size)


def zipf(requests: int, distinct: int, exponent: float, seed: int = 0) -> list[int]:
    """Each request's adapter: the k-th of them with a chance in proportion to 1/k^exponent."""
    chances = [(k + 1) ** -exponent for k in range(distinct)]
    return random.Random(seed).choices(range(distinct), chances, k=requests)  # noqa: S311


def summary(own: Sequence[Figures], base: Sequence[Figures]) -> Figures:
    """Each figure's median over the turns, and the ratio to the base's of the same turn."""
    figures = {key: median(turn[key] for turn in own) for key in own[0]}
    own_times, base_times = ([1 / t["tokens_per_second"] for t in turns] for turns in (own, base))
    return figures | {"ratio_to_base": speed_ratio(own_times, base_times)}


def _offline(
    options: dict[str, Any], written: Written, load: Load, stack: ExitStack, engine: Engine
) -> Started:
    """All rows at once, in a process of the engine's own."""
    worker = stack.enter_context(Worker(f"the engine {engine.name}", engine.system))
    generator = torch.Generator().manual_seed(0)
    size = load.rows, load.prompt_tokens
    device = worker.ask(
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

    runs = []
    for names in engine.mixes.values():
        adapters = [
            None if name is None else [name, numbers[name], str(written.folders[name])]
            for name in names
        ]
        runs.append(partial(run, [adapters[row % len(adapters)] for row in range(load.rows)]))
    return Started(runs, worker.ask if device == "cpu" else None)


def _online(
    options: dict[str, Any],
    written: Written,
    load: Load,
    stack: ExitStack,
    traffic: Traffic,
    client: Worker,
    engine: Engine,
) -> Started:
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

    runs = []
    for names in engine.mixes.values():
        drawn = zipf(traffic.requests, len(names), traffic.zipf)
        runs.append(partial(run, [names[i] or BASE_MODEL for i in drawn]))
    return Started(runs)
