"""Make the pictures of the Space in README.md and docs/space.md:

    python docs/screenshots.py --model results/quickstart
    python docs/screenshots.py --codes results/codiesp

The second command makes those of a model of ICD-10 codes, several a text. Needs Debian's chromium
and chromium-driver, and selenium.
"""

import argparse
import base64
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "space")]

from space_server import SpaceServer
from test_space_browser import Page, start_chromium

# of the moving picture
WIDTH = 1000
HEIGHT = 1080
PALETTE = Image.Quantize.MAXCOVERAGE  # the method that keeps colours of small areas
CLASS = "#result .certainty"
REPORT = (
    "A 63-year-old man with arterial hypertension and type 2 diabetes came with fever, "
    "cough and pain in the right side of the "
    "chest. The radiograph showed consolidation of the lower lobe and a pleural effusion. "
    "Creatinine was 2.4 mg/dl, and the "
    "kidney failure resolved with fluids. A CT scan showed a renal mass of 4 cm: "
    "nephrectomy found a clear cell carcinoma without "
    "metastases. He had smoked for forty years."
)


def capture(page: Page, height: int | None = None) -> Image.Image:
    """Return a picture of the page: its upper part of some height, or the whole, as far as its
    content reaches.
    """
    time.sleep(1)  # until the layout is still
    width, bottom = page.driver.execute_script(
        "return [innerWidth, "
        "Math.ceil(document.querySelector('#foot').getBoundingClientRect().bottom + "
        "scrollY)]"
    )
    clip = {"x": 0, "y": 0, "width": width, "height": height or bottom + 12, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": height is None, "clip": clip}
    shot = page.driver.execute_cdp_cmd("Page.captureScreenshot", options)
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


def shoot(page: Page, name: str) -> None:
    image = capture(page).quantize(256, method=PALETTE)
    image.save(ROOT / "docs" / f"{name}.png", optimize=True)


def take_pictures(page: Page) -> None:
    page.open(390, 844, "dark")
    shoot(page, "start-390-dark")
    page.open()
    page.press("#examples button:nth-child(2)")
    page.until(lambda: page.all(CLASS))
    page.weights()
    shoot(page, "text-1280-light")
    page.open_file(ROOT / "examples" / "unseen.csv", "deleted from the disk")
    page.start("Done")
    shoot(page, "file-1280-light")


def take_pictures_of_codes(page: Page) -> None:
    for width, theme in ((1280, "light"), (390, "dark")):
        page.open(width, 900, theme)
        page.type(REPORT)
        page.press("#classify")
        page.until(lambda: page.all(CLASS))
        page.weights()
        shoot(page, f"codes-{width}-{theme}")


def film(page: Page) -> None:
    """Save a moving picture: an example is classified, its coverage raised, a node pressed, and a
    file is classified.
    """
    frames: list[Image.Image] = []
    milliseconds: list[int] = []

    def keep(seconds: float) -> None:
        page.driver.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
        frames.append(capture(page, HEIGHT))
        milliseconds.append(int(1000 * seconds))

    page.open(WIDTH, HEIGHT)
    keep(1)
    page.press("#examples button:nth-child(2)")
    page.until(lambda: page.all(CLASS))
    page.weights()
    keep(3)
    page.one("#coverage input[type=range]").send_keys(Keys.ARROW_RIGHT * 5)
    page.until(lambda: "For 95%" in page.text("#result .held"))
    keep(3)
    page.explain("cardiovascular diseases")
    keep(3.5)
    page.open_file(ROOT / "examples" / "unseen.csv", "deleted from the disk")
    keep(1)
    page.start("Done")
    keep(3.5)

    # one palette for all frames, so that only what changes is stored
    sheet = Image.new("RGB", (WIDTH, HEIGHT * 3))
    for i, frame in enumerate((frames[0], frames[-4], frames[-1])):  # they have all colours
        sheet.paste(frame, (0, HEIGHT * i))
    palette = sheet.quantize(128, method=PALETTE)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    file = ROOT / "docs" / "page.gif"
    first.save(
        file, save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of the Space.")
    parser.add_argument("--model", type=Path, help="a model of the default taxonomy")
    parser.add_argument("--codes", type=Path, help="a model of ICD-10 codes")
    arguments = parser.parse_args()
    kinds = {arguments.model: (take_pictures, film), arguments.codes: (take_pictures_of_codes,)}
    for model, functions in kinds.items():
        if model is not None:
            with (
                tempfile.TemporaryDirectory() as folder,
                SpaceServer(str(model.resolve()), Path(folder)) as server,
            ):
                driver = start_chromium("--hide-scrollbars")
                try:
                    for function in functions:
                        function(Page(driver, server.address))
                finally:
                    driver.quit()


if __name__ == "__main__":
    main()
