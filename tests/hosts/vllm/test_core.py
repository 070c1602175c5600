"""Requests that wait until their own adapter is read."""

from concurrent.futures import Future
from types import SimpleNamespace

from flora.hosts.vllm.core import Arrivals
from tests import zoo
from tests.hosts.vllm.script import run_script
from tests.hosts.vllm.test_engine import HEADS

SLOW = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
               "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_PLUGINS": "flora"}
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.lora.request import LoRARequest

def read_slowly(worker):
    import time
    reader = worker.model_runner.lora_manager._reader
    read = reader._read

    def slow(request):
        time.sleep(3)
        return read(request)

    reader._read = slow

model, *folders = sys.argv[1:]
engine = LLMEngine.from_engine_args(EngineArgs(
    model, dtype="float32", skip_tokenizer_init=True, max_model_len=128, enforce_eager=True,
    enable_lora=True, max_loras=2, max_cpu_loras=2, enable_prefix_caching=False))
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
engine.engine_core.shutdown()
print(json.dumps(found))
"""


def request(number: int, name: str = "good") -> SimpleNamespace:
    return SimpleNamespace(lora_name=name, lora_int_id=number)


class Workers:
    """What workers say of the adapters that they have read, by number."""

    def __init__(self) -> None:
        self.read: set[int] = set()
        self.asked: list[int] = []

    def ask(self, lora: SimpleNamespace) -> Future[list[bool]]:
        self.asked.append(lora.lora_int_id)
        answer: Future[list[bool]] = Future()
        if lora.lora_name == "bad":
            answer.set_exception(RuntimeError("no such folder"))
        else:
            answer.set_result([lora.lora_int_id in self.read])
        return answer


def test_a_request_begins_once_its_own_adapter_is_read():
    workers, handled = Workers(), []
    failed: list[str] = []
    arrivals = Arrivals(workers.ask, 2)
    can_begin = arrivals.before(lambda r: handled.append(r) or True, fail=failed.append)
    slow, other, base, lost = (
        SimpleNamespace(lora_request=lora, request_id=name)
        for name, lora in (
            ("slow", request(1)),
            ("other", request(2)),
            ("base", None),
            ("lost", request(3, "bad")),
        )
    )
    workers.read = {2}
    assert [can_begin(each) for each in (slow, other, base)] == [False, False, True]
    assert [can_begin(each) for each in (slow, other, base)] == [False, True, True]
    workers.read = {1, 2}
    assert not can_begin(slow)
    assert can_begin(slow)
    assert handled == [base, other, base, slow]
    assert [can_begin(lost), can_begin(lost), can_begin(other)] == [False, False, True]
    assert failed == ["lost"]


def test_of_late_adapters_nobody_is_asked():
    workers = Workers()
    workers.read = {1, 2, 3}
    arrivals = Arrivals(workers.ask, 2)
    for number in (1, 2, 1, 2, 3, 2):
        while not arrivals.has(request(number)):
            pass
    assert workers.asked == [1, 2, 3]
    assert not arrivals.has(request(1))


def test_an_engine_in_a_process_of_its_own_answers_others_meanwhile(tmp_path):
    """It loads plugins once it has begun to be made."""
    model = zoo.build("Llama", **HEADS)
    model.save_pretrained(tmp_path / "model")
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        zoo.make_adapter("lora", model, folder, seed)
    assert run_script(SLOW, tmp_path / "model", *folders) == ["base", "own"]
