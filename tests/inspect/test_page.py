from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.browser import WIDTHS, Browser, browser  # noqa: F401
from tests.inspect.sample import CONFIG, sample_pieces, sample_trace

from nsa.inspect import Trace, render_page
from nsa.inspect.page import chart, document, headline, read_share

READY = "document.querySelector('[data-inspector]').dataset.ready"
QUERY = "Number(document.querySelector('[data-part=map]').getAttribute('aria-valuenow'))"


@pytest.fixture(scope="module")
def looked() -> Trace:
    return sample_trace()


@pytest.fixture(scope="module")
def page(looked: Trace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(render_page(looked, sample_pieces(), model_name="<tiny>"), encoding="utf-8")
    return path


@pytest.fixture
def opened(page: Path, browser: Browser) -> Browser:  # noqa: F811
    browser.open(page)
    browser.wait(READY)
    browser.settle()
    return browser


def press(opened: Browser, *keys: str) -> int:
    """Sends keys to the map and gives the token it then shows."""
    from selenium.webdriver.common.keys import Keys

    for key in keys:
        opened.find("[data-part=map]").send_keys(getattr(Keys, key))
        opened.settle()
    return opened.js(f"return {QUERY}")


def test_pieces_must_match_the_tokens(looked):
    with pytest.raises(ValueError, match="pieces: expected one string per token, 150, got 3"):
        render_page(looked, ["a", "b", "c"], model_name="m")


def test_page_names_no_address(page):
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text
    assert "https://" not in text
    assert "<tiny>" not in text


def test_chart_data_cannot_close_its_script():
    assert "</script><b>" not in chart({"label": "</script><b>"})


def test_read_share_counts_each_token_once(looked):
    for t in (0, 9, 40, 149):
        shares = []
        for layer in looked.layers.values():
            for blocks in layer.block_indices[t]:
                tokens = {s for b in blocks if b >= 0 for s in range(b * 8, b * 8 + 8)}
                tokens |= set(range(t - CONFIG.window_size + 1, t + 1))
                shares.append(len([s for s in tokens if 0 <= s <= t]) / (t + 1))
        assert read_share(looked)[t] == pytest.approx(np.mean(shares))


def test_headline_gives_the_averages(looked):
    kept = np.mean([looked.mean(layer.recall).mean() for layer in looked.layers.values()])
    assert f"That keeps <b>{kept:.0%}</b>" in headline(looked)


def test_headline_of_a_text_without_choice():
    assert "so short that every token reads all" in headline(sample_trace(20))


@pytest.mark.parametrize("num_tokens", [1, 5, 31])
def test_short_texts_make_a_page(num_tokens, tmp_path, browser):  # noqa: F811
    path = tmp_path / "short.html"
    looked = sample_trace(num_tokens, twin=False)
    path.write_text(
        render_page(looked, sample_pieces(num_tokens), model_name="m"), encoding="utf-8"
    )
    browser.open(path)
    browser.wait(READY)
    browser.settle()
    assert browser.log() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_loads_offline_without_errors_or_sideways_scrolling(page, browser, width, scheme):  # noqa: F811
    browser.open(page, width=width, scheme=scheme)
    browser.wait(READY)
    browser.settle()
    assert browser.log() == []
    assert browser.js("return performance.getEntriesByType('resource').length") == 0
    assert browser.overflow() <= 0
    assert len(browser.driver.get_screenshot_as_png()) > 20_000
    colors = browser.js("""
        const canvas = document.querySelector('[data-part=map-canvas]');
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        const seen = new Set();
        for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 3).join());
        return seen.size""")
    assert colors == 5, "chosen, forced, window, future and unread"


def test_the_page_holds_the_arrays_of_the_trace(opened, looked):
    for number, head in ((0, 1), (1, 0)):
        layer = looked.layers[number]
        got = opened.driver.execute_async_script(
            """
            const [key, done] = arguments;
            const meta = JSON.parse(document.querySelector('[data-meta]').textContent);
            unpackCell(document.querySelector(`[data-cell="${key}"]`).textContent, meta)
              .then((cell) => done(meta.tokens.map((_, t) => ({
                blocks: blocksOf(cell, t),
                gates: [0, 1, 2].map((i) => cell.gates[3 * t + i] / 255),
                recall: cell.curves.recall[t] / 255,
                twin: cell.curves.twin_recall[t] / 255,
                compressed: Array.from({length: meta.numCompressed},
                                       (_, i) => probability(cell, t, i)),
                shares: Array.from({length: meta.numBlocks}, (_, b) => blockShare(cell, t, b)),
              }))));""",
            f"{number}-{head}",
        )
        for t, row in enumerate(got):
            blocks = layer.block_indices[t, head]
            assert row["blocks"] == blocks[blocks >= 0].tolist()
            gates = layer.gates[t, 2 * head : 2 * head + 2].mean(0)
            np.testing.assert_allclose(row["gates"], gates, atol=0.003)
            assert row["recall"] == pytest.approx(layer.recall[t, head], abs=0.003)
            assert row["twin"] == pytest.approx(layer.twin_recall[t, head], abs=0.003)
            np.testing.assert_allclose(row["compressed"], layer.compressed[t, head], atol=0.005)
            weights = CONFIG.importance_weights()
            padded = np.pad(layer.compressed[t, head].astype(float), 8)
            for block, share in enumerate(row["shares"]):
                first = 8 + 2 * block - 1
                expected = padded[first : first + len(weights)] @ np.array(weights) / 2
                assert share == pytest.approx(expected, abs=0.02)


def test_keys_move_the_query(opened):
    start = opened.js(f"return {QUERY}")
    assert press(opened, "ARROW_DOWN") == start + 1
    assert press(opened, "ARROW_UP", "ARROW_UP") == start - 1
    assert press(opened, "PAGE_UP") == start - 1 - CONFIG.block_size
    assert press(opened, "HOME") == 0
    assert press(opened, "ARROW_UP") == 0
    assert press(opened, "END") == 149
    assert press(opened, "ARROW_RIGHT") == 149


def test_a_query_shows_its_passages_and_marks_its_text(opened, looked):
    t = press(opened, "END", "PAGE_UP")
    key = opened.js(f"return {READY}")
    number, head = map(int, key.split("-"))
    blocks = looked.layers[number].block_indices[t, head].tolist()
    shown = opened.js("""
        return [...document.querySelectorAll('[data-part=passages] button')]
          .map((button) => Number(button.dataset.first))""")
    assert shown == [b * CONFIG.block_size for b in blocks]
    marked = opened.js("""
        return [...document.querySelectorAll('[data-part=text] .slc, [data-part=text] .forced')]
          .map((span) => Number(span.firstChild.dataset.t))""")
    assert marked == [b * CONFIG.block_size for b in blocks]
    assert opened.find(".text .now").get_attribute("data-t") == str(t)
    assert opened.js("return document.querySelectorAll('.text .win').length") == 11
    assert f"Token {t}" in opened.find("[data-part=map]").get_attribute("aria-valuetext")
    text = opened.js("return document.querySelector('[data-part=text]').textContent")
    assert text == "".join(sample_pieces())


def test_hovering_looks_and_clicking_keeps(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    start = opened.js(f"return {QUERY}")
    target = opened.find("[data-part=map]")
    opened.js("arguments[0].scrollIntoView({block: 'center'})", target)
    ActionChains(opened.driver).move_to_element_with_offset(target, 5, -100).perform()
    opened.settle()
    looked_at = opened.js(f"return {QUERY}")
    assert looked_at != start
    assert "cannot see" in opened.find("[data-part=readout]").text
    ActionChains(opened.driver).move_to_element(opened.find("h1")).perform()
    opened.settle()
    assert opened.js(f"return {QUERY}") == start
    opened.js("arguments[0].scrollIntoView({block: 'center'})", target)
    ActionChains(opened.driver).move_to_element_with_offset(target, 5, -100).click().perform()
    ActionChains(opened.driver).move_to_element(opened.find("h1")).perform()
    opened.settle()
    assert opened.js(f"return {QUERY}") == looked_at


def test_arrow_keys_pick_layers_and_heads(opened):
    from selenium.webdriver.common.keys import Keys

    opened.js("document.querySelector('[name=cell][value=\"0-0\"]').focus()")
    opened.js("document.querySelector('[name=cell][value=\"0-0\"]').click()")
    opened.wait(f"{READY} === '0-0'")
    opened.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    opened.wait(f"{READY} === '0-1'")
    opened.driver.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
    opened.wait(f"{READY} === '1-0'")


@pytest.mark.parametrize("width", WIDTHS)
def test_tab_reaches_every_control_and_each_has_a_name(page, browser, width):  # noqa: F811
    browser.open(page, width=width)
    browser.wait(READY)
    browser.settle()
    assert {"metric", "cell", "view", "map", "text"} <= set(browser.tab_through())


def test_the_map_can_show_compressed_attention(opened):
    before = opened.js("return document.querySelector('[data-part=map-canvas]').toDataURL()")
    opened.js("document.querySelector('[name=view][value=compressed]').click()")
    opened.settle()
    after = opened.js("return document.querySelector('[data-part=map-canvas]').toDataURL()")
    assert before != after


def test_a_page_can_bring_its_own_charts(tmp_path, browser):  # noqa: F811
    spec = {
        "label": "Loss of both",
        "x": [0, 1, 2, 3],
        "xLabel": "step",
        "series": [
            {"name": "a", "color": "var(--slc)", "values": [3, 2, None, 1]},
            {"name": "b", "color": "var(--cmp)", "values": [3.5, 2, 1.5, 1.25], "mark": True},
        ],
    }
    path = tmp_path / "charts.html"
    path.write_text(document("Charts", chart(spec)), encoding="utf-8")
    browser.open(path)
    assert browser.find("svg").get_attribute("aria-label") == "Loss of both"
    shown = browser.js(
        "return [...document.querySelectorAll('.legend b')].map((b) => b.textContent)"
    )
    assert shown == ["1.00", "1.25"]
    assert browser.js("return document.querySelectorAll('circle').length") == 4
    assert browser.log() == []
