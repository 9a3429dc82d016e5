"""The implementations that are compared: on a CPU with as many threads as torch uses, on a GPU with and without a CUDA
graph.

Every one is checked before it is timed (`Workload.check`), which on a GPU also is its warm-up: compilation, cuDNN's
search and the proof of a kernel at its first launch happen there.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import cnnfast
from cnnfast.cpu.isa import InstructionSet, instruction_set
from cnnfast.gpu import guard
from cnnfast.gpu.observers import observed

from .timers import captured
from .workload import Implementation, NotAvailable, Prepared, Workload

__all__ = [
    "COMPILED",
    "EAGER",
    "GPU_IMPLEMENTATIONS",
    "GRAPH",
    "IMPLEMENTATIONS",
    "SUITE_IMPLEMENTATIONS",
    "backend",
    "fused",
    "named",
    "onnxruntime_call",
    "openvino_call",
    "path_of",
    "require_compiler",
    "traced_onnx",
]


# --- torch ------------------------------------------------------------------------------------------------------------


def _formats(w: Workload, channels_last: bool) -> None:
    if channels_last and not w.has_formats:
        raise NotAvailable("a 1-D input has no channels_last")


def _eager(channels_last: bool | None) -> Callable[[Workload], Prepared]:
    """``channels_last`` None: where there is such a thing."""

    def prepare(w: Workload) -> Prepared:
        _formats(w, bool(channels_last))
        last = w.has_formats if channels_last is None else channels_last
        call = w.call(w.modules(channels_last=last), last)
        return Prepared(call, path=lambda: kernels_of(call, w.gradients) if w.device == "cuda" and _a_gpu() else "")

    return prepare


def require_compiler() -> None:
    """NotAvailable where `torch.compile` has no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise NotAvailable("torch.compile needs a C++ compiler: install g++ or clang") from error


def _compiled(
    channels_last: bool | None,
    mode: str | None = None,
    container: type[nn.Sequential] = nn.Sequential,
    launches: bool = False,
) -> Callable[[Workload], Prepared]:
    """``channels_last`` None: where there is such a thing. ``launches``: RuntimeError where no step is a kernel of ours
    (`_launched`)."""

    def prepare(w: Workload) -> Prepared:
        _formats(w, bool(channels_last))
        last = w.has_formats if channels_last is None else channels_last
        if w.device == "cpu":
            require_compiler()
        call = w.call(torch.compile(w.modules(container, last), dynamic=False, mode=mode), last)
        if launches:
            _launched(call, w.gradients)
        return Prepared(call, path=lambda: path_of(call, w.gradients))

    return prepare


# --- cnnfast ----------------------------------------------------------------------------------------------------------

# Operators of torch that do the arithmetic: what of them a forward calls is the path it took.
_PATHS = {
    "mkldnn::_convolution_transpose_pointwise": "oneDNN packed deconvolution",
    "mkldnn::_convolution_pointwise": "oneDNN packed convolution",
    "mkldnn::_linear_pointwise": "oneDNN packed product",
    "mkldnn::_linear_pointwise.binary": "oneDNN packed product",
    "aten::convolution": "ATen convolution",
    "aten::convolution_backward": "ATen convolution_backward",
    "aten::mm": "mm",
    "aten::addmm": "mm",
    "aten::bmm": "bmm",
    "aten::baddbmm": "bmm",
}


def path_of(call: Callable[[], object], gradients: bool = False) -> str:
    """What ran in a call: Triton launches by plan, operators by name, as observed (not as planned). In inference mode,
    unless it takes ``gradients``."""
    launches: list[str] = []
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports to stderr that it starts and stops
    with observed(launch=launches.append), torch.inference_mode(not gradients):
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            call()
    seen = Counter({f"Triton {name}": n for name, n in Counter(launches).items()})
    for event in trace.events() or ():
        if event.name in _PATHS:
            seen[_PATHS[event.name]] += 1
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in seen.items())


_KERNEL = re.compile(r"conv|gemm|wgrad|dgrad|xmma|cutlass|cudnn|winograd|fft", re.IGNORECASE)


def kernels_of(call: Callable[[], object], gradients: bool = False) -> str:
    """What cuDNN chose: the names of the device's kernels of a call that multiply, without their template arguments
    and signatures. Empty where the profiler sees no device."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.inference_mode(not gradients), profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    names = (e.name for e in trace.events() or () if e.device_type == DeviceType.CUDA and _KERNEL.search(e.name))
    seen = Counter(re.sub(r"^void |[<(].*", "", name) for name in names)
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in seen.items())


def _cnnfast(channels_last: bool, frozen: bool = False) -> Callable[[Workload], Prepared]:
    """``frozen``: by `cnnfast.freeze` weights count as constant, as they do for the two runtimes."""

    def prepare(w: Workload) -> Prepared:
        if not channels_last and not w.has_formats:
            raise NotAvailable("a 1-D input has one format: the same as cnnfast")
        if frozen and (w.gradients or w.device != "cpu"):
            raise NotAvailable("weights are kept in inference on a CPU only: the same as cnnfast")
        modules = w.modules(cnnfast.Sequential, channels_last)
        if frozen:
            cnnfast.freeze(modules)
        call = w.call(modules, channels_last)
        if not w.gradients and w.device == "cpu":
            with torch.inference_mode():  # what is checked and timed are packed weights
                call(), call()
        return Prepared(call, path=lambda: path_of(call, w.gradients))

    return prepare


# --- others -----------------------------------------------------------------------------------------------------------


def _require(module: str, w: Workload | None = None) -> None:
    if importlib.util.find_spec(module) is None:
        raise NotAvailable(f"{module} is not installed")
    if w is not None and w.device != "cpu":
        raise NotAvailable("timed on the CPU only")
    if importlib.util.find_spec("onnx") is None:
        raise NotAvailable("onnx, which builds its model, is not installed")


def traced_onnx(model: nn.Module, x: torch.Tensor) -> bytes:
    """A model in eval mode, as `torch.onnx` traces it, from ``x`` on. NotAvailable where there is no onnx."""
    _require("onnx")
    with io.BytesIO() as file, torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(model, (x.clone(),), file, dynamo=False, input_names=["x"], opset_version=17)
        return file.getvalue()


def onnxruntime_call(model: bytes, x: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """A call of a serialised float32 model on ``x``, with as many threads as torch uses. NotAvailable where it is not
    installed."""
    _require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Its threads would otherwise go on spinning for a while, in the time of whoever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: [torch.from_numpy(y) for y in session.run(None, feed)]


def _onnxruntime(w: Workload) -> Prepared:
    if w.dtype != torch.float32:
        raise NotAvailable(f"onnxruntime has no {w.dtype_name} convolutions on a CPU")
    _require("onnxruntime", w)
    from .onnx_graph import to_onnx

    call = onnxruntime_call(to_onnx(w.source, tuple(w.x.shape)), w.x)  # type: ignore[arg-type]
    return Prepared(call, lambda y: y[0])


def _openvino(w: Workload) -> Prepared:
    hint = _openvino_hint(w.dtype)
    _require("openvino", w)
    from .onnx_graph import to_onnx

    model, call = _openvino_model(to_onnx(w.source, tuple(w.x.shape)), w.x.float(), hint)  # type: ignore[arg-type]
    return Prepared(call, lambda y: torch.from_numpy(y[0].copy()), lambda: _openvino_path(model))


def _openvino_hint(dtype: torch.dtype) -> str:
    hint = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(dtype)
    if hint is None:
        raise NotAvailable(f"not timed in {str(dtype).removeprefix('torch.')}")
    if hint == "bf16" and instruction_set() < InstructionSet.AVX512:
        raise NotAvailable("OpenVINO compiles no bfloat16 for a processor of AVX2 only")
    return hint


def openvino_call(
    model: bytes, x: torch.Tensor, dtype: torch.dtype = torch.float32
) -> Callable[[], list[torch.Tensor]]:
    """As `onnxruntime_call`, with products in ``dtype``."""
    _require("openvino")
    _, call = _openvino_model(model, x, _openvino_hint(dtype))
    return lambda: [torch.from_numpy(y) for y in call().values()]


def _openvino_model(model: bytes, x: torch.Tensor, hint: str) -> tuple[Any, Callable[[], Any]]:
    """Compiled for products in the precision of ``hint``, and its call on ``x``: float32 in and out."""
    import openvino

    core = openvino.Core()
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    compiled = core.compile_model(core.read_model(model), "CPU", config)
    request, given = compiled.create_infer_request(), x.numpy()
    return compiled, lambda: request.infer([given], share_inputs=True, share_outputs=True)


def _openvino_path(model: Any) -> str:
    """The primitives of the convolutions and products: a hint binds nothing (deconvolutions stay in float32)."""
    seen: Counter[str] = Counter()
    for op in model.get_runtime_model().get_ops():
        info = op.get_rt_info()
        kind, primitive = (str(info[key].value) for key in ("layerType", "primitiveType"))
        if kind in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
            seen[f"{kind} {primitive}"] += 1
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in seen.items())


EAGER = ("eager", "eager channels_last")


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("eager", _eager(False)),
    Implementation("eager channels_last", _eager(True)),
    Implementation("torch.compile", _compiled(False)),
    Implementation("torch.compile channels_last", _compiled(True)),
    Implementation("torch.compile max-autotune", _compiled(None, "max-autotune")),
    Implementation("onnxruntime", _onnxruntime),
    Implementation("OpenVINO", _openvino),
    Implementation("cnnfast", _cnnfast(True)),
    Implementation("cnnfast frozen", _cnnfast(True, frozen=True)),
    Implementation("cnnfast NCHW", _cnnfast(False)),
    Implementation("cnnfast torch.compile", _compiled(None, container=cnnfast.Sequential)),
)


def named(*names: str, among: tuple[Implementation, ...] = IMPLEMENTATIONS) -> tuple[Implementation, ...]:
    """The implementations of these names, in the list's order. ValueError for an unknown one."""
    known = [i.name for i in among]
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"unknown implementation {', '.join(unknown)}: expected some of {', '.join(known)}")
    return tuple(i for i in among if i.name in names)


# What a suite's rows compare, unless asked otherwise: a compilation takes seconds, and a layer alone leaves it little
# to fuse. ("layers" are many, "generator" what a user runs.)
SUITE_IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "generator": tuple(i.name for i in IMPLEMENTATIONS),
    "upsample": tuple(i.name for i in IMPLEMENTATIONS if i.name != "torch.compile max-autotune"),
    "layers": (
        "eager",
        "eager channels_last",
        "torch.compile channels_last",
        "onnxruntime",
        "OpenVINO",
        "cnnfast",
        "cnnfast frozen",
    ),
}


# --- on a GPU ---------------------------------------------------------------------------------------------------------

GRAPH = ", CUDA graph"


def backend() -> str:
    """What a user has on a GPU: Triton where it applies. A machine that only pretends to have one (a function mode of
    torch, which answers for tensors and `torch.cuda`), whichever build of torch it has, runs Triton's kernels where
    they are asked for."""
    return "auto" if _a_gpu() else "triton"


def _a_gpu() -> bool:
    return torch.version.cuda is not None and torch._C._cuda_getDeviceCount() > 0


def fused(w: Workload) -> cnnfast.Sequential:
    """The modules as a user has them who wants speed on a GPU: weights in the order in which the kernels read them."""
    model = cnnfast.channels_last(w.modules(cnnfast.Sequential))
    assert isinstance(model, cnnfast.Sequential)
    return model


def _without_launch(call: Callable[[], object], gradients: bool) -> int:
    """Fused convolutions of a call that came to the kernels and were not launched."""
    seen: list[str | None] = []  # None: a step; else the launch that follows it
    with observed(step=lambda *step: seen.append(None), launch=seen.append), torch.inference_mode(not gradients):
        call()
    return sum(a is None and b is None for a, b in pairwise([*seen, None]))


def _launched(call: Callable[[], object], gradients: bool) -> None:
    """RuntimeError where no step of a call runs as a Triton kernel of ours: its time would be somebody else's."""
    path = path_of(call, gradients)
    if "Triton" not in path:
        raise RuntimeError(f"no step of it ran as a Triton kernel: {path or 'no convolution seen'}")


def _on_gpu(w: Workload) -> Prepared:
    """`cnnfast.Sequential`. RuntimeError where no step of it runs as a Triton kernel, or one that could does not
    (`cnnfast.gpu.guard` says why): every case has such steps, and a row without them says nothing of the kernels."""
    model = fused(w)
    plain, name = w.call(model, True), backend()

    def call() -> object:
        with cnnfast.backend(name):
            return plain()

    with torch.inference_mode(not w.gradients):
        call()
    given_up = [line for line in model.explain().splitlines() if "PyTorch's operators run" in line]
    if given_up:
        raise RuntimeError("; ".join(given_up))
    if missed := _without_launch(call, w.gradients):
        states = [line for line in guard.report() if "PyTorch's operators run" in line]
        raise RuntimeError(f"{missed} steps ran PyTorch's operators: {'; '.join(states) or 'for a reason not known'}")
    _launched(call, w.gradients)
    return Prepared(call, path=lambda: path_of(call, w.gradients))


def _graph(prepare: Callable[[Workload], Prepared]) -> Callable[[Workload], Prepared]:
    """The same, captured by `torch.cuda.graph`; what is timed is a replay."""

    def graphed(w: Workload) -> Prepared:
        ready = prepare(w)
        # A first capture in inference mode leaves generator state behind that no later one may write (PyTorch #166792).
        with torch.inference_mode(False), torch.set_grad_enabled(w.gradients):
            return replace(ready, call=captured(ready.call))

    return graphed


GPU_IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("eager", _eager(False)),
    Implementation("eager channels_last", _eager(None)),
    Implementation("eager channels_last" + GRAPH, _graph(_eager(None))),
    Implementation("torch.compile", _compiled(None)),
    Implementation("torch.compile max-autotune", _compiled(None, "max-autotune")),
    Implementation("cnnfast", _on_gpu),
    Implementation("cnnfast" + GRAPH, _graph(_on_gpu)),
    Implementation("cnnfast under torch.compile", _compiled(None, container=cnnfast.Sequential, launches=True)),
)
COMPILED = ("torch.compile", "torch.compile max-autotune")  # on a GPU
