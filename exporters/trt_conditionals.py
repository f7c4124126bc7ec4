"""Does a parsed network skip what its conditionals are to skip?

In TensorRT only those layers of a branch are lazy that hang on one of the conditional's input
layers (NVIDIA's documentation, "Working with Conditionals"); a parser that put them elsewhere
would give an engine that computes every attention and ignores the decision.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mskip.exporters.builder import branch_prefix
from mskip.exporters.contract import Contract

_HEAVY = ("MATRIX_MULTIPLY", "SOFTMAX")
"""Kinds of layers that a skip has to save."""


@dataclass
class Conditionals:
    """What was found.

    Attributes:
        layers: of the network, by kind.
        conditions: conditionals that the parser made.
        behind: products and softmaxes that run only if their sublayer executes, by decoder layer.
        outside: names of those that run whatever is decided, and should not.
    """

    layers: Counter[str] = field(default_factory=Counter)
    conditions: int = 0
    behind: dict[int, int] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)


def look_at(network: Any, contract: Contract) -> Conditionals:
    """Follow the tensors from each conditional's input layers to the end of its branch.

    Args:
        network: an `INetworkDefinition` as the parser left it.
        contract: of the routed graph.
    """
    found = Conditionals(behind=dict.fromkeys(contract.routed_layers, 0))
    prefixes = {
        branch_prefix(layer, contract.granularity): layer for layer in contract.routed_layers
    }
    lazy: set[str] = set()
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        kind = layer.type.name
        found.layers[kind] += 1
        found.conditions += kind == "CONDITION"
        inside = kind == "CONDITIONAL_INPUT" or any(
            tensor is not None and tensor.name in lazy
            for tensor in (layer.get_input(each) for each in range(layer.num_inputs))
        )
        if inside and kind != "CONDITIONAL_OUTPUT":
            outputs = (layer.get_output(each) for each in range(layer.num_outputs))
            lazy.update(tensor.name for tensor in outputs if tensor is not None)
        if kind not in _HEAVY:
            continue
        of = next((prefixes[each] for each in prefixes if layer.name.startswith(each)), None)
        if of is None:
            continue
        if inside:
            found.behind[of] += 1
        else:
            found.outside.append(layer.name)
    return found
