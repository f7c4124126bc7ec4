"""`mskip doctor --model`: whether an architecture can be routed, proven on a tiny random copy."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

from mskip.cli import console


def examine(name: str, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Prove a model's row, or a proposed one where its architecture has none.

    Args:
        name: hub id, folder or embedded name; of the model only the configuration is read.
        trust_remote_code: run the model's own code.

    Returns:
        ``checks`` holds a row for every check and granularity; ``recipe`` what a recipe has to
        say for an architecture without a built-in row, with the proven granularities only, and
        is None where there is nothing to say.

    Raises:
        ModelError: the model cannot be had, copied or described by a row.
    """
    from mskip.compressor.detection import detect
    from mskip.compressor.families import family_of, row_for
    from mskip.compressor.models import family_entries, load_config
    from mskip.compressor.proof import prove
    from mskip.compressor.recipe import ModelSpec
    from mskip.compressor.sublayers import Granularity
    from mskip.compressor.tiny import tiny_copy

    spec = ModelSpec(name=name, trust_remote_code=trust_remote_code)
    copy = tiny_copy(load_config(spec), trust_remote_code=trust_remote_code)
    known = row_for(copy.config.model_type) is not None
    row = family_of(copy) if known else detect(copy)
    kinds = [kind for kind in get_args(Granularity) if kind in row.granularities]
    checks = [
        {"granularity": kind, **asdict(check)} for kind in kinds for check in prove(copy, row, kind)
    ]
    failed = {check["granularity"] for check in checks if not check["passed"]}
    proven = frozenset(kinds) - failed
    recipe = None
    if proven and not known:
        entries = family_entries(replace(row, granularities=proven))
        model = spec.model_dump(exclude_defaults=True)
        if Path(name).expanduser().exists():  # the same one when later commands run elsewhere
            model["name"] = str(Path(name).expanduser().resolve())
        recipe = {"model": {**model, "family": entries}}
    return {
        "model": name,
        "architecture": row.model_type,
        "built_in": known,
        "row": family_entries(row),
        "copy": {
            "layers": copy.config.num_hidden_layers,
            "hidden_size": copy.config.hidden_size,
            "parameters": copy.num_parameters(),
        },
        "proven": not failed,
        "checks": checks,
        "recipe": recipe,
    }


def show(report: dict[str, Any]) -> None:
    """Print the checks as a table, what failed, and the block for a recipe."""
    import yaml

    checks = report["checks"]
    passed = {(each["name"], each["granularity"]): each["passed"] for each in checks}
    names, kinds = (list(dict.fromkeys(key[i] for key in passed)) for i in range(2))
    copy = report["copy"]
    origin = "built-in row" if report["built_in"] else "no built-in row; this one is proposed"
    console.say(
        f"{report['architecture']}: {origin}. On a random copy with {copy['layers']} layers of "
        f"width {copy['hidden_size']}:"
    )
    console.table(
        "",
        ["check", *kinds],
        [[name, *(console.verdict(passed[name, kind]) for kind in kinds)] for name in names],
    )
    console.say()
    for each in checks:
        if not each["passed"]:
            console.say(f"{each['granularity']}, {each['name']}: {each['detail']}")
    if report["recipe"] is not None:
        console.say("In a recipe:")
        console.say()
        block = yaml.safe_dump(report["recipe"], sort_keys=False, default_flow_style=False)
        console.say(block.rstrip(), whole=True)
    elif report["proven"]:
        console.say("Nothing is to be said in a recipe.")
