"""Named data sets: what a short name in ``data.source`` stands for, and the order of drawing.

One row a data set of the Hugging Face hub, one row a mixture of them; docs/data.md says
where each figure is from and what of it is assumed. Reading is in
`mskip.compressor.records`, the formats are in `mskip.compressor.data`.

Sources: Router-Tuning (arXiv 2410.13184) and its public converter; LLaMA Pro
(arXiv 2401.02415, table 7); the data sets' cards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, in its default configuration.

    Attributes:
        hub: its id.
        keys: the keys that make its format, as `mskip.compressor.data` reads it.
        rows: number of records, as published; a mixture weighs by it.
        licence: what its card says, and what the card does not settle.
        use: what the paper and its public code use it for.
        file: a JSON list in it that is opened directly, since ``datasets`` reads such a
            list whole even when it streams; None where ``datasets`` streams.
        split: its only split.
    """

    hub: str
    keys: tuple[str, ...]
    rows: int
    licence: str
    use: str
    file: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Mixture:
    """Named data sets drawn from in proportion to rows times copies.

    Attributes:
        copies: how often each data set is counted, by its short name.
        use: what the paper and its public code use it for.
    """

    copies: Mapping[str, float]
    use: str


_TURNS = ("conversations",)
HUB_SETS: dict[str, HubSet] = {
    "alpaca": HubSet(
        hub="tatsu-lab/alpaca",
        keys=("instruction", "input", "output"),
        rows=52_002,
        licence="CC BY-NC 4.0",
        use="the paper's Alpaca, and the set of its public launch script",
    ),
    "evol-instruct": HubSet(
        hub="WizardLMTeam/WizardLM_evol_instruct_V2_196k",  # was WizardLM/...
        keys=_TURNS,
        rows=143_000,
        licence="MIT",
        use="the paper's Evol-Instruct; part of llama-pro",
        file="WizardLM_evol_instruct_V2_143k.json",
    ),
    "evol-instruct-70k": HubSet(
        hub="WizardLMTeam/WizardLM_evol_instruct_70k",  # was WizardLM/...
        keys=("instruction", "output"),
        rows=70_000,
        licence="MIT",
        use="not used: the first edition of evol-instruct",
        file="alpaca_evol_instruct_70k.json",
    ),
    "evol-codealpaca": HubSet(
        hub="theblackcat102/evol-codealpaca-v1",
        keys=("instruction", "output"),
        rows=111_272,
        licence="Apache-2.0",
        use="part of llama-pro",
    ),
    "sharegpt": HubSet(
        hub="anon8231489123/ShareGPT_Vicuna_unfiltered",
        keys=_TURNS,
        rows=63_817,
        licence="Apache-2.0 by its card; chats of many users, whose consent is not on record",
        use="the paper's ShareGPT; part of llama-pro",
        file="ShareGPT_V3_unfiltered_cleaned_split_no_imsorry.json",
    ),
    "metamathqa": HubSet(
        hub="meta-math/MetaMathQA",
        keys=("query", "response"),
        rows=395_000,
        licence="MIT",
        use="part of llama-pro",
        file="MetaMathQA-395K.json",
    ),
    "slimorca": HubSet(
        hub="Open-Orca/SlimOrca",
        keys=_TURNS,
        rows=517_982,
        licence="MIT",
        use="part of llama-pro",
    ),
}
MIXTURES: dict[str, Mixture] = {
    "llama-pro": Mixture(
        # The public converter's portions. They are the average rounds of a conversation in
        # table 7 of LLaMA Pro, which gives no weights; kept, to be comparable.
        copies={
            "sharegpt": 2.9,
            "evol-instruct": 1.0,
            "slimorca": 1.0,
            "metamathqa": 1.0,
            "evol-codealpaca": 1.0,
        },
        use="the paper's Llama-Pro",
    ),
}


def names() -> list[str]:
    """Every short name, in the order of the tables."""
    return [*HUB_SETS, *MIXTURES]


def parts_of(name: str) -> list[tuple[HubSet, float]]:
    """The hub data sets behind a short name, each with its weight (> 0, not normalised).

    Raises:
        KeyError: no such name.
    """
    copies = MIXTURES[name].copies if name in MIXTURES else {name: 1.0}
    return [(HUB_SETS[part], HUB_SETS[part].rows * count) for part, count in copies.items()]


def interleave(parts: Sequence[tuple[Iterator[T], float]], seed: int) -> Iterator[T]:
    """Draw from ``parts`` at random, each with a probability in proportion to its weight.

    Items of one part keep their order, and nothing comes twice: a part that has ended is
    no longer drawn from, and the others share its weight. No part is read ahead of its
    next item, and none before it is first drawn.

    Args:
        parts: iterators, each with its weight (> 0).
        seed: of the draws; the same seed and weights give the same order.
    """
    left = list(parts)
    draw = random.Random(seed)
    while left:
        chosen = draw.choices(range(len(left)), [weight for _, weight in left])[0]
        try:
            item = next(left[chosen][0])
        except StopIteration:
            del left[chosen]
        else:
            yield item


def shuffled(items: Iterator[T], buffer: int, seed: int) -> Iterator[T]:
    """Shuffle within a sliding buffer: the order is a function of items, buffer and seed.

    An item comes at most ``buffer - 1`` places early, and as many items are read ahead.
    With a buffer that holds all of them the order is a full shuffle.

    Args:
        items: not read before the first is asked for.
        buffer: how many items are held to choose from.
        seed: of the choices.

    Raises:
        ValueError: ``buffer`` below 1.
    """
    if buffer < 1:
        raise ValueError("a shuffle buffer holds at least 1")
    return _drawn(items, buffer, random.Random(seed))


def _drawn(items: Iterator[T], buffer: int, draw: random.Random) -> Iterator[T]:
    held = list(islice(items, buffer - 1))
    for item in items:
        held.append(item)
        place = draw.randrange(len(held))
        held[place], held[-1] = held[-1], held[place]
        yield held.pop()
    draw.shuffle(held)
    yield from held
