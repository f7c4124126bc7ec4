"""What a tuning starts from: which sublayers it routes, what skipping them costs, fitted maps."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from mskip.compressor.baselines import (
    Greedy,
    Sensitivity,
    greedy_removal,
    kept_count,
    kept_of,
    measure_sensitivity,
    router_inputs,
    static_gates,
)
from mskip.compressor.compensation import Compensation
from mskip.compressor.encoding import Sample
from mskip.compressor.errors import RecipeError
from mskip.compressor.evaluation import Reference
from mskip.compressor.fitting import fit_compensation
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import patched
from mskip.compressor.progress import Progress
from mskip.compressor.recipe import CompensationSpec, Recipe
from mskip.compressor.sublayers import Sublayers
from mskip.compressor.tokenwise import require_masks


def routed_sublayers(recipe: Recipe, base: BaseModel, layers: list[int] | None = None) -> Sublayers:
    """What a recipe routes in this model, with an unfitted compensation where it has one.

    Args:
        recipe: the resolved recipe.
        base: the base model.
        layers: the routed layers; None goes by the recipe alone.

    Raises:
        RecipeError: layers or a rank that the model has not.
        ModelError: tokens are to decide, and the model's attention cannot run some of them.
    """
    # Removal for good is the same for every token: it needs no routers that decide by token.
    unit = recipe.routing.unit if recipe.method == "routed" else "sequence"
    if unit == "token":
        require_masks(base.model)
    config = base.model.config.get_text_config()
    layers = layers or recipe.routing.routed_layers(config.num_hidden_layers)
    rank, hidden = recipe.compensation.rank, int(config.hidden_size)
    compensation = None
    if rank:
        if rank != "full" and rank > hidden:
            raise RecipeError(
                f"compensation.rank = {rank}: the model's hidden state is only {hidden} wide.",
                'Give at most that, or "full".',
            )
        compensation = Compensation(len(layers), hidden, hidden if rank == "full" else rank)
        compensation.to(base.model.device)
    return Sublayers(layers, recipe.routing.granularity, compensation, unit)


def bare_sublayers(
    base: BaseModel, recipe: Recipe, samples: list[Sample], progress: Progress
) -> tuple[Sublayers, Sensitivity | None]:
    """What a recipe routes, with nothing in its place, measured where the recipe asks for that.

    Args:
        base: the base model, not patched.
        recipe: its routing section says how many, and which layers are left out.
        samples: a few tuning samples.
        progress: one unit a candidate.

    Returns:
        The sublayers, and what skipping each alone costs where that had to be measured.
    """
    bare = routed_sublayers(recipe.model_copy(update={"compensation": CompensationSpec()}), base)
    routing = recipe.routing
    if not routing.measures:
        return bare, None
    every = routing.candidates(base.model.config.get_text_config().num_hidden_layers)
    candidates = Sublayers(every, routing.granularity)
    with patched(base.model, candidates):
        reference = Reference(base, every[0], samples, progress=progress)
        # What a static recipe removes by name has to be among the routed.
        named = recipe.static.removed or []
        least = measure_sensitivity(reference, candidates, progress).least(routing.last, named)
    return replace(bare, layers=least.layers), least


@dataclass(frozen=True)
class Measured:
    """What is known of the dense model before anything is tuned.

    Attributes:
        sensitivity: of every routed sublayer alone.
        greedy: removal one after another.
        inputs: the routers' inputs, [samples or their tokens, routed, hidden].
        reference: the samples that this was measured on.
    """

    sensitivity: Sensitivity
    greedy: Greedy
    inputs: Tensor
    reference: Reference

    @property
    def orders(self) -> dict[str, list[int]]:
        """Order of removal (positions 0..routed-1) by each rule."""
        return {
            "kl": self.sensitivity.order_by_kl(),
            "cosine": self.sensitivity.order_by_cosine(),
            "greedy": self.greedy.order,
        }

    @property
    def costs(self) -> dict[str, list[float]]:
        """What skipping each routed sublayer costs, nats, by the name of a router's start."""
        return {"sensitivity": self.sensitivity.kl, "greedy": self.greedy.costs}


def measure(
    base: BaseModel,
    sublayers: Sublayers,
    samples: list[Sample],
    removed: int,
    progress: Progress,
    sensitivity: Sensitivity | None = None,
) -> Measured:
    """Measure the routed sublayers; the model must be patched with them.

    Args:
        base: the base model.
        sublayers: what is routed; a compensation in it stands in for what is skipped.
        samples: a few tuning samples.
        removed: how many sublayers the greedy rule takes out.
        progress: shows every stage.
        sensitivity: what skipping each alone costs on these samples, where that is known.
    """
    reference = Reference(base, sublayers.layers[0], samples, progress=progress)
    if sensitivity is None:
        sensitivity = measure_sensitivity(reference, sublayers, progress)
    greedy = greedy_removal(reference, sensitivity, removed, progress)
    return Measured(sensitivity, greedy, router_inputs(reference, sublayers.unit), reference)


def compensate(
    base: BaseModel,
    recipe: Recipe,
    sublayers: Sublayers,
    samples: list[Sample],
    dense: Measured,
    progress: Progress,
    order: list[int] | None = None,
) -> Measured:
    """Fit the maps, choose again what to remove with them in place, and fit once more.

    What is cheap to remove changes when something stands in for it, and a fit depends on
    what is removed below it.

    Args:
        base: the base model, not patched.
        recipe: the resolved recipe.
        sublayers: what is routed, with the maps to fit.
        samples: tuning samples.
        dense: what was measured with nothing in the place of a skip.
        progress: shows every stage.
        order: of removal that the last fit follows; None takes the one chosen here.

    Returns:
        What was measured with the maps in place.
    """
    removed = len(sublayers) - kept_count(recipe.routing.capacity, len(sublayers))
    with patched(base.model, sublayers):
        reference = Reference(base, sublayers.layers[0], samples, progress=progress)

        def fit(order: list[int]) -> None:
            gates = static_gates(kept_of(order, len(order) - removed), len(order))
            fit_compensation(reference, sublayers, gates, recipe.compensation.ridge, progress)

        fit(dense.greedy.order)
        some = samples[: recipe.router.sensitivity_prompts]
        measured = measure(base, sublayers, some, removed, progress)
        fit(order or measured.greedy.order)
    return measured
