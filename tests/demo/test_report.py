from __future__ import annotations

import json
import math
import re

import pytest
from tests.browser import WIDTHS, browser  # noqa: F401
from tests.inspect.sample import sample_pieces, sample_trace

from nsa.demo import DemoSettings
from nsa.demo.report import Report, TwinReport, report_html, verdict
from nsa.train.validation import PositionLosses


def losses(loss: float) -> PositionLosses:
    return PositionLosses(
        loss=loss,
        num_tokens=1234,
        num_documents=3,
        bin_edges=(1, 64, 128, 512),
        bin_losses=(loss + 1, loss, math.nan),
        bin_tokens=(700, 534, 0),
    )


def make_report(nsa: float = 4.5, dense: float = 4.25, sample: str = " the <b>whale</b>") -> Report:
    twins = [
        TwinReport(
            name=name,
            num_parameters=1_000_000,
            tokens_per_second=2500.4,
            losses=[(1, 6.0), (10, 5.0)],
            validation_losses=steps,
            validation=losses(loss),
            sample=sample,
        )
        for name, loss, steps in (
            ("nsa", nsa, [(5, 5.0), (10, nsa)]),
            ("dense", dense, [(10, dense)]),
        )
    ]
    return Report(
        settings=DemoSettings(),
        twins=twins,
        unigram_entropy=5.75,
        prompt="CHAPTER 133 & so on",
        trace=sample_trace(),
        pieces=sample_pieces(),
        seconds=270.0,
    )


@pytest.mark.parametrize(
    ("nsa", "dense", "sentence", "gap"),
    [
        pytest.param(4.5, 4.25, "<b>0.250 nats per token</b> behind", "+0.250", id="worse"),
        pytest.param(4.25, 4.5, "<b>0.250 nats per token</b> ahead of", "-0.250", id="better"),
    ],
)
def test_the_gap_is_shown_as_it_is(nsa, dense, sentence, gap):
    page = report_html(make_report(nsa, dense))
    assert sentence in page
    assert f"<dd>{gap}<small>" in page
    assert f"<dd>{5.75 - nsa:.3f}<small>of 5.750 nats" in page
    assert "1,234 held-out tokens" in page


@pytest.mark.parametrize(
    ("loss", "learned", "sentence"),
    [
        pytest.param(
            4.75,
            True,
            "The sparse model learned: its held-out loss of 4.750 nats per token is 1.000 under "
            "the unigram entropy of 5.750",
            id="just-enough",
        ),
        pytest.param(4.76, False, "The sparse model did not learn: its", id="too-little"),
        pytest.param(6.0, False, "is 0.250 over the unigram entropy", id="worse-than-none"),
        pytest.param(math.nan, False, "expected at least 1.000 under it.", id="diverged"),
    ],
)
def test_the_page_says_whether_the_model_learned(loss, learned, sentence):
    report = make_report(nsa=loss)
    assert report.learned == learned
    assert sentence in verdict(report)
    assert verdict(report) in report_html(report)


def test_text_of_models_and_prompts_is_escaped():
    page = report_html(make_report())
    assert "<span>CHAPTER 133 &amp; so on</span> the &lt;b&gt;whale&lt;/b&gt;</p>" in page
    assert "<b>whale" not in page


def test_curves_share_their_steps_and_gaps_are_gaps():
    figures = re.findall(
        r"<figure data-chart><script[^>]*>(.*?)</script>", report_html(make_report())
    )
    training, held_out, position = map(json.loads, figures)
    assert training["x"] == [1, 10]
    assert [s["values"] for s in held_out["series"]] == [[5.0, 4.5], [None, 4.25]]
    assert position["x"] == [32.5, 96, 320]
    assert position["series"][0]["values"] == [5.5, 4.5, None]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_works_by_keyboard(width, tmp_path, browser):  # noqa: F811
    from selenium.webdriver.common.keys import Keys

    path = tmp_path / "report.html"
    path.write_text(report_html(make_report()), encoding="utf-8")
    ready = "document.querySelector('[data-inspector]').dataset.ready"
    query = "Number(document.querySelector('[data-part=map]').getAttribute('aria-valuenow'))"
    browser.open(path, width=width)
    browser.wait(ready)
    browser.settle()
    assert {"metric", "cell", "view", "map", "text"} <= set(browser.tab_through())
    first = "document.querySelector('[name=cell][value=\"0-0\"]')"
    browser.js(f"{first}.click(); {first}.focus()")
    browser.wait(f"{ready} === '0-0'")
    browser.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    browser.wait(f"{ready} === '0-1'")
    before = browser.js(f"return {query}")
    browser.find("[data-part=map]").send_keys(Keys.ARROW_UP)
    browser.settle()
    assert browser.js(f"return {query}") == before - 1
    assert browser.log() == []
    assert browser.overflow() <= 0
