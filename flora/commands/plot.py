"""`flora plot`: pictures of saved measurements."""

import json
from pathlib import Path
from typing import Annotated

import typer


def command(
    results: Annotated[
        list[Path], typer.Argument(help="Files that flora bench wrote, shown together.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the pictures (SVG).")] = Path("plots"),
) -> None:
    """Draw what flora bench measured: speed by rank and by different adapters, and the limit."""
    from flora.bench.plots import plot
    from flora.errors import UsageError

    records = []
    for path in results:
        try:
            records += [dict(record) for record in json.loads(path.read_bytes())]
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} holds no results of flora bench") from error
    for path in plot(records, output):
        typer.echo(path)
