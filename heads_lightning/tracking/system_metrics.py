"""Processor, memory, disk and GPU use of the machine and of one process, under the names that MLflow's own page for them shows.

A sample costs about a millisecond without a GPU. GPUs are read through NVML (`nvidia-ml-py`) where it is installed, else through the
`nvidia-smi` command; a machine with neither has no GPU values. Nothing here touches CUDA, so no memory is taken on the device.
"""

import importlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heads_lightning.configs.devices import peak_tflops

MEGABYTE = 1e6


class SystemMetrics:
    """Samples the machine, and the process `pid` with its children (data workers)."""

    def __init__(self, pid: int, folder: Path) -> None:
        import psutil

        self._psutil = psutil
        self._folder = folder
        self._process: Any = psutil.Process(pid)
        self._gpus = gpu_reader()
        psutil.cpu_percent()  # the first call only starts the interval that the second one reports
        self._process.cpu_percent()

    def sample(self) -> dict[str, float]:
        """Values now; rates are means since the sample before."""
        memory = self._psutil.virtual_memory()
        values = {
            "system/cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
        }
        disk = shutil.disk_usage(self._folder)
        values["system/disk_usage_percentage"] = 100 * disk.used / disk.total
        values["system/disk_available_megabytes"] = disk.free / MEGABYTE
        return values | self._of_process() | self._gpus()

    def _of_process(self) -> dict[str, float]:
        try:
            rss = self._process.memory_info().rss
            for child in self._process.children():
                rss += child.memory_info().rss if child.pid != os.getpid() else 0
            cpu = self._process.cpu_percent()
        except self._psutil.Error:  # gone between two looks
            return {}
        return {"system/process_memory_megabytes": rss / MEGABYTE, "system/process_cpu_percentage": cpu}


def gpu_reader() -> Callable[[], dict[str, float]]:
    """What reads the GPUs of this machine; a reader of nothing where there is none."""
    try:
        return _nvml_reader(importlib.import_module("pynvml"))
    except Exception:  # NVML has its own hierarchy of errors, and a missing driver is the usual case
        pass
    if shutil.which("nvidia-smi"):
        return _read_nvidia_smi
    return dict


def _visible(index: int) -> bool:
    """Whether CUDA_VISIBLE_DEVICES, which NVML does not read, leaves this GPU to the run. Names by UUID count as visible."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return not all(name.isdigit() for name in named) or not named or str(index) in named


def _nvml_reader(nvml: Any) -> Callable[[], dict[str, float]]:
    nvml.nvmlInit()
    handles = {i: nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount()) if _visible(i)}

    def read() -> dict[str, float]:
        values = {}
        for i, handle in handles.items():
            try:
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                values |= _gpu(i, memory.used / MEGABYTE, memory.total / MEGABYTE, nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
                               nvml.nvmlDeviceGetPowerUsage(handle) / 1000)  # fmt: skip
            except nvml.NVMLError:  # partitions of a GPU (MIG) do not report use or power
                continue
        return values

    return read


def _read_nvidia_smi() -> dict[str, float]:
    query = "--query-gpu=index,memory.used,memory.total,utilization.gpu,power.draw"
    try:
        done = subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(table: str) -> dict[str, float]:
    """Values of one `nvidia-smi` table; its memory is in MiB, and a cell may be [N/A]."""
    values = {}
    for row in table.splitlines():
        try:
            index, used, total, busy, watts = (float(cell) if cell.strip()[:1].isdigit() else float("nan") for cell in row.split(","))
        except ValueError:
            continue
        if index == index and _visible(int(index)):
            mib = 2**20 / MEGABYTE
            values |= _gpu(int(index), used * mib, total * mib, busy, watts)
    return values


def _gpu(index: int, used: float, total: float, busy: float, watts: float) -> dict[str, float]:
    name = f"system/gpu_{index}"
    values = {
        f"{name}_memory_usage_megabytes": used,
        f"{name}_memory_usage_percentage": 100 * used / total,
        f"{name}_utilization_percentage": float(busy),
        f"{name}_power_usage_watts": watts,
    }
    return {k: v for k, v in values.items() if v == v}


def peak_flops(devices: int) -> float | None:
    """Dense bf16 operations per second of `devices` GPUs like the first one here; None where it is none or unknown."""
    import torch

    if not torch.cuda.is_available():
        return None
    peak = peak_tflops(torch.cuda.get_device_name(0))
    return None if peak is None else devices * peak * 1e12
