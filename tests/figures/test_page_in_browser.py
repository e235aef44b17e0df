"""The attention page in a browser, by what a person can do and see."""

from __future__ import annotations

import base64
import io
import shutil
import time

import matplotlib
import numpy as np
import pytest
from page_helpers import COLOURS, HOSTILE, cosines, make_exhibit, write_exhibits
from PIL import Image

from dino_xcit.figures.page import compress

pytestmark = pytest.mark.browser


CHROMIUM, DRIVER = (
    shutil.which("chromium") or shutil.which("google-chrome"),
    shutil.which("chromedriver"),
)
FIRST, SECOND = make_exhibit(name=HOSTILE), make_exhibit(1, size=(32, 32), patch=4, heads=2, axes=0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    quiet = [
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
    ]
    profile = f"user-data-dir={tmp_path_factory.mktemp('profile')}"
    for flag in [
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "window-size=1280,900",
        *quiet,
        profile,
    ]:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page in a browser, by what a person can do and see."""

    def __init__(self, browser, path):
        self.browser = browser
        browser.get(path.as_uri())
        self.wait("return document.querySelectorAll('#heads button').length > 0")

    def js(self, code, *arguments):
        return self.browser.execute_script(code, *arguments)

    def wait(self, condition):
        end = time.monotonic() + 10
        while not self.js(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def head(self, choice):
        return self.find(f"#heads button[data-head='{choice}']")

    def canvas(self):
        return self.find("#canvas")

    def text(self, name):
        return self.find(f"#{name}").text

    def press(self, *keys):
        self.browser.switch_to.active_element.send_keys(*keys)

    def hover(self, element):
        self.actions().move_to_element(element).perform()

    def actions(self):
        from selenium.webdriver import ActionChains

        return ActionChains(self.browser, duration=0)

    def click_patch(self, row, column, shown=FIRST):
        """A click with the mouse on the middle of the patch, which may be cut."""
        H, W = shown.image.shape[:2]
        y, x = (
            (min(i * shown.patch + shown.patch, size) + i * shown.patch) / 2
            for i, size in ((row, H), (column, W))
        )
        box = self.canvas().rect
        offset = int((x / W - 0.5) * box["width"]), int((y / H - 0.5) * box["height"])
        self.actions().move_to_element_with_offset(self.canvas(), *offset).click().perform()

    def map(self):
        return self.canvas().get_attribute("data-map")

    def view(self):
        return self.canvas().get_attribute("data-view")

    def values(self):
        return np.array(self.js("return Array.from(page.shown().values)"))

    def kept(self):
        return np.array(self.js("return page.kept()"), dtype=bool)

    def picture(self):
        return self.js("return document.getElementById('canvas').toDataURL()")

    def pixels(self):
        """uint8 (height, width, 3) of the main canvas."""
        return np.asarray(
            Image.open(io.BytesIO(base64.b64decode(self.picture().split(",")[1]))).convert("RGB")
        )

    def pressed(self):
        return [
            button.get_attribute("data-head")
            for button in self.browser.find_elements("css selector", "#heads [aria-pressed=true]")
        ]


def keys():
    from selenium.webdriver import Keys

    return Keys


def in_range(values):
    """Values of 30 patches in the range that leaves out the lowest and the highest (CLIP)."""
    low, high = np.sort(values.ravel())[[1, -2]]
    return ((values - low) / (high - low)).clip(0, 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_exhibits(
        tmp_path_factory.mktemp("page") / "page.html", FIRST, SECOND, title=f"Maps {HOSTILE}"
    )


@pytest.fixture
def page(browser, path):
    yield (opened := Page(browser, path))
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert opened.js(
        "return performance.getEntries().filter(e => e.name.includes('://')).map(e => e.name)"
    ) == [path.as_uri()]


def official_mask(values, threshold):
    """Of visualize_attention.py: patches whose ascending running sum exceeds 1 - threshold."""
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(values[order])
    mask = np.zeros(len(values), dtype=bool)
    mask[order] = cumulated / cumulated[-1] > 1 - threshold
    return mask


def test_a_hostile_name_is_text(page):
    assert page.js("return window.hacked") is None
    assert page.find("h1").text == f"Maps {HOSTILE}"
    assert HOSTILE in page.text("notes")
    assert page.find("#thumbnails img").get_attribute("alt") == HOSTILE


def test_the_mean_is_shown_first_with_its_entropy_and_the_share_of_patches(page):
    assert (page.map(), page.view(), page.pressed()) == ("mean", "overlay", ["mean"])
    mean = FIRST.attention.mean(0).ravel()
    np.testing.assert_allclose(page.values(), mean, atol=FIRST.attention.max() / 131070)
    entropy = -(mean / mean.sum() * np.log(mean / mean.sum())).sum()
    assert f"entropy {entropy:.2f} of at most {np.log(30):.2f} nats" in page.text("caption")
    assert page.head("mean").text.split("\n") == ["mean", f"{entropy:.2f} nats", "patches 80 %"]
    assert page.text("high") == f"{np.sort(mean)[-2]:.3g} (attention weight)"


def test_a_head_is_shown_while_the_mouse_is_on_it(page):
    before = page.picture()
    page.hover(page.head(1))
    assert (page.map(), page.pressed()) == ("head 1", ["mean"])
    assert page.picture() != before
    np.testing.assert_allclose(
        page.values(), FIRST.attention[1].ravel(), atol=FIRST.attention[1].max() / 131070
    )
    page.hover(page.find("h1"))
    assert page.map() == "mean"
    assert page.picture() == before


def test_a_click_keeps_a_head(page):
    page.head(2).click()
    page.hover(page.head("all"))
    assert page.map() == "all heads"
    page.hover(page.find("h1"))
    page.js("document.activeElement.blur()")
    assert (page.map(), page.pressed()) == ("head 2", ["2"])


def test_a_tap_keeps_a_head(page):
    from selenium.webdriver.common.action_chains import ActionBuilder
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    tap = ActionBuilder(page.browser, mouse=PointerInput("touch", "finger"), duration=0)
    tap.pointer_action.move_to(page.head(1)).pointer_down().pointer_up()
    tap.perform()
    assert (page.map(), page.pressed()) == ("head 1", ["1"])


def test_heads_by_keyboard(page):
    page.js("document.querySelector('[data-head=mean]').focus()")
    page.press(keys().ARROW_RIGHT, keys().ARROW_RIGHT)
    assert (page.map(), page.pressed()) == ("head 1", ["mean"])
    page.press(keys().ENTER)
    assert page.pressed() == ["1"]
    page.press(keys().ARROW_LEFT)
    assert (page.map(), page.pressed()) == ("head 0", ["1"])
    page.press("2")  # wins over the focus
    assert (page.map(), page.pressed()) == ("head 2", ["2"])
    page.press("1")
    page.js("document.activeElement.blur()")
    assert page.map() == "head 1"
    for key, label in [
        ("2", "head 2"),
        ("c", "all heads"),
        ("m", "mean"),
        ("7", "mean"),
        ("0", "head 0"),
    ]:
        page.press(key)
        assert page.map() == label


def test_views_by_key_and_by_radio_button(page):
    pictures = {page.picture()}
    for view in ("map", "mask"):
        page.press("v")
        assert page.view() == view
        assert page.find(f"input[value={view}]").is_selected()
        pictures.add(page.picture())
    page.find("input[value=map]").click()
    assert page.view() == "map"
    assert page.picture() in pictures
    assert len(pictures) == 3


def centres(shown, pixels):
    """(h w, 3): pictures of the image have these colours in the middle of patches."""
    H, W = shown.image.shape[:2]
    h, w = shown.attention.shape[1:]
    rows, columns = (
        np.minimum((np.arange(n) + 0.5) * shown.patch, size - 1) + 0.5
        for n, size in ((h, H), (w, W))
    )
    rows, columns = (
        (rows * pixels.shape[0] / H).astype(int),
        (columns * pixels.shape[1] / W).astype(int),
    )
    return pixels[rows[:, None], columns].reshape(-1, 3).astype(int)


def test_the_map_has_the_colours_of_its_values(page):
    page.press("1", "v")
    values = page.values()
    expected = matplotlib.colormaps["viridis"](
        np.round(255 * in_range(values)).astype(int), bytes=True
    )[:, :3]
    low = np.sort(values)[1]
    assert float(page.text("low")) == pytest.approx(low, rel=0.06)
    assert centres(FIRST, page.pixels()).tolist() == expected.tolist()
    before = page.picture()
    page.find("#smooth").click()
    assert page.picture() != before


def test_all_heads_have_the_colour_of_the_strongest(page):
    page.press("c", "v")
    relative = np.stack([in_range(head) for head in FIRST.attention])
    strongest = relative.argmax(0).ravel()
    expected = 255 * np.array(COLOURS)[strongest] * relative.max(0).ravel()[:, None]
    np.testing.assert_allclose(centres(FIRST, page.pixels()), expected, atol=2.5)


def test_overlay_blends_by_the_opacity(page):
    page.press("0")
    page.find("#opacity").send_keys(keys().HOME)
    assert page.text("opaque") == "0 %"
    assert centres(FIRST, page.pixels()).tolist() == centres(FIRST, FIRST.image).tolist()
    page.js("document.activeElement.blur()")
    page.press("c")  # over grey
    assert np.ptp(centres(FIRST, page.pixels()), axis=1).max() <= 1
    assert page.pixels().mean() == pytest.approx(FIRST.image.mean(), rel=0.1)
    page.press("0")
    page.find("#opacity").send_keys(keys().END)
    assert page.text("opaque") == "100 %"
    page.js("document.activeElement.blur()")
    overlay = page.picture()
    page.press("v")
    assert page.picture() == overlay


@pytest.mark.parametrize("choice", ["m", "0", "2"])
def test_the_mask_is_official_dinos(page, choice):
    page.press(choice, "v", "v")
    values = page.values()
    mask = official_mask(values, 0.6)
    assert page.kept().tolist() == mask.tolist()
    assert page.text("kept") == f"60 % of the mass: {mask.sum()} of 30 patches"
    page.find("#threshold").send_keys(keys().ARROW_RIGHT * 25)
    mask = official_mask(values, 0.85)
    assert page.kept().tolist() == mask.tolist()
    assert page.text("kept") == f"85 % of the mass: {mask.sum()} of 30 patches"
    page.js("document.activeElement.blur()")
    pixels = centres(FIRST, page.pixels())
    assert pixels[mask].tolist() == centres(FIRST, FIRST.image)[mask].tolist()
    assert np.ptp(pixels[~mask], axis=1).max() <= 1  # grey
    assert pixels[~mask].max() <= 0.31 * 255
    assert pixels[~mask].mean() > 0.1 * 255


def test_the_mask_of_all_heads_is_that_of_any(page):
    masks, values = [], []
    for head in "012":
        page.press(head)
        masks.append(official_mask(page.values(), 0.6))
        values.append(page.values() / page.values().max())
    page.press("c", "v", "v")
    assert page.kept().tolist() == np.any(masks, axis=0).tolist()
    page.find("#opacity").send_keys(keys().END)
    strongest = np.where(masks, values, -1).argmax(0)
    expected = np.round(255 * np.array(COLOURS))[strongest]
    kept = np.any(masks, axis=0)
    assert centres(FIRST, page.pixels())[kept].tolist() == expected[kept].tolist()


def test_a_click_on_a_patch_shows_what_is_similar(page):
    before = page.picture()
    page.click_patch(4, 5)
    assert page.map() == "similarity"
    assert "row 4, column 5" in page.text("caption")
    expected = cosines(FIRST.features)[4 * 6 + 5]
    np.testing.assert_allclose(page.values(), expected, atol=0.02)
    quantised = np.moveaxis(compress(FIRST.features)[0], -1, 0)
    np.testing.assert_allclose(page.values(), cosines(quantised)[4 * 6 + 5], atol=1e-12)
    assert page.text("low") == f"{page.values().min():.2f}"
    assert page.text("kept").startswith(f"cosine ≥ 0.60: {(page.values() >= 0.6).sum()} of 30")
    assert page.picture() != before
    page.hover(page.head(0))
    assert page.map() == "head 0"
    page.hover(page.find("h1"))
    assert page.map() == "similarity"
    page.press(keys().ESCAPE)
    assert page.map() == "mean"
    assert page.picture() == before
    page.click_patch(0, 0)
    page.find("#back").click()
    assert page.map() == "mean"
    assert not page.find("#back").is_displayed()


def test_a_patch_by_keyboard(page):
    page.js("document.getElementById('canvas').focus()")
    page.press(
        keys().ARROW_DOWN,
        keys().ARROW_RIGHT,
        keys().ARROW_RIGHT,
        keys().ARROW_LEFT,
        keys().ARROW_DOWN,
        keys().ARROW_UP,
    )
    assert page.text("readout") == f"row 1, column 1: {FIRST.attention.mean(0)[1, 1]:.3g}"
    page.press(keys().ENTER)
    np.testing.assert_allclose(page.values(), cosines(FIRST.features)[7], atol=0.02)
    page.press(keys().ARROW_UP * 3)  # stays in the image
    assert page.text("readout").startswith("row 0, column 1")


def test_similarity_of_blocks_of_a_fine_grid(browser, tmp_path):
    fine = make_exhibit(size=(2, 300), patch=2)
    page = Page(browser, write_exhibits(tmp_path / "page.html", fine))
    page.js("page.state.cursor = 149; document.getElementById('canvas').focus()")
    page.press(keys().ENTER)
    assert "Similarity is computed on blocks of 2" in page.text("notes")
    pooled = fine.features.reshape(10, 1, 75, 2).mean(3)
    np.testing.assert_allclose(page.values(), cosines(pooled)[74], atol=0.02)


def test_images_by_click_and_key(page):
    page.press("2")
    first = page.picture()
    page.find("#thumbnails button:nth-child(2)").click()
    page.wait("return document.getElementById('canvas').dataset.exhibit === '1'")
    assert (page.map(), len(page.values())) == ("mean", 64)  # it has no head 2
    assert "cat.png" in page.text("notes")
    page.js("document.querySelector('[data-head=\"1\"]').focus()")
    page.press(keys().PAGE_DOWN)
    page.wait("return document.getElementById('canvas').dataset.exhibit === '0'")
    assert page.map() == "head 1"  # the focus stays
    page.press(keys().PAGE_UP)
    page.wait("return document.getElementById('canvas').dataset.exhibit === '1'")
    page.js("document.activeElement.blur()")
    page.click_patch(1, 1, SECOND)  # has no features
    assert page.map() == "mean"
    for back in (keys().PAGE_DOWN, keys().PAGE_UP):
        page.js("document.activeElement.blur()")
        page.press(back)
        page.wait("return document.getElementById('canvas').dataset.exhibit === '0'")
        page.press("2")
        page.hover(page.find("h1"))
        assert page.picture() == first
        page.find("#previous").click()
        page.wait("return document.getElementById('canvas').dataset.exhibit === '1'")


def test_an_image_that_decodes_late_is_not_shown(page):
    late = "{ decode: () => new Promise(done => setTimeout(done, 100)) }"
    page.js(f"page.data.exhibits[1].picture = {late}")
    page.press(keys().PAGE_DOWN, keys().PAGE_UP)
    page.js("return new Promise(done => setTimeout(done, 150))")
    assert (page.js("return page.state.exhibit"), len(page.values())) == (0, 30)


def test_the_view_is_saved_as_png(page, tmp_path):
    page.browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    page.press("1", "v")
    pixels = page.pixels()
    page.find("#save").click()
    end = time.monotonic() + 10
    while not (saved := list(tmp_path.glob("*.png"))) and time.monotonic() < end:
        time.sleep(0.02)
    assert saved[0].name.endswith("head_1_map.png")
    assert np.array_equal(np.asarray(Image.open(saved[0]).convert("RGB")), pixels)


@pytest.mark.parametrize(("width", "height"), [(360, 640), (844, 390), (1280, 900)])
def test_the_page_fits_its_window_and_its_pixels_the_screen(page, width, height):
    try:
        for ratio in (2, 3):  # with the window's size, then alone
            screen = {
                "width": width,
                "height": height,
                "deviceScaleFactor": ratio,
                "mobile": width < 1000,
            }
            page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            end = time.monotonic() + 10
            canvas = "document.getElementById('canvas')"
            density = f"return {canvas}.width / {canvas}.clientWidth"
            while abs(page.js(density) - ratio) > 0.02:
                assert time.monotonic() < end
                page.browser.get_screenshot_as_png()  # makes the browser notice the new ratio
            assert page.js("return [innerWidth, devicePixelRatio]") == [width, ratio]
            assert page.js("return document.scrollingElement.scrollWidth") <= width
            box = page.canvas().rect
            assert box["height"] < height
            assert box["width"] >= 280
            assert box["width"] / box["height"] == pytest.approx(45 / 37, rel=0.02)
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_one_image_without_features_has_no_thumbnails(browser, tmp_path):
    page = Page(browser, write_exhibits(tmp_path / "page.html", SECOND, threshold=0.333))
    assert not page.find("#images").is_displayed()
    assert not page.find("#similarity-key").is_displayed()
    assert page.text("kept").startswith("33.3 % of the mass")
    page.press("v", "v")
    assert page.kept().tolist() == official_mask(page.values(), 0.333).tolist()
