"""`flora bench`: measurements, each against the base model in turns."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

MIXED = "FLORA:1+HIRA:1+IA3+LORA:8+LORA/use_dora:8+ADALORA:8+VERA:8+LOHA:2"
"""What "mixed" stands for in --kinds."""

app = typer.Typer(help="Measure this machine: tokens per second beside the base model's.")

Model = Annotated[
    str | None, typer.Option(help="A folder or a repository of the hub; the demo's if not given.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Write the records to this file.")]


@app.callback()
def group() -> None:
    """A group, though it has one command yet."""


@app.command()
def generate(
    model: Model = None,
    rows: Annotated[str, typer.Option(help="Rows of a batch, by comma.")] = "32",
    distinct: Annotated[
        str, typer.Option(help='Different adapters in a batch, by comma; "all" for one a row.')
    ] = "all",
    kinds: Annotated[
        str,
        typer.Option(
            help="Kinds of adapters, by comma: KIND, KIND/flag, KIND:rank, several in one batch "
            'joined by +; "mixed" for one of each.'
        ),
    ] = "FLORA,mixed",
    ranks: Annotated[str, typer.Option(help="Ranks of the kinds that name none, by comma.")] = "1",
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 16,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Counted turns of each.")] = 5,
    as_json: Json = None,
) -> None:
    """Tokens per second of `generate`, each row with its own adapter."""
    from rich.console import Console
    from rich.table import Table

    from flora.assets import demo_model
    from flora.bench.adapters import parse_specs
    from flora.bench.environment import environment
    from flora.bench.generate import Load, measure
    from flora.commands.progress import progress
    from flora.hosts.loading import load_model

    mixes = dict.fromkeys(
        tuple(parse_specs(MIXED if text == "mixed" else text, rank))
        for text in kinds.split(",")
        for rank in _numbers("--ranks", ranks)
    )
    loads = [
        Load(rows=r, distinct=d, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        for r in _numbers("--rows", rows)
        for d in _numbers("--distinct", distinct.replace("all", str(r)))
        if d <= r
    ]
    loaded, _ = load_model(str(demo_model()) if model is None else model)
    facts = {"study": "generate", "model": model or "SmolLM2-135M-Instruct"} | environment()
    records: list[dict[str, Any]] = []
    with progress("measuring", len(loads)) as advance:
        for load in loads:
            records += measure(loaded, list(mixes), load, repeats=repeats)
            advance(f"{load.rows} rows")
    if as_json:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps([facts | record for record in records], indent=2) + "\n")
    columns = ("system", "kind", "rank", "rows", "distinct")
    table = Table(*columns, "tokens per second", "ratio to base", "ratio to limit")
    for record in records:
        shown = ["" if record[column] is None else str(record[column]) for column in columns]
        table.add_row(
            *shown,
            f"{record['tokens_per_second']:.1f}",
            f"{record['ratio_to_base']:.2f}",
            f"{record['ratio_to_limit']:.2f}",
        )
    Console().print(table)


def _numbers(option: str, text: str) -> list[int]:
    """A list of positive numbers. Raises UsageError."""
    from flora.errors import UsageError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise UsageError(f"{option} {text!r}: positive numbers by comma")
    return [int(part) for part in parts]
