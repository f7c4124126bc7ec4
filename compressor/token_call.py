"""Running a sublayer for chosen tokens: queries, masks and keys gathered by true positions.

What a skipped token leaves behind, and why, is in docs/per-token.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mskip.compressor.errors import ModelError
from mskip.compressor.token_cache import Columns, TokenLayer


class TokenCall:
    """One call of a routed sublayer, to be run for chosen tokens; part of a `Call`.

    Args:
        hidden: what the sublayer is called with, [batch, sequence, hidden].
        run: the sublayer, given hidden states and the keyword arguments that go with them.
        arguments: the keyword arguments of this call.
        layer: decoder layer whose keys and values the sublayer uses; None where its tokens
            do not see each other (MLP).
        skip: what it gives where it is skipped, of the tokens in a [batch, sequence] bool:
            [n, hidden].
        cache: name of the KV cache among the arguments.
    """

    def __init__(
        self,
        hidden: Tensor,
        run: Callable[[Tensor, dict[str, Any]], Tensor],
        arguments: dict[str, Any],
        layer: int | None,
        skip: Callable[[Tensor], Tensor],
        cache: str,
    ) -> None:
        self.hidden = hidden
        self.arguments = arguments
        self.skip = skip
        self._run = run
        self._cache = cache
        self._layer = layer

    def execute(self, gate: Tensor) -> Tensor:
        """Run the sublayer for the tokens in ``gate``; the others leave nothing in the cache.

        To be called once a call, where the gate is shut too: the cache counts positions.

        Args:
            gate: [batch, sequence], bool; False on padding.

        Returns:
            [n, hidden], in the order in which ``gate`` selects.

        Raises:
            ModelError: the cache cannot hold single tokens, or the attention's kernel takes
                no mask of its own for every query.
        """
        if self._layer is None:
            chosen = self.hidden[gate]
            return self._run(chosen.unsqueeze(0), self.arguments)[0] if len(chosen) else chosen
        counts: list[int] = gate.sum(1).tolist()
        cached = self._cached(self._layer)
        output = self._attend(gate, counts, cached) if any(counts) else self.hidden[:0, 0]
        if cached is not None:
            cached.seen += gate.shape[1]
        return output

    def execute_all(self, visible: Tensor) -> Tensor:
        """Run every token, with only some of them seen by later ones; for training.

        A token always sees itself: the output at a token that is not visible is what it
        would get if it alone executed too.

        Args:
            visible: [batch, sequence], bool.

        Returns:
            [batch, sequence, hidden].

        Raises:
            ValueError: the call has a cache.
        """
        if self._layer is None:
            return self._run(self.hidden, self.arguments)
        if self.arguments.get(self._cache) is not None:
            raise ValueError("tokens are all run only where there is no cache: use_cache=False")
        column = torch.arange(visible.shape[1], device=visible.device)
        allowed = visible[:, None, :] & (column <= column[:, None])
        mask = _restricted(
            _four_dimensional(self.arguments.get("attention_mask")),
            allowed[:, None],
            (column == column[:, None])[None, None],
        )
        return self._run(self.hidden, {**self.arguments, "attention_mask": mask})

    def _cached(self, layer: int) -> TokenLayer | None:
        cache = self.arguments.get(self._cache)
        if cache is None:
            return None
        cached = cache.layers[layer]
        if not isinstance(cached, TokenLayer):
            raise ModelError(
                f"this {type(cache).__name__} cannot hold keys of single tokens.",
                "Use the cache that the attached model returns, or TokenSkip.cache().",
            )
        return cached

    def _attend(self, gate: Tensor, counts: list[int], cached: TokenLayer | None) -> Tensor:
        """`execute` where some token executes and tokens see each other."""
        batch, positions = gate.shape
        some = [row for row, count in enumerate(counts) if count]
        rows = torch.tensor(some, device=gate.device)
        # The chosen tokens of each row come first, in order; what pads a row is a token of it.
        order = (~gate[rows]).to(torch.uint8).argsort(dim=1, stable=True)
        index = order[:, : max(counts)]
        offset = 0 if cached is None else cached.seen
        after = {row: index[n, : counts[row]] + offset for n, row in enumerate(some)}
        arguments = dict(self.arguments)
        if cached is not None:
            after = {row: torch.cat([cached.columns[row], new]) for row, new in after.items()}
            arguments[self._cache] = _Appended(cached, after)
        held = [len(columns) for columns in after.values()]
        mask = _four_dimensional(arguments.pop("attention_mask", None))
        seen = offset + positions
        # A sliding layer's mask starts at the oldest key that the model's own cache has kept.
        oldest = 0 if mask is None else seen - mask.shape[-1]
        if min(counts) == positions and min(held) == seen and oldest == 0:
            # Nothing was ever skipped: the dense call, with the mask that the model made.
            return self._run(self.hidden, {**arguments, "attention_mask": mask}).flatten(0, 1)
        arguments = {
            key: _take_tokens(value, rows, index, batch, positions)
            for key, value in arguments.items()
        }
        # Where the model made none: one query a row, or no past. Then the order of the keys is
        # all the mask there is, unless rows that differ in length are padded in sight of a query.
        new = [counts[row] for row in some]
        if mask is not None or (held != new and len(set(held)) > 1):
            keys = pad_sequence(list(after.values()), batch_first=True, padding_value=-1)
            padding = torch.arange(index.shape[1], device=gate.device) >= gate[rows].sum(1)[:, None]
            mask = _gathered(mask, rows, index, keys - oldest, batch)
            visible = (keys >= oldest)[:, None] & (keys[:, None] <= (index + offset)[:, :, None])
            # What pads a row sees anything, as to see nothing gives NaN.
            mask = _restricted(mask, visible[:, None], padding[:, None, :, None])
        arguments["attention_mask"] = mask
        output = self._run(self.hidden[rows[:, None], index], arguments)
        return torch.cat([output[n, : counts[row]] for n, row in enumerate(some)])


class _Appended:
    """Stands in for the cache within an attention module, for some rows of the batch."""

    def __init__(self, layer: TokenLayer, after: Columns) -> None:
        self.layer = layer
        self.after = after

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layer.append(self.after, key_states, value_states)


def _take_tokens(value: Any, rows: Tensor, index: Tensor, batch: int, positions: int) -> Any:
    """Chosen tokens of every per-token tensor in ``value``; anything else stays as it is.

    A tensor is per-token where it is [batch or 1, sequence, ...]: cos and sin, position ids.

    Args:
        value: an argument of the sublayer.
        rows: [n] int64.
        index: positions within each row, [n, chosen] int64.
        batch: sequences of the call.
        positions: positions of the call.
    """
    if isinstance(value, Tensor):
        if value.ndim < 2 or value.shape[0] not in (1, batch) or value.shape[1] != positions:
            return value
        return value.expand(batch, *value.shape[1:])[rows[:, None], index]
    if isinstance(value, tuple | list):
        return type(value)(_take_tokens(each, rows, index, batch, positions) for each in value)
    return value


def _four_dimensional(mask: Any) -> Tensor | None:
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 4):
        return mask
    raise ModelError(
        "per-token routing needs attention that takes a mask for every query and key.",
        'Load the model with attn_implementation="sdpa" or "eager".',
    )


def _gathered(
    mask: Tensor | None, rows: Tensor, index: Tensor, keys: Tensor, batch: int
) -> Tensor | None:
    """The mask of chosen queries and keys, [n, heads or 1, chosen, held]."""
    if mask is None:
        return None
    every = mask.expand(batch, *mask.shape[1:])
    queries, columns = index[:, :, None], keys.clamp(min=0)[:, None, :]
    return every[rows[:, None, None], :, queries, columns].movedim(3, 1)


def _restricted(mask: Tensor | None, allowed: Tensor, forced: Tensor) -> Tensor:
    """``mask`` (bool, or added to the logits; None hides nothing) with less to see.

    Args:
        mask: [n, heads or 1, queries, keys].
        allowed: bool, broadcasts against it; what is False is hidden.
        forced: bool, likewise; what is True is seen, whatever the other two say.
    """
    if mask is None:
        return allowed | forced
    if mask.dtype == torch.bool:
        return mask & allowed | forced
    hidden = torch.finfo(mask.dtype).min
    return mask.masked_fill(~allowed, hidden).masked_fill(forced, 0.0)
