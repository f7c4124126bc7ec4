"""The conditional graph in the nodes that ONNX Runtime has of its own."""

from __future__ import annotations

from mskip.exporters.attention_inputs import join_projections, rotate_inside
from mskip.exporters.builder import Builder
from mskip.exporters.contract import Contract
from mskip.exporters.tidying import fuse_sums_with_norms


class FusedBuilder(Builder):
    """See the module."""

    def first_forms(self, contract: Contract) -> None:
        """Heads turned by the kernel, and one product for queries, keys and values."""
        if contract.positions:
            rotate_inside(self.graph, contract.positions)
        join_projections(self.graph)

    def last_forms(self) -> None:
        """A sum and the norm of it in one node."""
        fuse_sums_with_norms(self.graph)
