"""Find which floating-point types a machine multiplies fast."""

import torch


def has_bf16(cpu: bool) -> bool:
    """Return whether bfloat16 matrix products are native, and so faster than float32, on the device that will train."""
    if cpu:
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.xpu.is_available()
