"""The equation as loops, the truth that the fused path is measured against.

y[b, t] = W x[b, t] + sum over the nodes n that row b's task reads of g[task, n, layer] * B_n (A_n x[b, t])
                    + sum over its pages p and their slots s       of g[task, p, layer] * K_p[s] . x[b, t] * V_p[:, s]

Of an open task, the gates on what is learning itself, its own node and its stage's page, get no gradient.
"""

import torch


def naive_logits(model, input_ids, rows, **kwargs) -> torch.Tensor:
    """Logits [B, T, V] of `model` with row b on the path of the task rows[b] (None: the backbone)."""
    hooks = []
    for name, layer in model._layer_of.items():
        key = name.replace(".", "_")
        nodes = model.hft_nodes[key]
        memory = dict(model.hft_memory.items()).get(key)

        def add_path(linear, args, y, nodes=nodes, memory=memory, layer=layer):
            out = []
            for b, task in enumerate(rows):
                tokens = [add_sources(model, task, nodes, memory, layer, x, y[b, t]) for t, x in enumerate(args[0][b])]
                out.append(torch.stack(tokens))
            return torch.stack(out)

        hooks.append(model.base_model.get_submodule(name).register_forward_hook(add_path))
    try:
        return model.backbone(input_ids, **kwargs).logits
    finally:
        for hook in hooks:
            hook.remove()


def add_sources(model, task, nodes, memory, layer, x, y):
    """One token of one row at one linear."""
    if task is None:
        return y
    entry = model.config.task(task)
    own = [task] + [page["id"] for page in model.config.pages if task in page["writers"] and not page["sealed"]]
    read = [*model.hierarchy.path(task), *entry["borrows"], *entry["pages"]]
    gates = model.hft_gates.of(task)[layer]
    gates = iter(g.detach() if not entry["sealed"] and source in own else g
                 for source, g in zip(read, gates, strict=True))  # fmt: skip
    for node in [*model.hierarchy.path(task), *entry["borrows"]]:
        A, B = nodes.pair(node)
        hidden = sum(A[:, i] * x[i] for i in range(A.shape[1]))
        y = y + next(gates) * (B @ hidden)
    for page in entry["pages"]:
        g = next(gates)
        if memory is None:
            continue
        K, V = memory.pair(str(page))
        match = [key @ x for key in K]
        for s, weight in enumerate(match):
            y = y + g * weight * V[:, s]
    return y
