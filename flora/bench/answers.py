"""Whether a server's answers are right, while many requests of many adapters are under way."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

from flora.bench.processes import CONNECTIONS, Server

ANSWER_SECONDS = 600.0


class Checked:
    """A server that is asked one prompt of many adapters.

    prompt:   token ids.
    expected: the tokens that each name's answer begins with.
    rows:     requests at a time, each followed by the next one.

    answers, wrong: how many there were, and how many of them began otherwise.
    memory:         bytes that the server's processes held, from time to time.
    seconds:        that each `work` took.
    """

    def __init__(
        self,
        server: Server,
        prompt: list[int],
        expected: dict[str, list[int]],
        *,
        rows: int,
        new_tokens: int,
    ) -> None:
        self.server, self.prompt, self.expected = server, prompt, expected
        self.rows, self.new_tokens = rows, new_tokens
        self.answers = self.wrong = 0
        self.memory: list[int] = []
        self.seconds: list[float] = []

    def figures(self) -> dict[str, int]:
        """Its counts for a record."""
        return {
            "answers": self.answers,
            "wrong_answers": self.wrong,
            "halfway_memory_bytes": self.memory[(len(self.memory) - 1) // 2],
            "memory_bytes": self.memory[-1],
        }

    async def expect(self, names: Iterable[str], margin: float) -> None:
        """Take what each of them answers now to be right.

        margin: as `certain_tokens` takes it.
        """
        async with self._connect() as http:

            async def learn(name: str) -> None:
                more = {"logprobs": 2, "return_tokens_as_token_ids": True}
                choice = await self._answer(http, name, **more)
                best = choice["logprobs"]["top_logprobs"]
                self.expected[name] = certain_tokens(choice["token_ids"], best, margin)

            await self._each(names, learn)

    async def work(self, names: Iterable[str]) -> None:
        """A request of each name."""
        async with self._connect() as http:
            start = time.perf_counter()
            await self._work(http, names)
            self.seconds.append(time.perf_counter() - start)
        self.memory.append(self.server.memory_bytes())

    async def reload(
        self,
        name: str,
        weights: Mapping[str, Path],
        times: int,
        others: Sequence[str],
    ) -> list[float]:
        """Load one name again and again, and ask it each time, while the others are asked.

        weights: the folders that it is loaded from in turns, by names that tell what is right.

        Returns the seconds of each time that it was loaded.
        """
        seconds: list[float] = []

        async def reloads(http: httpx.AsyncClient) -> None:
            for _, (right, folder) in zip(range(times), cycle(weights.items()), strict=False):
                body = {"lora_name": name, "lora_path": str(folder), "load_inplace": True}
                start = time.perf_counter()
                await self._post(http, "/v1/load_lora_adapter", body)
                seconds.append(time.perf_counter() - start)
                await self._check(http, name, self.expected[right])
                self.memory.append(self.server.memory_bytes())

        async with self._connect() as http:
            tasks = [
                asyncio.create_task(reloads(http)),
                asyncio.create_task(self._work(http, cycle(others))),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return seconds

    async def _work(self, http: httpx.AsyncClient, names: Iterable[str]) -> None:
        await self._each(names, lambda name: self._check(http, name, self.expected[name]))

    async def _each(self, names: Iterable[str], ask: Callable[[str], Awaitable[None]]) -> None:
        left = iter(names)

        async def one_after_the_other() -> None:
            for name in left:
                await ask(name)

        await asyncio.gather(*(one_after_the_other() for _ in range(self.rows)))

    async def _check(self, http: httpx.AsyncClient, name: str, expected: list[int]) -> None:
        choice = await self._answer(http, name)
        self.answers += 1
        self.wrong += choice["token_ids"][: len(expected)] != expected

    async def _answer(self, http: httpx.AsyncClient, name: str, **other: Any) -> Any:
        body = {
            "model": name,
            "prompt": self.prompt,
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = await self._post(http, "/v1/completions", body | other)
        return answer.json()["choices"][0]

    async def _post(self, http: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
        """Raises FloraError where there is no answer, or a refusal."""
        try:
            answer = await http.post(path, json=body)
        except httpx.HTTPError as error:
            raise self.server.failure(f"did not answer ({type(error).__name__})") from None
        if not answer.is_success:
            said = f"answered {answer.status_code} to {path} ({answer.text[:200]})"
            raise self.server.failure(said)
        return answer

    def _connect(self) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        return httpx.AsyncClient(
            base_url=self.server.url, timeout=ANSWER_SECONDS, trust_env=False, limits=CONNECTIONS
        )


def certain_tokens(
    tokens: list[int], best: Sequence[Mapping[str, float]], margin: float
) -> list[int]:
    """An answer's tokens up to the first one that rounding may change.

    best:   for each token the log-probabilities of the two best.
    margin: how far apart these are where it may not.
    """
    for count, of_token in enumerate(best):
        first, second, *_ = sorted(of_token.values(), reverse=True)
        if first - second < margin:
            return tokens[:count]
    return tokens
