"""The server's page in a real browser: what it shows is what the API answers."""

import json
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mirrors
import pytest
from launched import DEADLINE

from tenrec_jax.serving.app import create_app
from tenrec_jax.serving.batcher import BatchOptions
from tenrec_jax.serving.guard import Limits
from tenrec_jax.serving.pages import PAGE
from tenrec_jax.serving.server import listening, make_server
from tenrec_jax.serving.service import ServeOptions

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium, which the extra dev installs")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip("needs chromium and chromedriver; apt-get install chromium chromium-driver", allow_module_level=True)

TOKEN = "a-token-that-nobody-guesses"
USER, OTHER = 505, 404
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
# Text of which the contrast with what lies behind it is below WCAG AA.
FAINT = """
const rgba = text => { const context = new OffscreenCanvas(1, 1).getContext('2d'); context.fillStyle = text; context.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255]; };
const luminance = color => color.slice(0, 3).map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const behind = node => {
  for (; node; node = node.parentElement) { const color = rgba(getComputedStyle(node).backgroundColor); if (color[3] === 1) return color; }
  return [255, 255, 255, 1]; };
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let text; (text = walker.nextNode());) {
  const node = text.parentElement, style = getComputedStyle(node);
  if (!text.data.trim() || node.closest('.spoken, .skip, script, style, svg')) continue;
  if (!node.checkVisibility({ visibilityProperty: true })) continue;
  const [a, b] = [luminance(rgba(style.color)), luminance(behind(node))].sort((x, y) => y - x), ratio = (a + .05) / (b + .05);
  if (ratio < 4.5) found.push([text.data.trim(), style.color, ratio.toFixed(2)].join(' '));
}
return found;
"""
# The first answer arrives after all others, although it was given up.
HOLD_THE_FIRST = """
const real = window.fetch.bind(window); let held = false;
window.fetch = async (path, options) => {
  if (path !== '/v1/recommend' || held) return real(path, options);
  held = true;
  const response = await real(path, { ...options, signal: undefined });
  return new Promise(resolve => { window.release = () => { resolve(response); return true; }; });
};
"""
RESULTS = {
    "protocol": "per_user_order",
    "seed": 3,
    "is_synthetic": False,
    "counts": {"users": 5, "rows": 60, "catalogue": 39},
    "retrieval": {
        "recall@10": {"value": 0.25, "low": 0.125, "high": 0.375},
        "mrr": {"value": 0.5, "low": None, "high": None},
    },
    "ranking": {"click": {"auc": {"value": 0.75, "low": 0.625, "high": 0.875}, "rows": 60}},
    "baselines": {
        "popularity": {"retrieval": {"recall@10": {"value": 0.1, "low": 0.05, "high": 0.15}}},
        "item_rate": {"ranking": {"click": {"auc": {"value": 0.6, "low": 0.55, "high": 0.65}}}},
    },
    "index": {"kind": "exact"},
}


@contextmanager
def served(folder: Path, **options: Any) -> Iterator[str]:
    """The address of a server in a thread."""
    told = ServeOptions(folder, BatchOptions(max_batch=1), **options)
    failures: list[BaseException] = []
    server = make_server(create_app(told, failures.append), told)
    with listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join(DEADLINE)
    assert not failures


@pytest.fixture(scope="module")
def address(quick_compilation: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A recommender that lies in the folder of its run."""
    run = tmp_path_factory.mktemp("quickstart")
    (run / "eval").mkdir()
    (run / "eval" / "test.json").write_text(json.dumps(RESULTS))
    lines = [{"stage": "retrieval", "step": step, "loss": 1 / step} for step in (1, 2, 4)]
    lines += [{"stage": "ranking", "step": 1, "validation/click_auc": None}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with served(mirrors.write_recommender(run / "recommender")) as address:
        yield address


@pytest.fixture(scope="module")
def guarded(quick_compilation: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A recommender of text ids without a ranker, that lies in no run, behind a token."""
    folder = mirrors.write_recommender(tmp_path_factory.mktemp("alone") / "recommender", ranked=False, text_ids=True)
    with served(folder, limits=Limits(token=TOKEN)) as address:
        yield address


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str, *, fragment: str = "", width: int = 1280, theme: str = "light") -> None:
        """Open it anew, at a width and in a theme, and wait for a list, a message beside a field or a dialogue."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get("about:blank")
        self.driver.get(address + fragment)
        self.until("document.querySelector('.item, .error:not(:empty), dialog[open]')")

    @contextmanager
    def offline(self) -> Iterator[None]:
        """No server can be reached."""
        conditions = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.driver.execute_cdp_cmd("Network.enable", {})
        self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions | {"offline": True})
        try:
            yield
        finally:
            self.driver.execute_cdp_cmd("Network.emulateNetworkConditions", conditions | {"offline": False})

    def run(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def until(self, condition: str) -> None:
        """Wait until a JavaScript expression holds."""
        waiting = WebDriverWait(self.driver, DEADLINE, poll_frequency=0.02)
        waiting.until(lambda driver: driver.execute_script(f"return !!({condition})"), condition)

    def text(self, selector: str) -> str:
        return self.run(f"return document.querySelector({selector!r}).textContent")

    def find(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def press(self, *keys: str) -> None:
        """Type into what has the focus."""
        self.driver.switch_to.active_element.send_keys(*keys)

    def items(self) -> list[str]:
        return self.run("return [...document.querySelectorAll('#items .item')].map(row => row.dataset.item)")

    def until_told(self, text: str) -> None:
        self.until(f"document.getElementById('summary').textContent.includes({text!r})")

    def until_list_is(self, items: list[str]) -> None:
        rows = "[...document.querySelectorAll('#items .item')].map(row => row.dataset.item)"
        self.until(f"JSON.stringify({rows}) === {json.dumps(json.dumps(items, separators=(',', ':')))}")


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        yield Page(driver)
    finally:
        driver.quit()


def answer(address: str, **request: Any) -> dict[str, Any]:
    """What the API recommends."""
    body, kind = json.dumps(request | {"explain": True}).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{address}v1/recommend", body, kind), timeout=DEADLINE) as told:
        return json.load(told)


def expected(address: str, **request: Any) -> list[str]:
    return [str(item["item_id"]) for item in answer(address, **request)["items"]]


def test_the_page_shows_what_the_api_answers_for_a_chosen_user(page: Page, address: str) -> None:
    page.open(address, fragment="#k=8")
    first = page.run("return document.querySelector('#sample-users button').textContent")
    page.until_list_is(expected(address, user_id=int(first), k=8))
    page.find("#user").clear()
    page.find("#user").send_keys(str(USER), Keys.ENTER)
    told = answer(address, user_id=USER, k=8)
    page.until_list_is([str(item["item_id"]) for item in told["items"]])
    shown = page.run(
        "return [...document.querySelectorAll('#items .act span')].map(span => parseFloat(span.textContent.replace('< ', '')))"
    )
    probabilities = [100 * value for item in told["items"] for value in item["probabilities"].values()]
    assert shown == pytest.approx(probabilities, abs=0.051)
    assert page.text("#version") == told["version"]
    retrieved = page.run("return [...document.querySelectorAll('#found li')].map(row => row.dataset.item)")
    assert retrieved == [str(item["item_id"]) for item in told["retrieved"]]
    assert page.run("return document.querySelectorAll('#events li').length") == len(told["history"])
    page.driver.refresh()
    page.until(f"document.title.startsWith('user {USER} ')")
    assert page.run("return location.hash") == f"#user={USER}&k=8"
    page.driver.back()
    page.until(f"document.title.startsWith('user {first} ')")


def test_a_like_is_observed_and_changes_the_list(page: Page, address: str) -> None:
    page.open(address, fragment=f"#user={OTHER}&k=8")
    before, liked = page.items(), page.items()[2]
    page.find(f"[data-item='{liked}'] [data-action=like]").click()
    page.until_told(f"Liked {liked}:")
    after = answer(address, user_id=OTHER, k=8)
    assert page.items() == [str(item["item_id"]) for item in after["items"]] != before
    assert (after["history"][-1]["item_id"], after["history"][-1]["actions"]) == (int(liked), ["click", "like"])
    newest = page.text("#events li")
    assert newest.startswith(liked)
    assert "click, like" in newest
    gone = page.run("return [...document.querySelectorAll('#gone .chip')].map(chip => chip.textContent)")
    assert gone == [item for item in before if item not in page.items()]
    fresh = page.run("return [...document.querySelectorAll('.item:has(.mark.new)')].map(row => row.dataset.item)")
    assert fresh == [item for item in page.items() if item not in before]


def test_a_typed_history_grows_by_what_happens_and_can_be_shared(page: Page, address: str) -> None:
    known = [item["item_id"] for item in answer(address, user_id=USER)["history"][:2]]
    page.open(address)
    page.find("input[value=history]").send_keys(Keys.SPACE)
    page.find("#history").send_keys(f"{known[0]}, {known[1]}", Keys.ENTER)
    page.until_list_is(expected(address, history=known))
    shared = page.items()[0]
    page.find(f"[data-item='{shared}'] [data-action=share]").click()
    page.until_told(f"Shared {shared}:")
    history = [*known, {"item_id": int(shared), "actions": ["click", "share"]}]
    assert page.items() == expected(address, history=history)
    page.open(page.driver.current_url)
    page.until_list_is(expected(address, history=history))
    page.find("#history").send_keys(Keys.BACKSPACE, Keys.NULL)
    page.press(Keys.DELETE)
    page.until_list_is(expected(address, history=known))


def test_rules_tell_what_they_did(page: Page, address: str) -> None:
    page.open(address, fragment=f"#user={USER}")
    blocked = page.items()[1]
    page.find("#blocked_items").send_keys(blocked, Keys.ENTER)
    page.until(f"document.querySelector('[data-rule=blocked]')?.textContent.includes('{blocked}')")
    page.find("#diversity").send_keys(*[Keys.ARROW_RIGHT] * 10)
    page.until("document.querySelector('[data-rule=diversity]')")
    told = answer(address, user_id=USER, rules={"blocked_items": [int(blocked)], "diversity": 0.5})
    page.until_list_is([str(item["item_id"]) for item in told["items"]])
    moved = next(effect["moved"] for effect in told["effects"] if effect["rule"] == "diversity")
    assert f"{len(moved)} moved" in page.text("[data-rule=diversity]")
    page.find("#reset").click()
    page.until_list_is(expected(address, user_id=USER))


def test_errors_stand_beside_their_field_and_the_list_stays(page: Page, address: str) -> None:
    page.open(address, fragment=f"#user={USER}")
    items = page.items()
    for typed, part in (("17", "17"), ("nobody", "whole numbers")):
        page.find("#user").clear()
        page.find("#user").send_keys(typed, Keys.ENTER)
        page.until(f"document.getElementById('error-user').textContent.includes({part!r})")
        assert page.find("#user").get_attribute("aria-invalid") == "true"
    assert page.items() == items
    page.open(address, fragment=f"#user={USER}&k=5000")
    page.until("document.getElementById('error-k').textContent")
    page.find("#k").clear()
    page.find("#k").send_keys("3")
    page.until_list_is(items[:3])
    assert page.text("#error-k") == ""


def test_a_server_that_is_gone_is_told_and_asked_again(page: Page, address: str) -> None:
    page.open(address, fragment=f"#user={USER}")
    with page.offline():
        page.find("#again").click()
        page.until("!document.getElementById('banner').hidden")
        assert "does not answer" in page.text("#banner")
        assert page.items()
    page.find("#retry").click()
    page.until("document.getElementById('banner').hidden")
    page.until_told("Asked again:")


def test_an_older_answer_does_not_overwrite_a_newer_one(page: Page, address: str) -> None:
    page.open(address, fragment=f"#user={USER}")
    page.run(HOLD_THE_FIRST)
    page.find("#again").click()
    page.find("#user").clear()
    page.find("#user").send_keys("303", Keys.ENTER)
    page.until("document.title.startsWith('user 303 ')")
    page.until("window.release?.()")
    page.driver.execute_async_script("setTimeout(arguments[0])")
    assert page.text("#title-list") == "For user 303"
    assert page.items() == expected(address, user_id=303)


def test_the_keyboard_is_enough(page: Page, address: str) -> None:
    page.open(address, fragment=f"#user={USER}")
    page.press(Keys.TAB)
    assert page.driver.switch_to.active_element.get_attribute("id") == "skip"
    page.press(Keys.ENTER)
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    focused = page.driver.switch_to.active_element.get_attribute("aria-label")
    assert focused.startswith(f"like {page.items()[1]}, probability ")
    page.press("/")
    assert page.driver.switch_to.active_element.get_attribute("id") == "user"
    page.press(Keys.TAB)
    page.press("?")
    assert page.find("#shortcuts").is_displayed()
    page.press(Keys.ESCAPE)
    page.press("l")
    clicked = page.items()[0]
    page.press(Keys.HOME, Keys.ARROW_LEFT)
    page.press(Keys.ENTER)
    page.until_told(f"Clicked {clicked}:")
    assert page.run("return document.activeElement.closest('#items') !== null")
    page.find("#tab-list").send_keys(Keys.ARROW_RIGHT)
    page.until("document.querySelector('#panel-run .chart')")
    assert page.driver.switch_to.active_element.get_attribute("id") == "tab-run"


def test_the_run_tab_shows_results_with_intervals_and_curves(page: Page, address: str) -> None:
    page.open(address, fragment="#tab=run")
    page.until("document.querySelector('.chart')")
    tables = page.run("return [...document.querySelectorAll('.card table')].map(table => table.innerText)")
    recall = next(text for text in tables if text.startswith("recall@10"))
    assert all(part in recall for part in ("0.250", "0.125–0.375", "popularity", "0.050–0.150"))
    assert any("click · auc" in text and "0.625–0.875" in text and "item rate" in text for text in tables)
    drawn = page.find(".chart [role=img]").get_attribute("aria-label")
    assert drawn.startswith("retrieval · loss: from 1 at step 1 to 0.25 at step 4")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_can_be_read_and_stays_by_itself(page: Page, address: str, width: int, theme: str) -> None:
    page.driver.get_log("browser")
    page.open(address, fragment=f"#user={USER}&diversity=0.5", width=width, theme=theme)
    for tab in ("list", "run"):
        page.find(f"#tab-{tab}").click()
        page.until("document.querySelector('#items .item')" if tab == "list" else "document.querySelector('.chart')")
        page.run("for (const details of document.querySelectorAll('details')) details.open = true")
        assert page.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert page.run(FAINT) == []
    assert page.driver.get_log("browser") == []
    loaded = page.run("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [url for url in loaded if not url.startswith((address, "data:"))] == []


def test_a_token_is_asked_for_and_text_ids_without_a_ranker_are_shown(page: Page, guarded: str) -> None:
    page.open(guarded)
    page.find("#token").send_keys("wrong", Keys.ENTER)
    page.until("document.getElementById('error-token').textContent.includes('not accept')")
    page.find("#token").clear()
    page.find("#token").send_keys(TOKEN, Keys.ENTER)
    page.until("document.querySelector('#items .item')")
    clicked = page.items()[0]
    assert clicked.startswith("item ")
    assert page.find(".act b").is_displayed()
    page.find(f"[data-item='{clicked}'] [data-action=click]").click()
    page.until_told(f"Clicked {clicked}:")
    assert page.text("#events li").startswith(clicked)
    page.find("#tab-run").click()
    page.until("document.querySelector('#panel-run .note')")
    assert "No run beside this recommender" in page.text("#panel-run")


def test_the_file_needs_nothing_else() -> None:
    html = PAGE.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "http:" not in html
    assert "https:" not in html
    assert (html.count("<style>"), html.count("<script>"), html.count("eval(")) == (1, 1, 0)
