"""Test the Space in a real browser: typing, pressing, reading and downloading."""

import csv
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from conftest import CLEAR
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver"
)

NEURO = "The outcomes of epilepsy after seizures and of migraine with neuropathy. Colitis was not seen."
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script> ${document.title='owned'} "
    "{{constructor.constructor(\"document.title='owned'\")()}} 👩‍⚕️ \u202eright to left\u202c שלום epilepsy & seizures"
)


def start_chromium(*flags: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = start_chromium(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    yield driver
    driver.quit()


@pytest.fixture
def downloads(chromium, tmp_path) -> Path:
    """Return the folder for the downloads of a test."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    chromium.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    return folder


class Page:
    """Operate the Space in the browser."""

    def __init__(self, driver, address: str):
        self.driver, self.address = driver, address

    def open(self, width: int = 1280, height: int = 900, scheme: str = "light") -> "Page":
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(f"{self.address}/?__theme={scheme}")
        self.until(lambda: self.all("#classify") and self.all("#tree .node"))
        return self

    def until(self, condition, seconds: int = 60):
        return WebDriverWait(self.driver, seconds, 0.1).until(lambda _: condition())

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        return self.until(lambda: next(iter(self.all(selector)), None))

    def text(self, selector: str) -> str:
        return self.driver.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def type(self, text: str) -> None:
        """Set the text as pasting does. Selenium types no emoji, and is slow for 100,000 characters."""
        self.driver.execute_script(
            "const area = document.querySelector('#abstract textarea'); area.value = arguments[0];"
            "area.dispatchEvent(new Event('input', {bubbles: true}))",
            text,
        )

    def press(self, selector: str) -> None:
        self.driver.execute_script(
            "arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", self.one(selector)
        )

    def tab(self, name: str) -> None:
        found = next(t for t in self.all("button[role=tab]") if t.text == name)
        self.driver.execute_script("arguments[0].click()", found)

    def classify(self, text: str) -> None:
        self.driver.execute_script(
            "for (const id of ['result', 'words']) document.querySelector(`#${id} .panel`).dataset.old = '1'"
        )
        self.type(text)
        self.press("#classify")
        self.until(lambda: self.all("#result .panel") and not self.all("#result .panel[data-old]"))

    def explain(self, label: str) -> dict[str, float]:
        """Press a node of the tree. Return the coloured words with their weights."""
        self.weights()
        self.driver.execute_script("document.querySelector('#words .panel').dataset.old = '1'")
        self.press(f"#tree button[data-value='{label}']")
        return self.weights()

    def weights(self) -> dict[str, float]:
        """Return the coloured words with their weights, which appear some time after a result."""
        self.until(lambda: self.all("#words .text") and not self.all("#words .panel[data-old]"))
        spans = self.driver.execute_script(
            "return [...document.querySelectorAll('#words .text .w')].map(s => [s.innerText, +s.dataset.weight])"
        )
        return {word.lower(): weight for word, weight in spans}

    def open_file(self, file: Path, shown: str) -> None:
        """Choose a file, and wait for a text in its status."""
        self.tab("A file")
        self.one("#file input[type=file]").send_keys(str(file))
        self.until(lambda: shown in self.text("#state"))

    def start(self, shown: str) -> None:
        """Classify the file, and wait for a text in its status."""
        self.press("#start")
        self.until(lambda: re.search(shown, self.text("#state")))

    def remove_file(self) -> None:
        self.press("#file button[aria-label*=lear], #file button[title*=lear], #file .icon-button")
        self.until(lambda: self.all("#file input[type=file]") and "No file yet" in self.text("#state"))

    def cells(self, selector: str) -> list[list[str]]:
        """Return the texts of a table by row and cell."""
        rows = (
            "[...document.querySelectorAll(arguments[0] + ' tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
        )
        return self.driver.execute_script(f"return {rows}", selector)

    def marked(self) -> list[str]:
        """Return the names of the nodes that the tree marks as predicted."""
        names = "[...document.querySelectorAll('#tree .predicted bdi')].map(name => name.innerText)"
        return self.driver.execute_script(f"return {names}")

    def top_of(self, selector: str) -> float:
        place = "document.querySelector(arguments[0]).getBoundingClientRect().top + scrollY"
        return self.driver.execute_script(f"return {place}", selector)

    def target(self, kind: str = "number"):
        """Return the number box or the slider (kind "range") of the guarantee of a text."""
        box = self.one(f"#coverage input[type={kind}], #recall input[type={kind}]")
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
        return box

    def settle(self, selector: str) -> str:
        """Return the text of an element once it is unchanged for a second, which is twice the time between progress messages."""

        def same() -> str | None:
            before = self.text(selector)
            time.sleep(1)
            return before if self.text(selector) == before else None

        return self.until(same)

    def download(self, folder: Path, kind: str, count: int) -> list[dict]:
        """Download a file, wait until it has ``count`` rows, and return them."""
        file = folder / f"predictions.{kind}"

        def rows() -> list[dict] | None:
            lines = file.read_text("utf-8-sig", "replace").splitlines(keepends=True) if file.exists() else []
            if not lines or not lines[-1].endswith("\n"):
                return None
            found = list(csv.DictReader(lines)) if kind == "csv" else list(map(json.loads, lines))
            return found if len(found) == count else None

        self.until(lambda: self.driver.execute_script(f"return !document.querySelector('#{kind}').disabled"))
        self.press(f"#{kind}")
        return self.until(rows)

    def is_too_wide(self) -> bool:
        """Return whether the page is wider than the window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth > innerWidth + 1")


@pytest.fixture(scope="module")
def page(chromium, space) -> Page:
    return Page(chromium, space.address)


@pytest.fixture(scope="module", params=["one path", "several labels"])
def any_page(request, chromium) -> tuple[Page, bool]:
    """Return the page of a model of each form, and whether it predicts several labels."""
    several = request.param == "several labels"
    return Page(chromium, request.getfixturevalue("labels_space" if several else "space").address), several


def write_table(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


# ── One text ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_abstract_is_typed_submitted_by_ctrl_enter_and_its_result_read(any_page):
    page, several = any_page
    page.open()
    assert several or "Not a medical device" in page.text("#masthead")
    height = page.top_of("#words")
    page.one("#abstract textarea").send_keys("Outcomes of epilepsy and seizures.", Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.all("#result .path"))
    assert page.text("#result .class") == "nervous system diseases"
    assert "%" in page.text("#result .certainty")
    assert page.text("#result .path").split()[:2] == ["specific", "disease"]
    assert f"For 90% {'recall' if several else 'coverage'}: " in page.text("#result .held")
    assert "The whole text was read" in page.text("#result")
    assert page.marked() == ["specific disease", "nervous system diseases"]
    assert bool(page.all("#tree button .bar i")) == several  # thresholds
    assert page.top_of("#words") == height  # nothing moved


def test_the_words_appear_by_themselves_and_a_press_on_a_node_explains_it(any_page):
    page, several = any_page
    page.open()
    page.classify(NEURO)
    weights = page.weights()
    assert "nervous system diseases" in page.text("#words h3")
    assert max(weights, key=weights.get) in CLEAR["nervous system diseases"]
    assert "convergence error" in page.text("#words")
    assert ("log-odds" if several else "percentage points") in page.text("#words")
    other = page.explain("digestive system diseases")
    assert "digestive system diseases" in page.text("#words h3")
    assert max(other, key=other.get) == "colitis"


def test_after_an_edit_the_old_result_is_marked_and_its_nodes_are_those_of_the_old_text(page):
    page.open()
    page.classify(NEURO)
    page.weights()
    assert not page.all(".old")
    box = page.one("#abstract textarea")
    box.send_keys(" Angina")
    page.until(lambda: page.all(".old #result .panel"))
    other = page.explain("cardiovascular diseases")
    assert "angina" not in page.text("#words .text").lower()
    assert "epilepsy" in other
    box.send_keys(Keys.BACKSPACE * len(" Angina"))
    page.until(lambda: not page.all(".old"))
    box.send_keys(" Angina, thrombosis and stenosis.")
    page.until(lambda: page.all(".old"))
    page.press("#classify")
    page.until(lambda: not page.all(".old"))
    page.until(lambda: "thrombosis" in page.text("#words .text"))


def test_a_coverage_is_typed_key_by_key_and_a_higher_one_backs_off(page):
    page.open()
    page.classify("Outcomes of epilepsy after angina, colitis and carcinoma.")
    page.target().send_keys(Keys.CONTROL, "a", Keys.DELETE)
    page.press("#classify")
    page.until(lambda: "must be a number between" in page.text("#result .held"))
    page.target().send_keys("0")
    answers = []
    for shown, kind, keys in (("50%", "number", [".5", Keys.TAB]), ("95%", "range", [Keys.ARROW_RIGHT] * 45)):
        page.target(kind).send_keys(*keys)
        page.until(lambda shown=shown: shown in page.text("#result .held"))
        chips = page.all("#result .held .chip bdi")
        answers.append([chip.text for chip in chips])
    assert not page.all(".toast-body")
    (leaf,), higher = answers
    assert leaf in CLEAR
    assert len(higher) > 1 or higher[0] not in CLEAR


def test_the_last_press_counts_and_a_cleared_text_gets_no_late_explanation(page):
    page.open()
    for button in range(1, 4):  # the examples
        page.driver.execute_script("document.querySelector('#result .panel').dataset.old = '1'")
        page.press(f"#examples button:nth-child({button})")
        page.until(lambda: page.all("#result .certainty") and not page.all("#result .panel[data-old]"))
    page.type(NEURO * 200)
    page.press("#classify")
    time.sleep(1)
    page.type("Carcinoma, lymphoma and sarcoma.")
    page.press("#classify")
    page.until(lambda: page.text("#result .class") == "neoplasms")
    page.classify(NEURO * 40)
    page.classify("Carcinoma, lymphoma and sarcoma.")
    page.until(lambda: "Carcinoma" in page.text("#words .text"))
    assert "Carcinoma" in page.settle("#words .text")
    page.type(NEURO * 40)
    for button in ("#classify", "#clear"):
        page.press(button)
        time.sleep(1)  # requests that are sent at once may arrive in another order
    page.until(lambda: "After a prediction" in page.text("#words"))
    assert "After a prediction" in page.settle("#words")
    assert "Paste a text" in page.settle("#result")
    assert not page.all("#tree button")
    assert page.one("#abstract textarea").get_attribute("value") == ""


def test_a_text_is_refused_or_truncated_in_words_and_the_page_goes_on(page):
    page.open()
    for text, message in (("", "The text is empty"), ("epilepsy " * 11_200, "100,800 characters; at most 20,000")):
        page.classify(text)
        assert message in page.text("#result [role=alert]")
    page.classify(NEURO + " The rest of it goes on and on." * 100)
    assert page.text("#result .class") == "nervous system diseases"
    assert "were not read" in page.text("#result .warning")
    page.weights()
    assert "goes on and on." in page.text("#words .text .unread")


def test_the_last_words_of_a_text_of_many_windows_decide_and_are_explained(chromium, long_space, long_texts):
    page = Page(chromium, long_space.address).open()
    for label in ("neoplasms", "cardiovascular diseases"):
        page.classify(long_texts[label])
        assert page.text("#result .class") == label
        assert "The whole text was read" in page.text("#result")
    page.until(lambda: label in page.text("#words h3"), 120)
    weights = page.weights()
    assert max(weights, key=weights.get) in CLEAR[label]


def test_a_hostile_text_is_shown_and_nothing_of_it_runs(page):
    page.open()
    title = page.driver.title
    page.classify(HOSTILE)
    assert page.text("#result .class") == "nervous system diseases"
    page.weights()
    assert page.driver.execute_script("return document.querySelector('#words .text').textContent") == HOSTILE
    assert not page.all("#words img, #words script, #result img, #tree img")
    assert page.driver.title == title
    page.classify("NUL \0 angina \x07 thrombosis")  # another answer: one that looks the same is not drawn again
    assert page.text("#result .class") == "cardiovascular diseases"


# ── A file ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_classified_and_its_downloads_parse(any_page, downloads, tmp_path):
    page, _ = any_page
    texts = [NEURO, "=cmd epilepsy and seizures", "Angina <img src=x onerror=alert(1)>"]
    rows = [["n", "abstract"], ["1", texts[0]], ["2"], ["3", texts[1]], ["4", " "], ["5", texts[2]]]
    page.open()
    page.open_file(write_table(tmp_path / "texts.csv", rows), "deleted from the disk")
    assert page.one("#column input").get_attribute("value") == "abstract"
    page.start("Done: 5 of 5 rows; 2 could not be classified")
    shown = page.cells("#rows")
    assert [row[0] for row in shown] == ["2", "4", "6"]
    assert "nervous system diseases" in shown[0][2]
    assert shown[2][1] == texts[2]
    assert not page.all("#rows img")
    assert page.cells("#problems") == [["3", "1 fields, where the header has 2"], ["5", "the text is empty"]]
    assert "nervous system diseases" in page.text("#summary .counts")
    for kind, start in (("csv", "\\"), ("jsonl", "")):
        found = page.download(downloads, kind, 3)
        assert [row["text"] for row in found] == [texts[0], start + texts[1], texts[2]]
        assert [int(row["line"]) for row in found] == [2, 4, 6]
        expected = ["nervous system diseases", "cardiovascular diseases"]
        assert [row["label"] for row in found][1:] == expected
        assert [row["labels"] for row in found][1:] == ([[one] for one in expected] if kind == "jsonl" else expected)


def test_the_rows_of_a_file_are_turned_by_pages(page, tmp_path):
    page.open()
    page.open_file(write_table(tmp_path / "rows.csv", [["text"], *[[NEURO]] * 45]), "of 45 rows")
    page.start("Done: 45 of 45 rows")
    for button, lines in (("Next", range(22, 42)), ("Next", range(42, 47)), ("Previous", range(22, 42))):
        page.press(f"#rows .pager button:{'last' if button == 'Next' else 'first'}-of-type")
        page.until(lambda lines=lines: [row[0] for row in page.cells("#rows")] == [*map(str, lines)])
    assert "Page 2 of 3" in page.text("#rows .pager")


def test_a_file_is_cancelled_or_removed_and_the_next_one_runs(page, tmp_path):
    page.open()
    page.open_file(write_table(tmp_path / "many.csv", [["text"], *[[NEURO + " word" * 90]] * 9000]), "9,000")
    page.start("Classified [1-9]")  # not "Classified: 0 of 9,000 rows"
    page.press("#cancel")
    page.until(lambda: "Cancelled" in page.text("#ended"))
    assert "Done" not in page.settle("#state")
    assert "Cancelled" in page.text("#ended")  # and it stays so
    page.start("Classified [1-9]")
    page.remove_file()  # ends the run, too
    assert not page.cells("#rows")
    assert "No file yet" in page.settle("#state")
    page.open_file(write_table(tmp_path / "few.csv", [["text"], [NEURO]]), "of 1 rows")
    page.start("Done: 1 of 1 rows")
    assert page.text("#ended") == ""
    page.press("#cancel")
    page.until(lambda: "Nothing is running" in page.text("#ended"))
    assert "Done" in page.text("#state")
    assert page.cells("#rows")
    page.remove_file()
    assert not page.cells("#rows")
    page.until(lambda: page.driver.execute_script("return document.querySelector('#csv').disabled"))


def test_a_file_that_is_replaced_while_it_is_read_is_not_classified(page, tmp_path):
    page.open()
    header = [*(f"c{i}" for i in range(900)), "text"]
    slow = write_table(tmp_path / "slow.csv", [header, *[[""] * 900 + ["Sepsis and fever."]] * 9000])
    page.open_file(slow, "No file yet")
    page.until(lambda: "slow" in page.text("#file"))
    time.sleep(1)  # so that it is being read
    page.remove_file()
    page.open_file(write_table(tmp_path / "quick.csv", [["text"], [NEURO]]), " rows")
    page.start("Done: 1 of 1 rows")
    assert "nervous system diseases" in page.text("#rows")


def test_a_file_that_cannot_be_read_is_refused_in_words(page, tmp_path):
    (tmp_path / "wrong.parquet").write_bytes(b"text\nnot Parquet\n")
    (tmp_path / "big.csv").write_bytes(b"text\n" + b"x" * (11 * 2**20))
    page.open()
    page.open_file(tmp_path / "wrong.parquet", "not a Parquet file")
    assert page.all("#state [role=alert]")
    page.start("There is no file: choose one.")
    page.remove_file()
    page.open_file(tmp_path / "big.csv", "")
    page.until(lambda: "exceed the maximum allowed size of 10" in page.text("body"))


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_is_wider_than_the_page_and_the_model_is_described(any_page, width, scheme, tmp_path):
    page, several = any_page
    page.open(width, 844, scheme)
    assert not page.is_too_wide()
    page.classify(NEURO + " " + "W" * 300)
    page.weights()
    assert not page.is_too_wide()
    page.open_file(write_table(tmp_path / "texts.csv", [["text"], [NEURO], ["W" * 300]]), "of 2 rows")
    page.start("Done")
    assert not page.is_too_wide()
    page.tab("About the model")
    page.until(lambda: "up to 9" in page.text("#facts"))
    assert several or page.until(lambda: page.all("#plots img"))
    assert several or "README.md" in page.text("#card")
    assert not page.is_too_wide()


def test_every_control_has_a_name_and_is_reached_by_the_keyboard(page):
    page.open()
    unnamed = page.driver.execute_script(
        """
        const named = (e) => e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.title ||
            e.innerText?.trim() || (e.labels && [...e.labels].some(l => l.innerText.trim())) || e.closest('label')?.innerText;
        return [...document.querySelectorAll('.gradio-container :is(button, input, textarea, select)')]
            .filter(e => e.offsetParent && !named(e)).map(e => e.outerHTML.slice(0, 160))
        """
    )
    assert unnamed == []
    page.classify(NEURO)
    page.weights()
    page.driver.execute_script("document.querySelector('#abstract textarea').focus()")
    focused = "return document.activeElement.closest('#classify, #clear, #coverage, #tree')?.id"
    reached = set()
    for _ in range(18):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.driver.execute_script(focused))
    assert {"classify", "clear", "coverage", "tree"} <= reached
    page.driver.execute_script("document.querySelector(\"#tree button[data-value='specific disease']\").focus()")
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.until(lambda: "specific disease" in page.text("#words h3"))


def test_the_page_sends_requests_only_to_its_own_server_and_the_console_has_no_errors(page, space):
    page.driver.get_log("browser")
    page.open()
    page.driver.get_log("performance")
    page.classify("Zebrafish-4711 " + NEURO)
    page.weights()
    sent = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert urls
    assert all(url.startswith((space.address, "data:", "blob:")) for url in urls)
    assert "Zebrafish" not in space.log()
    assert not any(b"Zebrafish" in content for content in space.files().values())
    severe = [entry["message"] for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [message for message in severe if page.address in message.split(" ")[0]]
