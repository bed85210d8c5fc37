"""Devices and interconnects as their vendors' data sheets have them.

Rates are dense (half of what is advertised "with sparsity"), links are counted in one direction. Each figure is what
the sheet promises; what of it a program reaches is assumed elsewhere (step_time.py) and said there.
"""

import re
from dataclasses import dataclass, replace

from igpt_ds.errors import UserError

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        label: by which the name that its driver gives is known, a regular expression.
        bf16, tf32, fp32: peak FLOP/s of dense matrix products with sums in float32; fp32 without TensorFloat-32. 0: the
            device does not compute in it.
        memory: bytes, as its driver tells: GDDR6 whose errors are corrected has 15 sixteenths of what is sold.
        bandwidth: of its memory, bytes/s.
        link: to its neighbours in the node, bytes/s one way; without NVLink or the like, the host's bus.
        host: to the processor, bytes/s one way.
        attention: the kernel that computes it in bfloat16, see `igpt_ds.model.attention`.
    """

    label: str
    bf16: float
    tf32: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    host: float
    attention: str = "flash"

    def peak(self, precision: str) -> float:
        """FLOP/s in a precision of the configuration; what the device does not compute goes by float32."""
        return {"bfloat16": self.bf16, "tf32": self.tf32}.get(precision, self.fp32) or self.fp32


def _device(
    label: str, bf16: float, tf32: float, fp32: float, gib: float, bandwidth: float, link: float, host: float
) -> Device:
    """In the units of data sheets: TFLOP/s, GiB (sold as GB), GB/s."""
    attention = "cudnn" if re.search("[HB][12]00", label) else "flash"  # Hopper and Blackwell
    rates = bf16 * TERA, tf32 * TERA, fp32 * TERA
    return Device(label, *rates, gib * 2**30, bandwidth * GIGA, link * GIGA, host * GIGA, attention)


# Host links, one way: PCIe 3.0 x16 16 GB/s, 4.0 x16 32 GB/s, 5.0 x16 64 GB/s; GH200's is NVLink-C2C. NVLink bridges,
# which join two PCIe cards only, are not counted.
DEVICES = {
    "b200": _device("B200", 2250, 1125, 75, 180, 7700, 900, 64),
    "h200": _device("H200", 989, 494, 67, 141, 4800, 450, 64),
    "h200-nvl": _device("H200 NVL", 835, 417, 60, 141, 4800, 64, 64),
    "gh200": _device("GH200", 989, 494, 67, 96, 4000, 450, 450),
    "h100": _device("H100", 989, 494, 67, 80, 3350, 450, 64),
    "h100-nvl": _device("H100 NVL", 835, 417, 60, 94, 3900, 64, 64),
    "h100-pcie": _device("H100 PCIe", 756, 378, 51, 80, 2000, 64, 64),
    "a100": _device("A100", 312, 156, 19.5, 80, 2039, 300, 32),
    "a100-40gb": _device("A100.*40GB", 312, 156, 19.5, 40, 1555, 300, 32),
    "mi300x": _device("MI300X", 1307, 654, 163.4, 192, 5300, 448, 64),
    "l40s": _device("L40S", 362, 183, 91.6, 45, 864, 32, 32),
    "rtx6000-ada": _device("RTX 6000 Ada", 364, 182, 91.1, 48, 960, 32, 32),
    "rtx-a6000": _device("RTX A6000", 155, 77.4, 38.7, 48, 768, 32, 32),
    "rtx5090": _device("RTX 5090", 209.5, 104.8, 104.8, 32, 1792, 64, 64),
    "rtx4090": _device("RTX 4090", 165.2, 82.6, 82.6, 24, 1008, 32, 32),
    "rtx3090": _device("RTX 3090", 71, 35.6, 35.6, 24, 936, 32, 32),
    "a10g": _device("A10G", 70, 35, 31.5, 22.5, 600, 32, 32),
    "l4": _device("L4", 121, 60, 30.3, 22.5, 300, 32, 32),
    "v100": _device("V100", 0, 0, 15.7, 32, 900, 150, 16),
    "v100-16gb": _device("V100.*16GB", 0, 0, 15.7, 16, 900, 150, 16),
    "t4": _device("T4", 0, 0, 8.1, 15, 320, 16, 16),
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


def find_device(
    name: str, peak_tflops: float | None = None, memory_gib: float | None = None, bandwidth: float | None = None
) -> Device:
    """A device by its key, or by hand.

    Args:
        peak_tflops: of dense matrix products, whatever the precision.
        memory_gib: of it.
        bandwidth: of its memory, GB/s. What is given takes the place of the data sheet's, or of all of it.
    """
    known = DEVICES.get(name.lower())
    if known is None and None in (peak_tflops, memory_gib, bandwidth):
        raise UserError(
            f"device {name}: its data sheet is not here: choose {', '.join(DEVICES)}, or add --peak-tflops, "
            "--memory-gib and --bandwidth"
        )
    device = known or _device(name, 0, 0, 0, 0, 0, 32, 32)
    if peak_tflops is not None:
        device = replace(device, bf16=peak_tflops * TERA, tf32=peak_tflops * TERA, fp32=peak_tflops * TERA)
    if memory_gib is not None:
        device = replace(device, memory=memory_gib * 2**30)
    return device if bandwidth is None else replace(device, bandwidth=bandwidth * GIGA)


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


def recognise(name: str) -> Device | None:
    """The data sheet of a device by its driver's name, or by its key here; None where there is none."""
    if name in DEVICES:
        return DEVICES[name]
    # A longer match is a nearer one: "H100 PCIe" before "H100". An RTX 4090 D or an RTX 4090 Laptop is another chip,
    # and MIG's devices are parts of one.
    others = r"(?! (?:D|Ti|Laptop)\b)(?!.* MIG )"
    matches = [device for device in DEVICES.values() if re.search(rf"\b{device.label}\b{others}", name)]
    return max(matches, key=lambda device: len(device.label)) if matches else None


def peak_flops(device_name: str) -> float | None:
    """The dense bfloat16 peak in FLOP/s of a device by its driver's name, or None where it is not known."""
    device = recognise(device_name)
    return device.bf16 or None if device else None
