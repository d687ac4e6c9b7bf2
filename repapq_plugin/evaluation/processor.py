"""What this processor does with 8-bit integers."""

from __future__ import annotations

import platform

import torch

X86 = ("x86_64", "amd64")


def has_vnni() -> bool:
    """Whether torch finds AVX512-VNNI, with which its kernels multiply 8-bit integers into 32-bit sums."""
    # The check was renamed between the torch versions that this package supports.
    for name in ("_is_vnni_supported", "_is_avx512_vnni_supported"):
        check = getattr(torch.cpu, name, None)
        if check is not None:
            return bool(check())
    return False


def adds_in_16_bits() -> bool:
    """Whether OpenVINO's kernels add pairs of 8-bit products in 16 bits here, which can saturate: x86 without VNNI."""
    if platform.machine().lower() not in X86 or has_vnni():
        return False
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # newer torch only
    return capabilities is None or not capabilities().get("avx_vnni", False)


def saturation_note(reduce_range: bool) -> str:
    """Return what to say of OpenVINO's score of a network on this processor; empty where it computes exactly.

    Args:
        reduce_range: Whether the network's weights keep to 7 bits.
    """
    if reduce_range or not adds_in_16_bits():
        return ""
    return (
        "this processor has no VNNI, so sums of 8-bit products can saturate in OpenVINO here and its score can be "
        "lower than the simulated one; the key reduce_range=True avoids that, a processor with VNNI does not need it."
    )


def how_sums_are_made() -> str:
    """Return in a sentence what this processor makes of sums of 8-bit products."""
    if adds_in_16_bits():
        return "no VNNI; 8-bit sums can saturate in OpenVINO here, unless a network is quantized with reduce_range=True"
    return "computes sums of 8-bit products exactly"
