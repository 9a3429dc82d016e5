"""What the compiler made of a launch: registers, stack, shared memory and the instructions of the main loop, without a
GPU.

`target(arch)` puts a driver for an NVIDIA architecture that is not there in Triton's place: every launch inside the
block is specialised and compiled exactly as on such a GPU (the code path of a real launch), and not executed.
`recording(arch)` does the same but compiles nothing yet: it collects the launches (`Call`) and what each would compile
(`Job`), so that equal binaries are compiled once (`inspections.py`). The machine code is read with the disassembler
that comes in triton's wheel.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
import triton.compiler.compiler as triton_compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from cnnfast.gpu import fence

__all__ = ["ARCHS", "Call", "Job", "Report", "StubDriver", "compile_job", "inspect", "recording", "target"]

ARCHS = (80, 86, 89, 90, 100, 120)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Tensor-core instructions by generation: mma.sync, wgmma, tcgen05.
_MMA = re.compile(r"^(HMMA|IMMA|QMMA|HGMMA|UTCHMMA|UTCQMMA|UTCIMMA)\b")
_LOADS = re.compile(r"^(LDG|LDGSTS|UBLKCP|UTMALDG)\b")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
_DRAIN = re.compile(r"\bWARPGROUP\.DEPBAR\.LE\s+gsb\d+,\s*0x0\b")
_HMMA_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


@dataclass(frozen=True)
class Report:
    """One compiled kernel. Counts of the main loop are per warp and trip (of the machine code's loop, which may hold
    several trips of the source's)."""

    name: str
    arch: int
    num_warps: int
    registers: int
    stack: int  # bytes of local memory: spills, dynamically indexed arrays
    shared: int  # bytes
    mma: int
    mma_kind: str  # "mma" (a warp's), "wgmma" (of four warps), "tcgen05" (of the block), "" where there is none
    macs: int  # multiply-adds of the loop by all warps; 0 where the opcode does not tell (tcgen05)
    ffma: int  # scalar multiply-adds in the loop
    instructions: int
    loads: dict[str, int]  # global and asynchronous loads of the main loop by opcode
    looped: bool  # False: the loop was unrolled away, and everything from its first to its last product counts as one
    local: int  # LDL and STL anywhere
    unfenced: int  # wgmma without a proxy fence since the last write to shared memory
    drains: int = 0  # waits in the loop for all products of wgmma, with none left in flight
    bulk: int = 0  # copies by descriptor (TMA) into shared memory, anywhere

    @property
    def per_mma(self) -> float:
        return self.instructions / self.mma if self.mma else float("inf")

    @property
    def widths(self) -> dict[int, int]:
        """Global loads of the main loop by bytes for each thread (0: bulk copies, which have none)."""
        found: Counter[int] = Counter()
        for op, n in self.loads.items():
            found[_width(op)] += n
        return dict(sorted(found.items(), reverse=True))

    @property
    def narrow_loads(self) -> int:
        """2-byte (and smaller) global loads in the main loop: a lost divisibility hint (or, in an unrolled loop, a few
        of the epilogue's vectors, which the compiler moved up)."""
        return sum(n for width, n in self.widths.items() if width in (1, 2))


def _width(op: str) -> int:
    if op.startswith(("UBLKCP", "UTMALDG")):
        return 0
    parts = op.split(".")
    for mark, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if mark in parts:
            return size
    return 4


# --- a driver for a GPU that is not there -----------------------------------------------------------------------------


class _Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class _Utils:
    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        from cnnfast.gpu.devices import DEVICES, REGISTERS

        d = DEVICES[self.arch]
        return {
            "max_shared_mem": d.shared_memory,
            "multiprocessor_count": d.multiprocessors,
            "warpSize": 32,
            "max_num_regs": REGISTERS,
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
def _stub(arch: int) -> Iterator[None]:
    previous = getattr(driver, "_active", None)
    driver.set_active(StubDriver(arch))
    try:
        yield
    finally:
        driver._active = previous


@contextmanager
def target(arch: int) -> Iterator[list[Any]]:
    """Compile launches for ``arch`` and collect the compiled kernels, one entry per distinct binary."""
    compiled: list[Any] = []
    init = triton_compiler.CompiledKernel.__init__

    def remember(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        compiled.append(self)

    with _stub(arch):
        triton_compiler.CompiledKernel.__init__ = remember
        try:
            yield compiled
        finally:
            triton_compiler.CompiledKernel.__init__ = init


# --- launches without compiling ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Job:
    """A binary to compile: what Triton's own launch hands to its compiler."""

    module: str
    function: str
    source: str  # hash of the function's source and of all that it calls
    arch: int
    signature: dict[str, str]
    constants: dict[Any, Any]  # by path of argument numbers
    attributes: dict[Any, Any]
    options: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """Equal for equal binaries."""
        parts = [triton.__version__, self.function, self.source, self.arch]
        for table in (self.signature, self.constants, self.attributes, self.options):
            parts.append(sorted((repr(k), repr(v)) for k, v in table.items() if k != "extern_libs"))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def argument_names(self) -> list[str]:
        return list(self.signature)

    @property
    def named_constants(self) -> dict[str, Any]:
        return {self.argument_names[path[0]]: value for path, value in self.constants.items() if len(path) == 1}


@dataclass(frozen=True, eq=False)
class Call:
    """A launch. ``arguments`` are those of run time by name; of a tensor its (shape, dtype)."""

    job: Job
    grid: tuple[int, int, int]
    arguments: dict[str, Any] = field(repr=False)

    @property
    def tensors(self) -> list[str]:
        return [n for n, v in self.arguments.items() if isinstance(v, tuple)]

    def bytes_of(self, name: str) -> int:
        shape, dtype = self.arguments[name]
        return math.prod(shape) * dtype.itemsize


@contextmanager
def recording(arch: int) -> Iterator[list[Call]]:
    """Collect the launches inside the block as they would be on ``arch``; nothing is compiled, nothing runs."""
    calls: list[Call] = []
    run, do_compile = JITFunction.run, JITFunction._do_compile
    seen: set[int] = set()
    jobs: list[Job] = []

    def record_run(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
        if id(self) not in seen:  # what was compiled before would not be asked for again
            self.device_caches.pop(arch, None)
            seen.add(id(self))
        run(self, *args, grid=grid, **kwargs)
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        job = jobs.pop()
        values = {n: given[n] for n in self.arg_names if n in given and job.signature[n] != "constexpr"}
        bases = {n: getattr(v, "base", v) for n, v in values.items()}  # of a descriptor, its tensor
        described = {n: (tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else v for n, v in bases.items()}
        calls.append(Call(job, (*grid, 1, 1)[:3], described))

    def record_job(
        self: Any, key: Any, signature: Any, device: int, constexprs: Any, options: Any, attrs: Any, warmup: bool
    ) -> None:  # None: there is no kernel, and none is launched
        jobs.append(
            Job(
                self.fn.__module__, self.fn.__name__, self.cache_key, arch, dict(signature), dict(constexprs),
                dict(attrs), dict(options.__dict__),
            )
        )  # fmt: skip

    with _stub(arch):
        JITFunction.run, JITFunction._do_compile = record_run, record_job
        try:
            yield calls
        finally:
            JITFunction.run, JITFunction._do_compile = run, do_compile


def compile_job(job: Job) -> Any:
    """Triton's compiled kernel."""
    function = getattr(importlib.import_module(job.module), job.function)
    source = GluonASTSource if function.is_gluon() else ASTSource
    src = source(function, job.signature, job.constants, job.attributes)
    with fence.inserted(bool(job.named_constants.get("FENCE"))):
        return triton.compile(src, target=GPUTarget("cuda", job.arch, 32), options=job.options)


# --- reading machine code ---------------------------------------------------------------------------------------------


def _run(tool: str, *args: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *args], check=True, capture_output=True, text=True).stdout


def _main_loop(sass: str) -> tuple[list[str], bool]:
    """Instructions of the loop that holds the most tensor-core (else multiply-add) instructions, and True; where a
    short loop was unrolled away, everything from the first to the last of them, and False."""
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
        mma = sum(bool(_MMA.match(o)) for o in ops)  # a persistent kernel's loop over tiles has as many, and is longer
        return mma, 0 if mma else sum(o.startswith("FFMA") for o in ops), -len(ops)

    best = max(loops, key=weight, default=[])
    if any(_MMA.match(_opcode(t)) for t in best):
        return best, True
    mma = [i for i, t in enumerate(lines) if _MMA.match(_opcode(t))]
    return (lines[mma[0] : mma[-1] + 1], False) if mma else (best, True)


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _macs(op: str, num_warps: int) -> int:
    """Multiply-adds of a tensor-core instruction that every warp of the block issues; 0 where it does not tell."""
    if m := re.match(r"^HMMA\.(\d+)\b", op):
        return _HMMA_SHAPES[m.group(1)] * num_warps
    if m := re.match(r"^HGMMA\.(\d+)x(\d+)x(\d+)\b", op):
        return int(m.group(1)) * int(m.group(2)) * int(m.group(3)) * num_warps // 4
    return 0


def _kind(ops: list[str]) -> str:
    for name, mark in (("tcgen05", "UTC"), ("wgmma", "HGMMA"), ("mma", "HMMA")):
        if any(op.startswith(mark) for op in ops):
            return name
    return ""


_PROXIES = re.compile(
    r"^[ \t]*(?:@!?%p\d+ )?(cp\.async\.wait|st\.shared|fence\.proxy\.async|wgmma\.mma_async)", re.MULTILINE
)


def _unfenced(ptx: str) -> int:
    """Products of wgmma with no ``fence.proxy.async`` between them and the last write to shared memory, or the last
    wait for one, in the order of the text."""
    found, written = 0, False
    for operation in _PROXIES.findall(ptx):
        if operation == "wgmma.mma_async":
            found += written
        else:
            written = operation != "fence.proxy.async"
    return found


def inspect(kernel: Any) -> Report:
    """Read a compiled kernel (of `compile_job`, or an entry of `target`'s list)."""
    cubin, meta = kernel.asm["cubin"], kernel.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = _run("cuobjdump", "-res-usage", f.name)
        sass = _run("nvdisasm", "-c", "-ndf", f.name)  # no data flow analysis: half the time
    m = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    if m is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    body, looped = _main_loop(sass)
    loop = [_opcode(t) for t in body]
    mma = [op for op in loop if _MMA.match(op)]
    return Report(
        name=meta.name,
        arch=meta.target.arch,
        num_warps=meta.num_warps,
        registers=int(m.group(1)),
        stack=int(m.group(2)),
        shared=meta.shared,
        mma=len(mma),
        mma_kind=_kind(mma),
        macs=sum(_macs(op, meta.num_warps) for op in mma),
        ffma=sum(op.startswith("FFMA") for op in loop),
        instructions=len(loop),
        loads=dict(Counter(op for op in loop if _LOADS.match(op))),
        looped=looped,
        local=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        unfenced=_unfenced(kernel.asm["ptx"]),
        drains=sum(bool(_DRAIN.search(text)) for text in body),
        bulk=len(re.findall(r"\bUTMALDG\b", sass)),
    )
