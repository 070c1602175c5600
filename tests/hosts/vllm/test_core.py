"""Requests that wait until their own adapter is read."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from flora.hosts.vllm.core import Arrivals
from tests import zoo
from tests.hosts.vllm.script import run_script
from tests.hosts.vllm.test_engine import HEADS
from tests.hosts.vllm.test_reader import request

MANY = 24
"""More than there may be questions on their way between an engine and its worker."""

IN_TURN = """
import json, os, random, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
               "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_PLUGINS": "flora"}
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest

def read_slowly(worker):
    import time
    reader = worker.model_runner.lora_manager._reader
    reader.as_ever = reader._read

    def slow(request):
        time.sleep(3)
        return reader.as_ever(request)

    reader._read = slow

def read_as_ever(worker):
    reader = worker.model_runner.lora_manager._reader
    reader._read, reader.waited, take = reader.as_ever, 0, reader.take

    def counting(request):
        reader.waited += not reader.has(request)
        return take(request)

    reader.take = counting

def waited(worker):
    return worker.model_runner.lora_manager._reader.waited

model, *folders = sys.argv[1:]
engine = LLMEngine.from_engine_args(EngineArgs(
    model, dtype="float32", skip_tokenizer_init=True, max_model_len=128, enforce_eager=True,
    enable_lora=True, max_loras=4, max_cpu_loras=8, enable_prefix_caching=False))
sampling = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, detokenize=False)
prompt = {"prompt_token_ids": [3, 4, 5]}
adapters = [LoRARequest(folder, number, folder) for number, folder in enumerate(folders, 1)]

def ended(**asked):
    for name, lora in asked.items():
        engine.add_request(name, prompt, sampling, lora_request=lora)
    names = []
    while engine.has_unfinished_requests():
        names += [output.request_id for output in engine.step() if output.finished]
    return names

for lora in adapters:
    ended(one=lora)  # the last ones leave no room for the first
engine.collective_rpc(read_slowly)
found = ended(own=adapters[0], base=None)
engine.collective_rpc(read_as_ever)
random.seed(0)
rows = adapters + random.choices(adapters, k=60)
found.append(len(ended(**{f"row{number}": lora for number, lora in enumerate(rows)})))
found.append(engine.collective_rpc(waited))
engine.engine_core.shutdown()
print(json.dumps(found))
"""


class Worker:
    """What a worker says of the adapters that it has read, by number."""

    def __init__(self) -> None:
        self.read: set[int] = set()
        self.asked: list[list[int]] = []

    def ask(self, loras: Sequence[SimpleNamespace]) -> Future[list[list[bool | str]]]:
        self.asked.append([lora.lora_int_id for lora in loras])
        answer: Future[list[list[bool | str]]] = Future()
        lost = {lora.lora_int_id for lora in loras if lora.lora_name == "bad"}
        found = ["no such folder" if n in lost else n in self.read for n in self.asked[-1]]
        answer.set_result([found])
        return answer


def scheduler(worker: Worker, **options: Any) -> tuple[Callable[..., list[Any]], list[str]]:
    """A function that says of waiting requests which of them begin, and those that failed."""
    return scheduler_of(Arrivals(worker.ask, slots=2, capacity=2, **options))


def scheduler_of(arrivals: Arrivals) -> tuple[Callable[..., list[Any]], list[str]]:
    failed: list[str] = []
    can_begin = arrivals.before(lambda _: True, fail=failed.append)

    def schedule(*requests: SimpleNamespace) -> list[SimpleNamespace]:
        return [each for each in requests if can_begin(each)]

    def used(step: list[SimpleNamespace]) -> set[int]:
        return {each.lora_request.lora_int_id for each in step if each.lora_request}

    return arrivals.around(schedule, used=used), failed


def waiting(name: str, lora: SimpleNamespace | None) -> SimpleNamespace:
    return SimpleNamespace(lora_request=lora, request_id=name)


SLOW, OTHER, BASE, LOST = (
    waiting("slow", request(1)),
    waiting("other", request(2)),
    waiting("base", None),
    waiting("lost", request(3, "bad")),
)


def test_a_request_begins_once_its_own_adapter_is_read():
    worker = Worker()
    schedule, failed = scheduler(worker, runs_meanwhile=False)
    assert schedule(SLOW, OTHER, BASE) == [BASE]
    assert worker.asked == [[1, 2]]
    worker.read = {2}  # while the step ran
    assert schedule(SLOW, OTHER, BASE) == [OTHER, BASE]
    assert worker.asked == [[1, 2], [1, 2], [1]]
    worker.read = {1, 2}
    assert schedule(SLOW) == [SLOW]
    assert [schedule(LOST), schedule(LOST, OTHER), failed] == [[], [OTHER], ["lost"]]


def test_a_worker_that_runs_is_not_waited_for():
    worker = Worker()
    schedule, _ = scheduler(worker, runs_meanwhile=True)
    assert schedule(SLOW) == []
    worker.read = {1}
    assert schedule(SLOW) == []  # as it was before the step
    assert schedule(SLOW) == [SLOW]
    assert worker.asked == [[1], [1]]


def test_no_more_are_asked_for_than_a_step_may_use():
    worker = Worker()
    worker.read = {1, 2, 3}
    schedule, _ = scheduler(worker, runs_meanwhile=False)
    three = [waiting("", request(number)) for number in (1, 2, 3)]
    assert schedule(*three) == []
    assert schedule(*three) == three[:2]
    assert worker.asked == [[1, 2], [1, 2], [3]]


def test_of_late_adapters_nobody_is_asked():
    worker = Worker()
    worker.read = {1, 2, 3}
    schedule, _ = scheduler(worker, runs_meanwhile=False)
    for number in (1, 2, 1, 2, 3, 2):
        while not schedule(waiting("", request(number))):
            pass
    assert worker.asked == [[1], [1], [2], [2], [3], [3]]
    assert not schedule(waiting("", request(1)))


def test_a_removed_adapter_is_asked_for_again():
    worker = Worker()
    worker.read = {1}
    arrivals = Arrivals(worker.ask, slots=2, capacity=2, runs_meanwhile=False)
    schedule, _ = scheduler_of(arrivals)
    assert [schedule(SLOW), schedule(SLOW)] == [[], [SLOW]]
    assert arrivals.without(lambda number: number == 1)(1)
    worker.read = set()
    assert [schedule(SLOW), schedule(SLOW)] == [[], []]
    assert worker.asked[2:] == [[1], [1], [1]]


def test_an_engine_in_a_process_of_its_own_answers_others_meanwhile(tmp_path):
    """It loads plugins once it has begun to be made. And no step waits for an adapter, however many
    there are that come and go."""
    model = zoo.build("Llama", **HEADS)
    model.save_pretrained(tmp_path / "model")
    folders = [tmp_path / str(seed) for seed in range(MANY)]
    for seed, folder in enumerate(folders):
        zoo.make_adapter("lora", model, folder, seed)
    assert run_script(IN_TURN, tmp_path / "model", *folders) == ["base", "own", MANY + 60, [0]]
