"""The memory: what is not one task's own. Pages of key-value slots beside a linear, one page a stage.

B batch, T tokens, I/O in and out features, S slots of a page.
"""

from .nodes_hft import HFTFactors


class HFTMemory(HFTFactors):
    """The memory's pages beside one linear: page p holds S keys K_p [S, I] and their values V_p [O, S].

    All tasks of a stage, but for those that `page_tasks` leaves out, write its page together; it is sealed with the stage,
    and read by them and by every later task, whatever its branch. Read linearly, a page adds V_p K_p x: without a softmax
    between keys and values, as in a fast-weight memory (Schlag et al. 2021, https://arxiv.org/abs/2102.11174), so that it
    fuses with the nodes.
    """

    DOWN, UP = "K", "V"
