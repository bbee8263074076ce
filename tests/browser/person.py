"""A browser without a window, and what a person does in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

WIDTH, HEIGHT = 1400, 900
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage"),
    *("no-first-run", "disable-background-networking", "disable-component-update"),
    *("disable-sync", "hide-scrollbars", "no-proxy-server", f"window-size={WIDTH},{HEIGHT}"),
)
LOADS_S = 90.0
SETTLES_S = 4.0
"""Time for a page's movements to end before a picture."""
COLOURS = 128
"""Of a picture; pages of flat colours look the same with so few, at a third of the size."""


class Person:
    """Somebody with a browser, who waits until things are there."""

    def __init__(self, browser: webdriver.Chrome, pictures: Path) -> None:
        self._browser = browser
        self._pictures = pictures

    def visit(self, url: str) -> None:
        self._browser.get("about:blank")  # else only the part behind the # may change
        self._browser.get(url)

    def prefers(self, scheme: str) -> None:
        """Light or dark pages."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def runs(self, script: str) -> object:
        """What a script on the page returns."""
        return self._browser.execute_script(script)

    def sees(self, *texts: str, wait_s: float = LOADS_S) -> str:
        """The page's text, once all of `texts` are in it; an error says which never came."""
        for text in texts:
            self._until(lambda _, text=text: text in self.text(), f"'{text}' on the page", wait_s)
        return self.text()

    def text(self) -> str:
        return str(self._browser.execute_script("return document.body.innerText"))

    def find(self, xpath: str, wait_s: float = LOADS_S) -> WebElement:
        """The first that is shown."""
        self._until(lambda _: self._shown(xpath), xpath, wait_s)
        return self._shown(xpath)[0]

    def all(self, xpath: str) -> list[WebElement]:
        return self._shown(xpath)

    def click(self, xpath: str) -> None:
        element = self.find(xpath)
        self._browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def write(self, element: WebElement, text: str) -> None:
        """Put `text` in the place of what a field says."""
        element.clear()
        element.send_keys(text)

    def goes_where(self, xpath: str) -> str:
        """The address behind a link."""
        return str(self.find(xpath).get_attribute("href"))

    def picture(self, name: str, *, height: int = HEIGHT) -> None:
        """Keep what is on the screen as a small PNG file."""
        self._browser.set_window_size(WIDTH, height)
        time.sleep(SETTLES_S)
        image = Image.open(BytesIO(self._browser.get_screenshot_as_png())).convert("RGB")
        self._browser.set_window_size(WIDTH, HEIGHT)
        self._pictures.mkdir(parents=True, exist_ok=True)
        image.quantize(COLOURS).save(self._pictures / f"{name}.png", optimize=True)

    def _shown(self, xpath: str) -> list[WebElement]:
        found = self._browser.find_elements(By.XPATH, xpath)
        return [one for one in found if one.is_displayed()]

    def _until(self, is_so: object, what: str, wait_s: float) -> None:
        said = f"{what} did not come within {wait_s:.0f} s"
        WebDriverWait(self._browser, wait_s, poll_frequency=0.5).until(is_so, said)


@contextmanager
def person(profile: Path, pictures: Path) -> Iterator[Person]:
    """Somebody with a browser whose files lie in `profile`; needs Debian's chromium-driver."""
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    options.binary_location = shutil.which("chromium") or ""
    # Found here, selenium asks nobody else for a driver.
    service = webdriver.ChromeService(shutil.which("chromedriver") or "")
    browser = webdriver.Chrome(options=options, service=service)
    try:
        yield Person(browser, pictures)
    finally:
        browser.quit()
