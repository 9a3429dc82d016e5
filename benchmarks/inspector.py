"""What the compiler made of a launch: registers, stack, shared memory and the instructions of the main loop, without a
GPU.

`target(arch)` puts a driver for an NVIDIA architecture that is not there in Triton's place: every launch inside the
block is specialised and compiled exactly as on such a GPU (the code path of a real launch), and not executed. The
machine code is read back with the disassembler that comes in triton's wheel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.compiler.compiler as triton_compiler
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

ARCHS = (80, 86, 89, 90, 100, 120)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Tensor-core instructions by generation: mma.sync, wgmma, tcgen05.
_MMA = re.compile(r"^(HMMA|IMMA|QMMA|HGMMA|UTCHMMA|UTCQMMA|UTCIMMA)\b")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")


@dataclass(frozen=True)
class Report:
    """One compiled kernel. Counts of the main loop are per warp and trip."""

    name: str
    arch: int
    num_warps: int
    registers: int
    stack: int  # bytes of local memory: spills, dynamically indexed arrays
    shared: int  # bytes
    mma: int
    instructions: int
    loads: dict[str, int]  # global and asynchronous loads of the main loop by opcode
    local: int  # LDL and STL anywhere

    @property
    def per_mma(self) -> float:
        return self.instructions / self.mma if self.mma else float("inf")

    @property
    def narrow_loads(self) -> int:
        """2-byte (and smaller) global loads in the main loop: a lost divisibility hint."""
        return sum(n for op, n in self.loads.items() if re.search(r"\.(U8|S8|U16|S16)\b", op))


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Utils:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        from cnnfast.plan import DEVICES

        d = DEVICES[self.arch]
        return {
            "max_shared_mem": d.shared_memory,
            "multiprocessor_count": d.multiprocessors,
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[str, bytes, int, int, int]:
        return "loaded", kernel, 0, 0, 1024  # no module would make Triton load it again at every launch


class StubDriver:
    """Triton's driver interface for an absent GPU of compute capability ``arch``; launches do nothing."""

    launcher_cls = _Launcher

    def __init__(self, arch: int) -> None:
        self.arch, self.utils = arch, _Utils(arch)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_current_device(self) -> int:
        # Triton keeps its launch caches per device: one device number per architecture keeps them apart.
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@contextmanager
def target(arch: int) -> Iterator[list[Any]]:
    """Compile launches for ``arch`` and collect the compiled kernels, one entry per distinct binary."""
    compiled: list[Any] = []
    init = triton_compiler.CompiledKernel.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        compiled.append(self)

    previous = getattr(driver, "_active", None)
    driver.set_active(StubDriver(arch))
    triton_compiler.CompiledKernel.__init__ = remember
    try:
        yield compiled
    finally:
        triton_compiler.CompiledKernel.__init__ = init
        driver._active = previous


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *args], check=True, capture_output=True, text=True).stdout


def _main_loop(sass: str) -> list[str]:
    """Instructions of the loop that holds the most tensor-core (else multiply-add) instructions; where a short loop was
    unrolled away, everything from the first to the last of them."""
    lines, labels = [], {}
    for line in sass.splitlines():
        if m := re.match(r"^\s*(\.L_x_\d+):", line):
            labels[m.group(1)] = len(lines)
        elif m := _INSTRUCTION.match(line):
            lines.append(m.group(1))
    loops = []
    for end, text in enumerate(lines):
        m = re.search(r"\bBRA\b.*?`?\(?(\.L_x_\d+)", text)
        if m and labels.get(m.group(1), end + 1) <= end:
            loops.append(lines[labels[m.group(1)] : end + 1])

    def weight(body: list[str]) -> tuple[int, int, int]:
        ops = [_opcode(t) for t in body]
        return sum(bool(_MMA.match(o)) for o in ops), sum(o.startswith("FFMA") for o in ops), -len(ops)

    best = max(loops, key=weight, default=[])
    if any(_MMA.match(_opcode(t)) for t in best):
        return best
    mma = [i for i, t in enumerate(lines) if _MMA.match(_opcode(t))]
    return lines[mma[0] : mma[-1] + 1] if mma else best


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def inspect(kernel: Any) -> Report:
    """Read a compiled kernel (an entry of `target`'s list)."""
    cubin, meta = kernel.asm["cubin"], kernel.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = _run("cuobjdump", "-res-usage", f.name)
        sass = _run("nvdisasm", "-c", f.name)
    m = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    if m is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    loop = [_opcode(t) for t in _main_loop(sass)]
    loads = Counter(op for op in loop if op.startswith(("LDG", "LDGSTS", "UBLKCP", "UTMALDG")))
    return Report(
        name=meta.name,
        arch=meta.target.arch,
        num_warps=meta.num_warps,
        registers=int(m.group(1)),
        stack=int(m.group(2)),
        shared=meta.shared,
        mma=sum(bool(_MMA.match(op)) for op in loop),
        instructions=len(loop),
        loads=dict(loads),
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
    )
