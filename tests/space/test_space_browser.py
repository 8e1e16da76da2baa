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

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver"
)

NEURO = (
    "The outcomes of epilepsy after seizures and of migraine with neuropathy. Colitis was not seen."
)
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"> <script>document.title='owned'</script> "
    "${document.title='owned'} "
    "{{constructor.constructor(\"document.title='owned'\")()}} 👩‍⚕️ \u202eright to "
    "left\u202c שלום epilepsy & seizures"
)


def start_chromium(*flags: str) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        *flags,
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = start_chromium(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    yield driver
    driver.quit()


class Page:
    """Operate the Space in the browser."""

    def __init__(self, driver, address: str):
        self.driver = driver
        self.address = address

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
        return self.driver.execute_script(
            "return document.querySelector(arguments[0])?.innerText ?? ''", selector
        )

    def type(self, text: str) -> None:
        """Set the text as pasting does.

        Selenium types no emoji, and is slow for 100,000 characters.
        """
        self.driver.execute_script(
            "const area = document.querySelector('#abstract textarea'); area.value = arguments[0];"
            "area.dispatchEvent(new Event('input', {bubbles: true}))",
            text,
        )

    def press(self, selector: str) -> None:
        self.driver.execute_script(
            "arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()",
            self.one(selector),
        )

    def walk(self, selector: str, *held: str) -> None:
        """Press Tab, with held keys, until an element of a selector has the focus.

        Press Enter there.
        """
        for _ in range(40):
            self.driver.switch_to.active_element.send_keys(*held, Keys.TAB)
            focused = self.driver.switch_to.active_element
            if self.driver.execute_script(
                "return arguments[0].matches(arguments[1])", focused, selector
            ):
                return focused.send_keys(Keys.ENTER)
        pytest.fail(f"the keyboard does not reach {selector}")

    def tab(self, name: str) -> None:
        found = next(t for t in self.all("button[role=tab]") if t.text == name)
        self.driver.execute_script("arguments[0].click()", found)

    def classify(self, text: str) -> None:
        self.driver.execute_script(
            "for (const id of ['result', 'words']) document.querySelector(`#${id} "
            ".panel`).dataset.old = '1'"
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
            "return [...document.querySelectorAll('#words .text .w')].map(s => "
            "[s.innerText, +s.dataset.weight])"
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
        self.press("#file button[aria-label=Clear]")
        self.until(
            lambda: self.all("#file input[type=file]") and "No file yet" in self.text("#state")
        )

    def cells(self, selector: str) -> list[list[str]]:
        """Return the texts of a table by row and cell."""
        rows = "return [...document.querySelectorAll(arguments[0] + ' tbody tr')]"
        return self.driver.execute_script(
            f"{rows}.map(r => [...r.cells].map(c => c.textContent))", selector
        )

    def settle(self, selector: str) -> str:
        """Return the text of an element once it is unchanged for a second, which is twice the time
        between progress messages.
        """

        def same() -> str | None:
            before = self.text(selector)
            time.sleep(1)
            return before if self.text(selector) == before else None

        return self.until(same)


@pytest.fixture(scope="module")
def page(chromium, space) -> Page:
    return Page(chromium, space.address)


def write_table(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


# ── One text ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("server", ["space", "labels_space"])
def test_a_text_is_submitted_by_keys_and_its_words_and_those_of_a_pressed_node_are_shown(
    server, request, chromium
):
    several = server == "labels_space"
    page = Page(chromium, request.getfixturevalue(server).address).open()
    assert several or "Not a medical device" in page.text("#masthead")
    top = "return document.querySelector('#words').getBoundingClientRect().top"
    before = page.driver.execute_script(top)
    page.one("#abstract textarea").send_keys(
        "Outcomes of epilepsy and seizures.", Keys.SHIFT, Keys.ENTER
    )
    page.until(lambda: page.all("#result .path"))
    assert page.driver.execute_script(top) == before  # nothing moved
    assert page.text("#result .class") == "nervous system diseases"
    assert page.text("#result .path").split()[:2] == ["specific", "disease"]
    assert f"For 90% {'recall' if several else 'coverage'}: " in page.text("#result .held")
    assert "The whole text was read" in page.text("#result")
    marked = [name.text for name in page.all("#tree .predicted bdi")]
    assert marked == ["specific disease", "nervous system diseases"]
    assert bool(page.all("#tree button .bar i")) == several  # thresholds

    page.weights()  # else they would be shown after those of the next text
    page.classify(NEURO)
    weights = page.weights()
    assert "nervous system diseases" in page.text("#words h3")
    assert max(weights, key=weights.get) in CLEAR["nervous system diseases"]
    assert ("log-odds" if several else "percentage points") in page.text("#words")
    other = page.explain("digestive system diseases")
    assert "digestive system diseases" in page.text("#words h3")
    assert max(other, key=other.get) == "colitis"


def test_after_an_edit_the_old_result_is_marked_and_its_nodes_are_those_of_the_old_text(page):
    page.open()
    page.classify(NEURO)
    page.weights()
    assert not page.all(".old")
    page.one("#abstract textarea").send_keys(" Angina, thrombosis and stenosis.")
    page.until(lambda: page.all(".old #result .panel"))
    assert "epilepsy" in page.explain("cardiovascular diseases")
    assert "angina" not in page.text("#words .text").lower()
    page.press("#classify")
    page.until(lambda: not page.all(".old") and "thrombosis" in page.text("#words .text"))


def test_a_coverage_is_typed_key_by_key_and_a_higher_one_needs_more_nodes(page):
    page.open()
    page.classify("Outcomes of epilepsy after angina, colitis and carcinoma.")
    number, slider = (page.one(f"#coverage input[type={kind}]") for kind in ("number", "range"))
    number.send_keys(Keys.CONTROL, "a", Keys.DELETE)
    page.press("#classify")
    page.until(lambda: "must be a number between" in page.text("#result .held"))
    sets = []
    for shown, box, keys in (
        ("50%", number, ["0.5", Keys.TAB]),
        ("95%", slider, [Keys.ARROW_RIGHT] * 45),
    ):
        box.send_keys(*keys)
        page.until(lambda shown=shown: shown in page.text("#result .held"))
        sets.append([chip.text for chip in page.all("#result .held .chip bdi")])
    assert not page.all(".toast-body")
    (leaf,), higher = sets
    assert leaf in CLEAR
    assert len(higher) > 1 or higher[0] not in CLEAR


def test_the_last_press_counts_and_a_cleared_text_gets_no_late_explanation(page):
    page.open()
    page.press("#examples button:nth-child(2)")
    page.until(lambda: page.all("#result .certainty"))
    page.type(NEURO * 200)
    page.press("#classify")
    time.sleep(1)  # requests that are sent at once may arrive in another order
    page.classify("Carcinoma, lymphoma and sarcoma.")
    page.until(
        lambda: (
            page.text("#result .class") == "neoplasms" and "Carcinoma" in page.text("#words .text")
        )
    )
    assert "Carcinoma" in page.settle("#words .text")
    page.type(NEURO * 40)
    for button in ("#classify", "#clear"):
        page.press(button)
        time.sleep(1)
    page.until(lambda: "After a prediction" in page.text("#words"))
    assert "After a prediction" in page.settle("#words")
    assert "Paste a text" in page.settle("#result")
    assert not page.all("#tree button")
    assert page.one("#abstract textarea").get_attribute("value") == ""


def test_a_text_is_refused_or_truncated_in_words_and_a_hostile_one_is_shown(page):
    page.open()
    title = page.driver.title
    for text, message in (
        ("", "The text is empty"),
        ("epilepsy " * 11_200, "100,800 characters; at most 20,000"),
    ):
        page.classify(text)
        assert message in page.text("#result [role=alert]")
    page.classify(NEURO + " The rest of it goes on and on." * 100)
    assert "were not read" in page.text("#result .warning")
    page.weights()
    assert "goes on and on." in page.text("#words .text .unread")
    page.classify(HOSTILE)
    assert page.text("#result .class") == "nervous system diseases"
    page.until(
        lambda: (
            page.driver.execute_script("return document.querySelector('#words .text').textContent")
            == HOSTILE
        )
    )
    assert not page.all("#words img, #words script, #result img, #tree img")
    assert page.driver.title == title


# ── A file ────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_classified_its_pages_are_turned_and_its_downloads_parse(page, tmp_path):
    folder = tmp_path / "downloads"
    page.driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
    )
    texts = [
        NEURO,
        "=cmd epilepsy and seizures",
        "Angina <img src=x onerror=alert(1)>",
        *["Colitis"] * 42,
    ]
    rows = [["n", "abstract"], *([i, text] for i, text in enumerate(texts)), ["3"], ["4", " "]]
    page.open()
    page.open_file(write_table(tmp_path / "texts.csv", rows), "deleted from the disk")
    assert page.one("#column input").get_attribute("value") == "abstract"
    page.start("Done: 47 of 47 rows; 2 could not be classified")
    shown = page.cells("#rows")
    assert [row[0] for row in shown] == [*map(str, range(2, 22))]
    assert "nervous system diseases" in shown[0][2]
    assert shown[2][1] == texts[2]
    assert not page.all("#rows img")
    assert page.cells("#problems") == [
        ["47", "1 fields, where the header has 2"],
        ["48", "the text is empty"],
    ]
    assert "digestive system diseases" in page.text("#summary .counts")
    for button, lines in (
        (".pager button:last-of-type", [*range(22, 42)]),
        (".pager button:last-of-type", [*range(42, 47)]),
        (".pager button:first-of-type", [*range(22, 42)]),
        ("th:nth-child(3) button", [4]),  # rows of each class together, the most probable first
        ("th:first-child button", [2]),
    ):
        page.press(f"#rows {button}")
        page.until(
            lambda lines=lines: [int(row[0]) for row in page.cells("#rows")][: len(lines)] == lines
        )
        # the box of these events is emptied last: what is pressed before that is lost
        page.until(lambda: not page.one("#page textarea, #page input").get_attribute("value"))
    for kind, start in (("csv", "\\"), ("jsonl", "")):
        page.press(f"#{kind}")
        file = folder / f"predictions.{kind}"
        # one in `NEURO`
        page.until(lambda file=file: file.exists() and file.read_bytes().count(b"Colitis") == 43)
        lines = file.read_text("utf-8-sig").splitlines(keepends=True)
        found = list(csv.DictReader(lines)) if kind == "csv" else list(map(json.loads, lines))
        assert [row["text"] for row in found] == [texts[0], start + texts[1], *texts[2:]]
        assert [row["label"] for row in found][1:3] == [
            "nervous system diseases",
            "cardiovascular diseases",
        ]


def test_a_file_is_cancelled_or_removed_and_the_next_one_runs(page, tmp_path):
    page.open()
    page.open_file(
        write_table(tmp_path / "many.csv", [["text"], *[[NEURO + " word" * 90]] * 9000]), "9,000"
    )
    page.start("Classified [1-9]")  # not "Classified: 0 of 9,000 rows"
    page.press("#cancel")
    page.until(lambda: "Cancelled" in page.text("#state"))
    assert "Cancelled" in page.settle("#state")  # and it stays so
    assert not page.cells("#rows")
    page.start("Classified [1-9]")
    page.remove_file()  # ends the run, too
    assert "No file yet" in page.settle("#state")
    assert not page.cells("#rows")
    page.start("There is no file: choose one.")
    (tmp_path / "wrong.parquet").write_bytes(b"text\nnot Parquet\n")
    page.open_file(tmp_path / "wrong.parquet", "not a Parquet file")
    page.remove_file()
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in texts:
        file.write_text(f"Grüße.\n{NEURO}", encoding="cp1252")
    page.open_file("\n".join(map(str, texts)), "2 could not be classified")
    for keys in ([Keys.CONTROL, "a"], ["cp1252", Keys.ENTER]):
        page.one("#encoding input").send_keys(*keys)
    page.until(
        lambda: "of 2 rows" in page.text("#state") and "could not" not in page.text("#state")
    )
    page.start("Done: 2 of 2 rows")
    page.remove_file()
    page.open_file(write_table(tmp_path / "few.csv", [["text"], [NEURO]]), "of 1 rows")
    page.start("Done: 1 of 1 rows")
    page.press("#cancel")
    assert "Done" in page.settle("#state")
    assert page.cells("#rows")
    page.remove_file()
    assert not page.cells("#rows")
    page.until(lambda: page.driver.execute_script("return document.querySelector('#csv').disabled"))


# ── The page ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_is_wider_than_the_page_and_the_model_is_described(page, width, scheme, tmp_path):
    def fits() -> bool:
        return page.driver.execute_script(
            "return document.documentElement.scrollWidth <= innerWidth + 1"
        )

    page.open(width, 844, scheme)
    assert fits()
    page.classify(NEURO + " " + "W" * 300)
    page.weights()
    assert fits()
    page.open_file(
        write_table(tmp_path / "texts.csv", [["text"], [NEURO], ["W" * 300]]), "of 2 rows"
    )
    page.start("Done")
    assert fits()
    page.tab("About the model")
    page.until(lambda: page.all("#plots img"))
    assert "a person should check important results" in page.text("#card")
    assert "README.md in the model's folder" in page.text("#card")
    assert fits()


def test_every_control_has_a_name_and_is_used_by_the_keyboard_alone(page, tmp_path):
    page.open()
    unnamed = page.driver.execute_script(
        """
        const named = (e) => 
            e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.title ||
            e.innerText?.trim() ||
            (e.labels && [...e.labels].some(l => l.innerText.trim())) ||
            e.closest('label')?.innerText;
        const inputs = ':is(button, input, textarea, select)';
        return [...document.querySelectorAll('.gradio-container ' + inputs)]
            .filter(e => e.offsetParent && !named(e)).map(e => e.outerHTML.slice(0, 160))
        """
    )
    assert unnamed == []
    page.classify(NEURO)
    page.weights()
    page.driver.execute_script("document.querySelector('#abstract textarea').focus()")
    page.walk("#classify")
    page.walk("#coverage input[type=number]")
    page.walk("#tree button[data-value='specific disease']")
    page.until(lambda: "specific disease" in page.text("#words h3"))
    page.walk("#tree summary")
    folded = page.one("#tree details[open] button").get_attribute("data-value")
    page.walk("#tree details[open] button")
    page.until(lambda: folded in page.text("#words h3"))
    page.walk("[data-tab-id=file]", Keys.SHIFT)
    rows = [[text] for text in [NEURO, *["Colitis"] * 21]]
    page.one("#file input[type=file]").send_keys(
        str(write_table(tmp_path / "rows.csv", [["text"], *rows]))
    )
    page.until(lambda: "of 22 rows" in page.text("#state"))
    page.walk("#start")
    page.until(lambda: "Done" in page.text("#state"))
    page.walk("#rows th:nth-child(2) button")
    page.until(lambda: page.cells("#rows")[0][1] == "Colitis")
    page.walk("#rows td summary")
    assert page.all("#rows details[open]")
    page.walk("#rows .pager button:last-of-type")
    page.until(lambda: page.cells("#rows")[-1][1] == NEURO)
    page.walk("[data-tab-id=model]", Keys.SHIFT)
    page.until(lambda: page.all("#plots img"))


def test_the_page_sends_requests_only_to_its_own_server_and_the_console_has_no_errors(page, space):
    page.driver.get_log("browser")
    page.open()
    page.driver.get_log("performance")
    page.classify(NEURO)
    page.weights()
    sent = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    urls = [
        m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"
    ]
    assert urls
    assert all(url.startswith((space.address, "data:", "blob:")) for url in urls)
    severe = [
        entry["message"] for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"
    ]
    assert not [message for message in severe if page.address in message.split(" ")[0]]
