"""`flora bench`: measurements, each against the base model in turns."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from flora.bench.adapters import Spec

MIXED = "FLORA:1+HIRA:1+IA3+LORA:8+LORA/use_dora:8+ADALORA:8+VERA:8+LOHA:2"
"""What "mixed" stands for in --kinds."""

SHAPES = {
    "starcoder-1b": "2048x2048,2304x2048,8192x2048,2048x8192",
    "starcoder-3b": "2816x2816,3072x2816,11264x2816,2816x11264",
    "starcoder-15b": "6144x6144,6400x6144,24576x6144,6144x24576",
    "llama-3-8b": "4096x4096,1024x4096,14336x4096,4096x14336",
    "whisper-large": "1280x1280,5120x1280,1280x5120",
}
"""Models whose layers `op` knows by name."""

SPEED = ("tokens per second", 1.0, 1)
RATIO = ("of base", 1.0, 2)
LIMIT = ("of limit", 1.0, 2)
PIPE_COLUMNS = 200
"""Where no terminal says how wide a table may be."""

LATENCIES = {
    f"{stage}_{name}_seconds": (f"{title}{percentile}, ms", 1e3, 0)
    for name, title in (("ttft", "first token"), ("tpot", "token"), ("latency", "request"))
    for stage, percentile in (("median", ""), ("p99", " p99"))
}

app = typer.Typer(help="Measure this machine: the base, flora and others in turns, and the limit.")

Model = Annotated[
    str | None, typer.Option(help="A folder or a repository of the hub; the demo's if not given.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")]
Rows = Annotated[str, typer.Option(help="Rows of a batch, by comma.")]
Distinct = Annotated[
    str, typer.Option(help='Different adapters in a batch, by comma; "all" for one a row.')
]
Ranks = Annotated[str, typer.Option(help="Ranks of the kinds that name none, by comma.")]
Systems = Annotated[str, typer.Option(help="What is measured beside the base, by comma.")]
Backend = Annotated[
    str, typer.Option(help="flora's backend: auto, eager, cpu, triton or reference.")
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Repeats = Annotated[int, typer.Option(min=1, help="Counted turns of each.")]
Kinds = Annotated[
    str,
    typer.Option(
        help="Kinds of adapters, by comma: KIND, KIND/flag, KIND:rank, several in one batch "
        'joined by +, BASE among them for rows without; "mixed" for one of each.'
    ),
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Random ones, of each row.")]
NewTokens = Annotated[int, typer.Option(min=1, help="That each row generates.")]
Zipf = Annotated[
    float,
    typer.Option(
        min=0, help="Exponent of the law that draws a request's adapter; 0 draws all alike."
    ),
]
Eager = Annotated[
    bool, typer.Option("--eager", help="Keep vLLM from compiling the model, in all systems.")
]


@app.command()
def op(
    model: Model = None,
    shapes: Annotated[
        str,
        typer.Option(
            help=f"Layers OUTxIN, by comma; the model's own if not given, or those of "
            f"{', '.join(SHAPES)}."
        ),
    ] = "",
    rows: Rows = "1,8,32,128,512",
    distinct: Distinct = "1,all",
    ranks: Annotated[str, typer.Option(help="Ranks, by comma.")] = "1,2,4,8,16,64",
    systems: Systems = "flora,flora-activation,flora-weight,bmm,peft",
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    backend: Backend = "auto",
    repeats: Repeats = 5,
    explain: Annotated[bool, typer.Option(help="Say what the plan picks, and why.")] = False,
    fresh: Annotated[bool, typer.Option(help="Measure the plan's costs again.")] = False,
    as_json: Json = None,
) -> None:
    """Seconds of one linear layer, each row with its own adapter."""
    import torch

    from flora.bench import op as study
    from flora.commands.progress import progress
    from flora.ops.costs import forget_costs

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "device": device,
        "backend": backend,
    }
    if fresh:
        forget_costs()
    layers = _shapes(model, shapes)
    loads = [
        study.Load(out_features=o, in_features=i, rows=r, distinct=d, rank=rank)
        for o, i in layers
        for r, d in _batches(rows, distinct)
        for rank in _numbers("--ranks", ranks)
    ]
    records: list[dict[str, Any]] = []
    with progress("measuring", len(loads)) as advance:
        for load in loads:
            if explain:
                typer.echo(study.explain(load, **settings))
            records += study.measure(load, systems=systems.split(","), repeats=repeats, **settings)
            advance(f"{load.layer}, {load.rows} rows, rank {load.rank}")
    _keep(records, "op", shapes or model, as_json)
    columns = ("system", "kind", "rank", "layer", "rows", "distinct")
    figures = {"seconds": ("µs", 1e6, 0), "ratio_to_base": RATIO, "times_limit": ("limits", 1, 2)}
    _print(records, columns, figures)


@app.command()
def generate(
    model: Model = None,
    rows: Rows = "32",
    distinct: Distinct = "all",
    kinds: Kinds = "FLORA,mixed",
    ranks: Ranks = "1",
    systems: Systems = "flora",
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 64,
    dtype: Dtype = "auto",
    repeats: Repeats = 5,
    as_json: Json = None,
) -> None:
    """Tokens per second of `generate`, each row with its own adapter.

    Systems: flora; peft, its mixed batch; peft-one, one adapter for all rows.
    """
    from flora.bench import generate as study
    from flora.bench.limit import Load
    from flora.commands.progress import progress

    batches = _batches(rows, distinct)
    mixes = _mixes(kinds, ranks, batches)
    loads = [
        Load(rows=r, distinct=d, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        for r, d in batches
    ]
    loaded = _load(model, dtype)
    records: list[dict[str, Any]] = []
    with progress("measuring", len(loads)) as advance:
        for load in loads:
            records += study.measure(
                loaded, mixes, load, systems=systems.split(","), repeats=repeats
            )
            advance(f"{load.rows} rows")
    _keep(records, "generate", model, as_json)
    columns = ("system", "kind", "rank", "rows", "distinct")
    figures = {"tokens_per_second": SPEED, "ratio_to_base": RATIO, "ratio_to_limit": LIMIT}
    _print(records, columns, figures)


@app.command()
def train(
    model: Model = None,
    adapters: Annotated[int, typer.Option(min=1, help="Trained in one batch, a row each.")] = 8,
    tokens: Annotated[str, typer.Option(help="Tokens of a row, by comma.")] = "32,128",
    kinds: Annotated[
        str, typer.Option(help="Kinds of adapters, by comma: KIND, KIND/flag or KIND:rank.")
    ] = "FLORA,LORA",
    ranks: Ranks = "1,4,16,64",
    systems: Systems = "flora,peft,peft-one",
    dtype: Dtype = "auto",
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    repeats: Repeats = 5,
    as_json: Json = None,
) -> None:
    """Seconds and memory of a training step, each row training its own adapter.

    Systems: flora, all adapters in one batch; peft, LoRA adapters one after the other on the same
    rows; peft-one, one LoRA adapter on all rows.
    """
    from flora.bench import train as study
    from flora.bench.adapters import parse_specs
    from flora.commands.progress import progress

    specs = list(
        dict.fromkeys(
            spec
            for text in kinds.split(",")
            for rank in _numbers("--ranks", ranks)
            for spec in parse_specs(text, rank)
        )
    )
    loads = [study.Load(adapters=adapters, tokens=n) for n in _numbers("--tokens", tokens)]
    trained = list(study.trainable(specs, systems.split(",")))
    loaded = _load(model, dtype)
    records: list[dict[str, Any]] = []
    with progress("measuring", len(loads) * (1 + memory * len(trained))) as advance:
        for load in loads:
            found = study.measure(loaded, specs, load, systems=systems.split(","), repeats=repeats)
            advance(f"{load.tokens} tokens")
            for (spec, system), record in zip(trained if memory else (), found[1:], strict=False):
                record |= study.peak_bytes(_source(model), spec, system, load, dtype=dtype)
                advance(f"{load.tokens} tokens, memory of {system}")
            records += found
    _keep(records, "train", model, as_json)
    columns = ("system", "kind", "rank", "rows", "distinct", "tokens")
    memory_figures = {"added_bytes": ("MB added", 1e-6, 0)} if memory else {}
    figures = {"seconds": ("ms", 1e3, 0), "tokens_per_second": SPEED, "ratio_to_base": RATIO}
    _print(records, columns, figures | memory_figures)


@app.command()
def serve(
    model: Model = None,
    rows: Annotated[
        str,
        typer.Option(help="Rows of a batch, by comma; with --rate the most that run at once."),
    ] = "32",
    distinct: Distinct = "all",
    kinds: Kinds = "FLORA,mixed",
    ranks: Ranks = "1",
    systems: Systems = "flora",
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 64,
    rate: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="Measure servers: so many requests a second, by a Poisson process."
        ),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Of a turn, with --rate.")] = 128,
    zipf: Zipf = 1.0,
    dtype: Dtype = "auto",
    eager: Eager = False,
    repeats: Repeats = 5,
    as_json: Json = None,
) -> None:
    """Tokens per second of vLLM's engines, or latency of its servers, beside vLLM without adapters.

    Systems: flora, the plugin; vllm-lora, vLLM's own LoRA; bmm, LoRA by bmm as in the paper. The
    last two run LoRA alone.
    """
    from flora.bench import serve as study
    from flora.bench.limit import Load
    from flora.commands.progress import progress

    traffic = None
    batches = _batches(rows, distinct, drawn=rate is not None)
    if rate is not None:
        traffic = study.Traffic(rate=rate, requests=requests, zipf=zipf)
    mixes = _mixes(kinds, ranks, batches)
    records: list[dict[str, Any]] = []
    with progress("measuring", len(batches)) as advance:
        for r, d in batches:
            records += study.measure(
                _source(model),
                mixes,
                Load(rows=r, distinct=d, prompt_tokens=prompt_tokens, new_tokens=new_tokens),
                traffic=traffic,
                systems=systems.split(","),
                dtype=dtype,
                eager=eager,
                repeats=repeats,
            )
            advance(f"{r} rows")
    _keep(records, "serve", model, as_json)
    columns = ("system", "kind", "rank", "rows", "distinct")
    figures = {"tokens_per_second": SPEED, "ratio_to_base": RATIO}
    _print(records, columns, figures | (LATENCIES if traffic else {"ratio_to_limit": LIMIT}))


@app.command()
def churn(
    model: Model = None,
    adapters: Annotated[int, typer.Option(min=3, help="That the server knows.")] = 64,
    resident: Annotated[int, typer.Option(min=2, help="The most that it holds at a time.")] = 16,
    kinds: Annotated[
        str,
        typer.Option(help='What the adapters are in turns, joined by +; "mixed" for one of each.'),
    ] = "mixed",
    rows: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    requests: Annotated[int, typer.Option(min=1, help="Of a turn.")] = 256,
    zipf: Zipf = 1.0,
    reloads: Annotated[
        int, typer.Option(min=2, help="Of one name, each time with other weights.")
    ] = 50,
    prompt_tokens: PromptTokens = 16,
    new_tokens: NewTokens = 16,
    dtype: Dtype = "auto",
    eager: Eager = False,
    repeats: Repeats = 5,
    as_json: Json = None,
) -> None:
    """A server of more adapters than it holds, and of a name that is loaded again and again.

    Speed beside all of them resident, wrong answers, and memory half-way and at the end.
    """
    from flora.bench import churn as study
    from flora.bench.adapters import parse_specs
    from flora.commands.progress import progress

    load = study.Load(
        adapters=adapters,
        resident=resident,
        rows=rows,
        requests=requests,
        zipf=zipf,
        reloads=reloads,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
    with progress("measuring", 2 * (repeats + 1)) as advance:
        records = study.measure(
            _source(model),
            parse_specs(MIXED if kinds == "mixed" else kinds, 1),
            load,
            dtype=dtype,
            eager=eager,
            repeats=repeats,
            after_turn=advance,
        )
    _keep(records, "churn", model, as_json)
    figures = {
        "tokens_per_second": SPEED,
        "ratio_to_resident": ("of all", 1.0, 2),
        "median_load_seconds": ("ms a load", 1e3, 1),
        "answers": ("answers", 1.0, 0),
        "wrong_answers": ("wrong", 1.0, 0),
        "halfway_memory_bytes": ("MB half-way", 1e-6, 0),
        "memory_bytes": ("MB", 1e-6, 0),
    }
    _print(records, ("kind", "resident", "reloads"), figures)


def _source(model: str | None) -> str:
    from flora.assets import demo_model

    return str(demo_model()) if model is None else os.path.expanduser(model)


def _load(model: str | None, dtype: str = "auto") -> Any:
    from flora.hosts.loading import load_model

    return load_model(_source(model), dtype)[0]


def _shapes(model: str | None, text: str) -> list[tuple[int, int]]:
    """Layers by name or size, or a model's different ones but the head. Raises UsageError."""
    from flora.base import ModelBase
    from flora.errors import UsageError

    if not text:
        base = ModelBase(_load(model))
        return list(dict.fromkeys(size for m, size in base.shapes.items() if m != base.head))
    found = []
    for part in ",".join(SHAPES.get(name.strip(), name) for name in text.split(",")).split(","):
        sizes = part.split("x")
        if len(sizes) != 2 or not all(size.isascii() and size.isdigit() for size in sizes):
            raise UsageError(f"--shapes {part!r}: OUTxIN, or one of {', '.join(SHAPES)}")
        found.append((int(sizes[0]), int(sizes[1])))
    return found


def _mixes(kinds: str, ranks: str, batches: Iterable[tuple[int, int]]) -> list[tuple["Spec", ...]]:
    """The adapters of each batch. Raises UsageError where no batch has room for a mix."""
    from flora.bench.adapters import parse_specs
    from flora.errors import UsageError

    mixes = dict.fromkeys(
        tuple(parse_specs(MIXED if text == "mixed" else text, rank))
        for text in kinds.split(",")
        for rank in _numbers("--ranks", ranks)
    )
    if (needed := max(map(len, mixes))) > max(d for _, d in batches):
        raise UsageError(
            f"--kinds {kinds!r}: no batch has the {needed} different adapters of its largest mix"
        )
    return list(mixes)


def _batches(rows: str, distinct: str, *, drawn: bool = False) -> list[tuple[int, int]]:
    """Each number of rows with the numbers of different adapters that it has room for.

    drawn: whether requests draw their adapters: then there is always room.

    Raises UsageError where there is room for none.
    """
    from flora.errors import UsageError

    found = [
        (r, d)
        for r in _numbers("--rows", rows)
        for d in dict.fromkeys(_numbers("--distinct", distinct.replace("all", str(r))))
        if drawn or d <= r
    ]
    if not found:
        raise UsageError(f"--distinct {distinct!r}: there are not so many rows")
    return found


def _keep(
    records: Iterable[dict[str, Any]], study: str, model: str | None, path: Path | None
) -> None:
    """Write the records, a line each, with what they were measured on."""
    from flora.bench.environment import environment

    if path:
        facts = {"study": study, "model": model or "SmolLM2-135M-Instruct"} | environment()
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(facts | record) for record in records)
        path.write_text(f"[\n{lines}\n]\n")


def _print(
    records: Iterable[dict[str, Any]],
    columns: Sequence[str],
    figures: Mapping[str, tuple[str, float, int]],
) -> None:
    """A table; for each figure its title, what it is multiplied with, and its decimals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, *(title for title, _, _ in figures.values()))
    for record in records:
        shown = ["" if record[column] is None else str(record[column]) for column in columns]
        for name, (_, factor, decimals) in figures.items():
            value = record.get(name)
            shown.append("" if value is None else f"{value * factor:,.{decimals}f}")
        table.add_row(*shown)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, PIPE_COLUMNS)
    console.print(table)


def _numbers(option: str, text: str) -> list[int]:
    """A list of positive numbers. Raises UsageError."""
    from flora.errors import UsageError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"{option} {text!r}: positive numbers by comma")
    return [int(part) for part in parts]
