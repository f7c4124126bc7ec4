"""The report shows every part of a run, and says so where a part is not there."""

import base64
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mskip.compressor.errors import ArtifactError
from mskip.exporters import plots, report

RECIPE = "{name: demo, model: {name: org/base}, routing: {capacity: 0.5}}"
LAYERS = [13, 14, 15]
SCORES = {None: [0.4, 0.5, 0.6, 0.7], "execute": [0.8, 0.81, 0.82, 0.83], "skip": [0.1, 0.2] * 2}
INPUTS = {
    "router_config.json": {
        "base_model": {"name": "org/base", "revision": "ab" * 20, "sha256": "cd" * 32},
        "layers": LAYERS,
        "hidden_size": 576,
        "method": "routed",
    },
    "reports/tune.json": {
        "target": 0.5,
        "loss": "kl",
        "seconds": 76.1,
        "samples": 160,
        "trace": [{"step": 1, "loss": 0.3, "capacity": 0.8}, {"step": 2, "capacity": 0.52}],
        "sensitivity": {"layers": LAYERS, "kl": [0.1, 0.2, 0.3], "cosine": [0.9, 0.95, 0.99]},
        "targets": [
            {"target": 0.75, "capacity": 0.7, "steps": 2, "trace": [0.8, 0.7]},
            {"target": 0.25, "capacity": 0.3125, "steps": 2, "trace": [0.8, 0.3]},
        ],
        "worth": {
            "rule": "greedy",
            "removed": [15, 16],
            "static_capacity": 0.5,
            "routed_capacity": 0.497,
            "static_kl": 0.21,
            "routed_kl": 0.19,
            "difference_interval": [-0.031, 0.002],
            "prompts": 48,
            "better": False,
        },
    },
    "reports/sweep.json": {
        "prompts": 48,
        "tokens": 2100,
        "dense_perplexity": 4.0,
        "series": {
            "static (greedy)": [{"wanted": 0.5, "capacity": 0.5, "kl": 0.2, "perplexity": 4.2}],
            "routed": [{"wanted": 0.5, "capacity": 0.49, "kl": 0.1, "perplexity": 4.1}],
        },
    },
    "reports/tasks.json": {
        "limit": 100,
        "rows": [
            {
                "method": "routed",
                "by": "torch",
                "capacity": 0.52,
                "tasks": {
                    "piqa": {
                        "metric": "acc_norm",
                        "value": 0.61,
                        "stderr": 0.049,
                        "shots": 0,
                        "documents": 100,
                    },
                },
                "average": {"value": 0.61, "stderr": 0.049},
            },
        ],
    },
    "calibration.json": {
        "target": 0.5,
        "per_layer": False,
        "tau": [0.55] * 3,
        "capacity": {"calibration": 0.5, "held_out": 0.497, "held_out_interval": [0.48, 0.52]},
        "prompts": {"calibration": 4, "held_out": 4},
        "layers": [
            {
                "layer": layer,
                "tau": 0.55,
                "capacity": sum(score >= 0.55 for score in scores) / 4,
                "constant": constant,
                "scores": scores,
            }
            for layer, (constant, scores) in zip(LAYERS, SCORES.items(), strict=True)
        ],
        "margins": {"min": 0.0001, "p05": 0.01, "median": 0.1},
        "warnings": ["2 gates are <constant>."],
        "evaluations": 7,
    },
    "reports/eval.json": {
        "prompts": 48,
        "tokens": 2100,
        "rows": [
            {
                "method": "dense",
                "capacity": 1.0,
                "kl": 0.0,
                "perplexity": 2.1,
                "layers_removed": [],
            },
            {
                "method": "static (sensitivity)",
                "capacity": 0.5,
                "kl": 0.2,
                "perplexity": 2.5,
                "layers_removed": [],
            },
            {
                "method": "static (cosine)",
                "capacity": 0.5,
                "kl": 0.3,
                "perplexity": 2.6,
                "layers_removed": [],
            },
            {
                "method": "routed",
                "capacity": 0.497,
                "kl": 0.16,
                "perplexity": 2.4,
                "layers_removed": [],
            },
        ],
        "routed_over_static": 0.8,
    },
    "reports/export.json": {
        "file": "onnx/model.onnx",
        "opset": 20,
        "bytes": 538_934_112,
        "seconds": 41.3,
        "peak_memory_over_weights": 1.2,
        "if_nodes": 16,
        "checker": "passed",
    },
    "reports/tensorrt.json": {
        "file": "tensorrt/model.engine",
        "builder": "tensorrt-rtx 1.7.1",
        "compute_capabilities": ["8.9", "12.0"],
        "precision": "float16",
        "bytes": 383_000_000,
        "seconds": 85.2,
        "peak_rss_bytes": 2_800_000_000,
        "layers": 8706,
        "conditions": 32,
        "behind_conditions": {"15": 9, "16": 9},
        "outside": [],
    },
    "reports/validate.json": {
        "status": "failed",
        "engine": "onnxruntime CPUExecutionProvider",
        "gates": [
            {
                "name": "decision_agreement",
                "value": 0.9998,
                "limit": 1.0,
                "passed": False,
                "comparison": ">=",
            },
            {
                "name": "logits_max_abs",
                "value": 4.3e-5,
                "limit": 1e-3,
                "passed": True,
                "comparison": "<=",
            },
        ],
        "decisions": {
            "agreement": 0.9998,
            "flips": [
                {"prompt": 3, "layer": 15, "torch": 0.5512, "engine": 0.5491, "margin": 0.0012}
            ],
            "min_margin": 0.0012,
        },
        "logits": {"max_abs": 4.3e-5, "max_rel": 2.1e-4},
        "tokens": {"prompts": 32, "steps": 32, "match": 1.0},
        "laziness": {
            "execute_ms": 41.2,
            "skip_ms": 28.8,
            "ratio": 1.43,
            "skipped_branch_nodes": 0,
            "executed_branch_nodes": 1232,
        },
        "batch_invariance": {"max_abs": 3.1e-5, "decisions_equal": True},
        "quality": {"kl_torch": 0.1714, "kl_engine": 0.1715},
    },
    "reports/bench.json": {
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 2, "onnxruntime": "1.27.0"},
        "date": "2026-11-23",
        "rows": [
            {
                "engine": "onnxruntime",
                "phase": phase,
                "batch": 1,
                "context": context,
                "capacity": 0.5,
                "dense_ms": 100.0,
                "routed_ms": 80.0,
                "execute_ms": 104.0,
                "skip_ms": 60.0,
                "static_ms": 55.0,
                "speedup": speedup,
                "efficiency": 0.89,
                "overhead": 1.04,
                "repeats": 5,
                "spread": 0.03,
            }
            for phase in ("prefill", "decode")
            for context, speedup in ((128, 0.97), (512, 1.25))
        ],
    },
}
INPUTS["reports/validate-engine.json"] = {
    **INPUTS["reports/validate.json"],
    "status": "passed",
    "engine": "tensorrt-rtx 1.7.1 on a GPU",
}
INPUTS["reports/bench-engine.json"] = {
    **INPUTS["reports/bench.json"],
    "rows": [{**row, "engine": "tensorrt"} for row in INPUTS["reports/bench.json"]["rows"]],
}
# The sections that a file fills, and the command that writes it.
SECTIONS = {
    "router_config.json": ((), "mskip tune"),
    "reports/tune.json": (("worth", "constraint", "sensitivity"), "mskip tune"),
    "reports/sweep.json": (("sweep",), "mskip sweep"),
    "reports/tasks.json": (("tasks",), "mskip eval --tasks paper"),
    "calibration.json": (("capacity", "scores", "calibration"), "mskip calibrate"),
    "reports/eval.json": (("quality",), "mskip eval"),
    "reports/validate.json": (("parity",), "mskip validate"),
    "reports/bench.json": (("speed",), "mskip bench"),
    "reports/export.json": (("export",), "mskip export"),
    "reports/tensorrt.json": (("tensorrt",), "mskip export --trt"),
    # Parts of that section.
    "reports/validate-engine.json": ((), "mskip validate --trt"),
    "reports/bench-engine.json": ((), "mskip bench --trt"),
}
FIGURES = ["capacity", "constraint", "latency", "quality", "scores", "sensitivity", "sweep"]


def make_run(run, inputs=INPUTS, recipe=RECIPE):
    (run / "reports").mkdir(parents=True)
    (run / "recipe.yaml").write_text(recipe)
    for name, value in inputs.items():
        (run / name).write_text(json.dumps(value))
    return run


def changed(name, **values):
    """All inputs, one of them with some of its keys replaced."""
    return {**INPUTS, name: {**INPUTS[name], **values}}


def section(html, name):
    return re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)[0]


def words(html):
    """What a reader sees, with single spaces."""
    html = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "full")
    path = report.write_report(run)
    assert path == run / "reports" / "report.html"
    return run, path.read_text(encoding="utf-8")


@pytest.fixture
def html_of(tmp_path, monkeypatch):
    """Write a report and return its HTML; figures, which are slow, are left out."""
    for name in (
        "quality",
        "tradeoff",
        "layer_capacity",
        "scores",
        "constraint",
        "sensitivity",
        "latency",
    ):
        monkeypatch.setattr(plots, name, lambda *args: None)
    monkeypatch.setattr(plots, "to_png", lambda figure: b"png")

    def write(*args, **kwargs):
        run = make_run(tmp_path / "run", *args, **kwargs)
        return report.write_report(run).read_text(encoding="utf-8")

    return write


def test_full_run_fills_every_section(full):
    html = full[1]
    assert re.findall(r'<section id="(\w+)">', html) == [
        *("summary", "quality", "worth", "sweep", "tasks", "capacity", "scores"),
        *("constraint", "sensitivity"),
        *("calibration", "parity", "speed", "export", "tensorrt", "reading"),
    ]
    assert 'class="absent"' not in html
    seen = words(html)
    for wrong in ("None", "Undefined", "nan", "Markup"):
        assert wrong not in seen
    assert 'class="missing"' not in html.replace(section(html, "reading"), "")


def test_report_refers_to_nothing_outside_itself(full):
    html = full[1]
    links = re.findall(r'(?:src|href|action|srcset)="([^"]*)"', html)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert not re.search(r"@import|url\(|<script|<link|https?://", html)


def test_figures_are_embedded_as_they_lie_beside_the_report(full):
    run, html = full
    images = [base64.b64decode(text) for text in re.findall(r"base64,([^\"]+)", html)]
    files = sorted((run / "reports").glob("*.png"))
    assert [file.stem for file in files] == FIGURES
    assert sorted(images) == sorted(file.read_bytes() for file in files)
    assert all(image.startswith(b"\x89PNG") for image in images)
    assert all(re.findall(r'<img [^>]*alt="([^"]*)"', html))


def test_same_run_gives_the_same_pictures(full):
    run, html = full
    paths = report.write_plots(run)
    assert sorted(path.stem for path in paths) == FIGURES
    assert all(base64.b64encode(path.read_bytes()).decode() in html for path in paths)


def test_summary_states_the_verdicts(full):
    seen = words(section(full[1], "summary"))
    for text in (
        "0.497 (skip rate 0.503) within 0.05 of target target 0.500 (skip rate 0.500)",
        "0.80× closer to dense than static routed: 0.160 nats at capacity 0.497 (skip rate 0.503)",
        "static (sensitivity): 0.200 nats",
        "failed gates: 1 passed, 1 failed, 0 not run",
        "decisions agree: 0.9998; flips: 1",
        "0.97× to 1.25× faster in 2 of 4 cases at capacity 0.500 (skip rate 0.500)",
        "efficiency 89% to 89% spread of the repeats at most 3.0%",
    ):
        assert text in seen


def test_tables_hold_the_numbers(full):
    html = full[1]
    constraint = words(section(html, "constraint"))
    assert "0.750 0.250 0.700 0.300 -0.050 yes 2" in constraint
    assert "0.250 0.750 0.312 0.688 +0.062 no 2" in constraint
    parity = words(section(html, "parity"))
    assert "decision_agreement FAILED 0.9998 ≥ 1" in parity
    assert "3 15 0.551200 0.549100 0.00120" in parity
    assert "15 0.550000 0.000 1.000 0.100000 0.200000 constant: skip" in words(html)
    worth = words(section(html, "worth"))
    assert "mskip static" in worth
    assert "-0.0310 .. +0.0020 nats" in worth
    assert "static (greedy) 0.500 0.500 0.210" in worth
    assert "piqa 0 acc_norm 100 61.0% 4.9%" in words(section(html, "tasks"))
    speed = words(section(html, "speed"))
    assert "onnxruntime 1 512 0.500 0.500 100 104 80.0 60.0 55.0 1.25× 89% 1.04× 5 3.0%" in speed
    assert speed.index("prefill") < speed.index("decode")
    assert "539 MB" in words(section(html, "export"))
    engine = words(section(html, "tensorrt"))
    assert "8.9, 12.0" in engine
    assert "18, in 2 routed sublayers; 0 outside" in engine
    assert "Engine: tensorrt-rtx 1.7.1 on a GPU. Overall: passed" in engine
    assert "decision_agreement FAILED 0.9998 ≥ 1" in engine
    assert "tensorrt 1 512 0.500 0.500 100 104 80.0" in engine


@pytest.mark.parametrize("name", INPUTS)
def test_missing_input_is_not_run_and_leaves_the_rest(html_of, name):
    html = html_of({key: value for key, value in INPUTS.items() if key != name})
    sections, command = SECTIONS[name]
    assert f"not run: <code>{command}</code>" in html
    assert len(re.findall("<section ", html)) == 15
    for each in sections:
        assert f"not run: <code>{command}</code>" in section(html, each)
        assert "<table" not in section(html, each)
    others = {each for key in SECTIONS if key != name for each in SECTIONS[key][0]}
    for other in others - ({"tensorrt"} if name.endswith("-engine.json") else set()):
        assert 'class="absent"' not in section(html, other)


def nulled(value):
    """The same structure with every number null."""
    if isinstance(value, dict):
        return {key: nulled(each) for key, each in value.items()}
    if isinstance(value, list):
        return [nulled(each) for each in value]
    return None if isinstance(value, int | float) else value


def nothing(value):
    """The top level with every key null."""
    return dict.fromkeys(value)


def emptied(value):
    return {
        key: type(each)() if isinstance(each, list | dict) else each for key, each in value.items()
    }


@pytest.mark.parametrize("strip", [nulled, nothing, emptied, lambda value: {}])
def test_nulls_and_absent_keys_are_not_run(html_of, strip):
    html = html_of({name: strip(copy.deepcopy(value)) for name, value in INPUTS.items()}, "{}")
    seen = words(html)
    assert seen.count("not run") > 30
    for wrong in ("None", "Undefined", "nan", "null"):
        assert wrong not in seen
    assert "<h1>run</h1>" in html


def test_null_numbers_can_be_drawn(tmp_path):
    run = make_run(tmp_path / "run", {name: nulled(value) for name, value in INPUTS.items()})
    report.write_report(run)


def test_text_from_files_is_escaped(html_of):
    evil = "<script>alert(1)</script>\"'"
    inputs = copy.deepcopy(INPUTS)
    inputs["router_config.json"]["base_model"] = dict.fromkeys(("name", "revision", "sha256"), evil)
    inputs["reports/eval.json"]["rows"][1]["method"] = f"static {evil}"
    inputs["reports/validate.json"]["status"] = evil
    html = html_of(inputs, recipe=json.dumps({"name": evil, "model": {"name": evil}}))
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;" in html
    assert "2 gates are &lt;constant&gt;." in html


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("text", ["{", '{"a": \xff', "[]", "null", "3"])
def test_corrupt_input_is_an_artifact_error(tmp_path, name, text):
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=re.escape(str(run / name))) as caught:
        report.write_report(run)
    assert caught.value.remedy.startswith("Write it again with: mskip ")
    assert not list((run / "reports").glob("*.html"))


@pytest.mark.parametrize(
    ("name", "values", "fault"),
    [
        ("reports/tune.json", {"trace": {}}, "trace is not a list"),
        ("reports/tune.json", {"targets": [None]}, "targets[0] is not a mapping"),
        ("calibration.json", {"target": "half"}, "target is not a finite number"),
        ("calibration.json", {"layers": [{"scores": [0.1, "x"]}]}, "scores[1] is not a finite"),
        ("calibration.json", {"layers": [{"tau": float("nan")}]}, "tau is not a finite number"),
        ("reports/bench.json", {"rows": [{"dense_ms": float("inf")}]}, "dense_ms is not a finite"),
        ("reports/validate.json", {"decisions": {"flips": [3]}}, "flips[0] is not a mapping"),
    ],
)
def test_input_of_another_form_names_the_key(tmp_path, name, values, fault):
    run = make_run(tmp_path / "run", changed(name, **values))
    with pytest.raises(ArtifactError, match=re.escape(fault)):
        report.write_plots(run)


@pytest.mark.parametrize(
    "recipe", [None, "a: [", "- a", "", "model: 3", b"\xff\xfe\x00", "!!bool x"]
)
def test_recipe_is_needed(tmp_path, recipe):
    run = tmp_path / "run"
    run.mkdir()
    if recipe is not None:
        (run / "recipe.yaml").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())
    with pytest.raises(ArtifactError, match=r"recipe\.yaml"):
        report.write_report(run)


@pytest.mark.parametrize(
    ("name", "values", "verdict"),
    [
        ("calibration.json", {"target": 0.4471}, "within 0.05 of target"),
        ("calibration.json", {"target": 0.446}, "not within 0.05 of target"),
        ("reports/eval.json", {"routed_over_static": 1.0}, "no closer to dense than static"),
        ("reports/validate.json", {"status": "passed"}, "PyTorch passed"),
        ("reports/validate.json", {"gates": [{"passed": None}]}, "0 failed, 1 not run"),
        ("reports/bench.json", {"rows": [{"speedup": 0.9}]}, "faster in 0 of 1 cases"),
    ],
)
def test_verdicts_follow_the_numbers(html_of, name, values, verdict):
    seen = words(section(html_of(changed(name, **values)), "summary"))
    assert re.search(rf"(?<!not ){re.escape(verdict)}", seen)


def test_many_flips_are_cut_and_said_to_be(html_of):
    flips = [{"prompt": number, "layer": 13} for number in range(60)]
    html = html_of(changed("reports/validate.json", decisions={"flips": flips}))
    assert "The first 40 of 60" in words(section(html, "parity"))


def test_figure_without_data_is_removed(full, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "to_png", lambda figure: b"png")
    run = make_run(tmp_path / "run")
    report.write_plots(run)
    (run / "reports" / "bench.json").unlink()
    report.write_plots(run)
    assert sorted(path.stem for path in (run / "reports").glob("*.png")) == sorted(
        set(FIGURES) - {"latency"}
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not run"),
        (0, "0"),
        (0.0, "0"),
        (1232, "1,232"),
        (True, "yes"),
        ("x", "x"),
        (0.00012345, "1.23e-04"),
        (-0.012345, "-0.0123"),
        (2.1, "2.10"),
        (76.14, "76.1"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert report._number(value) == text


def test_capacity_and_skip_rate_add_up_as_printed():
    assert report._capacity(0.4965) == "0.496 (skip rate 0.504)"
    assert report._capacity(1) == "1.000 (skip rate 0.000)"
    assert report._ranges([3, 5, 6, 7]) == "3, 5–7 (4)"
    assert report._ranges([]) == "none"


def test_scores_are_cut_at_tau_by_the_rule():
    layers = [{"layer": 1, "tau": 0.5, "scores": [0.1, 0.499999, 0.5, 0.9], "constant": None}]
    axes = plots.scores(layers).axes[0]
    executed, skipped = axes.containers
    assert sum(bar.get_height() for bar in executed) == 2
    assert sum(bar.get_height() for bar in skipped) == 2
    # No bar stands on both sides of tau, and only the executing ones to its right.
    for bars, right in ((executed, True), (skipped, False)):
        drawn = [bar for bar in bars if bar.get_height()]
        assert all((bar.get_x() >= 0.5 - 1e-9) == right for bar in drawn)


def test_text_with_dollars_is_no_mathematics():
    rows = [{"method": r"$\frac{", "capacity": 0.5, "kl": 0.1}]
    assert plots.to_png(plots.quality(rows)).startswith(b"\x89PNG")


def test_import_is_light_and_drawing_leaves_pyplot_alone(tmp_path):
    make_run(tmp_path / "run", {"reports/eval.json": INPUTS["reports/eval.json"]})
    code = (
        "import sys; from pathlib import Path; from mskip.exporters.report import write_report\n"
        "assert not {'matplotlib', 'torch', 'onnx', 'typer', 'rich'} & set(sys.modules)\n"
        "write_report(Path(sys.argv[1])); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(Path(tmp_path / "run"))], check=True)
