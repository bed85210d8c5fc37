"""Which kernel computes attention: the order by device, and that the one that is named is the one that runs."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from torch.profiler import profile

from igpt_ds.config.file import load_config
from igpt_ds.model import attention
from igpt_ds.model.transformer import ImageGPT

FLASH, CUDNN = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
REST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH, SDPBackend.OVERRIDEABLE]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def torchs_own_order() -> Iterator[None]:
    before = _cur_sdpa_kernel_backends(with_priority=True)
    yield
    attention.leave()
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize(
    ("capability", "cudnn", "tokens", "order"),
    [
        ((9, 0), 91002, 4096, [CUDNN, FLASH]),  # H100, H200
        ((10, 0), 91002, 1024, [CUDNN, FLASH]),  # B200
        ((8, 0), 91600, 1024, [FLASH, CUDNN]),  # A100
        ((12, 0), 91600, 1024, [FLASH, CUDNN]),  # RTX 5090
        ((9, 0), 91600, 576, [CUDNN, FLASH]),
        ((9, 0), 91500, 576, [FLASH]),  # whose gradients may be NaN: 576 = 4.5 * 128
        ((9, 0), 91500, 2304, [CUDNN, FLASH]),
    ],
)
def test_the_order_is_that_of_the_device(
    capability: tuple[int, int],
    cudnn: int,
    tokens: int,
    order: list[SDPBackend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    assert attention._order(torch.device("cuda", 0), tokens) == [*order, *REST]


def test_other_devices_have_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention._order(CPU, 1024) == [FLASH, *REST]
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert attention._order(torch.device("cuda", 0), 1024) == [FLASH, *REST]


def test_the_order_holds_for_the_process_and_the_last_choice_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted in ([SDPBackend.MATH, FLASH], [CUDNN, FLASH, *REST], [CUDNN, FLASH, *REST]):
        monkeypatch.setattr(attention, "_order", lambda device, tokens, wanted=wanted: wanted)
        attention.choose(CPU, torch.float32, 16, 8, causal=True)
        assert _cur_sdpa_kernel_backends(with_priority=True) == wanted


@pytest.mark.parametrize(
    ("dtype", "dropout", "expected", "operator"),
    [
        (torch.float32, 0.0, "FLASH_ATTENTION", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        (torch.bfloat16, 0.0, "FLASH_ATTENTION", "aten::_scaled_dot_product_flash_attention_for_cpu"),
        (torch.float32, 0.1, "MATH", "aten::_scaled_dot_product_attention_math"),
    ],
)
def test_what_is_named_is_what_runs(dtype: torch.dtype, dropout: float, expected: str, operator: str) -> None:
    assert attention.choose(CPU, dtype, 16, 8, causal=True, dropout=dropout) == expected
    q_BHTE = torch.randn(2, 3, 16, 8, dtype=dtype, requires_grad=True)
    with profile() as profiler:
        F.scaled_dot_product_attention(q_BHTE, q_BHTE, q_BHTE, dropout_p=dropout, is_causal=True)
    assert operator in {event.key for event in profiler.key_averages()}


def test_a_network_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = ["model.width=48", "model.heads=2", "data.resolution=8", "data.palette_size=16", "finetune.dropout=0.25"]
    model = ImageGPT(load_config("tiny", [*facts, "finetune.classes=3", "objective.name=masked_pixel"])).bfloat16()
    asked: list[object] = []
    monkeypatch.setattr(attention, "choose", lambda *arguments: asked.extend(arguments) or "MATH")
    assert model.choose_attention() == "MATH"
    assert asked == [CPU, torch.bfloat16, 64, 24, False, 0.25]


def test_selective_checkpointing_knows_every_fused_operator() -> None:
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::_scaled_dot_product_")}
    fused = {name for name in names if not name.endswith("_backward") and "_math" not in name}
    # Another device's, and one for quantised numbers.
    others = {"fused_attention_overrideable", "flash_attention.quantized"}
    assert {operator.name() for operator in attention.OPERATORS} == fused - {
        f"aten::_scaled_dot_product_{name}" for name in others
    }
