"""Contexts of benchmark tasks as prompts to calibrate on.

    python benchmarks/task_contexts.py --task-dir FOLDER --skip 300 --documents 20 \
        --output contexts.jsonl
    mskip calibrate RUN --capacity 0.5 --data contexts.jsonl

Takes the documents that `mskip eval --tasks --limit N` does not score (``--skip N``), with their
shots, and writes what the model reads before it is scored: no answer, no continuation. A task
that has no more documents than are skipped gives none.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mskip.compressor.files import write_text
from mskip.exporters.harness import harness_tasks, judged, offline, quietly
from mskip.exporters.task_files import definition, task_names


def recorder() -> Any:
    """A model of the harness that answers nothing and keeps what it was asked.

    Its ``contexts`` has each text once, in order.
    """
    from lm_eval.api.model import LM

    class Recorder(LM):  # type: ignore[misc]
        """See `recorder`."""

        def __init__(self) -> None:
            super().__init__()
            self.contexts: dict[str, None] = {}

        def _note(self, requests: Any) -> None:
            # The harness hands a blank at the end over to the continuation.
            self.contexts |= {request.args[0].rstrip(): None for request in requests}

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            self._note(requests)
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return [0.0] * len(requests)

        def generate_until(self, requests: Any) -> list[str]:
            self._note(requests)
            return [""] * len(requests)

    return Recorder()


def contexts_of(name: str, folder: Path, skip: int, documents: int) -> list[str]:
    """Contexts of a task's documents behind the first ``skip``, which are drawn by lot."""
    task, model = definition(name), recorder()
    with quietly(), offline():
        judged(task, harness_tasks(folder)(task), model, documents, skip=skip)
    return [text for text in model.contexts if text]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task-dir", type=Path, required=True)
    parser.add_argument("--tasks", default="paper")
    parser.add_argument("--skip", type=int, default=300, help="documents that are scored")
    parser.add_argument("--documents", type=int, default=20, help="of each task")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    lines = []
    for name in task_names(options.tasks):
        found = contexts_of(name, options.task_dir, options.skip, options.documents)
        print(f"{name}: {len(found)} contexts")
        lines += [json.dumps({"prompt": text}) for text in found]
    write_text(options.output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
