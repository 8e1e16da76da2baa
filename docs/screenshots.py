"""Make the pictures of the Space in docs/space.md: ``python docs/screenshots.py --model results/quickstart``.

Needs Debian's chromium and chromium-driver, and selenium.
"""

import argparse
import base64
import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "space")]

from space_server import SpaceServer
from test_space_browser import Page, start_chromium


def shoot(page: Page, name: str) -> None:
    """Save a picture of the whole page, as far as its content reaches."""
    time.sleep(1)  # until the layout is still
    width, bottom = page.driver.execute_script(
        "return [innerWidth, Math.ceil(document.querySelector('#foot').getBoundingClientRect().bottom + scrollY)]"
    )
    clip = {"x": 0, "y": 0, "width": width, "height": bottom + 12, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    shot = page.driver.execute_cdp_cmd("Page.captureScreenshot", options)
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"])))
    image = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=128)
    image.save(ROOT / "docs" / f"{name}.png", optimize=True)


def take_pictures(page: Page) -> None:
    page.open(390, 844, "dark")
    shoot(page, "start-390-dark")
    page.open()
    page.press("#examples button:nth-child(2)")
    page.until(lambda: page.all("#result .certainty"))
    page.weights()
    shoot(page, "text-1280-light")
    page.open_file(ROOT / "examples" / "unseen.csv", "deleted from the disk")
    page.start("Done")
    shoot(page, "file-1280-light")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the pictures of the Space.")
    parser.add_argument("--model", type=Path, default=Path("results/quickstart"))
    model = str(parser.parse_args().model.resolve())
    with tempfile.TemporaryDirectory() as folder, SpaceServer(model, Path(folder), fresh=True) as server:
        driver = start_chromium("--hide-scrollbars")
        try:
            take_pictures(Page(driver, server.address))
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
