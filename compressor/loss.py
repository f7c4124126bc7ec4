"""The loss of one micro-batch: gates relaxed, the backbone frozen.

Below the first routed layer nothing is differentiated, and teacher and
student share what is computed there.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from mskip.compressor.encoding import Sample
from mskip.compressor.evaluation import answer_targets
from mskip.compressor.models import BaseModel
from mskip.compressor.objective import straight_through_gate
from mskip.compressor.recipe import TuningSpec
from mskip.compressor.router import Routers
from mskip.compressor.routing import Call, Rows, by_gate
from mskip.compressor.rowwise import (
    hidden_kl,
    hidden_next_token_loss,
    summarised_kl,
    summary_of,
)
from mskip.compressor.sampling import gate_noise
from mskip.compressor.segments import SplitModel
from mskip.compressor.stems import StemStore
from mskip.compressor.tokenwise import TokenRelaxedPass, token_noise


class RelaxedPass:
    """Training: every row is computed both ways, and its gate mixes the two.

    Args:
        routers: the routers being tuned.
        prompt_mask: [batch, sequence], true on prompt positions.
        temperature: of the gate's backward sigmoid.
        noise: logistic noise, [batch, routed], or None.
    """

    def __init__(
        self, routers: Routers, prompt_mask: Tensor, temperature: float, noise: Tensor | None
    ) -> None:
        self.routers = routers
        self.prompt_mask = prompt_mask
        self.temperature = temperature
        self.noise = noise
        self.logits: dict[int, Tensor] = {}

    def __call__(self, call: Call) -> Tensor:
        """See `Pass`."""
        logit = self.routers.logit(call.index, call.hidden, self.prompt_mask)
        # A checkpointed layer comes by again in the backward pass.
        self.logits.setdefault(call.index, logit)
        noise = None if self.noise is None else self.noise[:, call.index]
        gate = straight_through_gate(logit, self.temperature, noise)[:, None, None]
        executed, skipped = _executed(call, gate.detach().flatten() > 0), call.skip(None)
        gate = gate.to(executed.dtype)  # exactly 0 or 1 in value, so each side comes out exact
        return executed * gate + skipped * (1 - gate)


def _executed(call: Call, gate: Tensor) -> Tensor:
    """All rows executed, [batch, sequence, hidden], and differentiated where the gate is open.

    What a shut gate multiplies by zero sends exactly nothing back: neither a backward pass nor
    what it would need is worth having there. The gate's own gradient asks for the value alone.
    """

    def undifferentiated(rows: Rows) -> Tensor:
        with torch.no_grad():
            return call.execute(rows)

    return by_gate(gate, call.execute, undifferentiated)


class RouterObjective(nn.Module):
    """Loss of one micro-batch; its registered children are what is trained.

    These are the routers, and the compensation where it is refined.

    The backbone is deliberately no submodule: it must not be trained, saved,
    switched to training mode or wrapped for distributed training.

    Args:
        base: the dense model, patched while tuning.
        routers: the routers.
        spec: the recipe's tuning section.
        samples: the tuning samples, for the store of dense activations.
        refine: train the compensation too.
    """

    compensation: nn.Module | None
    accepts_loss_kwargs = True

    def __init__(
        self,
        base: BaseModel,
        routers: Routers,
        spec: TuningSpec,
        samples: list[Sample],
        *,
        refine: bool = False,
    ) -> None:
        super().__init__()
        self.routers = routers
        self.compensation = routers.sublayers.compensation if refine else None
        if self.compensation is not None:
            self.compensation.requires_grad_(True)
        self.spec = spec
        split = SplitModel(base.model, routers.layers[0])
        self.__dict__["split"] = split
        self.__dict__["store"] = StemStore(
            split,
            samples,
            int(spec.cache_gib * 2**30),
            kept_of_dense=(
                partial(_kept_of_dense, split, spec.kl_temperature) if spec.loss == "kl" else None
            ),
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        prompt_mask: Tensor,
        answer_mask: Tensor,
        index: Tensor,
        noise_scale: float,
        noise_seed: int,
        num_items_in_batch: Tensor | int,
        **_: Tensor,
    ) -> dict[str, Tensor]:
        """Task loss and router logits.

        Args:
            input_ids: and the four masks, see `collate`.
            index: number of each sample, [batch] int64.
            noise_scale: of the gate noise, 0..1.
            noise_seed: with the sample's number, decides its noise.
            num_items_in_batch: answer tokens of the whole optimiser step.

        Returns:
            ``task``: sum over this micro-batch's answer tokens / num_items_in_batch.
            ``logits``: of the prompts, [batch, routed]; where the unit of routing is the
            token, of the prompts' tokens, [tokens, routed]. Float32.
        """
        split: SplitModel = self.__dict__["split"]
        store: StemStore = self.__dict__["store"]
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "answer_mask": answer_mask,
        }
        stem, dense = store.get(batch, index)
        by_token = self.routers.sublayers.unit == "token"
        real = attention_mask.bool()
        routed, temperature = len(self.routers.layers), self.spec.temperature
        noise: Tensor | None = None
        if noise_scale > 0:
            noise = (
                token_noise(noise_seed, index, real, routed)
                if by_token
                else gate_noise(noise_seed, index, routed).to(input_ids.device)
            ) * noise_scale
        routing = (
            TokenRelaxedPass(self.routers, real, temperature, noise)
            if by_token
            else RelaxedPass(self.routers, prompt_mask, temperature, noise)
        )
        hidden = split.finish(stem, routing, checkpoint=self.spec.gradient_checkpointing)
        hidden = hidden[answer_mask]
        if self.spec.loss == "kl":
            kl = summarised_kl if _summarises(split, hidden) else hidden_kl
            loss = kl(hidden, dense, split.logits, self.spec.kl_temperature)
        else:
            loss = hidden_next_token_loss(hidden, answer_targets(batch), split.logits)
        logits = torch.stack(list(routing.logits.values()), dim=1)
        if by_token:  # Capacity is held over the prompts, as it is calibrated.
            logits = logits[prompt_mask[real]]
        return {"task": loss.sum() / num_items_in_batch, "logits": logits}


def _summarises(split: SplitModel, hidden: Tensor) -> bool:
    """Whether the dense model is held as `summary_of` says; the same in every step."""
    # In fewer bits the two parts of the gradient, which nearly cancel, lose their difference.
    precise = hidden.dtype.itemsize >= 4 and not torch.is_autocast_enabled(hidden.device.type)
    return precise and split.family.has_affine_head(split.model)


def _kept_of_dense(split: SplitModel, temperature: float, dense: Tensor) -> Tensor:
    """What the loss needs of the dense model's final hidden states, [answers, hidden]."""
    return summary_of(dense, split.logits, temperature) if _summarises(split, dense) else dense
