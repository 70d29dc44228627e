"""Take the README's pictures of the page from a running server.

tenrec-jax serve runs/movielens/recommender &
python experiments/screenshots/take.py --address http://127.0.0.1:8080/

Needs chromium, chromedriver, selenium (the extra dev) and Pillow (which the extra plot brings). The pictures are written beside this
file. One of them shows what the first user's like changes, which the server is told: take one that may forget it.
"""

import argparse
import io
import shutil
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

FOLDER, SECONDS, COLOURS = Path(__file__).parent, 30, 128
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
LIKE = "document.querySelector('.item:nth-child(3) [data-action=like]').click()"


class Picture(NamedTuple):
    """What a picture shows: `fragment` of the page's address, a script that acts in it, and the condition after which it is taken."""

    name: str
    width: int
    height: int
    theme: str
    fragment: str
    script: str
    ready: str


PICTURES = (
    Picture(
        "desktop", 1280, 1000, "light", "#k=12&diversity=0.2", LIKE, "document.querySelector('.mark.new, .mark.up')"
    ),
    Picture("phone", 390, 844, "dark", "#k=12", "document.getElementById('known').scrollIntoView()", "true"),
    Picture("run", 1280, 1000, "light", "#tab=run", "", "document.querySelector('.chart')"),
)


def main() -> None:
    """Take them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--address", default="http://127.0.0.1:8080/", help="of a running server (default: %(default)s)"
    )
    address = parser.parse_args().address
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        for picture in PICTURES:
            _take(driver, address, picture)
    finally:
        driver.quit()


def _take(driver: webdriver.Chrome, address: str, picture: Picture) -> None:
    waiting = WebDriverWait(driver, SECONDS)
    metrics = {
        "width": picture.width,
        "height": picture.height,
        "deviceScaleFactor": 1.5,
        "mobile": picture.width < 500,
    }
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    # Without motion nothing is caught half way.
    features = {"prefers-color-scheme": picture.theme, "prefers-reduced-motion": "reduce"}
    media = {"features": [{"name": name, "value": value} for name, value in features.items()]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.get("about:blank")
    driver.get(address + picture.fragment)
    waiting.until(lambda driver: driver.execute_script("return document.querySelector('.item')"))
    driver.execute_script(picture.script)
    waiting.until(lambda driver: driver.execute_script(f"return !!({picture.ready})"))
    path = FOLDER / f"{picture.name}.png"
    # Flat colours: a palette halves the file and cannot be told from the original.
    picture_of = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    picture_of.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
