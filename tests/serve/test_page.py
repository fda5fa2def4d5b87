"""The page in a headless Chromium: streaming, the fold, the stop button, Korean, and no way to inject anything."""

import time

import pytest
from browser import Browser, find
from scripted import ScriptedEngine, gate_of, serving

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium on this machine")

THOUGHTS = "17 × 20 = 340, 17 × 4 = 68.\n340 + 68 = 408."
ANSWER = "17 × 24 = 408입니다.\n```python\nprint(17 * 24)\n```\n<img src=x onerror=alert(1)> <b>굵게</b>"
QUESTION = "17 × 24는 얼마인가요?"


@pytest.fixture(scope="module")
def engine(tokenizer):
    return ScriptedEngine(tokenizer, f"<think>{THOUGHTS}</think>\n\n{ANSWER}", delay=0.01)


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    with Browser(find(), language="ko-KR") as browser:
        yield browser


@pytest.fixture
def page(chromium, url):
    chromium.events.clear()
    chromium.look(1200, 800)
    chromium.open(url)
    chromium.evaluate("localStorage.clear()")
    chromium.open(url)
    yield chromium
    assert chromium.problems() == []
    assert all(address.startswith((url, "data:")) for address in chromium.requested())


def text_of(page, selector):
    return page.evaluate(f"[...document.querySelectorAll({selector!r})].map(e => e.textContent).join('')")


def ask(page, question=QUESTION):
    page.evaluate("$('question').focus()")
    page.type(question)
    page.press("Enter", 13)


def test_a_question_is_streamed_and_the_reasoning_folds(page):
    ask(page)
    page.wait(
        "document.querySelector('details')?.open && document.querySelector('details .text').textContent.length > 5"
    )
    assert text_of(page, "summary") == "생각하는 중…"
    assert text_of(page, ".answer > .text") == ""
    page.wait("document.querySelector('.answer > .text').textContent.length > 3")
    assert page.evaluate("document.querySelector('details').open") is False
    assert page.evaluate("!!running"), "the fold closed only at the end"
    page.wait("!running")
    assert text_of(page, ".question") == QUESTION
    assert text_of(page, "details .text") == THOUGHTS
    assert "동안 생각함" in text_of(page, "summary")
    assert "토큰" in text_of(page, ".foot") and "초당" in text_of(page, ".foot")
    page.evaluate("document.querySelector('summary').click()")
    assert page.evaluate("document.querySelector('details').open") is True


def test_what_the_model_says_is_text_and_nothing_else(page):
    ask(page)
    page.wait("$('stop').hidden && history.length === 2")
    assert page.evaluate("document.querySelectorAll('.answer img, .answer b').length") == 0
    assert "<img src=x onerror=alert(1)> <b>굵게</b>" in text_of(page, ".answer > .text")
    assert text_of(page, ".answer pre") == "print(17 * 24)"
    assert "```" not in text_of(page, ".answer > .text")
    said = page.evaluate("history")
    assert said == [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def test_a_fold_that_a_person_opened_stays_open(page):
    ask(page)
    page.wait("document.querySelector('details')")
    page.evaluate("document.querySelector('summary').click()")
    page.evaluate("document.querySelector('summary').click()")
    page.wait("!running")
    assert page.evaluate("document.querySelector('details').open") is True


def test_stop_ends_the_answer_and_the_model(page, engine):
    ask(page)
    page.wait("document.querySelector('details .text')?.textContent.length > 3")
    assert page.evaluate("$('send').hidden && !$('stop').hidden")
    page.evaluate("$('stop').click()")
    page.wait("!running && !$('send').hidden")
    assert "멈춤" in text_of(page, ".foot")
    shown = text_of(page, "details .text")
    deadline = time.monotonic() + 5
    while engine.scheduler.running and time.monotonic() < deadline:
        time.sleep(0.02)
    passes = engine.model.passes
    time.sleep(0.2)
    assert engine.model.passes == passes
    assert text_of(page, "details .text") == shown and len(shown) < len(THOUGHTS)


def test_enter_does_not_send_while_hangul_is_composed(page):
    page.evaluate("$('question').focus()")
    page.send("Input.imeSetComposition", text="안녕", selectionStart=2, selectionEnd=2)
    page.send("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=229)
    page.evaluate(
        "$('question').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert page.evaluate("document.querySelectorAll('.question').length") == 0
    page.type("안녕")  # the composition ends
    assert page.evaluate("$('question').value") == "안녕"
    page.press("Enter", 13)
    page.wait("document.querySelector('.question')?.textContent === '안녕'")
    assert page.evaluate("$('question').value") == ""


def test_shift_enter_is_a_new_line_and_blank_is_not_sent(page):
    page.press("Enter", 13)
    page.type("   ")
    page.press("Enter", 13)
    assert page.evaluate("document.querySelectorAll('.question').length") == 0
    page.evaluate("$('question').value = ''")
    page.type("하나")
    low = page.evaluate("$('question').clientHeight")
    page.press("Enter", 13, modifiers=8, text="\r")
    page.type("둘")
    assert page.evaluate("$('question').value") == "하나\n둘"
    assert page.evaluate("$('question').clientHeight") > low


def test_new_chat_leaves_nothing_behind(page):
    ask(page)
    page.wait("document.querySelector('details')")
    page.evaluate("$('new').click()")
    page.wait("!running && !$('welcome').hidden")
    assert page.evaluate("history.length") == 0
    assert page.evaluate("document.querySelectorAll('.question').length") == 0
    time.sleep(0.3)
    assert page.evaluate("history.length") == 0 and page.evaluate("$('send').hidden") is False


def test_the_language_follows_the_browser_and_can_be_switched(page, url):
    assert page.evaluate("document.documentElement.lang") == "ko"
    assert page.evaluate("$('question').placeholder") == "메시지를 입력하세요"
    page.evaluate("$('language').click()")
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("$('send').ariaLabel") == "Send"
    page.open(url)
    assert page.evaluate("$('new').textContent") == "New chat"
    missing = page.evaluate("Object.keys(words.en).filter(k => !(k in words.ko)).concat("
                            "Object.keys(words.ko).filter(k => !(k in words.en)))")  # fmt: skip
    assert missing == []


def test_settings_are_sent_and_kept(page, url):
    page.evaluate("$('settings').click()")
    for name, value in {"temperature": "0.25", "seed": "7", "max_tokens": "12", "system": "짧게"}.items():
        page.evaluate(f"$('{name}').value = '{value}'; $('{name}').dispatchEvent(new Event('change'))")
    page.evaluate("$('temperature').value = '9'; $('temperature').dispatchEvent(new Event('change'))")
    page.evaluate("$('done').click()")
    page.open(url)
    body = page.evaluate("JSON.parse(requestBody())")
    assert body["messages"][0] == {"role": "system", "content": "짧게"}
    assert (body["seed"], body["max_tokens"], body["temperature"], body["top_p"]) == (7, 12, 0.3, 0.9)
    ask(page)
    page.wait("document.querySelector('.foot')?.textContent")
    assert "최대 길이" in text_of(page, ".foot")


def test_errors_are_shown_and_the_question_comes_back(page):
    page.evaluate("$('system').value = 'x '.repeat(20000)")
    ask(page)
    page.wait("document.querySelector('.error')")
    assert "문맥" in text_of(page, ".error") and page.evaluate("$('question').value") == QUESTION
    assert page.evaluate("history.length") == 0
    page.events[:] = [event for event in page.events if "400" not in str(event.get("params", {}).get("entry", {}))]


def test_a_server_that_is_gone_is_told(chromium, tokenizer):
    with serving(ScriptedEngine(tokenizer, "word " * 100, delay=0.02)) as url:
        chromium.open(url)
        ask(chromium)
        chromium.wait("document.querySelector('.answer > .text').textContent.length > 5")
    chromium.wait("!running && document.querySelector('.error')")
    assert text_of(chromium, ".error") in ("답이 끝나기 전에 연결이 끊겼습니다.", "network error")
    ask(chromium)
    chromium.wait("document.querySelectorAll('.error').length === 2")
    assert "서버에 연결할 수 없습니다" in text_of(chromium, ".error")


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_is_wider_than_the_screen(page, url, width):
    page.look(width, 700, phone=width < 600)
    page.open(url)
    ask(page, "가나다 " * 40 + "a" * 200)
    if width < 600:
        page.evaluate("if (!running) send()")  # touch screens send with the button
    page.wait("!running && history.length")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("$('scroll').scrollWidth <= $('scroll').clientWidth")


def test_everything_that_can_be_used_has_a_name(page):
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea')].filter(e => !(e.ariaLabel || e.textContent.trim() "
        "|| e.labels?.length)).map(e => e.id)"
    )
    assert nameless == []


# --- where the memory opened ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def remembering(tokenizer):
    with serving(ScriptedEngine(tokenizer, f"<think>{THOUGHTS}</think>\n\n{ANSWER}", memory=True)) as url:
        yield url


WARM = """[...document.querySelectorAll(SELECTOR)].map(e => [e.textContent, e.style.getPropertyValue('--gate')])"""


def gates_by_character(tokenizer, text):
    """What each character of a script deserves: the gate of the token that ends it."""
    marks, data, shown = [], b"", ""
    for token in tokenizer.encode(f"<think>{THOUGHTS}</think>\n\n{ANSWER}"):
        data += tokenizer.decode_bytes([token])
        whole = data.decode(errors="ignore")
        marks += [gate_of(token)] * (len(whole) - len(shown))
        shown = whole
    at = shown.index(text)
    return list(zip(text, marks[at:], strict=False))


@pytest.mark.parametrize("dark", [False, True])
def test_the_switch_shades_what_the_memory_gave(chromium, remembering, tokenizer, dark):
    chromium.events.clear()
    chromium.look(1200, 800, dark=dark)
    chromium.open(remembering)
    chromium.evaluate("localStorage.clear()")
    chromium.open(remembering)
    chromium.wait("!$('memory-switch').hidden")
    assert chromium.evaluate("$('memory').labels[0].textContent").startswith("기억이 열린 곳 보기")
    ask(chromium)
    chromium.wait("!running && history.length === 2")
    plain = text_of(chromium, ".answer > .text")
    assert chromium.evaluate("document.querySelectorAll('.warm').length") == 0  # off at first
    chromium.evaluate("$('memory').click()")
    for selector, said in ((".answer > .text", ANSWER), ("details .text", THOUGHTS)):
        runs = chromium.evaluate(WARM.replace("SELECTOR", f"'{selector} .warm'"))
        shaded = [(character, float(gate)) for text, gate in runs for character in text]
        told = gates_by_character(tokenizer, said)
        assert len({gate for _, gate in told}) > 5
        if said == THOUGHTS:
            assert shaded == told
        else:  # the page leaves out the line that opens a box of code, and the marks that close it
            assert len(shaded) > len(told) - 20 and shaded[:10] == told[:10] and shaded[-20:] == told[-20:]
    assert text_of(chromium, ".answer > .text") == plain
    tint = "getComputedStyle([...document.querySelectorAll('.warm')].find(e => e.title === TITLE)).backgroundColor"
    least, most = (chromium.evaluate(tint.replace("TITLE", f"'{value}'")) for value in ("0.00", "1.00"))
    assert least != most
    assert chromium.evaluate("document.querySelector('pre .warm') !== null && document.querySelector('img') === null")
    chromium.evaluate("$('memory').click()")
    assert chromium.evaluate("document.querySelectorAll('.warm').length") == 0
    assert text_of(chromium, ".answer > .text") == plain
    chromium.evaluate("$('memory').click(); $('language').click()")
    assert chromium.evaluate("$('memory').labels[0].textContent").startswith("Show where the memory opened")
    chromium.open(remembering)  # the choice is kept, and the next answer is shaded as it ends
    chromium.wait("!$('memory-switch').hidden")
    ask(chromium)
    chromium.wait("!running && document.querySelectorAll('.warm').length > 10")
    assert chromium.problems() == []


def test_a_model_without_memory_has_no_such_switch(page):
    page.wait("$('model').textContent")
    assert page.evaluate("$('memory-switch').hidden && !('memory_gates' in JSON.parse(requestBody()))")
