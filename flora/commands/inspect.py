"""`flora inspect`: what an adapter's folder holds, or what is wrong with it."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor


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

    record = describe(read_checkpoint(path))
    if as_json:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps([{"path": str(path), **record}], indent=2) + "\n")

    console = Console(markup=False, highlight=False)  # names and patterns may hold brackets
    facts = Table(show_header=False, box=None)
    facts.add_column()
    facts.add_column(overflow="fold")
    facts.add_row("kind", record["kind"])
    for key, value in record["config"].items():
        facts.add_row(key, json.dumps(value))
    facts.add_row("base model", record["base_model"] or "not said")
    facts.add_row("made with the base's", ", ".join(record["made_with"]) or "nothing")
    facts.add_row("bytes", f"{record['bytes']:,}")
    facts.add_row("hash", record["identity"])
    console.print(facts)
    heads = ("layers", "out", "in", "Hadamard pairs (h)", "additive rank (l)", "bias")
    table = Table("module", *heads)
    columns = ("out", "in", "pairs", "rank", "bias")
    same = Counter(
        (layer["module"].rpartition(".")[2], *(layer[column] for column in columns))
        for layer in record["modules"]
    )
    for (ending, *sizes, bias), count in sorted(same.items(), key=str):
        shown = ["any" if size is None else str(size) for size in sizes]
        table.add_row(ending, str(count), *shown, "yes" if bias else "no")
    console.print(table)


def describe(checkpoint: Any) -> dict[str, Any]:
    """What a checkpoint holds, and what the base must be: its layers, and what is asked of them."""
    probe = Probe(checkpoint.sizes())
    layers = checkpoint.fill(probe)
    return {
        "kind": checkpoint.kind,
        "config": checkpoint.config.model_dump(exclude_defaults=True),
        "base_model": checkpoint.base_model,
        "made_with": sorted(probe.asked),
        "bytes": sum(tensor.nbytes for tensor in checkpoint.tensors().values()),
        "identity": checkpoint.identity,
        "modules": [
            {
                "module": module,
                **probe.size(module, factors),
                "pairs": factors.pairs,
                "rank": factors.rank,
                "bias": factors.bias is not None,
            }
            for module, factors in sorted(layers.items())
        ],
    }


class Probe:
    """Stands in for a base model, of the sizes that an adapter's tensors say, and notes what is
    asked of it. Ranks come out right with it, numbers do not."""

    def __init__(self, sizes: Mapping[str, Mapping[str, int]]) -> None:
        # 1 where it is not known: what is made with that says it too, or has 1 as well.
        self.shapes = {m: (size.get("out", 1), size.get("in", 1)) for m, size in sizes.items()}
        self.asked: set[str] = set()

    def size(self, module: str, factors: Any) -> dict[str, int | None]:
        """What a layer's "out" and "in" must be, as far as its tensors, or what they made, say."""
        pairs = zip(("out", "in"), self.shapes[module], factors.size, strict=True)
        largest = {side: max(own, made or 1) for side, own, made in pairs}
        return {side: None if size == 1 else size for side, size in largest.items()}

    def bias(self, module: str) -> "Tensor":
        import torch

        self.asked.add("biases")
        return torch.zeros(self.shapes[module][0])

    def row_norm2(self, module: str) -> "Tensor":
        import torch

        self.asked.add("weights")
        return torch.ones(self.shapes[module][0])

    def product(self, module: str, x: "Tensor") -> "Tensor":
        self.asked.add("weights")
        return x.new_zeros(len(x), self.shapes[module][0])
