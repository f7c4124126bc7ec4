"""All that needs an NVIDIA GPU, in one go of less than eight minutes.

    python benchmarks/gpu_suite.py --output results/gpu.json

Needs PyTorch for CUDA and the Triton language, nothing else. Attention sublayers with the shapes of
an 8B model and random weights: the kernels against float64, decoding steps of a few layers captured
in a CUDA graph (all sequences execute, half of them, none, sublayers removed, and PyTorch's own
products and attention), rates against what the device gives to a copy, waits for the host in a
step, and which tiles are fastest. What else is installed (TensorRT, TensorRT-RTX) is asked whether
it knows this GPU; where it does, it builds and runs the engines of a small random model. Cases that
do not fit the memory or the time are named as not run.

`--smoke` runs tiny shapes in triton's interpreter on the CPU: it proves the script, not the speed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_engines import builders, engines, first_line

SEED = 0
ROUNDS = 7
VARIANTS = ("reference", "execute", "half", "skip", "removed")


@dataclass(frozen=True)
class Shapes:
    """Of the layers that are timed, and which cases."""

    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head: int = 128
    inner: int = 14336
    layers: int = 4
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (512, 2048, 4096, 16384)


SMOKE = Shapes(32, 4, 2, 16, 48, 1, (2,), (16,))


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape: int, dtype: Any, seed: int) -> Any:
    import torch

    generator = torch.Generator(device()).manual_seed(SEED + seed)
    return torch.randn(*shape, generator=generator, device=device()).mul_(0.02).to(dtype)


class Layers:
    """A few decoder layers: routed attention, dense MLP."""

    def __init__(self, shapes: Shapes, dtype: Any) -> None:
        wide, narrow = shapes.heads * shapes.head, shapes.kv_heads * shapes.head
        sizes = {
            "q": (wide, shapes.hidden), "k": (narrow, shapes.hidden), "v": (narrow, shapes.hidden),
            "o": (shapes.hidden, wide), "up": (shapes.inner, shapes.hidden),
            "down": (shapes.hidden, shapes.inner),
        }  # fmt: skip
        self.shapes = shapes
        self.weights = [
            {
                name: random(*size, dtype=dtype, seed=10 * layer + number)
                for number, (name, size) in enumerate(sizes.items())
            }
            for layer in range(shapes.layers)
        ]

    def weight_bytes(self, names: tuple[str, ...]) -> int:
        return sum(layer[name].nbytes for layer in self.weights for name in names)


class Case:
    """A batch of sequences with so many positions, about to make a step."""

    def __init__(self, layers: Layers, batch: int, context: int, dtype: Any) -> None:
        import torch

        shapes = layers.shapes
        self.layers, self.batch, self.context = layers, batch, context
        size = (batch, shapes.kv_heads, context + 1, shapes.head)
        self.keys = [random(*size, dtype=dtype, seed=i) for i in range(shapes.layers)]
        self.values = [random(*size, dtype=dtype, seed=100 + i) for i in range(shapes.layers)]
        self.x = random(batch, 1, shapes.hidden, dtype=dtype, seed=7)
        self.positions = torch.full((batch, 1), context, dtype=torch.int64, device=device())
        self.mask = torch.zeros(batch, 1, 1, context + 1, dtype=dtype, device=device())
        self.execute = torch.zeros(batch, dtype=torch.int32, device=device())

    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self.keys, *self.values))

    def decide(self, variant: str) -> None:
        rows = {"execute": self.batch, "half": self.batch // 2}.get(variant, 0)
        self.execute.zero_()
        self.execute[:rows] = 1

    def step(self, variant: str) -> Any:
        """All layers once; the result is returned, keys and values are written."""
        import torch.nn.functional as f

        x = self.x
        for number, weights in enumerate(self.layers.weights):
            if variant == "reference":
                x = x + self._reference(x, number, weights)
            elif variant != "removed":
                x = x + self._ours(x, number, weights)
            x = x + f.linear(f.silu(f.linear(x, weights["up"])), weights["down"])
        return x

    def _split(self, states: Any, heads: int) -> Any:
        return states.view(self.batch, 1, heads, self.layers.shapes.head).transpose(1, 2)

    def _write(self, number: int, key: Any, value: Any) -> None:
        at = self.positions[:, None, :, None].expand_as(key)
        self.keys[number].scatter_(2, at, key)
        self.values[number].scatter_(2, at, value)

    def _ours(self, x: Any, number: int, weights: dict[str, Any]) -> Any:
        from mskip.exporters.routed_kernels import attention, linear

        shapes = self.layers.shapes
        q, k, v = (linear(x, weights[name], self.execute, transposed=True) for name in "qkv")
        self._write(number, self._split(k, shapes.kv_heads), self._split(v, shapes.kv_heads))
        found = attention(
            self._split(q, shapes.heads), self.keys[number], self.values[number], self.mask,
            self.execute, self.positions,
        )  # fmt: skip
        return linear(found.flatten(2), weights["o"], self.execute, transposed=True)

    def _reference(self, x: Any, number: int, weights: dict[str, Any]) -> Any:
        import torch.nn.functional as f

        shapes = self.layers.shapes
        q, k, v = (f.linear(x, weights[name]) for name in "qkv")
        self._write(number, self._split(k, shapes.kv_heads), self._split(v, shapes.kv_heads))
        found = f.scaled_dot_product_attention(
            self._split(q, shapes.heads), self.keys[number], self.values[number], enable_gqa=True
        )
        return f.linear(found.transpose(1, 2).flatten(2), weights["o"])


# -- correctness --------------------------------------------------------------------------------


def parity(shapes: Shapes, dtype: Any) -> list[dict[str, Any]]:
    """Largest error of each kernel relative to the largest value, against float64."""
    import torch

    from mskip.exporters.routed_kernels import attention, linear

    rows = []
    for new, context in ((1, shapes.contexts[0]), (7, shapes.contexts[0] - 3)):
        batch, capacity = 3, context + 8
        execute = torch.tensor([1, 0, 1], dtype=torch.int32, device=device())
        x = random(batch, new, shapes.hidden, dtype=dtype, seed=1)
        weight = random(shapes.heads * shapes.head, shapes.hidden, dtype=dtype, seed=2)
        expected = (x.double() @ weight.double().T) * execute[:, None, None]
        found = linear(x, weight, execute, transposed=True)
        rows.append({"kernel": "linear", "new": new, "error": _error(found, expected)})
        q = 50 * random(batch, shapes.heads, new, shapes.head, dtype=dtype, seed=3)
        k, v = (
            50 * random(batch, shapes.kv_heads, capacity, shapes.head, dtype=dtype, seed=seed)
            for seed in (4, 5)
        )
        positions = context - torch.arange(batch, device=device())[:, None]
        positions = positions + torch.arange(new, device=device())
        seen = torch.arange(capacity, device=device()) <= positions[:, None, :, None]
        mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
        group = shapes.heads // shapes.kv_heads
        wide_k, wide_v = (each.double().repeat_interleave(group, 1) for each in (k, v))
        scores = q.double() @ wide_k.transpose(2, 3) * shapes.head**-0.5 + mask.double()
        expected = (scores.softmax(-1) @ wide_v).transpose(1, 2) * execute[:, None, None, None]
        found = attention(q, k, v, mask, execute, positions)
        rows.append({"kernel": "attention", "new": new, "error": _error(found, expected)})
    return rows


def _error(found: Any, expected: Any) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


# -- time ---------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], calls: int) -> float:
    """ms of a call; the device is waited for at the end only."""
    import torch

    if device().type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    for _ in range(calls):
        run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / calls


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same work as the replay of a CUDA graph; as it is where there is no GPU."""
    import torch

    if device().type != "cuda":
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def waits(run: Callable[[], Any]) -> int | None:
    """How often a call waits for the device."""
    import torch

    if device().type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
        return sum("synchroniz" in str(each.message) for each in seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bandwidth() -> float | None:
    """GB/s of a copy on the device, reads and writes."""
    import torch

    if device().type != "cuda":
        return None
    a = torch.empty(1 << 30, dtype=torch.uint8, device=device())
    b = torch.empty_like(a)
    times = [timed(lambda: b.copy_(a), 10) for _ in range(5)]
    return 2 * a.nbytes / statistics.median(times) / 1e6


def measure(case: Case, rate: float | None) -> dict[str, Any]:
    """All variants of a step, taking turns; ratios are taken within a round."""
    steps = {}
    for variant in VARIANTS:
        case.decide(variant)
        steps[variant] = captured(lambda variant=variant: case.step(variant))  # type: ignore[misc]
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_ in range(ROUNDS + 1):
        for variant, run in steps.items():
            case.decide(variant)
            taken = timed(run, 10)
            if round_:
                times[variant].append(taken)
    case.decide("half")
    found: dict[str, Any] = {
        "batch": case.batch,
        "context": case.context,
        "ms": {name: statistics.median(each) for name, each in times.items()},
        "waits": waits(lambda: case.step("half")),
    }

    def ratio(of: Callable[..., float]) -> list[float]:
        each = [of(*values) for values in zip(*times.values(), strict=True)]
        return [statistics.median(each), (max(each) - min(each)) / 2]

    found["overhead"] = ratio(lambda reference, execute, *_: execute / reference)
    found["efficiency"] = ratio(lambda r, e, half, s, removed: (e - s) / max(e - removed, 1e-9))
    found["half_efficiency"] = ratio(
        lambda r, e, half, s, removed: 2 * (e - half) / max(e - removed, 1e-9)
    )
    if rate is not None:
        read = case.layers.weight_bytes(("q", "k", "v", "o", "up", "down")) + case.nbytes()
        for name in ("reference", "execute"):
            found[f"{name}_share_of_bandwidth"] = read / found["ms"][name] / 1e6 / rate
    return found


def tiles(shapes: Shapes, dtype: Any) -> list[dict[str, Any]]:
    """Time of each way to cut a step's product and attention; the first of a kind is fastest."""
    from mskip.exporters.routed_kernels import attention, linear
    from mskip.exporters.tiles import Tile

    layers = Layers(Shapes(**{**vars(shapes), "layers": 1}), dtype)
    case = Case(layers, shapes.batches[-1], shapes.contexts[0], dtype)
    case.decide("execute")
    q = case._split(linear(case.x, layers.weights[0]["q"], case.execute, transposed=True),
                    shapes.heads)  # fmt: skip
    small = shapes is SMOKE
    products = [Tile(16, n, k, w) for n in (16, 32, 64) for k in (64, 128) for w in (4, 8)]
    attentions = [Tile(16, n, 0, w, s) for n in (32, 64, 128) for w in (4, 8) for s in (2, 3)]
    rows = []
    for kind, candidates in (("linear", products), ("attention", attentions)):
        found = []
        for tile in candidates[:2] if small else candidates:

            def run(kind: str = kind, tile: Tile = tile) -> Any:
                if kind == "linear":
                    weight = layers.weights[0]["o"]
                    return linear(q.transpose(1, 2).flatten(2), weight, case.execute,
                                  transposed=True, tile=tile)  # fmt: skip
                return attention(q, case.keys[0], case.values[0], case.mask, case.execute,
                                 case.positions, tile=tile)  # fmt: skip

            try:
                run()
                ms = statistics.median(timed(run, 20) for _ in range(5))
            except Exception as error:  # a tile that does not fit this GPU
                found.append({"kernel": kind, "tile": tile.to_json(), "not_run": first_line(error)})
                continue
            found.append({"kernel": kind, "tile": tile.to_json(), "ms": ms})
        rows += sorted(found, key=lambda row: row.get("ms", float("inf")))
    return rows


def save_tiles(report: dict[str, Any]) -> Path:
    """The fastest tile of each kernel into this machine's table, which the kernels then go by."""
    from mskip.exporters.tiles import Tile, save_tile, table_path

    dtype = report["dtype"].removeprefix("torch.")
    best = {row["kernel"]: row for row in reversed(report["tiles"]) if "ms" in row}
    for kernel, row in best.items():
        head = report["shapes"]["head"] if kernel == "attention" else 0
        save_tile(kernel, report["capability"], dtype, Tile(**row["tile"]), prompt=False, head=head)
    return table_path()


def cases(shapes: Shapes) -> Iterator[tuple[int, int]]:
    """Those that the project's aims name come first."""
    wanted = [(batch, context) for context in shapes.contexts for batch in shapes.batches]
    yield from sorted(wanted, key=lambda each: (each[1] != 4096, each))


def suite(shapes: Shapes, seconds: float) -> dict[str, Any]:
    """Everything; see the module."""
    import torch
    import triton

    began = time.monotonic()
    cuda = device().type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if cuda else "cpu, triton's interpreter",
        "capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "date": datetime.date.today().isoformat(),
        "seed": SEED,
        "dtype": str(dtype),
        "shapes": vars(shapes),
        "parity": parity(shapes, dtype),
        "builders": builders(),
        "copy_gb_s": bandwidth(),
        "rows": [],
        "not_run": [],
    }
    report["tiles"] = tiles(shapes, dtype)
    layers = Layers(shapes, dtype)
    for batch, context in cases(shapes):
        name = f"batch {batch}, context {context}"
        if time.monotonic() - began > seconds:
            report["not_run"].append(f"{name}: no time left of {seconds:.0f} s")
            continue
        try:
            row = measure(Case(layers, batch, context, dtype), report["copy_gb_s"])
        except torch.OutOfMemoryError as error:
            report["not_run"].append(f"{name}: {first_line(error)}")
            continue
        finally:
            if cuda:
                torch.cuda.empty_cache()
        report["rows"].append(row)
        print(f"{name:26}", *(f"{key} {value:.3f}" for key, value in row["ms"].items()))
    if time.monotonic() - began > seconds:
        report["engines"] = {"not_run": f"no time left of {seconds:.0f} s"}
    else:
        report["engines"] = engines(rounds=ROUNDS)
    report["seconds"] = round(time.monotonic() - began, 1)
    return report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--save-tiles", action="store_true", help="the kernels then go by them")
    given = parser.parse_args()
    if given.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device().type != "cuda":
        raise SystemExit("not run: no CUDA device (--smoke proves the script on the CPU)")
    from mskip.compressor.files import write_json

    report = suite(SMOKE if given.smoke else Shapes(), given.seconds)
    write_json(given.output, report)
    if given.save_tiles:
        print(save_tiles(report))
    print(f"{given.output}: {report['seconds']} s")


if __name__ == "__main__":
    main()
