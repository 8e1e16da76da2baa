"""Makes the pictures of the Space that docs/space.md shows: ``python docs/screenshots.py --model results/quickstart``.

Starts the Space on a free port, opens it in headless Chromium, and writes `PICTURES` as PNG. Needs Debian's chromium and chromium-driver, and selenium.
"""

import argparse
import base64
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).resolve().parent.parent
SIZES = {1280: 900, 390: 844}
PICTURES = ("start-390-dark", "text-1280-light", "file-1280-light")
SAMPLE = ROOT / "examples" / "unseen.csv"


def serve(model: str) -> tuple[subprocess.Popen, str]:
    """The Space in a process of its own, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    line = [sys.executable, str(ROOT / "space" / "app.py"), "--model", model]
    process = subprocess.Popen(line, env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(240):
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(line)} stopped")
        with socket.socket() as there:
            if there.connect_ex(("127.0.0.1", port)) == 0:
                return process, f"http://127.0.0.1:{port}"
        time.sleep(0.5)
    raise SystemExit("the Space does not answer")


def browser() -> webdriver.Chrome:
    """Headless Chromium, as Debian has it."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))


def shoot(driver: webdriver.Chrome, file: Path, width: int) -> None:
    """The whole page, as far as its content reaches, if it is one of `PICTURES`."""
    if file.stem not in PICTURES:
        return
    height = driver.execute_script(
        "return Math.ceil(document.querySelector('#foot').getBoundingClientRect().bottom + scrollY)"
    )
    clip = {"x": 0, "y": 0, "width": width, "height": height + 12, "scale": 1}
    shot = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip}
    )
    file.write_bytes(base64.b64decode(shot["data"]))
    from PIL import Image

    Image.open(file).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(file, optimize=True)


def until(driver: webdriver.Chrome, condition: str, seconds: int = 90) -> None:
    WebDriverWait(driver, seconds).until(lambda d: d.execute_script(f"return Boolean({condition})"))


def tab(driver: webdriver.Chrome, name: str) -> None:
    """Opens a tab, which on a narrow page may be behind the button for more of them."""
    found = [
        t for t in driver.find_elements(By.CSS_SELECTOR, "button[role=tab]") if t.text == name and t.is_displayed()
    ]
    driver.execute_script("arguments[0].click()", found[0])


def views(driver: webdriver.Chrome, address: str, width: int, scheme: str, folder: Path) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": SIZES[width], "deviceScaleFactor": 1, "mobile": width < 500},
    )
    driver.get(f"{address}/?__theme={scheme}")
    until(
        driver, "document.querySelector('#classify') && document.querySelector('#icicle .slicetext, #icicle .main-svg')"
    )
    time.sleep(1)
    name = f"{width}-{scheme}"
    shoot(driver, folder / f"start-{name}.png", width)
    example = next(b for b in driver.find_elements(By.CSS_SELECTOR, "#examples button") if b.text == "Stroke or heart")
    driver.execute_script("arguments[0].click()", example)
    until(driver, "document.querySelector('#result .path')")
    driver.find_element(By.CSS_SELECTOR, "#show").click()
    until(driver, "document.querySelector('#words .text')")
    time.sleep(1)
    shoot(driver, folder / f"text-{name}.png", width)
    tab(driver, "A file")
    driver.find_element(By.CSS_SELECTOR, "#file input[type=file]").send_keys(str(SAMPLE))
    until(driver, "document.querySelector('#state').innerText.includes('deleted from the disk')")
    driver.find_element(By.CSS_SELECTOR, "#start").click()
    until(driver, "document.querySelector('#state').innerText.includes('Done')")
    time.sleep(1)
    shoot(driver, folder / f"file-{name}.png", width)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the pictures of the Space.")
    parser.add_argument("--model", default="results/quickstart")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    process, address = serve(arguments.model)
    try:
        urllib.request.urlopen(address).read()
        for width, scheme in ((1280, "light"), (390, "dark")):
            driver = browser()
            try:
                views(driver, address, width, scheme, arguments.output)
            finally:
                driver.quit()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
