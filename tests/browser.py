"""Open a report.html in headless Chromium as a reader would: filter, change axes, hover, click, copy. Not a test module:

    python tests/browser.py results/report/report.html SCREENSHOT.png

Needs Debian's chromium and chromium-driver and the package selenium. Prints what it saw; exits 1 when something is off.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--window-size=1300,1500",
]


def main(page: Path, screenshot: Path) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            walk(driver, page, screenshot)
        finally:
            driver.quit()


def walk(driver: webdriver.Chrome, page: Path, screenshot: Path) -> None:
    started = time.perf_counter()
    driver.get(page.resolve().as_uri())
    count = driver.find_element(By.ID, "count")
    print(f"opened in {time.perf_counter() - started:.1f} s: {count.text}")
    errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors
    driver.save_screenshot(str(screenshot))
    points = driver.find_elements(By.CSS_SELECTOR, "#figure .scatterlayer .points path")
    print(f"{len(points)} points drawn")

    target = points[len(points) // 2]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", target)
    ActionChains(driver).move_to_element(target).pause(0.5).perform()
    hover = driver.find_element(By.CSS_SELECTOR, "#figure .hoverlayer").text
    print("hover:", hover.replace("\n", " | "))
    driver.save_screenshot(str(screenshot.with_stem(screenshot.stem + "-hover")))
    ActionChains(driver).move_to_element(target).click().pause(0.5).perform()
    command, said = (driver.find_element(By.ID, name).text for name in ("command", "said"))
    print("click:", said, command)
    assert said == "Copied." and command.startswith("python -m sweep")
    search = driver.find_element(By.ID, "row").text
    print("row:", search)

    before = count.text
    driver.find_element(By.CSS_SELECTOR, "#filters input").click()
    print("after a filter:", count.text)
    assert count.text != before
    driver.find_element(By.CSS_SELECTOR, "#filters input").click()
    assert count.text == before
    for axis in ("x", "y"):
        choice = Select(driver.find_element(By.ID, axis))
        choice.select_by_index(len(choice.options) - 1)
    titles = [e.text for e in driver.find_elements(By.CSS_SELECTOR, "#figure .g-xtitle, #figure .g-ytitle")]
    print("other axes:", titles)
    upper = Select(driver.find_element(By.ID, "to"))
    upper.select_by_index(1)
    print("sparsity up to the second value:", count.text)
    driver.find_element(By.CSS_SELECTOR, "#body button").click()
    time.sleep(0.3)
    print("button:", driver.find_element(By.ID, "said").text, driver.find_element(By.ID, "command").text)
    errors = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, errors


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
