"""A mixed batch at vLLM's servers, sent as their users send it: by the openai client."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from flora.bench.processes import CONNECTIONS, Server
from flora.bench.systems import engine_options

ANSWER_SECONDS = 600.0


class Client:
    """The openai client of a server that has started."""

    def __init__(self, server: Server) -> None:
        import openai

        self.server = server
        self._openai = openai.OpenAI(
            base_url=f"{server.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=ANSWER_SECONDS,
            # A proxy of the user's does not lead to this machine.
            http_client=openai.DefaultHttpxClient(trust_env=False, limits=CONNECTIONS),
        )

    def complete(
        self, names: Sequence[str], prompt: str, *, new_tokens: int, **settings: Any
    ) -> list[str]:
        """What each name answers to one prompt, greedily; all of them are asked at once.

        names:    of adapters, or the base's; a request's `model`.
        settings: of vLLM's own, such as `ignore_eos`.

        Raises FloraError where the server refuses a request or does not answer.
        """
        import openai

        def answer(name: str) -> str:
            completion = self._openai.completions.create(
                model=name,
                prompt=prompt,
                max_tokens=new_tokens,
                temperature=0,
                extra_body=settings,
            )
            text: str = completion.choices[0].text
            return text

        try:
            with ThreadPoolExecutor(len(names)) as pool:
                return list(pool.map(answer, names))
        except openai.OpenAIError as error:
            raise self.server.failure(f"failed a request ({error})") from None

    def close(self) -> None:
        """Leave the server."""
        self._openai.close()


@contextmanager
def serve(
    model: str, dtype: str, adapters: Mapping[str, Path], *, tokens: int, eager: bool
) -> Iterator[tuple[Client, Client]]:
    """Clients of two servers, which end with the block: vLLM as it is, and vLLM with the adapters.

    model:    a folder or a repository of the hub.
    adapters: the folder of each, by its name; so many requests run at once.
    tokens:   the most of a prompt and its answer.
    eager:    whether vLLM is kept from compiling the model.

    Raises FloraError where one does not start.
    """
    options = engine_options(model, dtype, rows=len(adapters), tokens=tokens, eager=eager)
    options |= {"enable_prefix_caching": False, "gpu_memory_utilization": 0.45}  # for each of two
    with (
        Server("vLLM's server", "base", options, {}) as plain,
        Server(
            "vLLM's server with flora", "flora", options | {"enable_lora": True}, adapters
        ) as own,
    ):
        plain.wait()
        own.wait()
        with closing(Client(plain)) as plain_client, closing(Client(own)) as own_client:
            yield plain_client, own_client
