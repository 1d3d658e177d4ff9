"""What `hft` does about the memory of a process on a CPU."""

import os
import subprocess
import sys

import pytest
import torch

from hft.trainers.cpu_memory import CAPACITIES, use_memory_well


SCRIPT = """
import sys
import torch
from hft.trainers.cpu_memory import give_freed_back, use_memory_well

def held():  # MiB
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

if sys.argv[1] == "well":
    use_memory_well()
weight_IO = torch.randn(256, 512).bfloat16()
for length in range(1, 9):
    torch.randn(length, 256).bfloat16() @ weight_IO
give_freed_back()
begin = held()
for length in range(9, 500):
    torch.randn(length, 256).bfloat16() @ weight_IO
give_freed_back()
print(held() - begin)
blocks = [torch.ones(2**18) for _ in range(200)]  # a MiB each
last = torch.ones(8)
full = held()
del blocks
print(full - held())
give_freed_back()
print(full - held())
"""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or torch.accelerator.is_available(),
    reason="what is done on a CPU under Linux",
)


@pytest.mark.slow
def test_new_lengths_do_not_make_the_process_grow_and_what_is_freed_is_kept_till_it_is_given_back():
    """Where the machine multiplies in bfloat16 itself; elsewhere no product is kept, and neither process grows."""

    def run(how: str) -> list[float]:
        env = {key: value for key, value in os.environ.items() if key not in CAPACITIES}
        done = subprocess.run([sys.executable, "-c", SCRIPT, how], env=env, capture_output=True, text=True, check=True)
        return list(map(float, done.stdout.split()))

    careless, (growth, freed, given_back) = run("as it is")[0], run("well")
    assert growth < max(careless / 2, 4), (careless, growth)
    assert freed < 50 and given_back > 150


def test_the_users_own_capacities_stay(monkeypatch):
    monkeypatch.setenv(CAPACITIES[0], "7")
    monkeypatch.setenv(CAPACITIES[1], "")  # so that it is taken out again
    monkeypatch.delenv(CAPACITIES[1])
    use_memory_well()
    assert [os.environ[name] for name in CAPACITIES] == ["7", "128"]
