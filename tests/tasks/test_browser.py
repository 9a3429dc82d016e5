"""The page in Chromium without a window: every tab used as people do, a picture of each, nothing asked of elsewhere.

Needs Debian's packages chromium and chromium-driver, and selenium. The pictures lie in the folder that
``CNNFAST_SCREENSHOTS`` names, else in pytest's own.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'cnnfast[app]'")
pytest.importorskip("selenium", reason="selenium is not installed")
pytest.importorskip("skimage", reason="scikit-image is not installed")
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

from cnnfast.fetch import WeightsError
from cnnfast.generators import create_model
from cnnfast.tasks import page, pictures
from cnnfast.tasks.app import HOST
from cnnfast.tasks.data import photograph
from cnnfast.tasks.pipelines import Pipelines

if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

_LONG = 60.0  # seconds, with another test on the other core


class Page:
    """The page in a browser, by what is seen."""

    def __init__(self, browser: Any, url: str, shots: Path, downloads: Path) -> None:
        self.browser, self.url, self.shots, self.downloads = browser, url, shots, downloads
        browser.get(url)

    def until(self, what: Callable[[], Any]) -> Any:
        end = time.monotonic() + _LONG
        while not (found := what()):
            if time.monotonic() > end:
                self.shot("failed")
                raise TimeoutError("see failed.png")
            time.sleep(0.1)
        return found

    def seen(self, css: str) -> list[Any]:
        return [e for e in self.browser.find_elements(By.CSS_SELECTOR, css) if e.is_displayed()]

    def press(self, text: str, css: str = "button.primary") -> None:
        self.until(lambda: [e for e in self.seen(css) if e.text.strip() == text and e.is_enabled()])[0].click()

    def tab(self, text: str) -> None:
        self.press(text, "button[role=tab]")

    def choose(self, path: Path) -> None:
        """As the first file of the tab that is open. The field itself is hidden: its button is seen."""
        shown = "return arguments[0].closest('.block').offsetParent !== null"

        def fields() -> list[Any]:
            every = self.browser.find_elements(By.CSS_SELECTOR, "input[type=file]")
            return [e for e in every if self.browser.execute_script(shown, e)]

        self.until(fields)[0].send_keys(str(path))
        self.until(lambda: [e for e in self.seen(".file-preview") if path.stem in e.text])

    def said(self, start: str) -> str:
        return self.until(lambda: [e.text for e in self.seen(".prose") if e.text.startswith(start)])[0]

    def pictured(self) -> None:
        """Every picture that is seen has been loaded."""
        loaded = "return [...document.images].every(i => i.complete && (i.naturalWidth > 0 || !i.src))"
        self.until(lambda: self.seen("img") and self.browser.execute_script(loaded))

    def shot(self, name: str) -> np.ndarray:
        path = self.shots / f"{name}.png"
        self.browser.save_screenshot(str(path))
        return np.asarray(Image.open(path).convert("RGB"))

    def download(self, name: str) -> np.ndarray:
        """The pixels of what the button gives."""
        self.press("Download", "button.secondary")
        file = self.downloads / name
        self.until(file.exists)
        return pictures.read(file).pixels

    def requests(self) -> set[str]:
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return {params["request"]["url"] for params in sent}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    shots = Path(os.environ.get("CNNFAST_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1360,1200"):
        options.add_argument(option)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.binary_location = str(shutil.which("chromium"))
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        patch.setenv("SE_AVOID_STATS", "true")
        blocks = page.build(Pipelines(device="cpu"), str(folder))
        browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield Page(browser, page.serve(blocks, HOST, None), shots, downloads)
        finally:
            browser.quit()
            blocks.close(verbose=False)


@pytest.fixture
def person(tmp_path: Path) -> Path:
    path = tmp_path / "person.png"
    photograph("astronaut").save(path)
    return path


def needs(*networks: str) -> None:
    for name in networks:
        try:
            create_model(name, pretrained=True)
        except WeightsError as error:
            pytest.skip(str(error).splitlines()[0])


def test_generate(opened: Page) -> None:
    needs("dcgan_faces")
    opened.tab("Generate")
    opened.press("Generate")
    opened.said("16 images, ")
    opened.pictured()
    assert len(opened.seen(".grid-wrap img")) == 16
    opened.shot("generate")


def test_draw(opened: Page) -> None:
    opened.tab("Draw")
    opened.seen("input[type=text], textarea")[0].send_keys("red heart")
    opened.press("Draw")
    opened.said("emoji, ")
    opened.pictured()
    shot = opened.shot("draw")
    red = (shot[..., 0] > 200) & (shot[..., 1] < 90) & (shot[..., 2] < 90)
    assert red.mean() > 0.03


def test_enhance(opened: Page, tmp_path: Path) -> None:
    needs("span_x2")
    photograph("chelsea").resize((225, 150)).save(tmp_path / "cat.png")
    opened.tab("Enhance")
    opened.choose(tmp_path / "cat.png")
    opened.press("Enhance")
    opened.said("450x300, ")
    opened.pictured()
    opened.shot("enhance")
    assert opened.download("cat-enhanced.png").shape == (300, 450, 3)


def test_repair_by_a_brush(opened: Page, person: Path) -> None:
    opened.tab("Repair")
    opened.choose(person)
    canvas = opened.until(lambda: opened.seen("canvas"))[0]
    opened.pictured()
    time.sleep(2)  # the editor lays the picture out
    stroke = ActionChains(opened.browser).move_to_element_with_offset(canvas, -60, -20).click_and_hold()
    stroke.move_by_offset(60, 20).move_by_offset(60, 20).release().perform()
    opened.press("Repair")
    opened.said("512x512, ")
    opened.pictured()
    opened.shot("repair")
    changed = (pictures.read(person).pixels != opened.download("person-repaired.png")).any(2)
    # A band across the middle, and nothing else.
    assert 500 < changed.sum() < 20_000
    rows, columns = np.nonzero(changed)
    assert rows.min() > 150 and rows.max() < 340 and columns.min() > 120 and columns.max() < 380


def test_style(opened: Page, person: Path) -> None:
    needs("style_26")
    opened.tab("Compose")
    opened.tab("Style")
    opened.choose(person)
    opened.press("Style")
    opened.said("512x512, ")
    opened.pictured()
    opened.shot("style")
    assert opened.download("person-styled.png").shape == (512, 512, 3)


def test_cut_out(opened: Page, person: Path) -> None:
    needs("selfie")
    opened.tab("Compose")
    opened.tab("Cut out")
    opened.choose(person)
    opened.press("Cut out")
    opened.said("512x512, ")
    opened.pictured()
    opened.shot("cut-out")
    assert opened.download("person-cut-out.png").shape == (512, 512, 4)


def test_an_error_is_a_line(opened: Page) -> None:
    opened.tab("Draw")
    text = opened.seen("input[type=text], textarea")[0]
    text.clear()
    text.send_keys("qqqq")
    opened.press("Draw")
    (line,) = opened.until(lambda: [e.text for e in opened.seen("[data-testid=toast-text]")])
    opened.shot("error")
    assert line.startswith("it knows none of the words 'qqqq'") and "\n" not in line


def test_nothing_is_asked_of_other_machines(opened: Page) -> None:
    """Last: of all that the tests above have done."""
    opened.browser.get(opened.url)
    opened.until(lambda: opened.seen("button[role=tab]"))
    asked = opened.requests()
    assert any(url.startswith(opened.url) for url in asked)
    own = (opened.url, "data:", "blob:", "chrome")
    assert [url for url in asked if not url.startswith(own)] == []
