"""What a reader needs to repeat a number: device, driver, versions, commit."""

import importlib.util
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone

import torch

import flowops

_SMI = {
    "driver": "driver_version",
    "clock_sm": "clocks.sm",
    "clock_sm_max": "clocks.max.sm",
    "clock_memory": "clocks.mem",
    "power_limit": "power.limit",
}


def environment(device: str = "cpu") -> dict[str, object]:
    cuda = device == "cuda"
    env = {
        "kind": device,
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flowops": flowops.__version__,
        "triton": _version("triton"),
        "isa": flowops.dispatch.backend_state("cpu")[1],
        "git": git_sha(),
        "dirty": dirty(),
        "time": now(),
    }
    if cuda:
        env |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), **_smi()}
    return env


def folder_name(env: dict) -> str:
    return re.sub(r"[^a-z0-9]+", "-", str(env["device"]).lower()).strip("-")


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def git_sha() -> str:
    return _run("git", "rev-parse", "--short", "HEAD")


def dirty() -> bool:
    return bool(_run("git", "status", "--porcelain", "--untracked-files=no"))


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines())
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model = f"family {fields['cpu family']} model {fields['model']}"
        return f"{fields['model name']} ({model})"
    except (OSError, KeyError, ValueError):
        return platform.processor() or platform.machine()


def _smi() -> dict[str, str]:
    """What nvidia-smi says of the first device; nothing where it is not installed."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = f"--query-gpu={','.join(_SMI.values())}"
    values = _run("nvidia-smi", "-i", "0", query, "--format=csv,noheader").split(", ")
    return dict(zip(_SMI, values, strict=True)) if len(values) == len(_SMI) else {}


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return ""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
