"""The dtype of the forward and backward pass: autocast, gradient scaler, and what `auto` is."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import click
import torch

SMALLEST_SCALE = 2.0**-16
"""Of the fp16 scaler, which begins at 2^16: below it 32 steps or more have overflowed and none fits."""
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Flags of /proc/cpuinfo: x86 with AVX-512 or AMX instructions for bf16, and ARM.
_CPU_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_GPU_BF16 = (8, 0)  # compute capability of Ampere; older ones emulate it


@dataclass(frozen=True)
class Precision:
    """Weights stay float32; autocast runs the passes in `name`."""

    name: str
    device: torch.device

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context for a forward pass."""
        enabled = self.name in _TYPES
        return torch.autocast(self.device.type, dtype=_TYPES.get(self.name, torch.bfloat16), enabled=enabled)

    def make_scaler(self) -> torch.amp.GradScaler:
        """Return the gradient scaler, which does something for fp16 only."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")

    def allow_fast_math(self) -> None:
        """Let a GPU's float32 products run as TF32 (10 bits of mantissa), and measure its convolutions.

        Products of fp16 keep summing in float32, which torch leaves to cuBLAS by default. Settings of the process, not
        of this object; nothing changes on a CPU.
        """
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            torch.backends.cudnn.allow_tf32 = True
            torch.backends.cudnn.benchmark = True


def choose_precision(name: str, device: torch.device) -> Precision:
    """Resolve `auto` and `prefer-bf16` for this device.

    Raises UsageError for fp16 on a CPU, which has no fast fp16 kernels.
    """
    if name == "prefer-bf16":
        has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _GPU_BF16
        name = "bf16" if has_bf16 else "auto"
    if name == "auto":
        name = "fp16" if device.type == "cuda" else "bf16" if cpu_has_bf16() else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise click.UsageError("--precision fp16 is for GPUs; on a CPU take bf16 or fp32")
    return Precision(name, device)


def cpu_has_bf16() -> bool:
    """Tell whether this CPU multiplies bf16 in hardware; without it bf16 is slower than float32."""
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split()
    except OSError:
        return False
    return not _CPU_BF16.isdisjoint(words)
