"""The routers: one linear map per routed sublayer, scored in float32.

Source: Router-Tuning, arXiv 2410.13184, section 3. The router's input is the
mean of the post-layernorm hidden state. Two departures, both because the
public code's results depend on batch-mates and on the answer: the mean runs
over prompt positions only, and padding never enters it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mskip.compressor.sublayers import Sublayers, as_sublayers


def prompt_mean(hidden: Tensor, prompt_mask: Tensor) -> Tensor:
    """Mean of the hidden state over the prompt positions.

    Args:
        hidden: [batch, sequence, hidden], any float dtype.
        prompt_mask: [batch, sequence], true on prompt positions.

    Returns:
        [batch, hidden], float32. A row without prompt positions gives zeros.
    """
    weights = prompt_mask.to(torch.float32).unsqueeze(-1)
    total = (hidden.to(torch.float32) * weights).sum(dim=1)
    return total / weights.sum(dim=1).clamp(min=1.0)


class Routers(nn.Module):
    """All routers of one model.

    The logit of router ``j`` is ``weight[j] . (x - center[j]) * scale[j] + bias[j]``
    with ``x`` the prompt mean. ``center`` and ``scale`` are statistics of the
    tuning data, kept out of the gradient; with 0 and 1 and no bias this is
    the paper's router. `folded` gives the equal plain affine form.

    Args:
        sublayers: what is routed; a bare list of layers means their attention.
        hidden_size: width of the residual stream.
        bias: whether the routers have a trained bias.
    """

    center: Tensor
    scale: Tensor

    def __init__(
        self, sublayers: Sublayers | list[int], hidden_size: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        # Not a submodule's owner: the compensation in it is trained and saved by itself.
        self.sublayers = as_sublayers(sublayers)
        self.trains_bias = bias
        routed = len(self.sublayers)
        self.weight = nn.Parameter(torch.zeros(routed, hidden_size))
        self.bias = nn.Parameter(torch.zeros(routed), requires_grad=bias)
        self.register_buffer("center", torch.zeros(routed, hidden_size))
        self.register_buffer("scale", torch.ones(routed, hidden_size))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Routers:
        # What stands in for a skipped sublayer goes where its router goes.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.sublayers.compensation is not None:
            self.sublayers.compensation._apply(  # type: ignore[no-untyped-call]
                fn, recurse
            )
        return self

    @property
    def layers(self) -> list[int]:
        """Decoder layer index of each routed sublayer, ascending."""
        return self.sublayers.layers

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.weight.shape[1]

    def logit(self, index: int, hidden: Tensor, prompt_mask: Tensor) -> Tensor:
        """Logit of router ``index`` for each sequence.

        Args:
            index: position of the routed sublayer, 0..routed-1.
            hidden: post-layernorm hidden state, [batch, sequence, hidden].
            prompt_mask: [batch, sequence], true on prompt positions.

        Returns:
            [batch], float32; the score is its sigmoid.
        """
        # Autocast would run the product in bfloat16, whose step near 0.5 is
        # 0.004: wider than the distance between most scores.
        with torch.autocast(hidden.device.type, enabled=False):
            return self._affine(index, prompt_mean(hidden, prompt_mask))

    def token_logit(self, index: int, hidden: Tensor) -> Tensor:
        """Logit of router ``index`` for each token, from the token's own hidden state alone.

        Args:
            index: position of the routed sublayer, 0..routed-1.
            hidden: post-layernorm hidden state, [batch, sequence, hidden].

        Returns:
            [batch, sequence], float32; the score is its sigmoid.
        """
        with torch.autocast(hidden.device.type, enabled=False):  # as in `logit`
            return self._affine(index, hidden.to(torch.float32))

    def _affine(self, index: int, inputs: Tensor) -> Tensor:
        normal = (inputs - self.center[index]) * self.scale[index]
        return normal @ self.weight[index] + self.bias[index]

    @torch.no_grad()
    def standardise(self, inputs: Tensor) -> None:
        """Set ``center`` and ``scale`` so that the given router inputs have mean 0, variance 1.

        The scale is further divided by sqrt(hidden), so that a logit stays of
        order one for weights of order one.

        Args:
            inputs: prompt means, [samples, routed, hidden], float32.
        """
        deviation = inputs.std(dim=0, correction=0).clamp(min=1e-6)
        self.center.copy_(inputs.mean(dim=0))
        self.scale.copy_(1.0 / (deviation * self.hidden_size**0.5))

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """Plain affine form: weight [routed, hidden] and bias [routed], float32."""
        weight = self.weight * self.scale
        bias = self.bias - (weight * self.center).sum(dim=1)
        return weight, bias
