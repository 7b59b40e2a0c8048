"""The page at `/`, used with the keyboard in a real browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import FOUND, Browser, browsing
from server_lab import CAPITAL, RIVER, TOKEN, Client

pytestmark = [
    pytest.mark.skipif(FOUND is None, reason="needs chromium"),
    pytest.mark.parametrize("client", [True], ids=["batched"], indirect=True),
]

LAST = "document.querySelector('#turns > li:last-child')"
FOCUS = "document.activeElement"


def focus(browser: Browser, wanted: str) -> None:
    """Go on with the tabulator until what has the focus reads `wanted`."""
    named = f"{FOCUS}.textContent || {FOCUS}.getAttribute('aria-label') || {FOCUS}.id"
    for _ in range(30):
        if browser.run(named) == wanted:
            return
        browser.press("Tab")
    raise AssertionError(f"the tabulator does not lead to {wanted!r}")


def test_a_person_asks_corrects_sees_why_and_undoes_with_the_keyboard_alone(
    client: Client, tmp_path: Path
) -> None:
    with browsing(tmp_path / "home") as browser:
        url = f"http://127.0.0.1:{client.port}/"
        browser.call("Page.navigate", url=url)
        browser.until("document.querySelector('#state')?.textContent.includes('talker')")
        assert browser.run(f"{FOCUS}.id") == "message"
        focus(browser, "token")
        browser.press("wrong", "Enter")

        browser.run("document.getElementById('message').focus()")
        browser.press(CAPITAL, "Enter")
        browser.until(f"!!{LAST}?.querySelector('.row')")
        assert browser.run(f"{LAST}.querySelector('.said').textContent") == "Sydney"
        assert "no edit answers · version 0" in browser.run(f"{LAST}.innerText")

        focus(browser, "Correct")
        browser.press("Enter")
        assert browser.run(f"{FOCUS}.getAttribute('aria-label')") == "The right answer"
        browser.press("Canberra", "Enter")
        browser.until("document.getElementById('news').className === 'bad'")
        assert "this server's token" in browser.run("document.getElementById('news').textContent")
        focus(browser, "token")
        browser.press(TOKEN, "Enter")
        focus(browser, "The right answer")
        browser.press("Enter")
        browser.until(f"{LAST}.classList.contains('hit') && !!{LAST}.querySelector('.row')")
        assert browser.run(f"{LAST}.querySelector('.said').textContent") == "Canberra"
        assert "edit 0 answers: distance 0.00, radius 0.500 · version 1" in browser.run(
            f"{LAST}.innerText"
        )
        assert "Canberra" in browser.run("document.getElementById('edits').innerText")

        focus(browser, "Why?")
        browser.press("Enter")
        why = browser.until(f"{LAST}.querySelector('.why')?.innerText")
        assert f"0: {CAPITAL} → Canberra" in why
        assert "within 0.500" in why

        focus(browser, "Undo the last change")
        browser.press("Enter")
        browser.until("document.getElementById('news').textContent.includes('edits 0 gone')")
        browser.until("document.querySelectorAll('#edits li').length === 0")
        focus(browser, "New conversation")
        browser.press("Enter", CAPITAL, "Enter")
        browser.until(f"!!{LAST}?.querySelector('.row')")
        assert browser.run(f"{LAST}.querySelector('.said').textContent") == "Sydney"

        # What a model or a person says is text, never part of the page.
        browser.run("document.getElementById('message').focus()")
        browser.press(f"<img src=x onerror=alert(1)> {RIVER}", "Enter")
        browser.until(f"!!{LAST}?.querySelector('.row')")
        assert browser.run("document.images.length") == 0
        asked = {line for line in browser.said if line.startswith("asks ")}
        assert all(line.startswith((f"asks {url}", "asks about:")) for line in asked), asked
        wrong = [x for x in browser.said if not x.startswith("asks ") and "401" not in x]
        assert [x for x in wrong if "favicon" not in x] == []
