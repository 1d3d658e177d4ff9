"""`hft doctor`: what this machine has, whether it works, and what to install. It asks no network."""

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement
from transformers.utils import is_flash_attn_2_available

from hft.attention_hft import has_flash_attention

from .compute_dtype import device_here, is_bfloat16_slow


DISTRIBUTION = "modeling-hft"
NEEDED = ("", "train", "quant")  # the extras without which `hft train` does not run; "": the core
MODULES = {"pyyaml": "yaml"}  # where a package's module is not called like the package
LEAST_DISK = 2**30  # a slim model takes megabytes; a backbone of 135M parameters takes 0.3 GB


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: what was looked at.
        text: what is there.
        advice: what to do, if something that is needed is missing or does not work; else empty.
    """

    name: str
    text: str
    advice: str = ""


def doctor() -> int:
    """Prints the report.

    Returns:
        0 if all that training needs is there and works, else 1.
    """
    print("What HFT finds on this machine\n")
    advice = []
    for finding in examine():
        print(f"{'!!' if finding.advice else 'ok'}  {finding.name:<16}{finding.text}", flush=True)
        if finding.advice:
            advice.append(finding.advice)
    print("\nTo do:" if advice else "\nAll that training needs is here and works.")
    for number, text in enumerate(advice, start=1):
        print(f"{number}. {text}")
    return 1 if advice else 0


def examine() -> Iterator[Finding]:
    """Looks at everything, one thing after another."""
    yield Finding("Python", f"{platform.python_version()} ({platform.system()}, {platform.machine()})")
    yield _device()
    yield Finding("attention", _attention())
    yield _nf4()
    yield from _packages()
    yield from _disk()


def _device() -> Finding:
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        bf16 = "no bfloat16 products: float16 is faster" if is_bfloat16_slow() else "bfloat16"
        text = (
            f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.1f} GiB, compute "
            f"capability {properties.major}.{properties.minor}, {bf16}"
        )
        return Finding("device", text)
    if torch.backends.mps.is_available():
        return Finding("device", "Apple GPU (MPS); HFT was not tested on it")
    text = (
        f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} of them used; PyTorch {torch.__version__} sees no GPU"
    )
    if shutil.which("nvidia-smi"):
        advice = "There is an NVIDIA driver, but this PyTorch does not see a GPU: install a CUDA build (pytorch.org)."
        return Finding("device", text, advice)
    return Finding("device", text + ("; no bfloat16 products: float32 is faster" if is_bfloat16_slow() else ""))


def _attention() -> str:
    flash = "installed" if is_flash_attn_2_available() else "not installed"
    best = "flash_attention_2 for half precision on the GPU" if has_flash_attention() else "sdpa"
    return f"sdpa, eager; flash_attention_2 {flash}; attn_implementation='auto' takes {best} if the model has it"


def _nf4() -> Finding:
    """Quantises a small linear and runs it forward and backward against the matrix that its 4-bit weights stand for."""
    name = "4-bit (NF4)"
    try:
        import bitsandbytes as bnb

        device = device_here()
        linear = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
        if "support_avx512bf16_for_cpu" in vars(linear):
            linear.support_avx512bf16_for_cpu = False  # as HFT's models do: else it spoils gradients
        x_BI = torch.randn(4, 128, device=device, requires_grad=True)
        weight_OI = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
        y_BO = linear(x_BI)
        y_BO.square().sum().backward()
        right_BO = x_BI.detach() @ weight_OI.T
        error = max(_relative(y_BO.detach(), right_BO), _relative(x_BI.grad, 2 * right_BO @ weight_OI))
    except Exception as error:  # whatever it is, the report must go on
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(name, f"does not run: {cause}", 'For 4-bit backbones: pip install -U "bitsandbytes>=0.48"')
    if not error < 0.05:
        advice = 'bitsandbytes computes wrong numbers here: pip install -U bitsandbytes, or set "load_in_4bit: false".'
        return Finding(name, f"forward or backward is wrong on {device.type}: relative error {error:.2g}", advice)
    return Finding(name, f"forward and backward are right on {device.type} (relative error {error:.1g})")


def _relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


def _packages() -> Iterator[Finding]:
    """Each package that HFT requires: is it there, new enough, and can it be imported?"""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(
            DISTRIBUTION, "not installed as a package", "Install it: pip install '.[train,quant]' in its folder."
        )
        return
    yield Finding(DISTRIBUTION, importlib.metadata.version(DISTRIBUTION))
    seen = set()
    for requirement in map(Requirement, lines):
        is_needed = requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in NEEDED
        )
        if is_needed and requirement.name not in (DISTRIBUTION, *seen):
            seen.add(requirement.name)  # two extras may name it
            yield _package(requirement)


def _package(requirement: Requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    advice = f'pip install -U "{name}{wanted}"'
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"not installed; HFT needs {wanted}", advice)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, f"{version}; HFT needs {wanted}", advice)
    try:
        importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # whatever it is, the report must go on
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        return Finding(name, f"{version}, cannot be imported: {cause}", advice)
    return Finding(name, f"{version} (needs {wanted})")


def _disk() -> Iterator[Finding]:
    """Free space where backbones are cached and where models are written."""
    for name, folder in (("disk, cache", Path(constants.HF_HUB_CACHE)), ("disk, here", Path.cwd())):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        advice = "" if free >= LEAST_DISK else f"Free some space in {folder}: {free / 2**30:.1f} GiB are left."
        yield Finding(name, f"{free / 2**30:.0f} GiB free in {folder}", advice)
