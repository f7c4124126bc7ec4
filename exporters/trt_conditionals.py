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
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    lazy = _lazy(layers)
    for number, layer in enumerate(layers):
        kind = layer.type.name
        found.layers[kind] += 1
        found.conditions += kind == "CONDITION"
        of = next((prefixes[each] for each in prefixes if layer.name.startswith(each)), None)
        if kind not in _HEAVY or of is None:
            continue
        if number in lazy:
            found.behind[of] += 1
        else:
            found.outside.append(layer.name)
    return found


def _lazy(layers: list[Any]) -> set[int]:
    """Numbers of the layers that hang on a conditional's input; those come after what they feed."""
    readers: dict[str, list[int]] = {}
    for number, layer in enumerate(layers):
        for tensor in (layer.get_input(each) for each in range(layer.num_inputs)):
            if tensor is not None:
                readers.setdefault(tensor.name, []).append(number)
    found: set[int] = set()
    todo = [n for n, layer in enumerate(layers) if layer.type.name == "CONDITIONAL_INPUT"]
    while todo:
        layer = layers[todo.pop()]
        for tensor in (layer.get_output(each) for each in range(layer.num_outputs)):
            for reader in readers.get(tensor.name, []) if tensor is not None else []:
                if reader not in found and layers[reader].type.name != "CONDITIONAL_OUTPUT":
                    found.add(reader)
                    todo.append(reader)
    return found
