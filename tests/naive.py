"""The equation as loops, the truth that the fused path is measured against.

y[b, t] = W x[b, t] + sum over the nodes n on the path of row b's task of g[task, n, layer] * B_n (A_n x[b, t])
"""

import torch


def naive_logits(model, input_ids, rows, **kwargs) -> torch.Tensor:
    """Logits [B, T, V] of `model` with row b on the path of the task rows[b] (None: the backbone)."""
    hooks = []
    for name, layer in model._layer_of.items():
        bank = model.hft_nodes[name.replace(".", "_")]

        def add_nodes(linear, args, y, bank=bank, layer=layer):
            out = []
            for b, task in enumerate(rows):
                tokens = []
                for t in range(y.shape[1]):
                    total = y[b, t]
                    for n, node in enumerate(model.hierarchy.path(task) if task else ()):
                        A, B = bank.node(node)
                        hidden = sum(A[:, i] * args[0][b, t, i] for i in range(A.shape[1]))
                        total = total + model.hft_gates.of(task)[layer, n] * (B @ hidden)
                    tokens.append(total)
                out.append(torch.stack(tokens))
            return torch.stack(out)

        hooks.append(model.base_model.get_submodule(name).register_forward_hook(add_nodes))
    try:
        return model.backbone(input_ids, **kwargs).logits
    finally:
        for hook in hooks:
            hook.remove()
