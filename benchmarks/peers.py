"""The implementations that are compared, and the check that each passes before it is timed.

Every implementation gets the same modules with the same weights (rounded to the dtype) and the same input, in inference
mode, with as many threads as torch uses.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import cnnfast

from .cases import Case

__all__ = [
    "EAGER",
    "IMPLEMENTATIONS",
    "SUITE_IMPLEMENTATIONS",
    "TOLERANCES",
    "Implementation",
    "NotAvailable",
    "Prepared",
    "Workload",
    "check",
    "path_of",
    "require_compiler",
]

# Largest |y - float64| over largest |float64|. float32: some roundings of sums of a few thousand products. The others:
# ten roundings to the dtype, two for each of five layers with a norm. A wrong tap or channel is off by far more.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 10 * 2**-11, torch.bfloat16: 10 * 2**-8}
TF32_TOLERANCE = 10 * 2**-11


class NotAvailable(Exception):
    """This implementation cannot run this workload here; the message says why."""


@dataclass(frozen=True)
class Workload:
    """One row of the comparison. ``tf32``: float32 on a GPU with TF32 products, for every implementation alike."""

    case: Case
    batch: int
    dtype: torch.dtype
    device: str = "cpu"
    tf32: bool = False

    @property
    def dtype_name(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.case.name}, {self.dtype_name}, batch {self.batch}"

    @property
    def tolerance(self) -> float:
        return TF32_TOLERANCE if self.tf32 else TOLERANCES[self.dtype]

    @cached_property
    def source(self) -> nn.Sequential:
        """The modules, rounded to the dtype. Implementations copy them: `modules`."""
        return self.case.build().to(self.device, self.dtype)

    @cached_property
    def x(self) -> torch.Tensor:
        return self.case.input(self.batch).to(self.device, self.dtype)

    @cached_property
    def expected(self) -> torch.Tensor:
        """The result in float64, from the rounded weights and input."""
        with torch.no_grad():
            return copy.deepcopy(self.source).double()(self.x.double())

    def modules(self, container: type[nn.Sequential] = nn.Sequential, channels_last: bool = False) -> nn.Sequential:
        made = container(*copy.deepcopy(list(self.source))).eval()
        return made.to(memory_format=torch.channels_last) if channels_last else made  # type: ignore[call-overload]

    @property
    def has_formats(self) -> bool:
        """Whether there are memory formats to choose from: 1-D inputs have one."""
        return self.x.dim() == 4

    def input(self, channels_last: bool) -> torch.Tensor:
        """``x``, in channels_last where asked for and there is such a thing."""
        last = channels_last and self.has_formats
        return self.x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@dataclass(frozen=True)
class Prepared:
    """``call`` is what is timed; ``result`` turns what it returned into a tensor like `Workload.expected`; ``path``
    tells, after a call, what ran."""

    call: Callable[[], object]
    result: Callable[[object], torch.Tensor]
    path: Callable[[], str] = str  # str() is ""


@dataclass(frozen=True)
class Implementation:
    """``prepare`` raises NotAvailable with the reason where it cannot run the workload."""

    name: str
    prepare: Callable[[Workload], Prepared]


def check(prepared: Prepared, workload: Workload) -> tuple[float, str | None]:
    """(relative error against float64, what is wrong or None). Compares one call."""
    with torch.inference_mode():
        y = prepared.result(prepared.call())
    expected = workload.expected
    if y.shape != expected.shape:
        return float("inf"), f"shape {tuple(y.shape)} instead of {tuple(expected.shape)}"
    error = ((y.double() - expected).abs().max() / expected.abs().max()).item()
    if error <= workload.tolerance:  # False for NaN
        return error, None
    return error, f"relative error {error:.2g} is above {workload.tolerance:.2g}"


def _tensor(y: object) -> torch.Tensor:
    assert isinstance(y, torch.Tensor)
    return y


# --- torch ------------------------------------------------------------------------------------------------------------


def _formats(w: Workload, channels_last: bool) -> None:
    if channels_last and not w.has_formats:
        raise NotAvailable("a 1-D input has no channels_last")


def _eager(channels_last: bool) -> Callable[[Workload], Prepared]:
    def prepare(w: Workload) -> Prepared:
        _formats(w, channels_last)
        model, x = w.modules(channels_last=channels_last), w.input(channels_last)
        return Prepared(lambda: model(x), _tensor)

    return prepare


def require_compiler() -> None:
    """NotAvailable where `torch.compile` has no C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise NotAvailable("torch.compile needs a C++ compiler: install g++ or clang") from error


def _compiled(
    channels_last: bool | None, mode: str | None = None, container: type[nn.Sequential] = nn.Sequential
) -> Callable[[Workload], Prepared]:
    """``channels_last`` None: where there is such a thing."""

    def prepare(w: Workload) -> Prepared:
        _formats(w, bool(channels_last))
        last = w.has_formats if channels_last is None else channels_last
        if w.device == "cpu":
            require_compiler()
        model, x = torch.compile(w.modules(container, last), dynamic=False, mode=mode), w.input(last)
        return Prepared(lambda: model(x), _tensor, lambda: path_of(lambda: model(x)))

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
    launch = None
    if importlib.util.find_spec("triton") is not None:
        from cnnfast.ops import launch  # type: ignore[no-redef]

        before, launch.LAUNCHES = launch.LAUNCHES, launches
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports to stderr that it starts and stops
    try:
        with torch.inference_mode(not gradients), profile(activities=[ProfilerActivity.CPU]) as trace:
            call()
    finally:
        if launch is not None:
            launch.LAUNCHES = before
    seen = Counter({f"Triton {name}": n for name, n in Counter(launches).items()})
    for event in trace.events() or ():
        if event.name in _PATHS:
            seen[_PATHS[event.name]] += 1
    return ", ".join(name if n == 1 else f"{n} {name}" for name, n in seen.items())


def _cnnfast(channels_last: bool) -> Callable[[Workload], Prepared]:
    def prepare(w: Workload) -> Prepared:
        if not channels_last and not w.has_formats:
            raise NotAvailable("a 1-D input has one format: the same as cnnfast")
        model, x = w.modules(cnnfast.Sequential, channels_last), w.input(channels_last)
        return Prepared(lambda: model(x), _tensor, lambda: path_of(lambda: model(x)))

    return prepare


# --- others -----------------------------------------------------------------------------------------------------------


def _require(module: str, w: Workload) -> None:
    if importlib.util.find_spec(module) is None:
        raise NotAvailable(f"{module} is not installed")
    if w.device != "cpu":
        raise NotAvailable("timed on the CPU only")
    if importlib.util.find_spec("onnx") is None:
        raise NotAvailable("onnx, which builds its model, is not installed")


def _onnxruntime(w: Workload) -> Prepared:
    if w.dtype != torch.float32:
        raise NotAvailable(f"onnxruntime has no {w.dtype_name} convolutions on a CPU")
    _require("onnxruntime", w)
    import onnxruntime

    from .onnx_graph import to_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    # Its threads would otherwise go on spinning for a while, in the time of whoever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = to_onnx(w.source, tuple(w.x.shape))  # type: ignore[arg-type]
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": w.x.numpy()}
    return Prepared(lambda: session.run(None, feed), lambda y: torch.from_numpy(y[0]))  # type: ignore[index]


def _openvino(w: Workload) -> Prepared:
    hint = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(w.dtype)
    if hint is None:
        raise NotAvailable(f"not timed in {w.dtype_name}")
    _require("openvino", w)
    import openvino

    from .onnx_graph import to_onnx

    core = openvino.Core()
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    model = core.compile_model(core.read_model(to_onnx(w.source, tuple(w.x.shape))), "CPU", config)  # type: ignore[arg-type]
    request, x = model.create_infer_request(), w.x.float().numpy()  # float32 in and out: the hint is of what is inside
    return Prepared(
        lambda: request.infer([x], share_inputs=True, share_outputs=True),
        lambda y: torch.from_numpy(y[0].copy()),  # type: ignore[index]
        lambda: _openvino_path(model),
    )


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
    Implementation("cnnfast NCHW", _cnnfast(False)),
    Implementation("cnnfast torch.compile", _compiled(None, container=cnnfast.Sequential)),
)

# What a suite's rows compare, unless asked otherwise: a compilation takes seconds, and a layer alone leaves it little
# to fuse. ("layers" are many, "generator" what a user runs.)
SUITE_IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "generator": tuple(i.name for i in IMPLEMENTATIONS),
    "upsample": tuple(i.name for i in IMPLEMENTATIONS if i.name != "torch.compile max-autotune"),
    "layers": ("eager", "eager channels_last", "torch.compile channels_last", "onnxruntime", "OpenVINO", "cnnfast"),
}
