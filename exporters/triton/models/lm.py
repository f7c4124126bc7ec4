"""The model "lm" where no backend of Triton holds the graph: the same inputs and outputs.

The graph is opened with the first request; "generate" runs one of its own, and does not need it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """Loaded by Triton's python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read what goes in and out."""
        config = json.loads(args["model_config"])
        self.inputs = [each["name"] for each in config["input"]]
        self.outputs = [each["name"] for each in config["output"]]
        self.model = Path(__file__).parent / "model.onnx"
        self.session: Any = None

    def execute(self, requests: list[Any]) -> list[Any]:
        """One call of the graph a request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        try:
            feeds = {}
            for name in self.inputs:
                tensor = pb_utils.get_input_tensor_by_name(request, name)
                if tensor is not None:
                    feeds[name] = tensor.as_numpy()
            wanted = [name for name in self.outputs if name in request.requested_output_names()]
            made = self._opened().run(wanted, feeds)
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        tensors = [pb_utils.Tensor(name, array) for name, array in zip(wanted, made, strict=True)]
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _opened(self) -> Any:
        if self.session is None:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self.session = onnxruntime.InferenceSession(
                str(self.model), options, providers=["CPUExecutionProvider"]
            )
        return self.session
