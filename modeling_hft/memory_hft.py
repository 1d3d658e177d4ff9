"""The memory: what is not one task's own. Pages of key-value slots beside a linear, one page a stage.

B batch, T tokens, I/O in and out features, S slots of a page.
"""

import torch
import torch.nn.functional as F

from .nodes_hft import HFTFactors


class HFTMemory(HFTFactors):
    """The memory's pages beside one linear: page p holds S keys K_p [S, I] and their values V_p [O, S].

    All tasks of a stage write the stage's page together; it is sealed with the stage, and read by them and by every later
    task, whatever its branch. Read linearly, a page adds V_p K_p x: without a softmax between keys and values, as in a
    fast-weight memory (Schlag et al. 2021, https://arxiv.org/abs/2102.11174), so that it fuses with the nodes.
    """

    DOWN, UP = "K", "V"

    def read_top(self, x_BTI: torch.Tensor, page: str, k: int) -> torch.Tensor:
        """The sparse read: each token reads its k best-matching slots, weighted by a softmax over these k.

        As in product-key memories (Lample et al. 2019, https://arxiv.org/abs/1907.05242), with plain keys.

        Args:
            x_BTI: the linear's input; any leading axes.
            page: its id, as text.
            k: 1 to S.

        Returns:
            Tensor [B, T, O] in the input's dtype.
        """
        K_SI, V_OS = self.pair(page)
        match_BTS = F.linear(x_BTI, K_SI.to(x_BTI))
        best_BTk, slot_BTk = match_BTS.topk(k, dim=-1)
        share_BTk = best_BTk.softmax(-1, dtype=torch.promote_types(x_BTI.dtype, torch.float32)).to(x_BTI.dtype)
        weight_BTS = torch.zeros_like(match_BTS).scatter(-1, slot_BTk, share_BTk)
        return F.linear(weight_BTS, V_OS.to(x_BTI))
