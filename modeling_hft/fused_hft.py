"""What the active path adds to one linear: its nodes and memory pages, fused into one pair of matrix products.

B batch, T tokens, I/O in and out features, R rank of the whole path: the sum over its nodes and pages.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_hft import HFTMemoryConfig
from .memory_hft import HFTMemory
from .nodes_hft import HFTNodes
from .path_hft import HFTPath, active_path


class HFTFused:
    """Beside one frozen linear: y = W x + sum over the path's sources s of g_s * up_s (down_s x).

    A source is a node (up B, down A) or a memory page (up V, down K).

    Args:
        nodes: the nodes beside the linear.
        memory: the pages beside it; None if this linear carries none.
        config: how pages are read.
    """

    def __init__(self, nodes: HFTNodes, memory: HFTMemory | None, config: HFTMemoryConfig):
        self.nodes = nodes
        self.memory = memory
        self.config = config

    def on_linear(self, linear: nn.Module, args: tuple[torch.Tensor, ...], y_BTO: torch.Tensor) -> torch.Tensor | None:
        """The forward hook on the linear: adds the active path, or leaves the output as it is, bit for bit."""
        path = active_path()
        if path is None:
            return None
        return y_BTO + self.added(args[0], path).to(device=y_BTO.device, dtype=y_BTO.dtype)

    def added(self, x_BTI: torch.Tensor, path: HFTPath) -> torch.Tensor:
        """What the path adds to the linear's output.

        Args:
            x_BTI: the linear's input; any leading axes if the whole batch is on one path.
            path: the sources to read and their gates.

        Returns:
            Tensor [B, T, O] in the input's dtype: (x A^T) (g B)^T.
        """
        linear_pages = self.memory is not None and self.config.read == "linear"
        pairs = [self.nodes.pair(node) for node in path.nodes]
        if linear_pages:
            pairs += [self.memory.pair(page) for page in path.pages]
        down_RI = torch.cat([down for down, _ in pairs]).to(x_BTI)
        up_OR = torch.cat([up for _, up in pairs], dim=1).to(x_BTI.device)
        g_R = path.column_gates(self.nodes.layer, linear_pages).to(x_BTI.device)
        # One path for all rows: scaled factors are those of an exported LoRA, to the bit. A path a row: g is [B, R], zero
        # for the sources of other rows.
        if g_R.dim() == 1:
            added_BTO = F.linear(F.linear(x_BTI, down_RI), (up_OR * g_R).to(x_BTI.dtype))
        else:
            added_BTO = F.linear(_scale_rows(F.linear(x_BTI, down_RI), g_R), up_OR.to(x_BTI.dtype))
        if self.memory is not None and not linear_pages:
            for page, g in zip(path.pages, path.page_gates(self.nodes.layer).to(x_BTI.device).unbind(-1), strict=True):
                read_BTO = self.memory.read_top(x_BTI, page, self.config.top_k)
                added_BTO = added_BTO + _scale_rows(read_BTO, g if g.dim() == 0 else g[:, None])
        return added_BTO


def _scale_rows(h_BTR: torch.Tensor, g_BR: torch.Tensor) -> torch.Tensor:
    """Scales each row [T, R] of a batch by its own gates [R]. Some decoders flatten rows and tokens into one axis."""
    if g_BR.dim() == 0:
        return (h_BTR * g_BR).to(h_BTR.dtype)
    scaled_BTR = h_BTR.reshape(len(g_BR), -1, h_BTR.shape[-1]) * g_BR[:, None]
    return scaled_BTR.to(h_BTR.dtype).reshape(h_BTR.shape)
