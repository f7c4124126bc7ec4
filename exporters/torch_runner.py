"""The reference: PyTorch with the routers attached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Literal

import numpy as np
import torch

from mskip.compressor.cache import RoutedCache
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import Patch
from mskip.compressor.router import Routers
from mskip.compressor.routing import HardPass, forced
from mskip.compressor.sublayers import require_unit
from mskip.exporters.contract import Contract
from mskip.exporters.kernel_steps import KernelSteps, StepPlace
from mskip.exporters.runner import Floats, Ints, Runner, State, positions, selected

_STAMPS = count()


class TorchRunner(Runner):
    """Runs the base model with routers; `close` takes them out again.

    Args:
        base: the base model.
        routers: its routers.
        contract: of the model; its ``tau`` is the default.
        kernels: "triton" decodes with the kernels of `mskip.exporters.routed_kernels`, which need
            an NVIDIA GPU; prompts are read as ever. None for transformers' own arithmetic.

    Raises:
        ModelError: the routers decide once a token, or the kernels cannot run this model here.
        MissingExtraError: triton is asked for and not installed.
    """

    name = "PyTorch"

    def __init__(
        self,
        base: BaseModel,
        routers: Routers,
        contract: Contract,
        kernels: Literal["triton"] | None = None,
    ) -> None:
        require_unit(routers.sublayers.unit, "sequence", "this runner")
        self.base = base
        self.routers = routers
        self.contract = contract
        self._steps = None if kernels is None else KernelSteps(base, routers)
        self._patch = Patch(base.model, routers.sublayers)

    def close(self) -> None:
        """Restore the model."""
        self._patch.restore()

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def extend(self, state: State, tokens: Ints, mask: Ints | None = None) -> State:
        """See `Runner.extend`; the kernels read one new position of each row at a time.

        Raises:
            ValueError: the kernels' buffers were written by going on from an earlier state.
        """
        if self._steps is None:
            return super().extend(state, tokens, mask)
        new = np.ones_like(tokens) if mask is None else mask
        logits = []
        for column in range(tokens.shape[1]):
            real, chosen = new[:, column : column + 1], tokens[:, column : column + 1]
            state = self._step(self._steps, state, chosen, real)
            logits.append(state.logits)
        return replace(state, logits=np.concatenate(logits, axis=1))

    def _step(self, steps: KernelSteps, state: State, tokens: Ints, real: Ints) -> State:
        place, columns = state.cache, state.mask.shape[1]
        if isinstance(place, RoutedCache):
            buffers = steps.buffers_from(place, state.routing, state.mask)
        else:
            buffers = _written(place).buffers
            if columns + 1 > buffers.capacity:
                buffers = steps.grown(buffers, state.routing)
            buffers.writes = [each for each in buffers.writes if each[0] <= columns]
        buffers.tokens.copy_(torch.from_numpy(tokens))
        buffers.lengths.copy_(torch.from_numpy(state.mask.sum(axis=1)))
        steps.step(buffers)
        after = StepPlace(buffers, columns + 1, next(_STAMPS))
        buffers.writes.append((after.columns, after.stamp))
        logits = buffers.logits.float().cpu().numpy().copy()
        return replace(
            state, logits=logits, mask=np.concatenate([state.mask, real], axis=1), cache=after
        )

    def forward(self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats) -> State:
        """See `Runner.forward`."""
        return self._call(input_ids, mask, cache, routing, tau, 0)  # transformers' word for all

    def forward_last(
        self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats
    ) -> State:
        """See `Runner.forward_last`."""
        return self._call(input_ids, mask, cache, routing, tau, 1)

    @torch.no_grad()
    def _call(
        self, input_ids: Ints, mask: Ints, cache: Any, routing: Ints, tau: Floats, keep: int
    ) -> State:
        model = self.base.model
        device = model.device
        # The caller's state stays usable: a cache that grows is a copy. Tensors are
        # replaced, never written to, so only the lists of them are new.
        empty = cache is None
        cache = RoutedCache(model.config, self.routers.sublayers) if empty else _fork(cache)
        if cache.decisions is None:
            cache.open(len(input_ids), device, forced(torch.from_numpy(routing)))
        new = input_ids.shape[1]
        mask_tensor = torch.from_numpy(mask).to(device)
        assert cache.decisions is not None
        assert cache.scores is not None
        hard = HardPass(
            self.routers,
            torch.from_numpy(tau).to(device),
            mask_tensor[:, -new:].bool(),
            cache.decisions,
            cache.scores,
        )
        logits = model(
            input_ids=torch.from_numpy(input_ids).to(device),
            attention_mask=mask_tensor,
            position_ids=torch.from_numpy(positions(mask, new)).to(device),
            past_key_values=cache,
            use_cache=True,
            routing=hard,
            logits_to_keep=keep,
        ).logits
        return State(
            logits.float().cpu().numpy(),
            hard.decisions.cpu().numpy().astype(np.int64),
            hard.scores.cpu().numpy().copy(),
            mask,
            cache,
        )

    def select(self, state: State, rows: Sequence[int]) -> State:
        """See `Runner.select`."""
        if self._steps is not None and isinstance(state.cache, StepPlace):
            place, chosen = _written(state.cache), list(rows)
            copied = self._steps.selected(place.buffers, chosen, state.routing[chosen])
            copied.writes = [(place.columns, place.stamp)]
            return selected(state, rows, replace(place, buffers=copied))
        cache = _fork(state.cache)
        cache.batch_select_indices(torch.tensor(rows))
        return selected(state, rows, cache)

    def kv_bytes(self, state: State) -> int:
        """See `Runner.kv_bytes`; of the kernels' buffers with their room, a row for everyone."""
        if isinstance(state.cache, StepPlace):
            return state.cache.buffers.nbytes()
        return int(state.cache.kv_bytes())


def _written(place: StepPlace) -> StepPlace:
    if (place.columns, place.stamp) not in place.buffers.writes:
        raise ValueError(
            "this state's keys and values were overwritten by going on from an earlier state."
        )
    return place


def _fork(cache: RoutedCache) -> RoutedCache:
    import copy

    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    assert cache.decisions is not None
    assert cache.scores is not None
    twin.decisions, twin.scores = cache.decisions.clone(), cache.scores.clone()
    return twin
