"""What lm-evaluation-harness asks, and what it would say itself."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest

from mskip.compressor.errors import DataError, MissingExtraError
from mskip.exporters.harness import cut, generation, harness_model, offline, quietly
from mskip.exporters.reading import Reader

if TYPE_CHECKING:
    from conftest import Exported
    from transformers import PreTrainedTokenizerBase

    from mskip.compressor.models import BaseModel
    from mskip.exporters.runner import Runner


@pytest.fixture(scope="module")
def plain_base(exported: Exported) -> BaseModel:
    """The base model once more: the other one has routers attached."""
    from mskip.compressor.models import load_base

    return load_base(exported.run.recipe().model)


@pytest.fixture
def requests() -> Any:
    """Factory of the harness's requests: ``requests(*arguments)``."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    return lambda *many: [instance("loglikelihood", {}, each, 0) for each in many]


def model_of(runner: Runner, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    decode = Reader(
        runner,
        lambda tokens: str(tokenizer.decode(tokens)),
        **{"max_length": 512, "routing": [1, 1, 1], **options},
    )
    return harness_model(decode, tokenizer)


PAIRS = [
    ("the question is", " one"),
    ("the question is", " two three"),
    ("user: the answer is ", "Response"),
    ("", "the answer"),
    ("<s>system", " one"),
    ("a " * 30, "b " * 20),
]


@pytest.fixture
def harness_own(plain_base: BaseModel) -> Any:
    """The harness's own model class on the model without routers."""
    pytest.importorskip("lm_eval.api.model")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    return huggingface.HFLM(
        pretrained=plain_base.model, tokenizer=plain_base.tokenizer, batch_size=2, device="cpu"
    )


def test_forced_to_execute_it_is_the_harness_on_the_dense_model(
    runner: Runner, plain_base: BaseModel, requests: Any, harness_own: Any
) -> None:
    ours = model_of(runner, plain_base.tokenizer)
    expected = harness_own.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests(*PAIRS))
    for (total, greedy), (value, likeliest) in zip(found, expected, strict=True):
        assert total == pytest.approx(float(value), abs=1e-3)
        assert greedy == likeliest
    skipping = model_of(runner, plain_base.tokenizer, routing=[0, 0, 0])
    other = skipping.loglikelihood(requests(*PAIRS))
    assert all(abs(a[0] - b[0]) > 1e-2 for a, b in zip(found, other, strict=True))


def test_rolling_likelihood_is_the_harness_on_the_dense_model(
    runner: Runner, plain_base: BaseModel, requests: Any, harness_own: Any
) -> None:
    texts = [("the question is " * 12,), ("one",)]
    harness_own._max_length = 16
    expected = harness_own.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    found = model_of(runner, plain_base.tokenizer, max_length=16).loglikelihood_rolling(
        requests(*texts)
    )
    assert found == pytest.approx([float(value) for value in expected], abs=1e-2)


def test_generation_is_the_harness_on_the_dense_model(
    runner: Runner, plain_base: BaseModel, requests: Any, harness_own: Any
) -> None:
    contexts = [pair[0] for pair in PAIRS if pair[0]]
    ours = model_of(runner, plain_base.tokenizer)

    def both(**arguments: Any) -> tuple[list[str], list[str]]:
        asked = [(context, {"do_sample": False, **arguments}) for context in contexts]
        expected = harness_own.generate_until(requests(*asked), disable_tqdm=True)
        return ours.generate_until(requests(*asked)), expected

    found, expected = both(until=[], max_gen_toks=12)
    assert found == expected
    stop = next(each for each in found if len(each) > 8)[4:6]
    stopped, expected = both(until=[stop], max_gen_toks=12)
    assert stopped == expected
    assert any(len(one) < len(other) for one, other in zip(stopped, found, strict=True))
    assert not any(stop in each for each in stopped)


def test_tokenizers_that_close_a_text(
    torch_runner: Runner, make_tokenizer: Any, requests: Any
) -> None:
    """An end token after the context would be read as the end of the context."""
    closing, opening = make_tokenizer(adds="both"), make_tokenizer(adds="bos")
    one = model_of(torch_runner, closing).loglikelihood(requests(*PAIRS))
    other = model_of(torch_runner, opening).loglikelihood(requests(*PAIRS))
    assert one == other


def test_generation_arguments() -> None:
    assert generation({"until": "x"}) == (["x"], 256)
    assert generation({"until": ["x", "", "y"], "max_new_tokens": 3}) == (["x", "y"], 3)
    assert generation({"max_gen_toks": 5, "temperature": 0.0}) == ([], 5)
    with pytest.raises(DataError, match="sampling"):
        generation({"do_sample": True})
    assert cut("one two three", ["three", " two"]) == "one"
    assert cut("one", []) == "one"


def test_patches_are_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    task = pytest.importorskip("lm_eval.api.task")
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    before = task.tqdm, logging.getLogger("lm_eval").level, datasets.config.HF_HUB_OFFLINE

    def broken() -> None:
        with quietly(), offline():
            assert list(task.tqdm([1, 2], total=2)) == [1, 2]
            assert not logging.getLogger("lm_eval.api.task").isEnabledFor(logging.ERROR)
            assert huggingface_hub.constants.is_offline_mode()
            assert datasets.config.HF_HUB_OFFLINE
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert (task.tqdm, logging.getLogger("lm_eval").level, datasets.config.HF_HUB_OFFLINE) == before
    assert not huggingface_hub.constants.is_offline_mode()


def test_without_lm_eval(
    torch_runner: Runner, plain_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"mskip\[eval\]"):
        harness_model(Reader(torch_runner, str, max_length=512), plain_base.tokenizer)
