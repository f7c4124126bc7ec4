"""The reference: PyTorch with the routers attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mskip.compressor.cache import RoutedCache
from mskip.compressor.models import BaseModel
from mskip.compressor.patching import Patch
from mskip.compressor.router import Routers
from mskip.compressor.routing import HardPass, forced
from mskip.compressor.sublayers import require_unit
from mskip.exporters.contract import Contract
from mskip.exporters.runner import Floats, Ints, Runner, State, positions, selected


class TorchRunner(Runner):
    """Runs the base model with routers; `close` takes them out again.

    Args:
        base: the base model.
        routers: its routers.
        contract: of the model; its ``tau`` is the default.

    Raises:
        ModelError: the routers decide once a token.
    """

    name = "PyTorch"

    def __init__(self, base: BaseModel, routers: Routers, contract: Contract) -> None:
        require_unit(routers.sublayers.unit, "sequence", "this runner")
        self.base = base
        self.routers = routers
        self.contract = contract
        self._patch = Patch(base.model, routers.sublayers)

    def close(self) -> None:
        """Restore the model."""
        self._patch.restore()

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        cache = _fork(state.cache)
        cache.batch_select_indices(torch.tensor(rows))
        return selected(state, rows, cache)

    def kv_bytes(self, state: State) -> int:
        """See `Runner.kv_bytes`."""
        return int(state.cache.kv_bytes())


def _fork(cache: RoutedCache) -> RoutedCache:
    import copy

    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    assert cache.decisions is not None
    assert cache.scores is not None
    twin.decisions, twin.scores = cache.decisions.clone(), cache.scores.clone()
    return twin
