"""`flora demo`: one prompt, one batch, eight adapters, eight programming languages."""

import copy
import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer

MODEL = "SmolLM2-135M-Instruct"
LANGUAGES = ("ruby", "perl", "rust", "haskell", "scheme", "bash", "ocaml", "php")
PROMPT = "# Sort a list"
STEPS = 90
REPORT_STEPS = 10
ROW_TOKENS = 64
LEARNING_RATE = 1e-2
ANSWER_TOKENS = 64
SPEED_TOKENS = 32
REPEATS = 3


def command(
    model: Annotated[
        str | None,
        typer.Option(help=f"A folder or a repository of the hub; {MODEL} if not."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A folder with <language>/<files> to train on.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The line that all eight go on from.")] = PROMPT,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Keep all of it as JSON in this file.")
    ] = None,
) -> None:
    """Train eight adapters together, then let one batch answer one prompt in eight languages."""
    from rich.console import Console
    from rich.markup import escape

    from flora.assets import demo_model, demo_text
    from flora.bench.environment import environment
    from flora.evals.languages import LanguageDetector, split
    from flora.hosts.loading import load_model
    from flora.machine import fast_dtype

    console = Console()
    if as_json:
        as_json.parent.mkdir(parents=True, exist_ok=True)
    console.print("[bold]1. A model, and source code in eight languages[/bold]")
    folder = text or demo_text()
    texts = split(folder, LANGUAGES)
    detector = LanguageDetector().fit(split(folder).held_out)
    source = model or MODEL
    dtype = fast_dtype()
    base, tokenizer = load_model(model or str(demo_model()), dtype)

    console.print(
        f"[bold]2. Eight FLoRA adapters of rank 1, trained in one batch[/bold]: {source}, {dtype}"
    )
    adapters = _train(base, tokenizer, texts.train, console)

    console.print(
        f"\n[bold]3. One prompt, one batch, eight adapters[/bold]: {escape(repr(prompt))}"
    )
    answers = _answer(base, tokenizer, adapters, prompt)
    seen = {name: detector.detect(answer) for name, answer in answers.items()}
    _print_answers(answers, seen, console)

    console.print("[bold]4. Speed[/bold], in turns, the same eight rows")
    speeds = _speeds(_seconds(base, tokenizer, adapters, prompt))
    _print_speeds(speeds, console)

    if as_json:
        common = {"study": "demo", "model": source, "dtype": dtype, **environment()}
        records: list[dict[str, Any]] = [
            {
                **common,
                "system": "flora",
                "kind": "FLORA",
                "rank": 1,
                "adapter": name,
                "language": name,
                "language_seen": seen[name],
                "prompt": prompt,
                "text": answer,
            }
            for name, answer in answers.items()
        ]
        kinds = {"base": (None, None, 0), "flora": ("FLORA", 1, 8), "peft": ("LORA", 1, 8)}
        for system, (speed, ratio) in speeds.items():
            kind, rank, distinct = kinds[system]
            records.append(
                {
                    **common,
                    "system": system,
                    "kind": kind,
                    "rank": rank,
                    "rows": len(LANGUAGES),
                    "distinct": distinct,
                    "new_tokens": SPEED_TOKENS,
                    "repeats": REPEATS,
                    "tokens_per_second": speed,
                    "ratio_to_base": ratio,
                }
            )
        as_json.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n")
        console.print(f"wrote {as_json}")


def _train(base: Any, tokenizer: Any, texts: dict[str, list[str]], console: Any) -> dict[str, Any]:
    """The trained adapters by language, every row of each batch being another's."""
    from flora.commands.progress import progress
    from flora.training.data import Example, RowStream, collate, tokenize
    from flora.training.trainer import JointTrainer, parse_recipe

    rows = {
        language: [
            row
            for text in own
            for row in tokenize(Example(adapter=language, text=text), tokenizer, ROW_TOKENS)
            if len(row.tokens) == ROW_TOKENS
        ]
        for language, own in texts.items()
    }
    recipe = parse_recipe({"peft_type": "FLORA", "r": 1, "learning_rate": LEARNING_RATE})
    start = time.perf_counter()
    recent: dict[str, deque[float]] = {name: deque(maxlen=REPORT_STEPS) for name in texts}
    console.print("mean loss  " + " ".join(f"{name:>7}" for name in texts))
    with JointTrainer(base, dict.fromkeys(texts, recipe)) as trainer:
        with progress("training", STEPS) as advance:
            for step, batch in zip(range(1, 1 + STEPS), RowStream(rows, 1, seed=0), strict=False):
                for name, loss in trainer.step(collate(batch, tokenizer.pad_token_id)).items():
                    recent[name].append(loss)
                advance("")
                if step % REPORT_STEPS == 0:
                    means = " ".join(f"{mean(losses):7.2f}" for losses in recent.values())
                    console.print(f"step {step:4}  {means}")
        console.print(f"{STEPS} steps in {time.perf_counter() - start:.0f} s")
        base = trainer.adapters.base
        return {name: trainer.adapters.checkpoint(name, None).adapter(base) for name in texts}


def _answer(base: Any, tokenizer: Any, adapters: dict[str, Any], prompt: str) -> dict[str, str]:
    import flora

    flora.attach(base, adapters)
    batch = tokenizer([f"{prompt}\n"] * len(adapters), return_tensors="pt").to(base.device)
    output = base.generate(
        **batch,
        adapter_names=list(adapters),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        repetition_penalty=1.1,
        pad_token_id=tokenizer.pad_token_id,
    )
    flora.detach(base)
    texts = tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return dict(zip(adapters, texts, strict=True))


def _seconds(
    base: Any, tokenizer: Any, adapters: dict[str, Any], prompt: str
) -> dict[str, list[float]]:
    """The turns of the base, of flora, and of PEFT with LoRA of the same layers."""
    from peft import LoraConfig, get_peft_model

    import flora
    from flora.adapters.targets import shortest_targets
    from flora.base import ModelBase
    from flora.bench.turns import measure_in_turns
    from flora.commands.progress import progress

    names = list(adapters)
    modules = shortest_targets(next(iter(adapters.values())).layers, ModelBase(base))
    config = LoraConfig(r=1, target_modules=modules, init_lora_weights=False)
    peft_model = get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        peft_model.add_adapter(name, config)
    flora_model = flora.attach(copy.deepcopy(base), adapters)
    batch = tokenizer([f"{prompt}\n"] * len(names), return_tensors="pt").to(base.device)

    def generate(model: Any, **more: Any) -> Callable[[], None]:
        def run() -> None:
            model.eval().generate(
                **batch,
                max_new_tokens=SPEED_TOKENS,
                min_new_tokens=SPEED_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                **more,
            )

        return run

    systems = {
        "base": generate(base),
        "flora": generate(flora_model, adapter_names=names),
        "peft": generate(peft_model, adapter_names=names),
    }
    with progress("measuring", len(systems) * (1 + REPEATS)) as advance:
        return measure_in_turns(systems, repeats=REPEATS, after_turn=advance)


def _print_answers(answers: dict[str, str], seen: dict[str, str], console: Any) -> None:
    from rich.syntax import Syntax
    from rich.table import Table

    table = Table("adapter", "seen", "answer", show_lines=True)
    for name, answer in answers.items():
        mark = "green" if seen[name] == name else "red"
        code = Syntax(answer.strip("\n"), name, background_color="default", word_wrap=True)
        table.add_row(name, f"[{mark}]{seen[name]}[/{mark}]", code)
    console.print(table)
    right = sum(seen[name] == name for name in answers)
    console.print(f"{right} of {len(answers)} answers are in their adapter's language")


def _speeds(seconds: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Tokens per second of each system, and the ratio to the base."""
    from flora.bench.turns import speed_ratio

    tokens = SPEED_TOKENS * len(LANGUAGES)
    return {
        system: (tokens / median(times), speed_ratio(times, seconds["base"]))
        for system, times in seconds.items()
    }


def _print_speeds(speeds: dict[str, tuple[float, float]], console: Any) -> None:
    from rich.table import Table

    titles = {
        "base": "base model, no adapters",
        "flora": "flora, 8 different FLoRA of rank 1",
        "peft": "PEFT adapter_names, 8 different LoRA of rank 1",
    }
    table = Table("system", "tokens per second", "ratio to base")
    for system, (speed, ratio) in speeds.items():
        table.add_row(titles[system], f"{speed:.1f}", f"{ratio:.2f}")
    console.print(table)
