"""How fast devices are at their peak: what a utilisation (MFU) is a share of."""

from __future__ import annotations

import re

PEAK_TFLOPS = {
    "A40": 150, "A100": 312, "A6000": 155, "B200": 2250, "GB200": 2500, "GH200": 989, "H100": 989, "H100 NVL": 835, "H100 PCIe": 756,
    "H200": 989, "H200 NVL": 835, "L4": 121, "L40": 181, "L40S": 362, "MI300X": 1307, "RTX 4090": 165,
}  # fmt: skip
"""Dense bf16 operations, in 10^12 a second, by words of the device's name (vendors' data sheets; SXM where nothing else is said)."""


def peak_tflops(name: str) -> float | None:
    """Of the device with this full name (`NVIDIA H100 PCIe`); None where it is not known. The longest words that fit decide.

    Whole words: an A4000 is no A40. What runs slower under the same name, a slice of a device or one in a laptop, is not known.
    """
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", name):
        return None
    known = max((words for words in PEAK_TFLOPS if re.search(rf"\b{words}\b", name)), key=len, default=None)
    return None if known is None else PEAK_TFLOPS[known]
