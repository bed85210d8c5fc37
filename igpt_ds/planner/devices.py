"""Devices and interconnects as their vendors' data sheets have them.

Rates are dense (half of what is advertised "with sparsity"), links are counted in one direction. Each figure is what
the sheet promises; what of it a program reaches is assumed elsewhere (step_time.py) and said there.
"""

import re
from dataclasses import dataclass

from igpt_ds.errors import UserError

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        label: the part of the name that its driver gives by which it is known.
        bf16, fp32: peak FLOP/s of dense matrix products; float32 without TensorFloat-32, which torch leaves off.
        memory: bytes.
        bandwidth: of its memory, bytes/s.
        link: to its neighbours in the node, bytes/s one way; without NVLink or the like, the host's bus.
        host: to the processor, bytes/s one way.
    """

    label: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    host: float


def _device(label: str, bf16: float, fp32: float, gib: float, bandwidth: float, link: float, host: float) -> Device:
    """In the units of data sheets: TFLOP/s, GB (which are GiB there), TB/s, GB/s."""
    return Device(label, bf16 * TERA, fp32 * TERA, gib * 2**30, bandwidth * TERA, link * GIGA, host * GIGA)


# Host links: PCIe 4.0 x16 32 GB/s, 5.0 x16 64 GB/s one way; GH200's is NVLink-C2C. NVLink bridges, which join two PCIe
# cards only, are not counted.
DEVICES = {
    "b200": _device("B200", 2250, 75, 180, 7.7, 900, 64),
    "h200": _device("H200", 989, 67, 141, 4.8, 450, 64),
    "gh200": _device("GH200", 989, 67, 96, 4.0, 450, 450),
    "h100": _device("H100", 989, 67, 80, 3.35, 450, 64),
    "h100-nvl": _device("H100 NVL", 835, 60, 94, 3.9, 64, 64),
    "h100-pcie": _device("H100 PCIe", 756, 51, 80, 2.0, 64, 64),
    "a100": _device("A100", 312, 19.5, 80, 2.039, 300, 32),
    "a100-40gb": _device("A100", 312, 19.5, 40, 1.555, 300, 32),
    "mi300x": _device("MI300X", 1307, 163.4, 192, 5.3, 448, 64),
    "l40s": _device("L40S", 362, 91.6, 48, 0.864, 32, 32),
    "a10g": _device("A10G", 70, 31.5, 24, 0.6, 32, 32),
    "l4": _device("L4", 121, 30.3, 24, 0.3, 32, 32),
}

# Bytes/s of one GPU's share of its node's network, one way. The cloud's EFA is given for nodes of 8 GPUs.
INTERCONNECTS = {
    "ib-xdr": 100 * GIGA,  # 800 Gbit/s a GPU
    "ib-ndr": 50 * GIGA,  # 400 Gbit/s a GPU
    "ib-hdr": 25 * GIGA,  # 200 Gbit/s a GPU
    "efa-3200": 50 * GIGA,  # 3200 Gbit/s a node
    "efa-400": 6.25 * GIGA,  # 400 Gbit/s a node
    "ethernet-100g": 1.5625 * GIGA,  # 100 Gbit/s a node
}


def find_device(name: str) -> Device:
    """A device by its key."""
    if name.lower() not in DEVICES:
        raise UserError(f"device {name}: its data sheet is not here: choose {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def find_interconnect(text: str) -> float:
    """Bytes/s of a GPU to other nodes: by name, or a number of GB/s."""
    if text.lower() in INTERCONNECTS:
        return INTERCONNECTS[text.lower()]
    try:
        rate = float(text) * GIGA
    except ValueError:
        rate = 0.0
    if not 0.001 * GIGA <= rate <= 1e6 * GIGA:
        names = ", ".join(INTERCONNECTS)
        raise UserError(f"interconnect {text}: unknown: choose {names}, or write a GPU's GB/s one way, such as 50")
    return rate


def peak_flops(device_name: str) -> float | None:
    """The dense bfloat16 peak in FLOP/s of a device by its driver's name, or None where it is not known."""
    # The longest match: "H100 PCIe" before "H100".
    matches = [device for device in DEVICES.values() if re.search(rf"\b{device.label}\b", device_name)]
    return max(matches, key=lambda device: len(device.label)).bf16 if matches else None
