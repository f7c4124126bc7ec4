"""The model "tokenizer": text to token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from mskip_serving.texts import Texts


class TritonPythonModel:
    """Loaded by Triton's python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the tokenizer that lies beside this file."""
        self.texts = Texts(Path(__file__).parent)

    def execute(self, requests: list[Any]) -> list[Any]:
        """One answer a request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        text = pb_utils.get_input_tensor_by_name(request, "text_input").as_numpy()
        chat = pb_utils.get_input_tensor_by_name(request, "chat")
        try:
            if text.size != 1:
                raise ValueError(f"a request has one text_input; this one has {text.size}.")
            framed = chat is not None and bool(chat.as_numpy().reshape(-1)[0])
            ids = self.texts.ids(text.reshape(-1)[0], chat=framed)
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        tensor = pb_utils.Tensor("input_ids", np.array([ids], dtype=np.int64))
        return pb_utils.InferenceResponse(output_tensors=[tensor])
