"""Keys and values as resident memory, and what a long generation adds.

    python benchmarks/kv_memory.py RUN --output results/kv-memory.json

RUN is exported with `--target ort`. Two processes, one graph each: the dense one, and the routed
one with every second routed sublayer skipped (capacity 0.5). Each reads prompts and keeps them all;
what its resident memory grows by, after a first prompt that was let go, is what a sequence holds.
One of them is then continued token by token, with time and memory along the way.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROBE = 64
"""Steps between two looks at the memory, and of which a median is taken."""


def resident() -> int:
    """Bytes of memory of this process's own that are resident now."""
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell the resident memory (RssAnon).")


def measure(
    folder: Path, routed: bool, context: int, prompts: int, steps: int, to: Connection
) -> None:
    """In a process of its own."""
    import numpy as np

    from mskip.exporters.onnx_export import DENSE, MODEL
    from mskip.exporters.opening import open_runner

    runner = open_runner(folder, MODEL if routed else DENSE)
    layers = len(runner.contract.routed_layers)
    routing = np.arange(layers)[None] % 2 if routed else None
    rng = np.random.default_rng(0)

    def read() -> Any:
        ids = rng.integers(0, runner.contract.vocabulary, (1, context))
        return runner.prefill(ids, routing=routing, last_only=True)

    state = read()
    runner.extend(state, np.zeros((1, 1), dtype=np.int64))
    del state
    before = resident()
    held = [read() for _ in range(prompts)]
    each = (resident() - before) / prompts
    state = held[-1]
    counted = [runner.kv_bytes(state)]
    times: list[float] = []
    memory = [resident()]
    for step in range(1, steps + 1):
        start = time.perf_counter()
        state = runner.extend(state, np.full((1, 1), step, dtype=np.int64))
        times.append((time.perf_counter() - start) * 1e3)
        if step % PROBE == 0:
            memory.append(resident())
            counted.append(runner.kv_bytes(state))
    to.send(
        {
            "graph": "routed, capacity 0.5" if routed else "dense",
            "engine": runner.name,
            "kv_bytes": counted[0],
            "resident_bytes": round(each),
            "step_ms": [
                round(statistics.median(times[at : at + PROBE]), 2) for at in range(0, steps, PROBE)
            ],
            "kv_growth_bytes": counted[-1] - counted[0],
            "resident_growth_bytes": memory[-1] - memory[0],
            "resident_growth_by_probe": [now - memory[0] for now in memory],
        }
    )


def main() -> None:
    """See the module."""
    from mskip.compressor.artifact import open_run, versions
    from mskip.compressor.files import write_json
    from mskip.exporters.speed import machine
    from mskip.exporters.targets import Form

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    run = open_run(given.run)
    folder = Form("ort").exported(run)
    context = multiprocessing.get_context("spawn")
    rows = []
    for routed in (False, True):
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(
            target=measure,
            args=(folder, routed, given.context, given.prompts, given.steps, sending),
        )
        process.start()
        sending.close()
        rows.append(receiving.recv())
        process.join()
    dense, half = rows
    for row in rows:
        print(
            f"{row['graph']}: {row['resident_bytes'] / 1e6:.1f} MB resident a sequence "
            f"({row['kv_bytes'] / 1e6:.1f} MB of keys and values); {given.steps} steps: "
            f"{row['step_ms'][0]} -> {row['step_ms'][-1]} ms, "
            f"{row['resident_growth_bytes'] / 1e6:+.1f} MB resident "
            f"({row['kv_growth_bytes'] / 1e6:+.1f} MB of keys and values)"
        )
    ratio = half["resident_bytes"] / dense["resident_bytes"]
    print(f"resident, capacity 0.5 over dense: {ratio:.3f}")
    write_json(
        given.output,
        {
            "rows": rows,
            "resident_ratio": round(ratio, 4),
            "context": given.context,
            "steps": given.steps,
            "model": run.recipe().model.name,
            "machine": machine(half["engine"], None),
            "versions": versions(),
            "date": datetime.date.today().isoformat(),
        },
    )


if __name__ == "__main__":
    main()
