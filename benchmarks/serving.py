"""A run on a real Triton Inference Server: throughput, latency, and ten minutes of mixed load.

    python benchmarks/serving.py runs/smollm2-135m                 # throughput, routed and dense
    python benchmarks/serving.py runs/smollm2-135m --soak 10       # minutes of mixed load
    python benchmarks/serving.py runs/smollm2-135m --perf-analyzer # NVIDIA's own tool

The run must be exported with ``mskip export --triton``. Routed and dense are two servers, of which
one is idle at a time, and they take turns, so that what the machine does meanwhile meets both.
The greedy reference of the mixed load is `OrtRunner`, one sequence at a time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from pathlib import Path

from serving_analyzer import perf_analyzer
from serving_soak import soak
from serving_throughput import show_throughput, throughput

from mskip.compressor.artifact import Run, versions
from mskip.compressor.files import write_json
from mskip.exporters.speed import machine
from mskip.exporters.triton.repository import FOLDER
from mskip.exporters.triton.server import requirements


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("run", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--soak", type=float, metavar="MINUTES")
    parser.add_argument("--perf-analyzer", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    run = Run(options.run)
    if not (run.path / FOLDER).is_dir():
        raise SystemExit("export the run first: mskip export --triton")
    with tempfile.TemporaryDirectory(dir=run.path) as scratch:
        place = Path(scratch)
        if options.soak:
            report = soak(run, options.soak, options.threads, place)
            print(json.dumps(report, indent=1))
        elif options.perf_analyzer:
            report = perf_analyzer(run, options.threads, place)
        else:
            report = throughput(run, options.rounds, options.threads, place)
            show_throughput(report)
    if options.output:
        signed = {
            "date": datetime.date.today().isoformat(),
            "machine": machine(f"{requirements()[2]} in Triton's python backend", options.threads),
            "versions": versions(),
            **report,
        }
        write_json(options.output, signed)


if __name__ == "__main__":
    main()
