"""Files of the tasks: what is wrong with them is said before a model is loaded."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from task_documents import made, read, write, write_tasks

from mskip.compressor.errors import DataError
from mskip.exporters.task_files import PAPER, definition, read_rows, task_names
from mskip.exporters.task_scores import check_tasks

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_names_of_tasks() -> None:
    assert task_names("paper") == list(PAPER)
    assert task_names("rte, boolq,rte") == ["rte", "boolq"]
    for text in ("bollq", "boolq,nothing", "", ",", "paper,boolq"):
        with pytest.raises(DataError, match="no task") as caught:
            task_names(text)
        assert "winogrande" in caught.value.remedy


BAD = {
    "not JSON": ("{", "not JSON"),
    "no object": ("[1]", "not a JSON object"),
    "key": ({"query": "a", "choices": ["b", "c"]}, "lacks the key 'gold'"),
    "text": ({"query": 1, "choices": ["b", "c"], "gold": 0}, "'query' is not a text"),
    "one choice": ({"query": "a", "choices": ["b"], "gold": 0}, "'choices' is not a list of texts"),
    "empty": ({"query": "a", "choices": ["b", ""], "gold": 0}, "none of them empty"),
    "gold": ({"query": "a", "choices": ["b", "c"], "gold": True}, "'gold' is not a whole number"),
    "range": ({"query": "a", "choices": ["b", "c"], "gold": 2}, "'gold' is 2: there are 2 choices"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(case: str, tmp_path: Path) -> None:
    line, reason = BAD[case]
    good = json.dumps({"query": "a", "choices": ["b", "c"], "gold": 1, "more": {}})
    bad = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / "piqa.jsonl"
    path.write_text(f"{good}\n\n{bad}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        check_tasks(["piqa"], tmp_path)
    assert caught.value.message.startswith(f"{path}, line 3: ")
    assert reason in caught.value.message
    assert "'query' (a text), 'choices'" in caught.value.remedy


def test_labels_that_do_not_fit_fixed_choices(tmp_path: Path) -> None:
    rng = random.Random(0)
    write(tmp_path / "rte.jsonl", [{**made("rte", rng), "label": "2"}])
    with pytest.raises(DataError, match="'label' is 2: there are 2 choices"):
        read_rows(tmp_path / "rte.jsonl", definition("rte"))
    write(tmp_path / "mmlu.jsonl", [{**made("mmlu", rng), "choices": ["a", "b", "c"]}])
    with pytest.raises(DataError, match="'choices' has 3 texts, not 4"):
        read_rows(tmp_path / "mmlu.jsonl", definition("mmlu"))


def test_missing_files_and_examples(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"boolq\.jsonl, which task boolq needs") as caught:
        check_tasks(["boolq"], tmp_path)
    assert "'gold' (a whole number from 0)" in caught.value.remedy
    shutil.copy(folder / "mmlu.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"mmlu_fewshot\.jsonl, which task mmlu needs"):
        check_tasks(["mmlu"], tmp_path)
    write(tmp_path / "mmlu_fewshot.jsonl", read(folder / "mmlu_fewshot.jsonl")[:10])
    with pytest.raises(DataError, match="holds 4 documents for mmlu_anatomy; it takes 5"):
        check_tasks(["mmlu"], tmp_path)
    write(tmp_path / "gsm8k.jsonl", read(folder / "gsm8k.jsonl")[:5])
    with pytest.raises(DataError, match=r"holds 5 documents; 5 are examples") as caught:
        check_tasks(["gsm8k"], tmp_path)
    assert "gsm8k_fewshot.jsonl" in caught.value.remedy
    (tmp_path / "rte.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no documents"):
        check_tasks(["rte"], tmp_path)
    check_tasks(PAPER, folder)
