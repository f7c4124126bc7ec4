"""The repository on a real Triton Inference Server, which this installs on first use."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import PROMPTS, WAIT, Served


@pytest.mark.parametrize("text", PROMPTS)
def test_greedy_tokens_are_those_of_the_runner(served: Served, text: str) -> None:
    """Over HTTP, with decisions, scores and counts."""
    for capacity in (None, 0.0, 0.5, 1.0):
        asked = {} if capacity is None else {"capacity": capacity}
        made = served.generate(text_input=text, max_tokens=16, **asked)
        statistics = json.loads(made["statistics"])
        expected = served.expected(text, 16, statistics["tau"])
        assert made["output_ids"] == expected.tokens[0]
        assert made["finish_reason"] == expected.ended[0]
        assert statistics["decisions"] == expected.routing[0].tolist()
        np.testing.assert_allclose(statistics["scores"], expected.scores[0], atol=1e-5)
        assert made["num_input_tokens"] == len(served.texts.ids(text))
        assert made["num_output_tokens"] == len(expected.tokens[0])
        if capacity in (0.0, 1.0):
            assert statistics["capacity"] == capacity


def grpc_answers(served: Served, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """All answers to a request over gRPC."""
    from tritonclient import grpc

    kinds = {"text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL", "input_ids": "INT64"}
    dtypes = {"BYTES": np.object_, "INT32": np.int32, "BOOL": np.bool_, "INT64": np.int64}
    inputs = []
    for name, value in asked.items():
        values = [value if isinstance(value, list) else [value]]
        array: Any = np.array(values, dtype=dtypes[kinds[name]])
        inputs.append(grpc.InferInput(name, list(array.shape), kinds[name]))
        inputs[-1].set_data_from_numpy(array)
    answers: queue.Queue[Any] = queue.Queue()
    client = grpc.InferenceServerClient(f"127.0.0.1:{served.server.ports.grpc}")
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    client.async_stream_infer("generate", inputs, enable_empty_final_response=True)
    made = []
    while True:
        result, error = answers.get(timeout=WAIT)
        if error is not None:
            client.stop_stream()
            raise error
        answer = result.get_response()
        if answer.outputs:
            names = [each.name for each in answer.outputs]
            made.append({name: result.as_numpy(name)[0] for name in names})
        if answer.parameters["triton_final_response"].bool_param:
            break
    client.stop_stream()
    client.close()
    return made


def test_streams_over_grpc(served: Served) -> None:
    """Piece by piece; with ids in the place of a text; as one answer."""
    expected = served.expected(PROMPTS[0], 12)
    ids = served.texts.ids(PROMPTS[0])
    for asked in ({"text_input": PROMPTS[0].encode()}, {"input_ids": ids}):
        pieces = grpc_answers(served, {**asked, "max_tokens": 12, "stream": True})
        tokens = [token for piece in pieces for token in piece["output_ids"].tolist()]
        assert tokens == expected.tokens[0]
        assert len(pieces) > 1
        assert json.loads(pieces[0]["statistics"][0])["decisions"] == expected.routing[0].tolist()
        assert pieces[-1]["finish_reason"][0].decode() == expected.ended[0]
    (whole,) = grpc_answers(served, {"text_input": PROMPTS[0].encode(), "max_tokens": 12})
    assert whole["output_ids"].tolist() == expected.tokens[0]
    assert b"".join(piece["text_output"][0] for piece in pieces) == whole["text_output"][0]


def test_32_clients_at_a_time(served: Served) -> None:
    """HTTP, answers and streams mixed: each gets what the runner gives it alone."""
    taus = [0.0, 0.3, 0.5, 0.7, 1.0]
    asked = [(PROMPTS[n % 5], 4 + n % 9, taus[n % 4]) for n in range(64)]
    expected = [served.expected(text, tokens, tau).tokens[0] for text, tokens, tau in asked]

    def one(number: int) -> list[int]:
        text, tokens, tau = asked[number]
        values = {"text_input": text, "max_tokens": tokens, "tau": tau}
        if number % 2:
            return list(served.generate(**values)["output_ids"])
        status, body = served.post(
            "/v2/models/generate/generate_stream", {**values, "stream": True}
        )
        assert status == 200, body
        pieces = [json.loads(line[5:]) for line in body.splitlines() if line.startswith("data:")]
        found = []
        for piece in pieces:
            ids = piece["output_ids"]
            found += ids if isinstance(ids, list) else [ids]
        return found

    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(one, range(64))) == expected
    assert served.metric("mskip_kv_bytes{") == 0
    assert served.metric("mskip_active_sequences") == 0


def test_statistics_as_json(served: Served) -> None:
    """They count what was asked, agree with the metrics, and have Triton's own counts of time."""
    before = served.statistics()
    made = [
        json.loads(served.generate(text_input=text, max_tokens=5, capacity=0.5)["statistics"])
        for text in PROMPTS
    ]
    served.post("/v2/models/generate/generate", {"text_input": "one", "tau": 2.0})
    after = served.statistics()

    assert (after["name"], after["instance"]) == ("generate", "generate_0_0")
    read = sum(each["prompt_tokens"] for each in made)
    assert after["tokens"]["prompt"] - before["tokens"]["prompt"] == read
    generated = sum(each["tokens"] for each in made)
    assert after["tokens"]["generated"] - before["tokens"]["generated"] == generated
    for phase in ("queue", "prefill"):
        assert after[phase]["count"] - before[phase]["count"] == len(PROMPTS)
    assert after["prefill"]["ns"] > before["prefill"]["ns"]
    refused = after["requests"]["refused"] - before["requests"].get("refused", 0)
    assert refused == 1
    for index, (layer, counts) in enumerate(after["layers"].items()):
        executed = sum(each["decisions"][index] for each in made)
        assert counts["executed"] - before["layers"][layer]["executed"] == executed
        decided = counts["executed"] + counts["skipped"]
        assert counts["skip_rate"] == counts["skipped"] / decided
        labels = f'mskip_decisions_total{{decision="skip",layer="{layer}"'
        assert served.metric(labels) == counts["skipped"]
    assert after["capacity"] == served.metric("mskip_capacity{")
    held = after["kv_bytes"]
    assert (held["held"], held["reserved"]) == (0, 0)
    assert held["budget"] == served.metric("mskip_kv_bytes_budget") > 0


def test_instances_measure_apart(make_repository: Callable[..., Path], tmp_path: Path) -> None:
    """Two schedulers of one model: neither writes over what the other has measured."""
    from mskip.exporters.triton.server import free_ports, install_server, started

    folder = make_repository(instances=2, kv_mib=64)
    with started(install_server(), folder / "models", tmp_path / "log.txt", free_ports()) as server:
        both = Served(server, folder, None, None)
        wanted = {"generate_0_0", "generate_0_1"}
        found: dict[str, dict[str, Any]] = {}
        end = time.monotonic() + WAIT
        while set(found) != wanted or sum(f["queue"]["count"] for f in found.values()) < 8:
            assert time.monotonic() < end, found
            if sum(each["queue"]["count"] for each in found.values()) < 8:
                both.generate(text_input=PROMPTS[0], max_tokens=2)
            latest = both.statistics()
            found[latest["instance"]] = latest
        assert both.metric("mskip_kv_bytes_budget") == 2 * (64 << 20)


def test_statistics_are_asked_for_alone(served: Served) -> None:
    status, body = served.post(
        "/v2/models/generate/generate", {"server_statistics": True, "text_input": "one"}
    )
    assert status >= 400
    assert "alone" in body


def test_a_client_that_goes_frees_its_memory(served: Served) -> None:
    """A stream that is closed is cancelled, before it has made all its tokens."""
    before = served.statistics()["requests"].get("cancelled", 0)
    body = {"text_input": PROMPTS[0], "max_tokens": 240, "stream": True, "temperature": 1.0}
    closed = 0
    for seed in range(20):
        data = json.dumps({**body, "seed": seed}).encode()
        address = f"{served.server.ports.url}/v2/models/generate/generate_stream"
        answer = urllib.request.urlopen(urllib.request.Request(address, data), timeout=WAIT)
        answer.read(16)
        answer.close()
        closed += 1
    end = time.monotonic() + WAIT
    while served.metric("mskip_active_sequences") or served.metric("mskip_queued_requests"):
        assert time.monotonic() < end
        time.sleep(0.05)
    gone = served.statistics()["requests"]["cancelled"] - before
    assert gone > 0, f"none of {closed} was cancelled"
    assert served.metric("mskip_kv_bytes{") == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"text_input": "one", "max_tokens": -1}, "max_tokens is -1"),
    ({"text_input": "one", "max_tokens": 0}, "max_tokens is 0"),
    ({"text_input": "one " * 1000}, "more than the 256 positions"),
    ({"text_input": ""}, "text_input is empty"),
    ({"max_tokens": 4}, "either text_input or input_ids"),
    ({"text_input": "one", "input_ids": [5]}, "either text_input or input_ids"),
    ({"input_ids": [5, 100_000]}, "outside 0"),
    ({"text_input": "one", "tau": 1.5}, "tau is out of range"),
    ({"text_input": "one", "tau": [0.5, 0.5]}, "tau has 1 or 3 values"),
    ({"text_input": "one", "tau": 0.5, "capacity": 0.5}, "not both"),
    ({"text_input": "one", "capacity": -0.5}, "capacity -0.5 is out of range"),
    ({"text_input": "one", "temperature": -1.0}, "temperature -1.0 is out of range"),
    ({"text_input": "one", "top_p": 0.0}, "top_p 0.0 is out of range"),
    ({"text_input": "one", "max_tokens": "many"}, "as signed-integer"),
    ({"text_input": 5}, "non-string"),
]


@pytest.mark.parametrize(("asked", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_requests_are_told_why(served: Served, asked: dict[str, Any], words: str) -> None:
    status, body = served.post("/v2/models/generate/generate", asked)
    assert status >= 400
    assert words in body
    assert served.generate(text_input="one", max_tokens=2)["num_output_tokens"] <= 2


def test_invalid_text_and_types_over_grpc(served: Served) -> None:
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match="UTF-8"):
        grpc_answers(served, {"text_input": b"\xff\xfe", "max_tokens": 2})
    wrong = grpc.InferInput("input_ids", [1, 2], "FP32")
    wrong.set_data_from_numpy(np.zeros((1, 2), dtype=np.float32))
    client = grpc.InferenceServerClient(f"127.0.0.1:{served.server.ports.grpc}")
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put(error))
    client.async_stream_infer("generate", [wrong])
    assert "input_ids" in str(answers.get(timeout=WAIT))
    client.stop_stream()
    client.close()


def test_stop_words_seeds_and_penalties(served: Served) -> None:
    whole = served.generate(text_input=PROMPTS[0], max_tokens=20)["text_output"]
    cut = whole[len(whole) // 2 :][:2]
    stopped = served.generate(text_input=PROMPTS[0], max_tokens=20, stop_words=[cut])
    assert stopped["finish_reason"] == "stop"
    assert stopped["text_output"] == whole[: whole.index(cut)]
    drawn = {
        seed: [
            served.generate(
                text_input=PROMPTS[0], max_tokens=12, temperature=1.0, seed=seed, top_k=50
            )["output_ids"]
            for _ in "ab"
        ]
        for seed in (1, 2**63 + 5)
    }
    assert all(one == two for one, two in drawn.values())
    assert drawn[1] != drawn[2**63 + 5]
    plain = served.generate(text_input=PROMPTS[0], max_tokens=24)["output_ids"]
    varied = served.generate(text_input=PROMPTS[0], max_tokens=24, presence_penalty=100.0)
    assert len(set(varied["output_ids"])) == len(varied["output_ids"])
    assert varied["output_ids"][0] == plain[0]


def test_the_models_around_it(served: Served) -> None:
    """Tokenizer, ensemble, and the graph's own logits."""
    from tritonclient import http

    client = http.InferenceServerClient(f"127.0.0.1:{served.server.ports.http}")
    text = http.InferInput("text_input", [1, 1], "BYTES")
    text.set_data_from_numpy(np.array([[PROMPTS[0].encode()]], dtype=np.object_))
    ids = client.infer("tokenizer", [text]).as_numpy("input_ids")
    assert ids[0].tolist() == served.texts.ids(PROMPTS[0])
    status, body = served.post(
        "/v2/models/ensemble/generate", {"text_input": PROMPTS[0], "max_tokens": 8}
    )
    assert status == 200, body
    made = served.generate(text_input=PROMPTS[0], max_tokens=8)
    assert json.loads(body)["text_output"] == made["text_output"]
    contract = served.runner.contract
    feeds: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1])[None],
        "logits_at": np.array([[ids.shape[1] - 1]]),
        "routing": np.full((1, len(contract.routed_layers)), -1),
        "tau": np.array(contract.tau, dtype=np.float32),
    }
    for layer in contract.cached_layers:
        for part in ("key", "value"):
            shape = (1, contract.kv_heads, ids.shape[1], contract.head_dim)
            feeds[f"past_key_values.{layer}.{part}"] = np.zeros(shape, dtype=np.float32)
    kinds = {"int64": "INT64", "float32": "FP32"}
    inputs = []
    for name, array in feeds.items():
        inputs.append(http.InferInput(name, list(array.shape), kinds[str(array.dtype)]))
        inputs[-1].set_data_from_numpy(array)
    answer = client.infer("lm", inputs, outputs=[http.InferRequestedOutput("logits")])
    assert int(answer.as_numpy("logits")[0, -1].argmax()) == made["output_ids"][0]
    client.close()


def test_the_client_in_the_repository_passes(served: Served) -> None:
    ports = served.server.ports
    done = subprocess.run(
        [sys.executable, "client.py", "--url", ports.url, "--metrics", ports.metrics_url],
        cwd=served.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("ok ") == 9


def test_the_client_says_what_fails(served: Served) -> None:
    """No server: status 1 and a line. No metrics: that check alone, by name, and status 1."""
    client = [sys.executable, str(served.folder / "client.py")]
    done = subprocess.run(
        [*client, "--url", "http://127.0.0.1:9"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "no server is ready" in done.stderr
    here = ["--url", served.server.ports.url, "--metrics", "http://127.0.0.1:9"]
    done = subprocess.run([*client, *here], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    assert [line.split()[1] for line in failed] == ["meters"], done.stdout


def test_reloads_while_it_serves(served: Served) -> None:
    """Requests of the old model end as they began; later ones are the new model's."""
    expected = served.expected(PROMPTS[3], 200)
    found: list[list[int]] = []
    faults: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            status, body = served.post(
                "/v2/models/generate/generate", {"text_input": PROMPTS[3], "max_tokens": 200}
            )
            if status == 200:
                found.append(json.loads(body)["output_ids"])
            else:
                faults.append(body)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    # A changed file makes it load again.
    path = served.folder / "models/generate/1/model.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    status, body = served.post("/v2/repository/models/generate/load", {})
    time.sleep(0.3)
    stop.set()
    for thread in threads:
        thread.join(WAIT)
    assert status == 200, body
    log = served.server.log.read_text(encoding="utf-8")
    assert log.count("successfully loaded 'generate'") == 2
    assert not faults, faults[:1]
    assert found
    assert all(ids == expected.tokens[0] for ids in found)
