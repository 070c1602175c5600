"""A server whose adapters come and go: its speed, its memory, and whether each answer is right."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flora.bench.adapters import BASE, Spec
from flora.bench.answers import Checked
from flora.bench.environment import vllm_version
from flora.bench.generate import facts_of
from flora.bench.processes import BASE_MODEL, IDLE_SECONDS, Server
from flora.bench.serve import write_adapters, zipf
from flora.bench.systems import engine_options
from flora.bench.turns import measure_in_turns, speed_ratio
from flora.errors import FloraError, UsageError

RELOADED = "reloaded"
WEIGHTS = ("even", "odd")
"""What the reloaded name is loaded from in turns, and the names of the same where it is not."""

MARGIN_EPS = 64
"""So many steps of the model's type are between the log-probabilities of a token and of the next
best, or rounding, which follows from who else is in a batch, may choose the other."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a server is asked.

    adapters: that it knows by name.
    resident: that it may hold at a time.
    rows:     requests at a time, each followed by the next one.
    requests: of a turn, with adapters by Zipf's law with the exponent `zipf`.
    reloads:  of one name, with other weights each time, while requests go on.
    """

    adapters: int
    resident: int
    rows: int
    requests: int
    zipf: float
    reloads: int
    prompt_tokens: int
    new_tokens: int


def measure(
    model: str,
    mix: Sequence[Spec],
    load: Load,
    *,
    dtype: str = "auto",
    eager: bool = False,
    repeats: int,
    after_turn: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Records of flora's server with all adapters resident, of one with fewer, and of its reloads.

    model, dtype: as `flora.hosts.loading.load_model` takes them.
    mix:          what the adapters are, in turns.
    eager:        whether vLLM is kept from compiling the model.

    The servers are measured in turns. What is right is what each adapter answers first, where all
    are resident, beside `rows - 1` others: not those of any later answer. Raises UsageError for a
    load that cannot be, FloraError where a server ends or refuses a request.
    """
    if load.resident >= load.adapters:
        raise UsageError(f"--resident {load.resident}: fewer than the {load.adapters} adapters")
    vllm = vllm_version()
    names = [f"adapter{i}" for i in range(load.adapters)]
    specs = {name: (mix[i % len(mix)], i) for i, name in enumerate(names)}
    reloaded = next(spec for spec in mix if spec.kind != BASE)
    specs |= {name: (reloaded, load.adapters + i) for i, name in enumerate(WEIGHTS)}
    with TemporaryDirectory(prefix="flora-bench-") as scratch, ExitStack() as stack:
        written = write_adapters(model, dtype, specs, Path(scratch))
        options = engine_options(
            model,
            written.dtype,
            rows=load.rows,
            tokens=load.prompt_tokens + load.new_tokens,
            eager=eager,
        )
        options |= {"enable_lora": True, "gpu_memory_utilization": 0.45}  # two stand side by side
        weights = {name: written.folders.pop(name) for name in WEIGHTS}
        all_of_them = written.folders | weights
        whole = stack.enter_context(_server(options, len(all_of_them), all_of_them))
        whole.wait()
        churned = stack.enter_context(_server(options, load.resident, written.folders))
        churned.wait()

        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(written.vocabulary, (load.prompt_tokens,), generator=generator)
        expected: dict[str, list[int]] = {}
        all_resident, fewer, reloads = (
            Checked(server, prompt.tolist(), expected, rows=load.rows, new_tokens=load.new_tokens)
            for server in (whole, churned, churned)
        )
        known = [name if name in written.folders else BASE_MODEL for name in names]
        margin = MARGIN_EPS * torch.finfo(getattr(torch, written.dtype)).eps
        asyncio.run(all_resident.expect(dict.fromkeys([*known, *WEIGHTS]), margin))
        check_told_apart(*(expected[name] for name in WEIGHTS))
        draw = [known[i] for i in zipf(load.requests, load.adapters, load.zipf)]

        def turn(checked: Checked) -> None:
            time.sleep(IDLE_SECONDS)
            asyncio.run(checked.work(draw))

        runs = {
            "all resident": partial(turn, all_resident),
            "fewer resident": partial(turn, fewer),
        }
        measure_in_turns(runs, repeats=repeats, after_turn=after_turn)
        loads = asyncio.run(reloads.reload(RELOADED, weights, load.reloads, draw))
    settings: dict[str, Any] = {"system": "flora"} | facts_of(mix) | asdict(load)
    settings |= {"dtype": written.dtype, "eager": eager, "vllm": vllm}
    settings["distinct_answers"] = len({tuple(expected[name]) for name in known})
    whole_seconds, fewer_seconds = all_resident.seconds[1:], fewer.seconds[1:]
    records = [
        {
            "reloads": 0,
            "tokens_per_second": load.requests * load.new_tokens / median(own),
            "ratio_to_resident": speed_ratio(own, whole_seconds),
        }
        for own in (whole_seconds, fewer_seconds)
    ]
    records[0]["resident"] = load.adapters
    percentiles = quantiles(loads, n=100, method="inclusive")
    records.append({"median_load_seconds": median(loads), "p99_load_seconds": percentiles[-1]})
    return [
        settings | record | checked.figures()
        for record, checked in zip(records, (all_resident, fewer, reloads), strict=True)
    ]


def check_told_apart(one: list[int], other: list[int]) -> None:
    """Raises FloraError for answers that do not tell which weights they are of."""
    both = min(len(one), len(other))
    if one[:both] == other[:both]:
        raise FloraError(
            "the reloaded adapter's two weights answer alike: ask for more --new-tokens"
        )


def _server(options: Mapping[str, Any], resident: int, folders: Mapping[str, Path]) -> Server:
    slots = min(resident, options["max_num_seqs"])
    return Server(
        f"the server with {resident} resident adapters",
        "flora",
        {**options, "max_loras": slots, "max_cpu_loras": resident},
        folders,
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
    )
