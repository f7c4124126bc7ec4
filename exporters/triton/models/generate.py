"""The model "generate": text in, text out, one answer or a stream of pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from mskip_serving.batch import Batch
from mskip_serving.dial import read_dial
from mskip_serving.graph import Arrays, Graph, LocalGraph, RemoteGraph, read_shape
from mskip_serving.meter import TritonMeter, report
from mskip_serving.sampling import Sampling
from mskip_serving.scheduler import (
    Event,
    Limits,
    RefusedError,
    Request,
    Scheduler,
    measured_savings,
)
from mskip_serving.texts import Texts

HERE = Path(__file__).parent


class TritonPythonModel:
    """Loaded by Triton's python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph, measure what skipping saves, and start to serve."""
        config = json.loads(args["model_config"])
        values = {key: each["string_value"] for key, each in config["parameters"].items()}
        self.texts, self.dial = Texts(HERE), read_dial(HERE / "dial.json")
        shape = read_shape(HERE / "contract.json")
        graph: Graph
        if values["engine"] == "lm":
            graph = RemoteGraph(_call, shape)
        else:
            # The folder of the models may lie anywhere, and be linked to.
            graph = LocalGraph(
                HERE.parent.parent / "lm/1/model.onnx", shape, int(values["threads"])
            )
        batch = Batch(graph, int(values["sequences"]), int(values["positions"]))
        # The first calls are slow: they are made here, before the server is ready. Another model
        # cannot be called yet.
        local = isinstance(graph, LocalGraph)
        savings = measured_savings(batch) if local else None
        instance = args["model_instance_name"]
        self.identity = {
            "name": args["model_name"],
            "version": args["model_version"],
            "instance": instance,
        }
        labels = {"model": args["model_name"], "model_instance": instance}
        self.meter = TritonMeter(pb_utils, labels)
        limits = Limits(int(values["queue"]), int(values["kv_bytes"]))
        options = {} if savings is None else {"savings": savings}
        self.scheduler = Scheduler(batch, self.texts.decode, self.meter, limits, **options)

    def execute(self, requests: list[Any]) -> None:
        """Queue the requests; they are answered as they get on."""
        for request in requests:
            sender, given = request.get_response_sender(), _Given(request)
            try:
                if given.one("server_statistics", False):
                    self._report(given, sender)
                else:
                    self.scheduler.submit(self._asked(given, sender))
            except RefusedError as error:  # the scheduler has counted it
                _fail(sender, str(error))
            except Exception as error:  # a request that nobody thought of ends itself alone
                self.meter.add("mskip_requests_total", 1, outcome="refused")
                words = str(error) if isinstance(error, ValueError) else ""
                _fail(sender, words or f"{type(error).__name__}: {error}")

    def finalize(self) -> None:
        """Stop serving."""
        self.scheduler.close()

    def _report(self, given: _Given, sender: Any) -> None:
        """Answer with what was measured so far, in the manner of Triton's own statistics."""
        if any(given.get(name) is not None for name in ("text_input", "input_ids")):
            raise ValueError("server_statistics is asked for alone, without a text.")
        found = {"model_stats": [{**self.identity, **report(self.meter)}]}
        _Answers(sender, 0, stream=False)(Event(ended="", statistics=found))

    def _asked(self, given: _Given, sender: Any) -> Request:
        ids = given.get("input_ids")
        text = given.get("text_input")
        if (ids is None) == (text is None):
            raise ValueError("give either text_input or input_ids.")
        if ids is not None:
            prompt = [int(each) for each in ids]
        elif len(text) != 1:
            raise ValueError(f"a request has one text_input; this one has {len(text)}.")
        else:
            prompt = self.texts.ids(text[0], chat=bool(given.one("chat", False)))
        seed = given.one("seed", None)
        return Request(
            prompt,
            self._tau(given),
            _Answers(sender, len(prompt), stream=bool(given.one("stream", False))),
            int(given.one("max_tokens", 64)),
            Sampling(
                float(given.one("temperature", 0.0)),
                int(given.one("top_k", 0)),
                float(given.one("top_p", 1.0)),
                None if seed is None else int(seed),
            ),
            [_text(each, "stop_words") for each in given.get("stop_words", ())],
            float(given.one("frequency_penalty", 0.0)),
            float(given.one("presence_penalty", 0.0)),
            sender.is_cancelled,
        )

    def _tau(self, given: _Given) -> list[float]:
        tau, capacity = given.get("tau"), given.one("capacity", None)
        shape = self.scheduler.batch.shape
        if tau is not None and capacity is not None:
            raise ValueError("give tau or capacity, not both.")
        if not shape.routed:
            return []
        if capacity is not None:
            return self.dial.tau(float(capacity))
        if tau is None:
            return list(shape.tau)
        values = [float(each) for each in tau]
        if len(values) == 1:
            values *= len(shape.routed)
        if len(values) != len(shape.routed):
            raise ValueError(f"tau has 1 or {len(shape.routed)} values, not {len(values)}.")
        if not all(0 <= each <= 1 for each in values):
            raise ValueError("tau is out of range. Scores lie in 0 to 1, and so does tau.")
        return values


class _Given:
    """Inputs of a request."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def get(self, name: str, default: Any = None) -> Any:
        tensor = pb_utils.get_input_tensor_by_name(self._request, name)
        return default if tensor is None else tensor.as_numpy().reshape(-1)

    def one(self, name: str, default: Any) -> Any:
        values = self.get(name)
        if values is None:
            return default
        if len(values) != 1:
            raise ValueError(f"{name} has one value, not {len(values)}.")
        return values[0].item() if hasattr(values[0], "item") else values[0]


class _Answers:
    """Sends what happens to a request."""

    def __init__(self, sender: Any, prompt_tokens: int, *, stream: bool) -> None:
        self._sender, self._prompt_tokens, self._stream = sender, prompt_tokens, stream
        self._text, self._tokens = "", list[int]()

    def __call__(self, event: Event) -> None:
        self._text += event.text
        self._tokens += event.tokens
        if event.error is not None:
            _fail(self._sender, event.error)
        elif event.ended == "cancelled":
            self._sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        elif event.ended is not None:
            self._send(event, pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        elif self._stream and (self._text or event.statistics is not None):
            self._send(event, 0)

    def _send(self, event: Event, flags: int) -> None:
        statistics = "" if event.statistics is None else json.dumps(event.statistics)
        texts = {
            "text_output": self._text,
            "finish_reason": event.ended or "",
            "statistics": statistics,
        }
        arrays = {
            "output_ids": np.array([self._tokens], dtype=np.int64),
            "num_input_tokens": np.array([[self._prompt_tokens]], dtype=np.int32),
            "num_output_tokens": np.array([[len(self._tokens)]], dtype=np.int32),
            **{
                name: np.array([[text.encode("utf-8")]], dtype=np.object_)
                for name, text in texts.items()
            },
        }
        tensors = [pb_utils.Tensor(name, array) for name, array in arrays.items()]
        self._sender.send(pb_utils.InferenceResponse(output_tensors=tensors), flags=flags)
        self._text, self._tokens = "", []


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error}.") from error


def _fail(sender: Any, message: str) -> None:
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _call(feeds: Arrays) -> Arrays:
    """Run the model "lm"."""
    outputs = [name.replace("past_key_values", "present") for name in feeds if "past" in name]
    outputs += ["logits", *(("routing_out", "routing_scores") if "routing" in feeds else ())]
    response = pb_utils.InferenceRequest(
        model_name="lm",
        requested_output_names=outputs,
        inputs=[pb_utils.Tensor(name, array) for name, array in feeds.items()],
    ).exec()
    if response.has_error():
        raise RuntimeError(response.error().message())
    made = {}
    for tensor in response.output_tensors():
        array = tensor.as_numpy() if tensor.is_cpu() else np.from_dlpack(tensor)
        made[tensor.name()] = array
    return made
