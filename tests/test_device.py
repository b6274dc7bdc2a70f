"""device.py: the devices, precisions and CPUs that a machine has."""

import pytest
import torch
from conftest import refusal

from device import cpu_limit, pick_device, pick_precision

CPU = torch.device("cpu")


def test_devices():
    assert pick_device("cpu") == CPU
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == expected


@pytest.mark.parametrize("name", ["banana", "", "cuda:99", "cpu:x", "xpu", "hpu", "mtia", "xla", "cuda:-1", "meta"])
def test_devices_that_are_not_there(name):
    assert f"--device {name}" in refusal(pick_device, name)


def test_precisions():
    assert pick_precision("fp32", CPU) == torch.float32 and pick_precision("bf16", CPU) == torch.bfloat16
    multiplies = {name for name, there in torch.cpu.get_capabilities().items() if there}
    has_bf16 = torch.backends.mkldnn.is_available() and multiplies & {"avx512_bf16", "amx_bf16", "bf16"}
    assert pick_precision("auto", CPU) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert pick_precision("auto", torch.device("mps")) == torch.float32
    assert pick_precision("fp16", torch.device("cuda")) == torch.float16
    for device in ("cpu", "mps"):
        message = refusal(pick_precision, "fp16", torch.device(device))
        assert message.startswith(f"--precision fp16 needs a CUDA device, and this is {device}")


@pytest.mark.parametrize(("text", "cpus"), [("150000 100000", 2), ("50000 100000", 1), ("max 100000", None)])
def test_share_of_the_cpus_that_a_container_has(text, cpus):
    assert cpu_limit(text) == cpus
