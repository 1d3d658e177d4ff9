"""What tests share that is no fixture."""

import socket

import torch
from transformers import AutoConfig, BitsAndBytesConfig


VOCABULARY = 261  # the tokenizer's in conftest.py
_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
BACKBONES = {
    "llama": dict(tie_word_embeddings=False),
    "qwen3": dict(head_dim=8),
    "gemma3_text": dict(head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    "mistral": dict(sliding_window=None),
    "phi3": dict(),  # its q, k, v are one linear
}


def tiny_config(family: str, **more):
    return AutoConfig.for_model(family, **{**_COMMON, **BACKBONES.get(family, {}), **more})


def fill(model, std: float = 0.2, seed: int = 3, only_trainable: bool = False) -> None:
    """Gives every node and page a voice and every gate a value of its own, so that no test passes on zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only_trainable and not parameter.requires_grad:
                continue
            if name.startswith(("hft_nodes", "hft_memory")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            elif name.startswith("hft_gates"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))


def grow(model, seal: bool = True) -> None:
    """Starts (and seals) a model's stages as training would, so that each gets its memory page."""
    for level in model.hierarchy.levels():
        tasks = [task for task in level if task in model.config.open_tasks()]
        model.start_stage(tasks)
        fill(model, only_trainable=True)
        if seal:
            model.seal(tasks)


def in_nf4(model, folder):
    """The model saved and loaded again with its backbone in 4 bit, computing in float32."""
    model.save_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="float32")
    return type(model).from_pretrained(folder, quantization_config=nf4).eval()


def bits(tensor: torch.Tensor) -> bytes:
    """For comparisons that allow no difference at all, signed zeros included."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(model) -> dict[str, bytes]:
    """Parameters, buffers, and the scales of packed weights."""
    found = {name: bits(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, module in model.named_modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            found[f"{name}.absmax"] = bits(state.absmax)
    return found


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
