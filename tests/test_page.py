"""report.html in headless Chromium, as a reader uses it: looked at, narrowed, sorted, clicked. Skipped without a Chromium.

    SCREENSHOTS=FOLDER python -m pytest tests/test_page.py

keeps pictures of what was seen. Debian's chromium and chromium-driver, and the package selenium, are all that it needs.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import frames
from sweep.report import rendering

selenium = pytest.importorskip("selenium")
pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no chromium and chromedriver here"
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PICTURES = os.environ.get("SCREENSHOTS")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a dense model, two recipes with two seeds, and one with one; each answered the same 40 questions."""
    rows = pd.concat(
        [frames.rows(seeds=2, methods=frames.METHODS[:2]), frames.rows(seeds=1, methods=frames.METHODS[2:])[1:]],
        ignore_index=True,
    ).assign(config='{"benchmarks": {"tasks": ["capitals", "pydoc"]}}')
    rows["cell"] = [f"{i:016x}" for i in range(len(rows))]
    place = tmp_path_factory.mktemp("page")
    for name in ("cells", "samples"):
        (place / name).mkdir()
    rows.to_parquet(place / "cells" / "0-table-made.parquet")
    for row in rows.itertuples():
        right = np.arange(40) < 32 - 40 * row.sparsity
        table = {
            "task": "capitals",
            "document": [str(i) for i in range(40)],
            "metric": "acc",
            "value": right.astype(float),
        }
        pd.DataFrame(table).to_parquet(place / "samples" / f"{row.cell}.parquet")
    rendering.report([str(place)], place / "report", rendering.Wanted(formats=("png",)))
    return place / "report" / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    """The page, drawn, at 1,400 pixels."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.set_window_size(1400, 1500)
    browser.get(page.resolve().as_uri())
    WebDriverWait(browser, 60).until(lambda driver: len(marks(driver)) > 10)
    return browser


def marks(driver: Any) -> list[Any]:
    return driver.find_elements("css selector", "#figure .scatterlayer .points path")


def keep(driver: Any, name: str) -> None:
    if PICTURES:
        driver.save_screenshot(f"{PICTURES}/{name}.png")


def column(driver: Any, place: int) -> list[str]:
    return [cell.text for cell in driver.find_elements("css selector", f"#body tr td:nth-child({place})")]


def test_it_is_small_and_opens_without_an_error(opened: Any, page: Path) -> None:
    assert page.stat().st_size < 3e6
    keep(opened, "page-1400")
    assert not [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"]
    assert len(marks(opened)) == 2 * 13 and opened.find_element("id", "count").text == "13 points"
    titles = [
        e.text for e in opened.find_elements("css selector", "#figure .g-xtitle, #figure .g-x2title, #figure .g-ytitle")
    ]
    assert titles[0].startswith("decode speedup") and any(text.startswith("quality kept (%)") for text in titles)
    table = opened.find_elements("css selector", ".decision tbody tr")
    assert [line.find_element("css selector", "td").text for line in table] == [f"{n} % lost" for n in (1, 2, 5, 10)]


@pytest.mark.parametrize("width", [1400, 1000])
def test_nothing_is_cut_off(opened: Any, width: int) -> None:
    opened.set_window_size(width, 1500)
    opened.execute_script("window.dispatchEvent(new Event('resize'))")
    time.sleep(1)  # plotly waits until a window is no longer drawn to another size
    keep(opened, f"page-{width}")
    wide, there = opened.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= there
    tables = opened.execute_script(
        "return [...document.querySelectorAll('.decision, #rows')].map(t => [t.getBoundingClientRect().right, t.parentElement.getBoundingClientRect().right])"
    )
    assert all(right <= edge + 1 for right, edge in tables)


def test_choices_narrow_what_is_drawn(opened: Any) -> None:
    count = opened.find_element("id", "count")
    box = opened.find_element("css selector", '#filters input[data-column="criterion"]')
    box.click()
    assert count.text == "9 points" and len(marks(opened)) == 2 * 9
    box.click()
    opened.find_element("id", "single").click()
    assert count.text == "21 cells" and len(column(opened, 1)) == 21


def test_two_points_are_compared_by_clicking_them(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    figure = opened.find_element("id", "figure")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", figure)
    stars, others = marks(opened)[:1], marks(opened)
    assert stars
    places = sorted(others[:13], key=lambda mark: mark.rect["y"])
    for mark in (places[0], places[-1]):
        ActionChains(opened).move_to_element(mark).pause(0.2).click().pause(0.4).perform()
    keep(opened, "page-compared")
    first, second = (opened.find_element("id", f"slot{i}").text for i in (0, 1))
    assert "quality kept" in first and "quality kept" in second and first != second
    lines = {
        line.find_element("css selector", "td").text: line.text
        for line in opened.find_elements("css selector", "#pair tbody tr")
    }
    assert "second worse" in lines["accuracy, capitals"] and "%" in lines["accuracy, capitals"]
    assert "stored weights (MB)" in lines and "decode latency (ms per token)" in lines


def test_the_table_is_compared_and_sorted_by_the_keyboard(opened: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    head = opened.find_element("css selector", '#head button[data-column="sparsity"]')
    head.send_keys(Keys.ENTER)
    assert column(opened, 2) == sorted(column(opened, 2), key=float)
    opened.find_element("css selector", '#head button[data-column="sparsity"]').send_keys(Keys.ENTER)
    assert column(opened, 2) == sorted(column(opened, 2), key=float, reverse=True)
    state = opened.find_element("css selector", '#head th[aria-sort="descending"]').text
    assert state.startswith("sparsity")
    buttons = opened.find_elements("css selector", '#body button[data-do="compare"]')[:2]
    for label in [button.get_attribute("aria-label") for button in buttons]:
        opened.find_element("css selector", f'#body button[aria-label="{label}"]').send_keys(Keys.ENTER)
        assert opened.switch_to.active_element.get_attribute("aria-label") == label
    assert opened.find_elements("css selector", "#pair tbody tr")


def test_columns_are_those_asked_for_and_a_command_is_copied(opened: Any) -> None:
    opened.find_element("css selector", "#asked").find_element("xpath", "./preceding-sibling::summary").click()
    before = len(opened.find_elements("css selector", "#head th"))
    opened.find_element("css selector", '#asked input[value="macs_per_token"]').click()
    heads = [head.text for head in opened.find_elements("css selector", "#head th")]
    assert len(heads) == before + 1 and "MACs per token (millions, counted)" in heads
    opened.find_element("css selector", '#body button[data-do="copy"]').click()
    assert opened.find_element("id", "command").text.startswith("python -m sweep")
