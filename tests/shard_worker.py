"""One of two processes: a model's passes before and after its backbone is sharded over both."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig

import hft
from tests.tiny import grow


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="bfloat16",
        bnb_4bit_quant_storage="bfloat16",
    )
    quantized = {"quantization_config": nf4} if spec["nf4"] else {}
    model = hft.HFTForCausalLM.from_backbone(
        spec["backbone"], {"a": [], "b": ["a"]}, rank=3, memory_config={"slots": 2},
        dtype=torch.bfloat16 if quantized else torch.float32, **quantized,
    )  # fmt: skip
    grow(model, seal=False)
    model.seal(["a"])  # its node is now of the backbone's dtype, those of b and all gates are float32
    model.set_trainable(["b"])
    ids = torch.randint(5, 200, (4, 7), generator=torch.Generator().manual_seed(1))

    def step(rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        output = model(rows, labels=rows, task="b", use_cache=False)
        output.loss.backward()
        return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    logits, gradients = step(ids)
    own = {parameter for name, parameter in model.named_parameters() if name.startswith("hft_")}
    for layer in model.base_model.layers:
        fully_shard(layer, ignored_params=own)
    fully_shard(model, ignored_params=own)
    assert {n for n, p in model.named_parameters() if isinstance(p, DTensor)} == {
        f"backbone.{name}" for name, _ in model.backbone.named_parameters()
    }
    mine = slice(2 * rank, 2 * rank + 2)
    its_logits, its_gradients = step(ids[mine])
    torch.testing.assert_close(its_logits, logits[mine])
    assert its_gradients.keys() == gradients.keys() == {n for n, p in model.learning_parameters("b").items()}
    for name, gradient in its_gradients.items():
        dist.all_reduce(gradient)
        error = (gradient / 2 - gradients[name]).norm() / gradients[name].norm()
        assert error < (0.02 if quantized else 1e-5), f"{name}: {error}"
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
