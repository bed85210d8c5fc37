"""Data sheets are found by the names that drivers give, or given by hand."""

import pytest

from igpt_ds.errors import UserError
from igpt_ds.planner.devices import DEVICES, INTERCONNECTS, find_device, find_interconnect, peak_flops, recognise


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA RTX A6000", 155),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("AMD Instinct MI300X", 1307),
    ],
)
def test_the_peak_is_found_by_name(name: str, tera: float) -> None:
    assert peak_flops(name) == tera * 1e12


# An L40 is no L4, an A1000 no A100, a laptop's GPU not the card, Turing's RTX 6000 not Ada's, a part not the whole.
@pytest.mark.parametrize(
    "name",
    [
        *("", "cpu", "NVIDIA L40", "NVIDIA A10", "NVIDIA RTX A1000", "Quadro RTX 6000", "NVIDIA GB200"),
        *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA A100-SXM4-40GB MIG 3g.20gb"),
        *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 5090 D"),
    ],
)
def test_an_unknown_device_has_no_peak(name: str) -> None:
    assert recognise(name) is None
    assert peak_flops(name) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla V100-SXM2-16GB", "v100-16gb"),
        ("Tesla T4", "t4"),
    ],
)
def test_the_nearest_data_sheet_is_taken(name: str, key: str) -> None:
    assert recognise(name) is DEVICES[key]


def test_older_devices_have_no_bfloat16() -> None:
    for key in ("v100", "v100-16gb", "t4"):
        device = DEVICES[key]
        assert peak_flops(f"Tesla {device.label}") is None
        assert device.bf16 == device.tf32 == 0
        assert device.peak("bfloat16") == device.peak("tf32") == device.peak("float32") == device.fp32


@pytest.mark.parametrize("key", DEVICES)
def test_the_figures_of_a_data_sheet_are_in_proportion(key: str) -> None:
    device = DEVICES[key]
    # NVIDIA's TensorFloat-32 goes at half the rate of bfloat16, AMD's too; and no figure is in the wrong unit.
    assert device.tf32 == pytest.approx(device.bf16 / 2, rel=0.02)
    assert 8e12 <= device.fp32 < 200e12 and device.fp32 <= max(device.bf16, device.fp32)
    assert 15 <= device.memory / 2**30 <= 192
    assert 0.3e12 <= device.bandwidth <= 7.7e12
    assert 16e9 <= device.host <= device.link or device.host == device.link
    assert device.attention == ("cudnn" if key.partition("-")[0] in ("h100", "h200", "gh200", "b200") else "flash")


def test_a_device_by_hand_needs_three_figures() -> None:
    mine = find_device("mine", 100, 16, 500)
    assert (mine.peak("bfloat16"), mine.peak("float32")) == (100e12, 100e12)
    assert (mine.memory, mine.bandwidth) == (16 * 2**30, 500e9)
    slower = find_device("h100", peak_tflops=700)
    assert (slower.bf16, slower.memory) == (700e12, DEVICES["h100"].memory)
    with pytest.raises(UserError, match=r"device mine: its data sheet is not here: choose b200, .*, or add --peak-t"):
        find_device("mine", 100, 16)


def test_an_interconnect_is_a_name_or_a_number() -> None:
    assert find_interconnect("IB-NDR") == INTERCONNECTS["ib-ndr"] == 50e9
    assert find_interconnect("12.5") == 12.5e9
