"""Samples to tune on that look like what is read later: chats, few-shot contexts, documents.

    python benchmarks/mixture.py --pairs alpaca.json --chats sharegpt.json --text wikitext.txt \
        --output mixture.jsonl
    mskip tune --data mixture.jsonl --set tuning.max_length=1024

Routers and maps that were tuned on short chats carry over badly to contexts of a thousand tokens
with examples in them. A context is put together from pairs of question and answer, in one of a
few plain styles, up to twelve before the one whose answer is scored; of a document the second half
is scored. Nothing comes from the tasks that are evaluated.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mskip.compressor.data import Conversation, read_conversations
from mskip.compressor.files import write_text

STYLES = ["Question: {}\nAnswer: ", "Q: {}\nA: ", "{}\n", "Instruction: {}\nResponse: "]
EXAMPLES = 12
SHORT = 400
"""Characters of a question and of an answer that take part in a context, at most."""


def pair_of(conversation: Conversation) -> tuple[str, str] | None:
    """Question and answer of a single turn; None where there are more, or no answer."""
    turns = conversation.messages
    if len(turns) != 2 or not turns[1].content.strip():
        return None
    return turns[0].content.strip(), turns[1].content.strip()


def contexts(
    pairs: list[tuple[str, str]], rng: random.Random, characters: int
) -> Iterator[dict[str, str]]:
    """Few-shot prompts of up to ``characters``, each of pairs of its own, and their answers."""
    left = iter([pair for pair in pairs if max(map(len, pair)) <= SHORT])
    while True:
        style, parts, size = rng.choice(STYLES), list[str](), 0
        for question, answer in left:
            head = style.format(question)
            if len(parts) == EXAMPLES or size + len(head) + len(answer) > characters:
                prompt = "\n\n".join([*parts, head.rstrip(" ")])
                yield {"prompt": prompt, "completion": f" {answer}"}
                break
            parts.append(head + answer)
            size += len(parts[-1])
        else:
            return


def untokenised(text: str) -> str:
    """WikiText's marks and blanks around punctuation taken back; other text hardly changes."""
    text = re.sub(r" @([-.,])@ ", r"\1", text)
    return re.sub(r" ([.,;:!?)]|'s)", r"\1", text).replace("( ", "(")


def documents(text: str, characters: int) -> Iterator[dict[str, str]]:
    """Paragraphs put together to some ``characters``, cut in the middle at a blank."""
    whole = ""
    for paragraph in (line.strip() for line in untokenised(text).splitlines()):
        if len(whole) + len(paragraph) > characters:
            if len(whole) > characters // 2 and (middle := whole.find(" ", len(whole) // 2)) > 0:
                yield {"prompt": whole[:middle], "completion": whole[middle:]}
            whole = ""
        # Headings and blank lines of such files are short.
        if SHORT // 2 < len(paragraph) <= characters:
            whole = f"{whole}\n{paragraph}".lstrip()


def mixture(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The records, shuffled."""
    rng = random.Random(options.seed)
    single, chats = (read_conversations(str(path)) for path in (options.pairs, options.chats))
    rng.shuffle(single)
    rng.shuffle(chats)
    short, rest = single[: options.short], single[options.short :]
    pairs = [pair for each in rest if (pair := pair_of(each)) is not None]
    fits = range(options.characters // 2, options.characters)
    long = [each for each in chats if sum(len(turn.content) for turn in each.messages) in fits]
    found = list(documents(options.text.read_text("utf-8"), options.characters))
    rng.shuffle(found)
    records: list[dict[str, Any]] = [
        *(_record(each) for each in [*short, *long[: options.long]]),
        *islice(contexts(pairs, rng, options.characters), options.contexts),
        *found[: options.documents],
    ]
    rng.shuffle(records)
    return records


def _record(conversation: Conversation) -> dict[str, Any]:
    turns = [{"role": turn.role, "content": turn.content} for turn in conversation.messages]
    return {"messages": turns}


def main(arguments: list[str] | None = None) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=Path, required=True, help="questions and answers, one turn")
    parser.add_argument("--chats", type=Path, required=True, help="longer conversations")
    parser.add_argument("--text", type=Path, required=True, help="plain text, a paragraph a line")
    parser.add_argument("--characters", type=int, default=3300, help="of a sample, at most")
    parser.add_argument("--short", type=int, default=200, help="pairs as chats of one turn")
    parser.add_argument("--contexts", type=int, default=110, help="few-shot contexts of pairs")
    parser.add_argument("--long", type=int, default=60, help="longer conversations")
    parser.add_argument("--documents", type=int, default=60, help="pieces of the text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    records = mixture(options)
    write_text(options.output, "".join(json.dumps(record) + "\n" for record in records))
    print(f"{len(records)} samples in {options.output}")


if __name__ == "__main__":
    main()
