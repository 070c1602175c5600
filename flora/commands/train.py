"""`flora train`: many adapters at once, from a YAML file."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from flora.errors import UsageError, faults

LOSSES = "losses.jsonl"


class Config(BaseModel):
    """The YAML file of `flora train`.

    model:      a folder or a repository of the hub.
    data:       JSONL; each line names its adapter: see `flora.training.data.Example`.
    output:     the folder for the adapters, `output/<name>`, and `losses.jsonl`.
    adapters:   for each name the keys of its `adapter_config.json`, and `learning_rate`,
                `weight_decay` for AdamW.
    steps:      how often each adapter is updated.
    rows:       rows of each adapter in a step.
    max_tokens: of a row.
    dtype:      of the base model's weights.
    lr_scheduler_type, warmup_steps: how the learning rates change: transformers' schedules.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: Path
    output: Path
    adapters: dict[str, dict[str, Any]] = Field(min_length=1)
    steps: PositiveInt
    rows: PositiveInt = 1
    max_tokens: PositiveInt = 512
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "linear"
    warmup_steps: NonNegativeInt = 0
    seed: int = 0


def command(
    config: Annotated[Path, typer.Argument(help="The YAML file.")],
) -> None:
    """Train many adapters at once, each on its own rows of every batch."""
    settings = read_config(config)

    from rich.console import Console
    from rich.table import Table

    from flora.adapters.checkpoint import check_writable
    from flora.hosts.loading import load_model
    from flora.training.data import read_examples
    from flora.training.trainer import Schedule, parse_recipe

    try:
        schedule = Schedule(
            name=settings.lr_scheduler_type,
            warmup_steps=settings.warmup_steps,
            steps=settings.steps,
        )
    except ValidationError as error:
        raise UsageError(f"{config}: {faults(error)}") from None
    if settings.output.exists() and not settings.output.is_dir():
        raise UsageError(f"{config}: output {str(settings.output)!r} is no folder")
    recipes = {}
    for name, raw in settings.adapters.items():
        if not re.fullmatch(r"[\w][\w.-]*", name) or name == LOSSES:
            raise UsageError(f"{config}: {name!r} cannot be an adapter's folder")
        check_writable(settings.output / name)
        try:
            recipes[name] = parse_recipe(raw)
        except UsageError as error:
            raise UsageError(f"{config}: adapters.{name}: {error}") from None
    examples = read_examples(settings.data)
    if unknown := sorted({example.adapter for example in examples} - set(recipes)):
        raise UsageError(f"{settings.data} names adapters not in {config}: {', '.join(unknown)}")
    model, tokenizer = load_model(settings.model, settings.dtype)
    losses = train(model, tokenizer, recipes, examples, settings, schedule)

    table = Table("adapter", "kind", "first loss", "last loss")
    for name, values in losses.items():
        table.add_row(name, recipes[name].kind, f"{values[0]:.3f}", f"{values[-1]:.3f}")
    Console().print(table)


def read_config(path: Path) -> Config:
    """Raises UsageError naming every key that does not hold."""
    import yaml

    if not path.is_file():
        raise UsageError(f"there is no config {str(path)!r}")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} is not a YAML mapping")
    try:
        return Config(**raw)
    except (ValidationError, TypeError) as error:
        said = faults(error) if isinstance(error, ValidationError) else error
        raise UsageError(f"{path}: {said}; the keys are {', '.join(Config.model_fields)}") from None


def train(
    model: Any,
    tokenizer: Any,
    recipes: dict[str, Any],
    examples: list[Any],
    settings: Config,
    schedule: Any,
) -> dict[str, list[float]]:
    """Train, save every adapter, and return each one's losses by step."""
    from flora.commands.progress import progress
    from flora.training.data import RowStream, collate, tokenize
    from flora.training.trainer import JointTrainer

    rows: dict[str, list[Any]] = {name: [] for name in recipes}
    for example in examples:
        rows[example.adapter] += tokenize(example, tokenizer, settings.max_tokens)
    stream = RowStream(rows, settings.rows, settings.seed)
    losses: dict[str, list[float]] = {name: [] for name in recipes}
    with JointTrainer(model, recipes, settings.seed, schedule) as trainer:
        with progress("training", settings.steps) as advance:
            for _, batch in zip(range(settings.steps), stream, strict=False):
                found = trainer.step(collate(batch, tokenizer.pad_token_id))
                for name, loss in found.items():
                    losses[name].append(loss)
                advance(" ".join(f"{name} {loss:.2f}" for name, loss in found.items()))
        trainer.save(settings.output, settings.model)
    with Path(settings.output, LOSSES).open("w") as file:
        for step, values in enumerate(zip(*losses.values(), strict=True), 1):
            file.write(
                json.dumps({"step": step, "losses": dict(zip(losses, values, strict=True))}) + "\n"
            )
    return losses
