"""`flora merge`: a plain model with an adapter folded into its weights."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A folder or a repository of the hub.")],
    adapter: Annotated[str, typer.Argument(help="The adapter's folder or repository.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
) -> None:
    """Fold an adapter into a model's weights and write a plain model."""
    from flora.adapters.checkpoint import read_checkpoint
    from flora.base import ModelBase
    from flora.errors import UsageError
    from flora.hosts.loading import load_model
    from flora.hosts.transformers import merge
    from flora.store import fetch

    if out.exists():
        raise UsageError(f"{str(out)!r} exists already; name a new folder")
    folder = fetch(adapter)
    read_checkpoint(folder)  # before the model is loaded, which takes longer
    base_model, tokenizer = load_model(model)
    base = ModelBase(base_model)
    merge(base_model, read_checkpoint(folder, base).adapter(base))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        whole = Path(scratch, "model")
        base_model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        whole.rename(out)
    typer.echo(f"wrote {out}")
