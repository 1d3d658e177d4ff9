"""`hft doctor` on this machine, and on machines where something is missing or broken."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hft.trainers import compute_dtype
from hft.trainers import doctor as doctors
from hft.trainers.cli import main

from .test_storage import run_clean


def test_the_report_is_right_about_this_machine(monkeypatch, capsys):
    usage = shutil.disk_usage(Path.cwd())._replace(free=7 * 2**30)  # others write meanwhile
    monkeypatch.setattr(doctors.shutil, "disk_usage", lambda folder: usage)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes"):
        assert f"ok  {package:<16}{importlib.metadata.version(package)} (needs >=" in shown
    assert "4-bit (NF4)     forward and backward are right on" in shown
    assert f"7 GiB free in {Path.cwd()}" in shown
    assert "matplotlib" not in shown  # nobody needs it to train
    assert "!!" not in shown and shown.endswith("All that training needs is here and works.\n")
    assert len(shown.splitlines()) < 40


def test_it_asks_no_network(tmp_path):
    code = """
    import socket, sys
    def refuse(*_):
        raise SystemExit("it asks the network")
    socket.socket.connect = socket.getaddrinfo = refuse
    from hft.trainers.cli import main
    main(["doctor"])
    """
    run_clean(code, tmp_path, HF_HUB_OFFLINE="0")


def advised(capsys) -> str:
    assert main(["doctor"]) == 1
    return capsys.readouterr().out.split("To do:\n")[1]


def test_missing_old_and_broken_packages_are_named(monkeypatch, capsys):
    version = importlib.metadata.version

    def other(name):
        if name == "trl":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"peft": "0.1.0"}.get(name, version(name))

    monkeypatch.setattr(importlib.metadata, "version", other)
    monkeypatch.setitem(sys.modules, "datasets", None)
    advice = advised(capsys)
    assert advice.splitlines() == [
        '1. pip install -U "trl>=1.16"',
        '2. pip install -U "datasets>=4.0"',
        '3. pip install -U "peft>=0.18"',
    ]


def test_a_build_for_a_gpu_that_is_not_here_computes_on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert "right on cpu" in str(doctors._nf4())


def test_a_bitsandbytes_that_is_missing_or_wrong_is_noticed(monkeypatch, capsys):
    import bitsandbytes as bnb

    right = bnb.nn.Linear4bit.forward

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return -gradient

    for wrong in (lambda self, x: right(self, x) * 1.5, lambda self, x: right(self, WrongGradient.apply(x))):
        monkeypatch.setattr(bnb.nn.Linear4bit, "forward", wrong)
        assert "1. bitsandbytes computes wrong numbers here" in advised(capsys)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert '1. For 4-bit backbones: pip install -U "bitsandbytes>=0.48"' in advised(capsys)


def test_it_runs_where_only_the_core_is_installed(tmp_path):
    code = (
        "import sys\n"
        "for name in ('trl', 'datasets', 'peft', 'bitsandbytes', 'accelerate'): sys.modules[name] = None\n"
        "from hft.trainers.cli import main\nsys.exit(main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    assert done.stdout.count("cannot be imported") == 5 and done.stdout.count("\n6. ") == 1


def test_gpus_disks_and_the_package_itself(monkeypatch, capsys):
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(doctors.shutil, "disk_usage", lambda folder: usage._replace(free=2**29))
    assert "GiB are left." in advised(capsys)
    monkeypatch.undo()
    monkeypatch.setattr(doctors, "DISTRIBUTION", "no-such-package")
    assert "1. Install it: pip install" in advised(capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here PyTorch sees the GPU")
def test_a_gpu_that_pytorch_does_not_see(monkeypatch, capsys):
    monkeypatch.setattr(doctors.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "1. There is an NVIDIA driver, but this PyTorch does not see a GPU" in advised(capsys)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_gpu_without_bfloat16_products_is_told_of(monkeypatch, has_bfloat16):
    properties = SimpleNamespace(name="Tesla T4", total_memory=16 * 2**30, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    assert ("no bfloat16 products: float16 is faster" in str(doctors._device())) == (not has_bfloat16)
    assert compute_dtype.fast_dtype() == (torch.bfloat16 if has_bfloat16 else torch.float16)
    assert "--bnb_4bit_compute_dtype float16 --fp16 true --bf16 false" in compute_dtype.advice()
