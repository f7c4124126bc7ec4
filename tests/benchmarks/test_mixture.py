"""Samples put together to tune on."""

from __future__ import annotations

import json
from pathlib import Path

import mixture
import pytest

from mskip.compressor.data import read_conversations


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Forty pairs, ten chats of two rounds and a text of sixty paragraphs."""
    pairs = [
        {"instruction": f"question {n}", "input": "", "output": f"the answer is {n} " * 5}
        for n in range(40)
    ]
    chats = [
        {
            "conversations": [
                {"from": role, "value": f"{role} {n} {turn} " + "so " * 50}
                for turn in range(2)
                for role in ("human", "gpt")
            ]
        }
        for n in range(10)
    ]
    paragraph = "It was well @-@ known , ( they said ) , that the ship 's crew had left . " * 4
    text = "".join(f" = Heading {n} = \n {n} {paragraph}\n\n" for n in range(60))
    for name, value in (("pairs", pairs), ("chats", chats)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value), "utf-8")
    (tmp_path / "text.txt").write_text(text, "utf-8")
    return [
        *("--pairs", str(tmp_path / "pairs.json"), "--chats", str(tmp_path / "chats.json")),
        *("--text", str(tmp_path / "text.txt"), "--characters", "900"),
        *("--short", "8", "--contexts", "5", "--long", "6", "--documents", "7"),
    ]


def test_every_part_is_there_and_is_read_again(files: list[str], tmp_path: Path) -> None:
    output = tmp_path / "mixture.jsonl"
    mixture.main([*files, "--output", str(output)])
    read = read_conversations(str(output))
    assert len(read) == 8 + 6 + 3 + 7  # 32 pairs are left, some nine fill a context
    assert sum(len(each.messages) == 2 for each in read) == 8
    assert sum(len(each.messages) == 4 for each in read) == 6
    plain = [each for each in read if each.prompt is not None]
    assert all(len(each.prompt or "") + len(each.text or "") <= 1000 for each in plain)

    contexts = [each for each in plain if "question" in (each.prompt or "")]
    asked = [word for each in contexts for word in (each.prompt or "").split("question ")[1:]]
    numbers = [line.split()[0] for line in asked]
    assert len(set(numbers)) == len(numbers)  # no pair twice
    singles = [each.messages[0].content.split()[1] for each in read if len(each.messages) == 2]
    assert not set(singles) & set(numbers)
    for each in contexts:
        number = (each.prompt or "").split("question ")[-1].split()[0]
        assert each.text == " " + f"the answer is {number} " * 4 + f"the answer is {number}"

    documents = [each for each in plain if each not in contexts]
    assert "well-known, (they said), that the ship's crew had left." in (documents[0].prompt or "")
    assert not any("Heading" in (each.prompt or "") + (each.text or "") for each in documents)
    assert all((each.text or "").startswith(" ") for each in documents)


def test_the_same_seed_gives_the_same(files: list[str], tmp_path: Path) -> None:
    written = []
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        mixture.main([*files, "--seed", seed, "--output", str(tmp_path / name)])
        written.append((tmp_path / name).read_text("utf-8"))
    assert written[0] == written[1] != written[2]
