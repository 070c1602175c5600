"""Whisper's own `generate`: rows end one by one, and a temperature runs some of them once more."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from flora.errors import ShapeError
from flora.hosts.rows import Batch, Generation


def wrappers(model: Any, generation: Generation) -> dict[str, Callable[..., Any]]:
    """What a Whisper model needs set on it while it generates, for the batches to follow its rows.

    The wrappers raise ShapeError where Whisper's rows are not the batch's.
    """
    batch, passes = generation.whole, _Passes(generation)
    generate_with_fallback, need_fallback = model.generate_with_fallback, model._need_fallback

    @wraps(generate_with_fallback)
    def segment(*args: Any, **kwargs: Any) -> Any:
        copies, rest = divmod(len(kwargs["seek"]), len(batch.spans))
        if rest:
            raise ShapeError(
                f"adapter_names has {len(batch.spans)} entries, Whisper {len(kwargs['seek'])} rows"
            )
        static = kwargs["generation_config"].cache_implementation == "static"
        passes.start(
            batch.repeat(copies).take(kwargs["batch_idx_map"]),
            least=kwargs["batch_size"] if static else 0,
        )
        return generate_with_fallback(*args, **kwargs)

    @wraps(need_fallback)
    def row(*args: Any, **kwargs: Any) -> Any:
        again, skipped = need_fallback(*args, **kwargs)
        passes.answer(again)
        return again, skipped

    return {"generate_with_fallback": segment, "_need_fallback": row}


class _Passes:
    """The rows of one segment, of which each temperature runs those that failed at the last."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation

    def start(self, batch: Batch, least: int) -> None:
        """least: the rows that a static cache is filled up to; nobody reads what these answer."""
        self.batch, self.least = batch, least
        self.generation.whole = batch
        self._run(range(len(batch.spans)))

    def answer(self, again: bool) -> None:
        """Whether the next row of this pass is in the next one; asked for each row in order."""
        self.answers.append(again)
        if len(self.answers) == len(self.rows):
            self._run([r for r, again in zip(self.rows, self.answers, strict=True) if again])

    def _run(self, rows: Sequence[int]) -> None:
        self.rows, self.answers = rows, list[bool]()
        filled = [*rows, *[0] * (self.least - len(rows))]
        self.generation.encoder = self.batch.take(filled)
