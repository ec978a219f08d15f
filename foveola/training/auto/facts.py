"""What a plan is made from: the images, the machine, and the time that there is."""

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveola import distributed
from foveola.config import ConfigError
from foveola.data.decode import decode
from foveola.data.sample import BadImage
from foveola.data.sources import PixelSource, Source
from foveola.launchers import own_cores

IMAGES_LOOKED_AT = 64  # images whose pixels are read
GRAY = 2.0  # mean difference of channels, in levels of 255, below which an image counts as gray
UNITS = "s|seconds?|min|minutes?|h|hours?|d|days?"
BUDGET = re.compile(rf"\s*(\d+(?:\.\d*)?)\s*(GPU-)?({UNITS})\s*", re.IGNORECASE)
SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MEASURED_FOR = 0.3  # seconds: beside other programs one product tells little
BUSY = 0.25  # of the machine's cores, from which on a plan says so
BF16_FLAGS = ("avx512_bf16", "amx_bf16")  # what Linux says of CPUs that multiply in bfloat16
REACHED = {"cpu": 0.6, "cuda": 0.35}  # of the speed of one large product, by a step of training
IN_STEPS = re.compile(r"\s*\d[\d.]*\s*[kM]?\s*(steps?|epochs?|samples?)\s*")

KNOWN_WEIGHTS = (  # ViT-S before ViT-B, which costs four times as much; DINOv2 before DINO and MAE
    ("hf", "facebook/dinov2-small"),
    ("hf", "facebook/dinov2-with-registers-small"),
    ("timm", "timm/vit_small_patch14_dinov2.lvd142m"),
    ("timm", "timm/vit_small_patch14_reg4_dinov2.lvd142m"),
    ("hf", "facebook/dinov2-base"),
    ("timm", "timm/vit_base_patch14_dinov2.lvd142m"),
    ("hf", "facebook/dino-vits16"),
    ("timm", "timm/vit_small_patch16_224.dino"),
)
KNOWN_FILES = (
    "dinov2_vits14_pretrain.pth",
    "dinov2_vits14_reg4_pretrain.pth",
    "dinov2_vitb14_pretrain.pth",
    "dino_deitsmall16_pretrain.pth",
)


@dataclass(frozen=True)
class DataFacts:
    """What there is to train on."""

    images: int
    side: int  # pixels of the shorter side, the median of those looked at
    gray: bool  # whether nearly all looked at have three equal channels
    objects: float  # objects annotated in an image, the mean of those looked at; 0: none
    labels: int  # classes of images; 0: no labels
    label_maps: bool  # each pixel has a label
    test: bool = False  # whether there are labelled test images beside them


@dataclass(frozen=True)
class Machine:
    """What there is to train with."""

    device: str  # cpu or cuda
    name: str
    processes: int
    cores: int  # of one process
    memory: float  # bytes of one device: of the GPU, or of the machine shared by the processes on it
    flops: float  # floating-point operations a second of one process that training reaches, as estimated
    bf16: bool  # whether it computes in bfloat16 by itself


@dataclass(frozen=True)
class Budget:
    """How long to train: seconds on this machine, or a duration in steps, epochs or samples."""

    text: str
    seconds: float | None = None
    duration: str | None = None


def look_at_data(source: Source, test: Source | None = None) -> DataFacts:
    """Return facts of a source from the pixels of at most `IMAGES_LOOKED_AT` evenly spread images.

    `test` is its test split, where there is one of other images.

    Raises ConfigError where none of them can be read.
    """
    if not len(source):
        raise ConfigError(f"{source.name} has no images")
    sides, differences, objects, labels = [], [], [], 0
    count = min(IMAGES_LOOKED_AT, len(source))
    for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist():
        try:
            sample = source[index]
            pixels = decode(sample.image)
        except BadImage:
            continue
        sides.append(min(pixels.shape[:2]))
        channels = pixels.astype(np.int16)
        differences.append(float(np.abs(channels - channels.mean(axis=2, keepdims=True)).mean()))
        objects.append(0 if sample.objects is None else len(sample.objects.boxes))
        labels += sample.label is not None
    if not sides:
        raise ConfigError(f"{source.name}: none of {count} images looked at can be read")
    gray = float(np.mean(np.array(differences) < GRAY)) > 0.9
    classes = len(source.classes or ()) if labels else 0
    maps = isinstance(source, PixelSource)
    held = test is not None and test.classes is not None
    return DataFacts(len(source), int(np.median(sides)), gray, float(np.mean(objects)), classes, maps, held)


def look_at_machine(device: str | torch.device = "auto") -> Machine:
    """Return facts of this machine; products of matrices are timed for less than a second."""
    found = distributed.find_device(device)
    processes = distributed.world_size()
    cores = own_cores()
    if found.type == "cuda":
        about = torch.cuda.get_device_properties(found)
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        speed = REACHED["cuda"] * _matmul_speed(found, torch.bfloat16 if bf16 else torch.float32)
        own = max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", processes)), 1)
        return Machine("cuda", about.name, processes, own, about.total_memory, speed, bf16)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    speed, own = REACHED["cpu"] * _matmul_speed(found, torch.float32), max(cores // processes, 1)
    name, busy = f"CPU with {cores} cores", min(os.getloadavg()[0] / (os.cpu_count() or 1), 1.0)
    if busy > BUSY:  # then the speed, as measured, is what they leave
        name += f" ({busy:.0%} busy with other programs in the last minute)"
    return Machine("cpu", name, processes, own, memory, speed, cpu_has_bf16())


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether an x86 CPU has instructions for bfloat16, as Linux tells; of others False.

    ARM is not looked at: nothing was measured on it.
    """
    try:
        words = cpuinfo.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return any(flag in words for flag in BF16_FLAGS)


def _matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large product of matrices, the best of five or more."""
    side = 4096 if device.type == "cuda" else 768
    a = torch.ones(side, side, device=device, dtype=dtype)
    times: list[float] = []
    while len(times) < 5 or sum(times[1:]) < MEASURED_FOR:  # the first prepares the device
        began = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times)


def budget_of(value: Any, processes: int) -> Budget:
    """Return a budget from its words: "2 hours", "30 min", "1 GPU-day" (of all GPUs together), "500 steps".

    Raises ConfigError for anything else.
    """
    text = str(value)
    if IN_STEPS.fullmatch(text):
        return Budget(text, duration=text.strip())
    if not (match := BUDGET.fullmatch(text)) or not float(match[1]):
        known = "'2 hours', '30 min', '1 GPU-day', '5000 steps' or '100 epochs'"
        raise ConfigError(f"budget={value!r}: write {known}")
    seconds = float(match[1]) * SECONDS[match[3][0].lower()]
    shared = processes if match[2] else 1
    return Budget(text, seconds=seconds / shared)


def weights_at_hand() -> list[str]:
    """Return public weights that are on this machine, best first: of caches of Hugging Face, timm and torch.

    Nothing is downloaded, and nothing of the files is read.
    """
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    torch_home = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")) / "hub" / "checkpoints"
    found = []
    for prefix, name in KNOWN_WEIGHTS:
        folder = hub.expanduser() / f"models--{name.replace('/', '--')}"
        if any(folder.glob("snapshots/*/*.safetensors")) or any(folder.glob("snapshots/*/*.bin")):
            found.append(f"{prefix}:{name.removeprefix('timm/')}")
    for name in KNOWN_FILES:
        if (file := torch_home.expanduser() / name).is_file():
            found.append(str(file))
    return found
