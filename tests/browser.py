"""Headless Chromium for the tests of pages; they are skipped where it is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

WIDTHS = (1280, 400)


class Browser:
    """A few steps over selenium's driver."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.js = driver.execute_script

    def open(self, page: Path, *, width: int = 1280, scheme: str = "light") -> None:
        """Opens a file without a network, in a window of ``width`` CSS pixels."""
        cdp = self.driver.execute_cdp_cmd
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        cdp("Emulation.setDeviceMetricsOverride", metrics)
        scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
        cdp("Emulation.setEmulatedMedia", {"features": [scheme_feature]})
        cdp("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        cdp("Network.emulateNetworkConditions", offline)
        self.driver.get(page.as_uri())

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def wait(self, script: str) -> Any:
        """The value of a JavaScript expression as soon as it is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, 20).until(lambda _: self.js(f"return {script}"))

    def settle(self) -> None:
        """Waits for the frame in which the page draws what was asked before."""
        self.driver.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(() => arguments[0]()))"
        )

    def log(self) -> list[str]:
        """Console messages since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def tab_through(self) -> list[str]:
        """Presses Tab from the top of the page to its end; the part or name of what is reached.

        Each control must say what it is and lie within the width of the window.
        """
        from selenium.webdriver.common.action_chains import ActionChains
        from selenium.webdriver.common.keys import Keys

        self.js("document.body.tabIndex = -1; document.body.focus()")
        reached: list[str] = []
        for _ in range(40):
            ActionChains(self.driver).send_keys(Keys.TAB).perform()
            element = self.driver.switch_to.active_element
            if element.tag_name == "body":
                return reached
            reached.append(element.get_attribute("data-part") or element.get_attribute("name"))
            assert element.accessible_name, element.get_attribute("outerHTML")[:200]
            left, right, width = self.js("""
                const box = document.activeElement.getBoundingClientRect();
                return [box.left, box.right, window.innerWidth]""")
            assert 0 <= left < right <= width, f"{reached[-1]}: from {left} to {right} of {width}"
        raise AssertionError(f"Tab does not leave the page: {reached}")

    def overflow(self) -> int:
        """CSS pixels by which the page is wider than the window."""
        return self.js("return document.documentElement.scrollWidth - window.innerWidth")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    selenium = pytest.importorskip("selenium", reason="needs selenium: pip install selenium")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.webdriver.Chrome(options=options, service=Service(driver_path))
    driver.set_script_timeout(20)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
