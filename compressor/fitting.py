"""Fitting what stands in for a skipped sublayer, in closed form.

Layer by layer, from the first routed one up: the map of a layer is the ridge
regression of its output on its input, both taken where the layers below are
already skipped and compensated as they will be. Rank r is the best rank-r
approximation of that map in the metric of its inputs (reduced-rank regression,
Izenman 1975, doi 10.1016/0047-259X(75)90042-1). One pass over the layers serves
all maps; the samples' residual streams are all that is held.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mskip.compressor.compensation import Compensation
from mskip.compressor.evaluation import Reference
from mskip.compressor.progress import Progress, silent
from mskip.compressor.routing import Call, ForcedPass
from mskip.compressor.sublayers import Sublayers


class Regression:
    """Sums of a linear regression of ``output`` on ``input``, both [tokens, hidden].

    Args:
        hidden_size: width of both.
    """

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        square = hidden_size, hidden_size
        self.count = 0
        self.inputs = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self.outputs = torch.zeros(hidden_size, dtype=torch.float64, device=device)
        self.covariance = torch.zeros(square, dtype=torch.float64, device=device)
        self.cross = torch.zeros(square, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add tokens; products are taken in float32 and summed in float64."""
        x, y = inputs.float(), outputs.float()
        self.count += len(x)
        self.inputs += x.sum(0)
        self.outputs += y.sum(0)
        self.covariance += x.T @ x
        self.cross += x.T @ y

    def solve(self, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """The ridge solution.

        Args:
            ridge: penalty in mean variances of the input.

        Returns:
            Weight [hidden, hidden], bias [hidden], and the input's penalised covariance
            [hidden, hidden], all float64.
        """
        mean_x, mean_y = self.inputs / self.count, self.outputs / self.count
        covariance = self.covariance / self.count - torch.outer(mean_x, mean_x)
        cross = self.cross / self.count - torch.outer(mean_x, mean_y)
        covariance.diagonal().add_(ridge * float(covariance.diagonal().mean()) + 1e-12)
        weight = torch.linalg.solve(covariance, cross)
        return weight, mean_y - mean_x @ weight, covariance


def reduced_rank(weight: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors of the best rank-``rank`` map in the metric of the inputs.

    Args:
        weight: of the full map, [hidden, hidden].
        covariance: of its inputs, [hidden, hidden].
        rank: 1..hidden.

    Returns:
        down [hidden, rank] and up [rank, hidden]; the columns of ``up.T`` are orthonormal.
    """
    _, vectors = torch.linalg.eigh(weight.T @ covariance @ weight)
    kept = vectors[:, -rank:].flip(1)
    return weight @ kept, kept.T


class _Watch:
    """Executes everything, and keeps the input and the output of the one sublayer that runs."""

    def __call__(self, call: Call) -> Tensor:
        self.input = call.hidden
        self.output = call.execute(None)
        return self.output


@torch.no_grad()
def fit_compensation(
    reference: Reference,
    sublayers: Sublayers,
    gates: Tensor,
    ridge: float,
    progress: Progress = silent,
) -> None:
    """Fit the maps of ``sublayers.compensation`` in place.

    Args:
        reference: samples of a model that is patched with these sublayers.
        sublayers: what is routed, with the compensation to fit.
        gates: [1, routed] bool: which sublayers the model executes while the maps above
            them are fitted; every sublayer gets a map, those that execute too.
        ridge: penalty in mean variances of the input.
        progress: one unit a sublayer.
    """
    compensation = sublayers.compensation
    assert compensation is not None
    routed = {layer: index for index, layer in enumerate(sublayers.layers)}
    split = reference.split
    streams = [stem.hidden for _, stem in reference.batches]
    forced = ForcedPass(gates.to(streams[0].device))
    for number, layer in split.upper:
        index = routed.get(number)
        if index is not None:
            regression = Regression(compensation.hidden_size, streams[0].device)
            for (batch, stem), hidden in zip(reference.batches, streams, strict=True):
                watch = _Watch()
                split.run(layer, stem.arguments[number], watch, hidden)
                output = watch.output
                if sublayers.granularity == "block":
                    output = output - hidden
                mask = batch["attention_mask"].bool()
                regression.add(watch.input[mask], output[mask])
            _set(compensation, index, regression, ridge)
            progress("compensation", index + 1, len(routed))
        for position, (_, stem) in enumerate(reference.batches):
            streams[position] = split.run(layer, stem.arguments[number], forced, streams[position])


def _set(compensation: Compensation, index: int, regression: Regression, ridge: float) -> None:
    weight, bias, covariance = regression.solve(ridge)
    if compensation.up is None:
        compensation.set_map(index, weight, None, bias)
    else:
        down, up = reduced_rank(weight, covariance, compensation.rank)
        compensation.set_map(index, down, up, bias)
