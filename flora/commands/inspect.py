"""`flora inspect`: what an adapter's folder holds, or what is wrong with it."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer


def command(
    path: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the same as JSON to this file.")
    ] = None,
) -> None:
    """Show an adapter's kind, ranks, modules, bytes, hash and base; exit 1 if it is invalid."""
    from rich.console import Console
    from rich.table import Table

    from flora.adapters.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path)
    adapter = checkpoint.adapter()
    config = checkpoint.config.model_dump(exclude_defaults=True)
    layers = Counter(
        (module.rpartition(".")[2], factors.pairs, factors.rank)
        for module, factors in adapter.layers.items()
    )
    record = {
        "path": str(path),
        "kind": checkpoint.kind,
        "config": config,
        "base_model": checkpoint.base_model,
        "bytes": adapter.nbytes,
        "identity": checkpoint.identity,
        "modules": [
            {"module": ending, "layers": count, "pairs": pairs, "rank": rank}
            for (ending, pairs, rank), count in sorted(layers.items())
        ],
    }
    if as_json:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps([record], indent=2) + "\n")

    console = Console(markup=False, highlight=False)  # names and patterns may hold brackets
    facts = Table(show_header=False, box=None)
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("kind", checkpoint.kind)
    for key, value in config.items():
        facts.add_row(key, json.dumps(value))
    facts.add_row("base model", checkpoint.base_model or "not said")
    facts.add_row("bytes", f"{adapter.nbytes:,}")
    facts.add_row("hash", checkpoint.identity)
    console.print(facts)
    table = Table("module", "layers", "Hadamard pairs (h)", "additive rank (l)")
    for (ending, pairs, rank), count in sorted(layers.items()):
        table.add_row(ending, str(count), str(pairs), str(rank))
    console.print(table)
