"""A run with random weights and untuned routers, of a real model's size: for measuring speed.

    python benchmarks/random_run.py FOLDER --layers 22
    mskip export FOLDER --target ort

The shape is that of TinyLlama 1.1B. FOLDER/model is the model, FOLDER the run. Every second routed
layer is what the static peer lacks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
"""Of TinyLlama 1.1B, which has 22 layers."""


def write_model(folder: Path, layers: int, dtype: str) -> None:
    """A random model with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.set_default_dtype(getattr(torch, dtype))
    config = LlamaConfig(
        **SHAPE, num_hidden_layers=layers, max_position_embeddings=16384, tie_word_embeddings=False
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(tokens, []))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def write_run(folder: Path, layers: int) -> None:
    """The run around the model, as tuning and calibration would have left it."""
    import numpy as np
    import torch

    from mskip.compressor.artifact import Run, save_routers
    from mskip.compressor.files import write_text
    from mskip.compressor.models import load_base
    from mskip.compressor.recipe import load_recipe
    from mskip.compressor.router import Routers

    routed = list(range(layers // 2 - 1, layers - 1))
    settings = [
        f"model.name={folder.resolve() / 'model'}", "compensation.rank=0", "routing.choose=last",
        f"routing.last={len(routed)}", f"bench.threads={torch.get_num_threads()}",
    ]  # fmt: skip
    recipe, run = load_recipe("smollm2-135m", settings), Run(folder)
    base = load_base(recipe.model)
    torch.manual_seed(0)
    routers = Routers(routed, SHAPE["hidden_size"]).requires_grad_(False)
    run.write_recipe(recipe)
    save_routers(run, routers, base, recipe)
    run.write_calibration({"target": 0.5, "tau": [0.5] * len(routed)})
    order = routed[::2] + routed[1::2]
    run.write_report("tune", {"removal_orders": {recipe.static.rule: order}})
    tokens = np.random.default_rng(0).integers(3, 250, 4096).tolist()
    lines = [{"key": ""}, {"input_ids": tokens, "prompt_length": len(tokens)}]
    write_text(folder / "samples.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    run.write_manifest()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    given = parser.parse_args()
    given.folder.mkdir(parents=True)
    write_model(given.folder / "model", given.layers, "float32")
    write_run(given.folder, given.layers)


if __name__ == "__main__":
    main()
