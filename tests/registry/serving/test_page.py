"""The page in headless Chromium: what a person sees and does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from dfu_mlflow.sampling import Sampler

from .conftest import Running, Serving, decoded

pytestmark = pytest.mark.slow


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test on any error of its script, and on any request to elsewhere."""
    page = browser.new_page(viewport={"width": 1180, "height": 760})
    errors: list[str] = []
    elsewhere: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda asked: elsewhere.append(asked.url) if not is_local(asked.url) else None)
    yield page
    page.close()
    assert errors == []
    assert elsewhere == []


def is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:"))


def saved(page: Page, position: int) -> bytes:
    """The PNG that a picture's link saves."""
    with page.expect_download() as download:
        page.locator("#pictures a").nth(position).click()
    return Path(download.value.path()).read_bytes()


def test_a_person_draws_pictures(page: Page, server: Running, bundle: Path) -> None:
    page.goto(f"http://127.0.0.1:{server.port}/")
    expect(page.locator(".notice")).to_contain_text("Synthetic.")
    expect(page.locator("#model")).to_have_text("Model dfu-sampler/1")
    assert page.locator("input[name=phase]").count() == 3
    page.get_by_label("P", exact=True).check()
    page.get_by_label("Seed", exact=True).fill("11")
    page.get_by_label("How many").fill("2")
    page.get_by_label("Guidance").fill("3.5")
    page.get_by_label("Steps").fill("4")
    page.get_by_role("button", name="Draw").click()
    expect(page.locator("#status")).to_contain_text("2 pictures in")
    expected = Sampler.load(bundle, "cpu").draw(["P", "P"], [11, 12], 3.5, 4)
    for position, image in enumerate(expected):
        shown = page.locator("#pictures img").nth(position)
        expect(shown).to_have_attribute("alt", f"Synthetic picture, phase P, seed {11 + position}")
        assert shown.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [16, 16]
        assert (decoded(saved(page, position)) == image).all()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("13")
    expect(page.locator("figcaption").first).to_contain_text("guidance 3.5, 4 steps, dfu-sampler/1")


def test_refusals_are_shown_and_a_token_opens(page: Page, serving: Serving) -> None:
    with serving(token="secret") as server:
        page.goto(f"http://127.0.0.1:{server.port}/")
        expect(page.locator("#status")).to_contain_text("DFU_TOKEN")
        expect(page.get_by_role("button", name="Draw")).to_be_disabled()
        page.get_by_label("Token").fill("secret")
        page.get_by_label("Token").press("Tab")
        expect(page.locator("#model")).to_have_text("Model dfu-sampler/1")
        page.get_by_role("button", name="Draw").click()
        expect(page.locator("#status")).to_contain_text("1 picture in")


def test_a_person_stops_a_long_one(page: Page, serving: Serving) -> None:
    with serving(max_steps=1000) as server:
        page.goto(f"http://127.0.0.1:{server.port}/")
        expect(page.locator("#model")).to_have_text("Model dfu-sampler/1")
        page.get_by_label("Steps").fill("1000")
        page.get_by_role("button", name="Draw").click()
        page.get_by_role("button", name="Stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        assert server.draw("I", 1, num_inference_steps=1).status == 200
