"""Tiny models, routers and folders that every test can afford.

Heavy packages are imported by the fixtures that need them, so that a test of
pure functions starts at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    from mskip.compressor.encoding import Batch
    from mskip.compressor.router import Routers

# Kernels run on the CPU. Triton reads this when it is imported, and torch may import it.
os.environ.setdefault("TRITON_INTERPRET", "1")

VOCABULARY = 97
BOS, EOS, PAD, START = "<s>", "<|im_end|>", "<pad>", "<|im_start|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--families FILE`` writes the page about architectures."""
    parser.addoption("--families", type=Path, metavar="FILE")


def pytest_configure(config: pytest.Config) -> None:
    """Only the process that sees all reports writes the page."""
    path = config.getoption("--families")
    if path is not None and not hasattr(config, "workerinput"):
        from families_table import FamiliesTable

        config.pluginmanager.register(FamiliesTable(path))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., LlamaForCausalLM]:
    """Factory of random Llamas: 4 layers, hidden 32, 4 query and 2 KV heads, float32.

    ``tiny_model(seed=0, attn_implementation="sdpa", **config)``; every call gives a new model.
    The weights are ten times wider than usual, so that a skipped sublayer, a wrong position or
    a missing key shows in the logits.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # The models are too small for two.

    def make(
        seed: int = 0, attn_implementation: str = "sdpa", **overrides: Any
    ) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        config = LlamaConfig(**{**settings, **overrides})
        config._attn_implementation = attn_implementation
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(config)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def tiny_routers() -> Callable[..., Routers]:
    """Factory of routers that execute about half of random prompts, each layer in its own way.

    ``tiny_routers(model, layers=(1, 2), seed=0)``: standardised on the dense model's prompt
    means of random prompts, then given random weights.
    """
    import torch

    from mskip.compressor.router import Routers

    def make(model: LlamaForCausalLM, layers: Sequence[int] = (1, 2), seed: int = 0) -> Routers:
        generator = torch.Generator().manual_seed(seed)
        routers = Routers(list(layers), model.config.hidden_size)
        prompts = torch.randint(3, model.config.vocab_size, (64, 6), generator=generator)
        means: dict[int, torch.Tensor] = {}
        hooks = [
            model.model.layers[layer].input_layernorm.register_forward_hook(
                lambda _, __, output, layer=layer: means.update({layer: output.mean(dim=1)})
            )
            for layer in layers
        ]
        with torch.no_grad():
            model(prompts, use_cache=False)
            for hook in hooks:
                hook.remove()
            routers.standardise(torch.stack([means[layer] for layer in layers], dim=1))
            routers.weight.normal_(std=3.0, generator=generator)
        return routers.requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def prompt_batch() -> Callable[..., Batch]:
    """Factory of batches of random prompts, all of them prompt: see `mskip.compressor.encoding`.

    ``prompt_batch(lengths, seed=0, side="left")`` gives one prompt a length, padded with 0.
    """
    import torch

    from mskip.compressor.encoding import Sample, collate

    def make(
        lengths: Sequence[int], seed: int = 0, side: Literal["left", "right"] = "left"
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        prompts = [
            torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
            for length in lengths
        ]
        samples = [Sample(prompt, len(prompt)) for prompt in prompts]
        return collate(samples, 0, padding_side=side)

    return make


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """Factory of byte-level BPE tokenizers, about 340 tokens.

    ``make_tokenizer(template, adds="bos")``; ``template`` is a chat template (ChatML if left
    out, None for none), and the tokenizer adds BOS ("bos"), BOS and EOS ("both") or nothing
    ("") to a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def make(template: str | None = CHATML, *, adds: str = "bos") -> PreTrainedTokenizerFast:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.train_from_iterator(
            ["user assistant system the answer is the question", "### Response: one two three"] * 4
            + ["\n" * 3] * 4,
            trainers.BpeTrainer(
                vocab_size=340,
                show_progress=False,
                special_tokens=[BOS, EOS, PAD, START],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        if adds:
            core.post_processor = processors.TemplateProcessing(
                single=f"{BOS} $A {EOS}" if adds == "both" else f"{BOS} $A",
                special_tokens=[(BOS, core.token_to_id(BOS)), (EOS, core.token_to_id(EOS))],
            )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token=BOS, eos_token=EOS, pad_token=PAD
        )
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tiny_folder(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., LlamaForCausalLM],
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> Path:
    """A Hugging Face model folder: safetensors, tokenizer with ChatML, EOS and PAD. Read only."""
    tokenizer = make_tokenizer()
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    model = tiny_model(vocab_size=len(tokenizer), **ids)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
