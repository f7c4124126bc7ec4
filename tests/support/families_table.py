"""Writes docs/families.md from what the tests of the architectures showed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from architectures import MODELS, row_of

HEAD = """# Architectures

Written by `make families`, which runs the tests of every architecture on tiny random models with
every feature of it switched on: `tests/compressor/test_families.py` (PyTorch) and
`tests/exporters/test_families.py` (ONNX Runtime against PyTorch). What they show for each cell is
in their docstrings: detaching restores the model bitwise, executing everything is the dense model,
a skip leaves the residual stream as it is, prefill and decoding is one long forward, a padded batch
is each sequence alone; the graph decides as PyTorch does, and its logits differ by less than 1e-4.

A cell gives the number of tests that passed. After the comma: which of the architecture's
switches is on; windows are shorter than the prompts. Real models: see the end.

| model | granularity | PyTorch | ONNX |
|---|---|---|---|
"""


class FamiliesTable:
    """Collects test reports by architecture, granularity and engine.

    Args:
        path: of the page; what follows its table is kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[tuple[str, str, str], Counter[str]] = {}
        self.reasons: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """One phase of one test."""
        place = dict(report.user_properties).get("family")
        if place is None:
            return
        name, kind, engine = place
        if report.skipped:
            self.reasons[(name, kind)] = report.longrepr[2].removeprefix("Skipped: ").split(";")[0]
        elif report.failed or report.when == "call":
            self.outcomes.setdefault((name, kind, engine), Counter())[report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        """Write the page."""
        page = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        before = {tuple(cells[:2]): cells[2:] for cells in map(_cells, page.splitlines()) if cells}
        rows = []
        for name in sorted(MODELS, key=lambda each: (row_of(each), each)):
            for kind in ("attention", "mlp", "block"):
                # What this session did not run stands as it was.
                stood = before.get((name, kind), ["not run", "not run"])
                cells = [
                    self.cell(name, kind, engine) or cell
                    for engine, cell in zip(("PyTorch", "ONNX"), stood, strict=True)
                ]
                rows.append(f"| {name} | {kind} | {' | '.join(cells)} |")
        rest = page.partition("\n\n## Real models")[2]
        rest = f"\n\n## Real models{rest}" if rest else "\n"
        self.path.write_text(HEAD + "\n".join(rows) + rest, encoding="utf-8")

    def cell(self, name: str, kind: str, engine: str) -> str | None:
        """What was seen; None of what was not run."""
        seen = self.outcomes.get((name, kind, engine))
        if seen:
            return "**failed**" if seen["failed"] else f"{seen['passed']} passed"
        return self.reasons.get((name, kind))


def _cells(line: str) -> list[str]:
    """Cells of a row of the table; nothing of another line."""
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    return cells if len(cells) == 4 and cells[1] in ("attention", "mlp", "block") else []
