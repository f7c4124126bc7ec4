"""The embedded real model: loaded, tokenised, exported and run, within the promised bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mskip.compressor.models import EMBEDDED, BaseModel, load_base
from mskip.compressor.recipe import ModelSpec
from mskip.compressor.router import Routers
from mskip.compressor.skipping import MindSkip

LAYERS = list(range(13, 29))


@pytest.fixture(scope="module")
def smollm2() -> BaseModel:
    return load_base(ModelSpec(name=EMBEDDED))


def test_numbers_are_split_into_digits(smollm2: BaseModel) -> None:
    """The GGUF conversion drops this step; without it texts tokenise unlike the original."""
    assert len(smollm2.tokenizer("2026", add_special_tokens=False)["input_ids"]) == 4


def test_it_speaks(smollm2: BaseModel) -> None:
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = smollm2.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = smollm2.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    output = smollm2.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(output[0, ids["input_ids"].shape[1] :])


def test_attach_and_detach_leave_the_model_bitwise_the_same(smollm2: BaseModel) -> None:
    ids = smollm2.tokenizer("The quick brown fox jumps.", return_tensors="pt")["input_ids"]
    routers = Routers(LAYERS, smollm2.model.config.hidden_size)
    with torch.no_grad():
        before = smollm2.model(ids).logits
        with MindSkip(smollm2.model, routers, tau=0.5):  # score 0.5 >= 0.5: all execute
            assert torch.equal(smollm2.model(ids).logits, before)
        with MindSkip(smollm2.model, routers, tau=0.6):
            assert not torch.equal(smollm2.model(ids).logits, before)
        assert torch.equal(smollm2.model(ids).logits, before)


EXPORT = """
import json, sys, time
from pathlib import Path
import numpy as np
import torch
from mskip.compressor.models import EMBEDDED, load_base
from mskip.compressor.recipe import ModelSpec
from mskip.compressor.router import Routers
from mskip.exporters.onnx_export import LIBRARIES_RSS, contract_of, export_onnx, peak_rss
base = load_base(ModelSpec(name=EMBEDDED))
layers = list(range(13, 29))
torch.manual_seed(0)
routers = Routers(layers, base.model.config.hidden_size)
torch.nn.init.normal_(routers.weight, std=0.05)
folder = Path(sys.argv[1])
folder.mkdir()
start = time.monotonic()
export_onnx(base, routers, contract_of(base, routers, [0.5] * 16, 20), folder, layers[:8])
seconds, peak = time.monotonic() - start, peak_rss() - LIBRARIES_RSS
weights = sum(p.nbytes for p in base.model.parameters())
from mskip.exporters.ort_runner import OrtRunner
from mskip.exporters.torch_runner import TorchRunner
engine = OrtRunner(folder)
ids = np.arange(100, 148).reshape(2, 24)
with TorchRunner(base, routers, engine.contract) as reference:
    a, b = reference.prefill(ids), engine.prefill(ids)
    steps = []
    for _ in range(4):
        steps.append(float(np.abs(a.logits - b.logits).max()))
        token = a.logits[:, -1].argmax(-1)[:, None]
        a, b = reference.extend(a, token), engine.extend(b, token)
print(json.dumps({"seconds": seconds, "peak": peak, "weights": weights, "steps": steps,
                  "agree": bool((a.routing == b.routing).all()),
                  "capacity": float(b.routing.mean()),
                  "disk": sum(p.stat().st_size for p in folder.iterdir())}))
"""


def test_export_is_right_lean_and_done_in_time(tmp_path: Path) -> None:
    """In a process of its own, so that the memory is the export's."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(tmp_path / "onnx")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["agree"]
    assert 0 < found["capacity"] < 1  # random routers: the comparison covers both branches
    assert max(found["steps"]) < 1e-3
    assert found["disk"] < 1.1 * found["weights"]  # weights stored once for all four graphs
    assert found["peak"] < 2 * found["weights"]
    assert np.isfinite(found["seconds"])
