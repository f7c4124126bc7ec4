"""Many requests at a time, from several threads, against one at a time."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mskip.exporters.serving.meter import Tally
    from mskip.exporters.serving.scheduler import Event, Request, Scheduler

WAIT = 60.0


def decode(ids: list[int]) -> str:
    """Letters, so that stop strings can be chosen."""
    return "".join(chr(97 + each % 26) for each in ids)


class Client:
    """Waits for what a request is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()
        self.gone = False

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if event.ended is not None:
            self.ended.set()

    def wait(self) -> Event:
        """The last event."""
        assert self.ended.wait(WAIT), "no end"
        return self.events[-1]

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events for token in event.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


@pytest.fixture(scope="module")
def make_scheduler(served_folder: Path) -> Callable[..., Scheduler]:
    """Factory: ``make_scheduler(rows=4, queue=64, kv_bytes=1 << 30)``."""
    from mskip.exporters.serving.batch import Batch
    from mskip.exporters.serving.graph import LocalGraph, read_shape
    from mskip.exporters.serving.meter import Tally
    from mskip.exporters.serving.scheduler import Limits, Scheduler

    shape = read_shape(served_folder / "contract.json")
    graph = LocalGraph(served_folder / "model.onnx", shape, threads=1)

    def make(rows: int = 4, **limits: int) -> Scheduler:
        return Scheduler(Batch(graph, rows, 128), decode, Tally(), Limits(**limits))

    return make


@pytest.fixture
def scheduler(make_scheduler: Callable[..., Scheduler]) -> Iterator[Scheduler]:
    made = make_scheduler()
    yield made
    made.close()


def ask(scheduler: Scheduler, ids: list[int], **options: Any) -> Client:
    from mskip.exporters.serving.scheduler import Request

    client = Client()
    tau = options.pop("tau", [0.5] * 3)
    request: Request = Request(ids, tau, client, cancelled=lambda: client.gone, **options)
    scheduler.submit(request)
    return client


def tally(scheduler: Scheduler) -> Tally:
    from mskip.exporters.serving.meter import Tally

    assert isinstance(scheduler.meter, Tally)
    return scheduler.meter


def some_requests(count: int) -> list[tuple[list[int], dict[str, Any]]]:
    from mskip.exporters.serving.sampling import Sampling

    rng = random.Random(1)
    made = []
    for seed in range(count):
        ids = [rng.randint(3, 90) for _ in range(rng.randint(1, 40))]
        options: dict[str, Any] = {
            "max_tokens": rng.randint(1, 20),
            "tau": [rng.choice([0.0, 0.4, 0.6, 1.1])] * 3,
        }
        if rng.random() < 0.5:
            options["sampling"] = Sampling(temperature=1.0, top_p=0.9, seed=seed)
        if rng.random() < 0.3:
            options |= {"frequency_penalty": 0.5, "presence_penalty": 0.2}
        if rng.random() < 0.3:
            options["stop"] = [rng.choice("aeiou")]
        made.append((ids, options))
    return made


def test_load_changes_no_answer(make_scheduler: Callable[..., Scheduler]) -> None:
    """40 requests from 8 threads get the tokens, text and decisions that each gets alone."""
    requests = some_requests(40)
    one = make_scheduler(rows=1)
    expected = [ask(one, ids, **options) for ids, options in requests]
    for client in expected:
        client.wait()
    one.close()
    many = make_scheduler(rows=6)
    found: list[Client] = [Client() for _ in requests]

    def part(start: int) -> None:
        for index in range(start, len(requests), 8):
            ids, options = requests[index]
            found[index] = ask(many, ids, **options)
            time.sleep(0.001 * (index % 3))

    threads = [threading.Thread(target=part, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for alone, beside in zip(expected, found, strict=True):
        last = beside.wait()
        assert beside.tokens == alone.tokens
        assert beside.text == alone.text
        assert last.ended == alone.events[-1].ended
        assert last.statistics is not None
        assert last.statistics["decisions"] == (alone.events[-1].statistics or {})["decisions"]
    values = tally(many).values
    many.close()
    assert values["mskip_tokens_total", "generated"] == sum(
        (client.events[-1].statistics or {})["tokens"] for client in found
    )
    assert values["mskip_tokens_total", "prompt"] == sum(len(ids) for ids, _ in requests)
    ended = sum(value for key, value in values.items() if key[0] == "mskip_requests_total")
    assert ended == len(requests)
    assert values["mskip_kv_bytes",] == values["mskip_active_sequences",] == 0
    assert values["mskip_steps_total",] < values["mskip_tokens_total", "generated"]


def test_streams_and_statistics(scheduler: Scheduler) -> None:
    """The first event has the decisions, the last has them with the counts."""
    client = ask(scheduler, [5, 6, 7], max_tokens=5, tau=[0.0, 1.1, 0.0])
    last = client.wait()
    assert last.ended in ("length", "end")
    first = client.events[0].statistics
    assert first is not None
    assert last.statistics is not None
    assert first["decisions"] == last.statistics["decisions"] == [1, 0, 1]
    assert last.statistics["capacity"] == pytest.approx(2 / 3)
    assert last.statistics["tokens"] == len(client.tokens)
    assert last.statistics["kv_bytes"] <= last.statistics["kv_bytes_dense"]
    assert all(event.statistics is None for event in client.events[1:-1])


def test_a_stop_string_ends_the_text_before_it(scheduler: Scheduler) -> None:
    whole = ask(scheduler, [5, 6, 7], max_tokens=12)
    whole.wait()
    cut = whole.text[3:5]
    client = ask(scheduler, [5, 6, 7], max_tokens=12, stop=[cut])
    assert client.wait().ended == "stop"
    assert client.text == whole.text[: whole.text.index(cut)]


def test_cancelled_requests_go_at_once(make_scheduler: Callable[..., Scheduler]) -> None:
    """One that runs gives its memory back; one that waits never runs."""
    scheduler = make_scheduler(rows=1)
    running = ask(scheduler, [5, 6, 7], max_tokens=120)
    waiting = ask(scheduler, [8, 9], max_tokens=120)
    after = ask(scheduler, [5], max_tokens=2)
    while not running.events:
        time.sleep(0.001)
    waiting.gone = running.gone = True
    assert running.wait().ended == waiting.wait().ended == "cancelled"
    assert not waiting.tokens
    assert len(running.tokens) < 120
    after.wait()
    values = tally(scheduler).values
    assert values["mskip_requests_total", "cancelled"] == 2
    assert values["mskip_kv_bytes",] == 0
    scheduler.close()


def test_a_client_that_raises_is_taken_as_gone(scheduler: Scheduler) -> None:
    from mskip.exporters.serving.scheduler import Request

    def broken(event: Event) -> None:
        raise ConnectionError

    scheduler.submit(Request([5, 6], [0.5] * 3, broken, max_tokens=100))
    ask(scheduler, [5], max_tokens=2).wait()
    end = time.monotonic() + WAIT
    while not tally(scheduler).values["mskip_requests_total", "cancelled"]:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_full_queue_refuses(make_scheduler: Callable[..., Scheduler]) -> None:
    from mskip.exporters.serving.scheduler import RefusedError

    scheduler = make_scheduler(rows=1, queue=2)
    first = ask(scheduler, [5, 6, 7], max_tokens=120)
    while not first.events:
        time.sleep(0.001)
    rest = [ask(scheduler, [5], max_tokens=1) for _ in range(2)]
    with pytest.raises(RefusedError, match="queue is full: 2"):
        ask(scheduler, [5], max_tokens=1)
    first.gone = True
    for client in rest:
        assert client.wait().ended in ("length", "end")
    assert tally(scheduler).values["mskip_requests_total", "refused"] == 1
    scheduler.close()


def test_memory_is_never_promised_twice(make_scheduler: Callable[..., Scheduler]) -> None:
    """With a budget for two long sequences, a third waits for one of them to end."""
    scheduler = make_scheduler(rows=4)
    budget = 2 * scheduler.batch.row_bytes(100)
    scheduler.close()
    scheduler = make_scheduler(rows=4, kv_bytes=budget)
    clients = [ask(scheduler, [5, 6, 7, 8], max_tokens=96, tau=[0.0] * 3) for _ in range(4)]
    most = 0.0
    while not all(client.ended.is_set() for client in clients):
        most = max(most, tally(scheduler).values["mskip_kv_bytes_reserved",])
        assert tally(scheduler).values["mskip_kv_bytes_reserved",] <= budget
        assert tally(scheduler).values["mskip_active_sequences",] <= 2
        time.sleep(0.0005)
    assert most > 0
    assert all(client.events[-1].ended in ("length", "end") for client in clients)
    scheduler.close()


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([5], {"max_tokens": 0}, "max_tokens is 0"),
        ([5], {"max_tokens": -3}, "max_tokens is -3"),
        ([], {}, "no tokens"),
        ([5], {"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ([5, 10_000], {}, "outside 0"),
        ([-1], {}, "outside 0"),
        ([5] * 100, {"max_tokens": 100}, "more than the 128 positions"),
    ],
)
def test_what_can_never_be_served_is_refused(
    scheduler: Scheduler, ids: list[int], options: dict[str, Any], words: str
) -> None:
    from mskip.exporters.serving.scheduler import RefusedError

    with pytest.raises(RefusedError, match=words):
        ask(scheduler, ids, **options)


def test_a_request_beyond_the_budget_is_refused(make_scheduler: Callable[..., Scheduler]) -> None:
    from mskip.exporters.serving.scheduler import RefusedError

    scheduler = make_scheduler(kv_bytes=10)
    with pytest.raises(RefusedError, match="the budget is 10"):
        ask(scheduler, [5], max_tokens=1)
    scheduler.close()


def test_a_fault_ends_its_requests_and_no_others(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails ends those that it ran; the next request is served."""
    graph = scheduler.batch.graph
    run = graph.run

    def failing(feeds: Any, caches: Any, stamp: Any) -> Any:
        if stamp[0] == "step":
            raise RuntimeError("out of order")
        return run(feeds, caches, stamp)

    monkeypatch.setattr(graph, "run", failing)
    client = ask(scheduler, [5, 6], max_tokens=8)
    last = client.wait()
    assert last.ended == "error"
    assert last.error == "RuntimeError: out of order"
    monkeypatch.setattr(graph, "run", run)
    assert ask(scheduler, [5, 6], max_tokens=3).wait().ended in ("length", "end")
    assert tally(scheduler).values["mskip_kv_bytes",] == 0


def test_closing_tells_everybody(make_scheduler: Callable[..., Scheduler]) -> None:
    from mskip.exporters.serving.scheduler import RefusedError

    scheduler = make_scheduler(rows=1)
    clients = [ask(scheduler, [5, 6], max_tokens=120) for _ in range(3)]
    scheduler.close()
    assert all(client.wait().ended is not None for client in clients)
    assert any("stopping" in str(client.events[-1].error) for client in clients)
    with pytest.raises(RefusedError, match="stopping"):
        ask(scheduler, [5])


def test_savings_are_measured(make_scheduler: Callable[..., Scheduler]) -> None:
    from mskip.exporters.serving.batch import Batch
    from mskip.exporters.serving.scheduler import measured_savings

    scheduler = make_scheduler()
    batch = Batch(scheduler.batch.graph, 2, 128)
    savings = measured_savings(batch, tokens=8, repeats=2)
    assert savings.prompt_token >= 0
    assert savings.step >= 0
    assert not batch.rows
    scheduler.close()
