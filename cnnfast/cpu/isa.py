"""Which processor this is, and which of its instructions oneDNN may use."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = [
    "InstructionSet",
    "Process",
    "cpu_model",
    "cpu_name",
    "full_width",
    "instruction_set",
    "lowered_products",
    "process",
    "products_dtype",
]


# --- what the processor has -------------------------------------------------------------------------------------------


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    found = _cpuinfo(r"model name|Model")
    return found[0] if found else platform.processor() or platform.machine()


def cpu_model() -> str:
    """The same with the numbers of family, model and stepping: a virtual machine's name may stand for several."""
    return ", ".join([cpu_name(), *_cpuinfo(r"cpu family|model|stepping")])


@lru_cache(maxsize=4)
def _cpuinfo(names: str) -> tuple[str, ...]:
    """What /proc/cpuinfo says of the first processor."""
    file = Path("/proc/cpuinfo")
    first = file.read_text(errors="replace").split("\n\n")[0] if file.is_file() else ""
    return tuple(re.findall(rf"^(?:{names})\s*:\s*(.+)$", first, re.MULTILINE))


class InstructionSet(IntEnum):
    """What oneDNN's kernels may use, in rising order (x86), as far as a rule depends on it."""

    NONE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4
    AMX_FP16 = 5


# oneDNN's names for a limit (its documentation, "CPU dispatcher control"); a name that is not here sets none.
_LIMITS = {
    "SSE41": InstructionSet.NONE,
    "AVX": InstructionSet.NONE,
    "AVX2": InstructionSet.AVX2,
    "AVX2_VNNI": InstructionSet.AVX2,
    "AVX2_VNNI_2": InstructionSet.AVX2,
    "AVX512_CORE": InstructionSet.AVX512,
    "AVX512_CORE_VNNI": InstructionSet.AVX512,
    "AVX512_CORE_BF16": InstructionSet.AVX512_BF16,
    "AVX512_CORE_FP16": InstructionSet.AVX512_BF16,
    "AVX10_1_512": InstructionSet.AVX512_BF16,
    "AVX512_CORE_AMX": InstructionSet.AMX,
    "AVX10_1_512_AMX": InstructionSet.AMX,
    "AVX512_CORE_AMX_FP16": InstructionSet.AMX_FP16,
    "AVX10_1_512_AMX_FP16": InstructionSet.AMX_FP16,
}


@lru_cache(maxsize=1)
def instruction_set() -> InstructionSet:
    """The best instruction set that oneDNN uses in this process: the processor's, limited by ``ONEDNN_MAX_CPU_ISA``.

    Read once, as oneDNN does.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return InstructionSet.NONE
    found = InstructionSet.NONE
    for level, query in (
        (InstructionSet.AVX2, "_is_avx2_supported"),
        (InstructionSet.AVX512, "_is_avx512_supported"),
        (InstructionSet.AVX512_BF16, "_is_avx512_bf16_supported"),
        (InstructionSet.AMX, "_is_amx_tile_supported"),
        (InstructionSet.AMX_FP16, "_is_amx_fp16_supported"),
    ):
        if _supported(query):
            found = level
    asked = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return min(found, _LIMITS.get(asked, InstructionSet.AMX_FP16))


def _supported(query: str) -> bool:
    supported = getattr(torch.cpu, query, None)  # private names, as everything in this file
    return supported is not None and supported()


# Models of family 6 with AVX-512 and one unit for it: Cannon, Ice, Tiger and Rocket Lake, of notebooks and desktops.
_ONE_UNIT = {"102", "125", "126", "140", "141", "167"}


@lru_cache(maxsize=1)
def full_width() -> bool:
    """Whether a core multiplies and adds 32 float32 numbers in a cycle: two whole units of 512 bits (Intel's servers,
    AMD from Zen 5 on). With AVX2, and where AVX-512 takes two cycles or has one unit, it is 16."""
    if instruction_set() < InstructionSet.AVX512:
        return False
    if _supported("_is_amx_tile_supported"):  # of no notebook, whatever model a virtual machine names
        return True
    vendor, family, model = (*_cpuinfo("vendor_id|cpu family|model"), "", "", "")[:3]
    if vendor == "AuthenticAMD":
        return family.isdigit() and int(family) >= 26
    return (family, model) not in {("6", m) for m in _ONE_UNIT}


@lru_cache(maxsize=1)
def cache_bytes() -> int:
    """The second-level cache of one core; 2 MiB where torch does not say."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return int(capabilities.get("l2_cache_size") or 2**21)


def lowered_products() -> bool:
    """Whether PyTorch's switches (`torch.set_float32_matmul_precision`) let float32 matrix products be less exact than
    convolutions: then none stands in for a convolution."""
    precision = torch._C._get_fp32_precision_getter
    matmul = precision("mkldnn", "matmul")
    if matmul == "bf16" or matmul == "tf32" and instruction_set() >= InstructionSet.AMX_FP16:
        return bool(matmul != precision("mkldnn", "conv"))
    return False


class Process(NamedTuple):
    """What else than instructions decides which method is right and fast: what `lowered_products` says, PyTorch's
    threads, and what `full_width` says."""

    lowered: bool
    threads: int
    full_width: bool


def process() -> Process:
    """As it is now."""
    return Process(lowered_products(), torch.get_num_threads(), full_width())


def products_dtype(dtype: torch.dtype, isa: InstructionSet) -> torch.dtype:
    """The dtype of the products: float32 where oneDNN has no fast instruction for a lower precision.

    Packed float32 is then several times faster than eager in the low precision, conversions included, and more exact.
    """
    native = {torch.bfloat16: InstructionSet.AVX512_BF16, torch.float16: InstructionSet.AMX_FP16}
    return dtype if isa >= native.get(dtype, isa) else torch.float32
