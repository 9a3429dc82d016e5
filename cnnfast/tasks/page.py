"""The page of `app`: five tabs, for what they do `pipelines`. Needs gradio, which is imported with this module."""

from __future__ import annotations

import functools
import html
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..messages import CnnfastError, one_line
from . import cutting, pictures, pixels
from .enhancement import LEVELS, MODELS, SCALES
from .pictures import Picture
from .pipelines import Pipelines
from .sampling import COLOURS
from .sampling import MODELS as NOISE_MODELS
from .styling import PARTS, STYLES

__all__ = ["OnlyHere", "build", "serve"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_LONGEST = 2048  # pixels of what is shown; what is downloaded is whole
_HEIGHT = 480
_MOST = 64  # images at once
_KEPT = 256  # files of results: older ones go, as nothing that is seen shows them any more
_DRAWN = 512  # pixels of a drawing's side
_BUTTONS: list[Any] = ["download", "fullscreen"]  # without "share", which sends pictures away
_EVERYTHING, _NONE = "all of it", "none"
_NOTHING, _COLOUR, _PICTURE = "nothing", "a colour", "a picture"
_PROGRESS = gr.Progress()  # gradio gives a function with this default what shows its progress

# Nothing of the page comes from elsewhere, and no other page may hold this one.
_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'"


class OnlyHere:
    """ASGI middleware: every answer tells the browser to load nothing from other machines."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"content-security-policy", _POLICY)]}
            await send(message)

        await self.app(scope, receive, answer)


def serve(blocks: gr.Blocks, host: str, port: int | None, *, open_browser: bool = False) -> str:
    """Serves a page that `build` made, by threads of its own, to this machine alone; its address."""
    here = [Middleware(TrustedHostMiddleware, allowed_hosts=[host, "localhost"]), Middleware(OnlyHere)]
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=open_browser,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        app_kwargs={"middleware": here},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )
    return url


# --- what the buttons do ----------------------------------------------------------------------------------------------


def _told(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Its errors as one line on the page, as the command line has them on standard error."""

    @functools.wraps(function)
    def told(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            line = html.escape(one_line(error), quote=False)
            unexpected = not isinstance(error, (CnnfastError, OSError))
            raise gr.Error(line, duration=None, print_exception=unexpected) from error

    return told


class Answers:
    """A function for each button: what gradio's components give -> what they show. Results are PNGs in ``folder``."""

    def __init__(self, pipelines: Pipelines, folder: str) -> None:
        self.pipelines, self.folder = pipelines, folder
        self._files: deque[Path] = deque()

    @_told
    def generate(self, model: str, count: int, seed: int | None, colours: Sequence[str]) -> tuple[list[str], str, str]:
        start = time.perf_counter()
        images, together, remarks = self.pipelines.generate(
            model, int(count), int(seed or 0), colours if model == "eyes" else ()
        )
        files = [self._file(f"{model}-{k:02d}.png", image) for k, image in enumerate(images)]
        return files, self._file(f"{model}.png", together), _remarks(f"{len(files)} images", start, remarks)

    @_told
    def draw(self, text: str, seed: int | None) -> tuple[str, str, str]:
        start = time.perf_counter()
        drawing, remarks = self.pipelines.draw(text, int(seed or 0), _DRAWN)
        file = self._file("drawing.png", pictures.from_pil(drawing.image))
        return file, file, _remarks(drawing.what, start, remarks)

    @_told
    def enhance(
        self, file: str | None, scale: int, denoise: str, model: str, progress: gr.Progress = _PROGRESS
    ) -> tuple[tuple[str, str], str, str]:
        options = {
            "scale": scale,
            "denoise": None if denoise == _NONE else int(denoise),
            "model": None if scale == 1 else model,
        }
        return self._made("enhanced", file, lambda picture: self.pipelines.enhance(picture, progress, **options))

    @_told
    def repair(
        self, file: str | None, painting: Any, mask: str | None, grow: int, progress: gr.Progress = _PROGRESS
    ) -> tuple[tuple[str, str], str, str]:
        """``painting``: the editor's value; ``mask``: a file, in its place."""
        marked = (painting or {}).get("layers", []) if mask is None else cutting.read(Path(mask))
        return self._made("repaired", file, lambda picture: self.pipelines.repair(picture, marked, int(grow), progress))

    @_told
    def style(
        self,
        file: str | None,
        first: str,
        second: str,
        blend: float,
        own: str | None,
        strength: float,
        only: str,
        progress: gr.Progress = _PROGRESS,
    ) -> tuple[tuple[str, str], str, str]:
        """``blend``: the part of the second style; ``own``: a picture as the style, in the place of both."""
        weights = [(name, part) for name, part in ((first, 1 - blend), (second, blend)) if part > 0]
        style: Any = weights if own is None else own
        part = None if only == _EVERYTHING else only
        return self._made(
            "styled",
            file,
            lambda picture: self.pipelines.style(picture, progress, style=style, strength=strength, only=part),
        )

    @_told
    def cut_out(
        self, file: str | None, behind: str, colour: str, background: str | None, progress: gr.Progress = _PROGRESS
    ) -> tuple[tuple[str, str], str, str]:
        """``behind``: `_NOTHING`, `_COLOUR` or `_PICTURE`."""
        chosen: Any = {_NOTHING: None, _COLOUR: colour}.get(behind)
        if behind == _PICTURE:
            if background is None:
                raise CnnfastError("choose a picture for the background first")
            chosen = cutting.read(Path(background))
        return self._made("cut-out", file, lambda picture: self.pipelines.cut_out(picture, chosen, progress))

    @_told
    def shown(self, file: str | None) -> tuple[str, str] | None:
        """A picture as the browser can show it, on both sides."""
        if file is None:
            return None
        shown = self._file("picture.png", pixels.preview(cutting.read(Path(file)), _LONGEST))
        return shown, shown

    def to_paint(self, file: str | None) -> tuple[Any, tuple[str, str] | None]:
        """The same as what is painted on, and as `shown`."""
        shown = self.shown(file)
        return None if shown is None else {"background": shown[0], "layers": [], "composite": None}, shown

    def _made(
        self, what: str, file: str | None, work: Callable[[Picture], tuple[Picture, list[str]]]
    ) -> tuple[tuple[str, str], str, str]:
        """((before, after) to look at, the result to download, remarks)."""
        if file is None:
            raise CnnfastError("choose a picture first")
        start = time.perf_counter()
        picture = cutting.read(Path(file))
        done, remarks = work(picture)
        result = self._file(f"{Path(file).stem}-{what}.png", done)
        before, after = (pixels.preview(p, _LONGEST) for p in (picture, done))
        sides = self._file("before.png", before), self._file("after.png", after)
        h, w = done.pixels.shape[:2]
        return sides, result, _remarks(f"{w}x{h}", start, remarks)

    def _file(self, name: str, picture: Picture) -> str:
        path = Path(tempfile.mkdtemp(dir=self.folder), name)
        pictures.write(path, picture)
        self._files.append(path)
        while len(self._files) > _KEPT:
            shutil.rmtree(self._files.popleft().parent)
        return str(path)


def _remarks(what: str, start: float, remarks: Sequence[str]) -> str:
    lines = [f"{what}, {time.perf_counter() - start:.1f} s", *remarks]
    return "\n\n".join(html.escape(line, quote=False) for line in lines)


# --- what it looks like -----------------------------------------------------------------------------------------------


def build(pipelines: Pipelines, folder: str) -> gr.Blocks:
    """The page; its results lie in ``folder``. Each button's function has a name, by which gradio's client calls it."""
    answers = Answers(pipelines, folder)
    with gr.Blocks(title="cnnfast", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown("# cnnfast")
        with gr.Tab("Generate"):
            _generate(answers)
        with gr.Tab("Draw"):
            _draw(answers)
        with gr.Tab("Enhance"):
            _enhance(answers)
        with gr.Tab("Repair"):
            _repair(answers)
        with gr.Tab("Compose"), gr.Tabs():
            with gr.Tab("Style"):
                _style(answers)
            with gr.Tab("Cut out"):
                _cut_out(answers)
    return blocks


def _picture(label: str = "Picture") -> gr.File:
    return gr.File(label=label, file_types=["image"], height=140)


def _result() -> list[Any]:
    """Before and after, the download, what is said."""
    return [
        gr.ImageSlider(label="Before and after", type="filepath", height=_HEIGHT, interactive=False, buttons=_BUTTONS),
        gr.DownloadButton("Download", interactive=False),
        gr.Markdown(),
    ]


def _on_choice(file: gr.File, work: Callable[..., Any], outputs: Any) -> None:
    file.change(work, file, outputs, show_progress="hidden", api_visibility="private")


def _on(events: Sequence[Any], work: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """``outputs[1]`` is the download, which has something after the first time."""
    done = gr.on(events, work, inputs, outputs, api_name=work.__name__, show_progress_on=outputs[0])
    done.success(_something, None, outputs[1], show_progress="hidden", api_visibility="private")


def _something() -> Any:
    return gr.DownloadButton(interactive=True)


def _generate(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            model = gr.Radio(list(NOISE_MODELS), value="faces", label="Of")
            count = gr.Slider(1, _MOST, value=16, step=1, label="Images")
            seed = gr.Number(value=0, minimum=0, precision=0, label="Seed")
            colours = gr.CheckboxGroup(list(COLOURS), label="Colours (none: all in turn)", visible=False)
            model.change(_on_model, model, colours, show_progress="hidden", api_visibility="private")
            button = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2):
            images = gr.Gallery(
                label="Images", columns=6, height=_HEIGHT, object_fit="contain", buttons=["download_all", "fullscreen"]
            )
            outputs = [images, gr.DownloadButton("Download as one picture", interactive=False), gr.Markdown()]
    _on([button.click], answers.generate, [model, count, seed, colours], outputs)


def _on_model(name: str) -> Any:
    return gr.CheckboxGroup(visible=name == "eyes")


def _draw(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            text = gr.Textbox(label="Text", placeholder="red heart, brown eye, ...", max_lines=1)
            seed = gr.Number(value=0, minimum=0, precision=0, label="Seed (of eyes)")
            button = gr.Button("Draw", variant="primary")
        with gr.Column(scale=2):
            image = gr.Image(label="Drawing", type="filepath", height=_HEIGHT, interactive=False, buttons=_BUTTONS)
            outputs = [image, gr.DownloadButton("Download", interactive=False), gr.Markdown()]
    _on([button.click, text.submit], answers.draw, [text, seed], outputs)


def _enhance(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            file = _picture()
            scale = gr.Radio([(f"x{n}", n) for n in SCALES], value=2, label="Larger")
            denoise = gr.Radio([_NONE, *map(str, LEVELS)], value=_NONE, label="Take out noise and JPEG's traces")
            models = [(f"{name}: {about.about.removesuffix(' (default)')}", name) for name, about in MODELS.items()]
            model = gr.Dropdown(models, value="span", label="Model")
            button = gr.Button("Enhance", variant="primary")
        with gr.Column(scale=2):
            outputs = _result()
    _on_choice(file, answers.shown, outputs[0])
    _on([button.click], answers.enhance, [file, scale, denoise, model], outputs)


def _repair(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            file = _picture()
            grow = gr.Slider(0, 16, value=0, step=1, label="Mark so many pixels more around")
            mask = _picture("Or a mask: white is repaired")
            button = gr.Button("Repair", variant="primary")
        with gr.Column(scale=2):
            editor = gr.ImageEditor(
                label="Paint what is to be repaired",
                type="pil",
                format="png",
                height=_HEIGHT + 60,
                sources=(),
                transforms=(),
                layers=False,
                brush=gr.Brush(default_size=12, colors=["#ff2060"], color_mode="fixed"),
                buttons=[],
            )
            outputs = _result()
    _on_choice(file, answers.to_paint, [editor, outputs[0]])
    _on([button.click], answers.repair, [file, editor, mask, grow], outputs)


def _style(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            file = _picture()
            first = gr.Dropdown(list(STYLES), value="mosaic", label="Style")
            second = gr.Dropdown(list(STYLES), value="lace", label="Second style")
            blend = gr.Slider(0, 1, value=0, step=0.05, label="Part of the second")
            own = _picture("Or any picture as the style")
            strength = gr.Slider(0, 1, value=1, step=0.05, label="Strength")
            only = gr.Radio([_EVERYTHING, *PARTS], value=_EVERYTHING, label="Of the picture")
            button = gr.Button("Style", variant="primary")
        with gr.Column(scale=2):
            outputs = _result()
    _on_choice(file, answers.shown, outputs[0])
    _on([button.click], answers.style, [file, first, second, blend, own, strength, only], outputs)


def _cut_out(answers: Answers) -> None:
    with gr.Row():
        with gr.Column(scale=1):
            file = _picture()
            behind = gr.Radio([_NOTHING, _COLOUR, _PICTURE], value=_NOTHING, label="Behind the people")
            colour = gr.ColorPicker(value="#204060", label="Colour", visible=False)
            background = gr.File(label="Background", file_types=["image"], height=140, visible=False)
            both: list[Any] = [colour, background]
            behind.change(_on_behind, behind, both, show_progress="hidden", api_visibility="private")
            button = gr.Button("Cut out", variant="primary")
        with gr.Column(scale=2):
            outputs = _result()
    _on_choice(file, answers.shown, outputs[0])
    _on([button.click], answers.cut_out, [file, behind, colour, background], outputs)


def _on_behind(kind: str) -> Any:
    return gr.ColorPicker(visible=kind == _COLOUR), gr.File(visible=kind == _PICTURE)
