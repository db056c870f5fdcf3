"""The page in a real browser: by keyboard alone, on any width, errors in words."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from hashtab.serving.bundle import Bundle
from tests.serving.scorer.kept import NEW, Kept
from tests.serving.scorer.servers import Server, scorer

USER = 105
CHROMIUM = "/usr/bin/chromium"
CONTRAST = 4.5  # WCAG 2.2 AA, of text

# Of each element with text of its own: the contrast with what lies behind it.
_CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const channels = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).map((c) => c / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (channels(colour)[3] === 255) return colour;
    }
    return "white";
  };
  return [...document.querySelectorAll("body *")]
    .filter((e) => e.checkVisibility() && [...e.childNodes].some(
      (n) => n.nodeType === Node.TEXT_NODE && n.textContent.trim()))
    .map((e) => {
      const pair = [luminance(getComputedStyle(e).color), luminance(behind(e))].sort();
      return [(pair[1] + 0.05) / (pair[0] + 0.05), e.textContent.trim().slice(0, 30)];
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # A container's root may not make the sandbox.
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(browser: Browser, server: Server, **options: Any) -> Page:
    page = browser.new_page(**options)
    page.set_default_timeout(20_000)
    page.complaints = []  # type: ignore[attr-defined]
    complain = page.complaints.append  # type: ignore[attr-defined]
    page.on("console", lambda m: complain(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complain(str(error)))
    page.goto(f"http://{server.address}/")
    return page


@pytest.fixture
def page(browser: Browser, shop: Server) -> Iterator[Page]:
    """The page, about which the browser must have nothing to complain."""
    opened = open_page(browser, shop)
    yield opened
    assert opened.complaints == []  # type: ignore[attr-defined]
    opened.close()


def ask(page: Page, user: object) -> None:
    page.get_by_label("User", exact=True).fill(str(user))
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text(re.compile(rf"User {user}: \d+ behaviours"))


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.textContent || document.activeElement.id"))


def test_by_keyboard_alone_one_types_a_user_and_sees_candidates_and_why(
    page: Page, shop: Server, kept: Kept
) -> None:
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the candidates"
    page.keyboard.press("Tab")
    page.keyboard.type(str(USER))
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text(f"User {USER}: 12 behaviours, 20 candidates.")

    answer = shop.ask("POST", "/v1/recommend", {"user": USER, "candidates": 500}).json
    shown = page.locator("#candidates button")
    assert shown.count() == len(answer["items"])
    events = kept.events(USER)
    history = page.locator("#history li").all_inner_texts()
    assert len(history) == 20
    assert history[0].split("\n")[0] == f"Product {events[-1].item}"
    assert re.search(r"2023-\d\d-\d\d \d\d:\d\d UTC", history[0])

    for _ in range(4):  # the box, the button, the history that scrolls, the first candidate
        page.keyboard.press("Tab")
    first = shown.first.inner_text().split("\n")
    assert focused(page).startswith(first[0])
    assert first[0].startswith(("Product ", "item 7"))
    assert re.fullmatch(r"\d+\.\d%", first[1])
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text(f"Why {first[0]}.")
    assert focused(page) == "Why"
    expect(shown.first).to_have_attribute("aria-pressed", "true")

    rows = page.locator("#why tbody tr")
    item = int(first[0].removeprefix("Product "))
    asked = {"user": USER, "item": item}
    why = shop.ask("POST", "/v1/explain", asked).json
    assert rows.count() == len(why["behaviours"]) > 0
    best = why["behaviours"][0]
    cells = rows.first.locator("th, td").all_inner_texts()
    assert cells[0] == (best["name"] or f"item {best['item']}")
    assert cells[2:4] == [str(best["times"]), f"{best['shared_groups']} of 4"]
    assert cells[4].strip() == f"{100 * best['share']:.1f}%"
    expect(page.locator("#scores")).to_contain_text("Without history")

    model = answer["model"]
    expect(page.locator("#model")).to_contain_text(model["version"])
    expect(page.locator("#tables")).to_have_text(
        f"fingerprint {model['fingerprint']}, "
        f"this user's written {kept.record(USER).revision} times"
    )
    expect(page.locator("#index")).to_have_text(answer["index"][:12])
    expect(page.locator("#last")).to_have_text(re.compile(r"^\d+\.\d ms \(v1/explain\)$"))
    expect(page.locator("#rolling")).to_have_text(
        re.compile(r"^median \d+\.\d ms, slowest \d+\.\d ms of 3$")
    )


def test_an_unknown_user_is_said_to_be_unknown_and_sees_what_is_met_most(page: Page) -> None:
    for user in ("nobody", NEW):
        ask(page, user)
        expect(page.locator("#candidates-note")).to_contain_text("This user is not known.")
        expect(page.locator("#candidates-note")).to_contain_text("what is met most")
        expect(page.locator("#history-note")).to_have_text("The log holds nothing of this user.")
        assert page.locator("#candidates button").count() == 20
        page.locator("#candidates button").first.click()
        expect(page.locator("#why-note")).to_contain_text("scored without a history")
        expect(page.locator("#why")).to_be_hidden()


def test_with_what_they_met_before_more_candidates_come(page: Page, kept: Kept) -> None:
    met = len({event.item for event in kept.events(USER)})
    every = len(Bundle.open(kept.bundle).catalogue)
    ask(page, USER)
    expect(page.locator("#candidates-note")).to_contain_text(f"of {every - met} retrieved")
    page.get_by_label("with what they met before").check()
    ask(page, USER)
    expect(page.locator("#candidates-note")).to_contain_text(f"of {every} retrieved")


def test_names_are_shown_as_text_whatever_they_hold(
    browser: Browser, kept: Kept, tmp_path: Path
) -> None:
    (tmp_path / "names.csv").write_text(
        "item,name\n" + "".join(f'{7 * i},"<img src=x onerror=alert({i})>"\n' for i in range(40))
    )
    options = ("--bundle", kept.bundle, "--store", kept.store, "--names", tmp_path / "names.csv")
    with scorer(tmp_path / "server", *options) as server:
        page = open_page(browser, server)
        ask(page, USER)
        assert "<img src=x" in page.locator("#candidates button").first.inner_text()
        assert page.locator("#candidates img").count() == 0
        assert page.complaints == []  # type: ignore[attr-defined]
        page.close()


def test_when_the_server_is_away_the_page_says_so_and_goes_on_once_it_is_back(
    page: Page,
) -> None:
    ask(page, USER)
    page.context.set_offline(True)
    page.get_by_label("User", exact=True).fill("110")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text(
        "The server does not answer. Is it running? Try again in a moment."
    )
    expect(page.get_by_role("status")).to_have_text("")
    complaints = page.complaints  # type: ignore[attr-defined]
    assert all("ERR_INTERNET_DISCONNECTED" in said for said in complaints)  # the browser's own
    complaints.clear()
    page.context.set_offline(False)
    ask(page, 110)
    expect(page.get_by_role("alert")).to_have_text("")


def test_what_the_server_refuses_is_shown_in_its_words(
    browser: Browser, kept: Kept, tmp_path: Path
) -> None:
    lonely = tmp_path / "bundle"
    lonely.symlink_to(kept.bundle)  # without an index beside it
    with scorer(tmp_path / "server", "--bundle", lonely, "--store", kept.store) as server:
        page = open_page(browser, server)
        page.get_by_label("User", exact=True).fill("105")
        page.keyboard.press("Enter")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("The server refused (409): there is no index of the items")
        page.close()


def test_histories_of_a_server_with_a_token_are_shown_to_those_who_type_it(
    browser: Browser, kept: Kept, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    options = ("--bundle", kept.bundle, "--store", kept.store, "--token-file", token)
    with scorer(tmp_path / "server", *options) as server:
        page = open_page(browser, server)
        expect(page.get_by_label("Token")).to_be_hidden()
        page.get_by_label("User", exact=True).fill(str(USER))
        page.keyboard.press("Enter")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("those with the server's token")
        assert page.locator("#history li").count() == 0
        expect(page.get_by_label("Token")).to_be_focused()
        page.keyboard.type("a guess")
        page.keyboard.press("Enter")
        expect(alert).to_contain_text("not the server's token")
        page.get_by_label("Token").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_contain_text(f"User {USER}: 12 behaviours")
        expect(alert).to_have_text("")
        page.locator("#candidates button").first.click()
        expect(page.locator("#why tbody tr").first).to_be_visible()
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_easy_to_read_in_light_and_dark_and_fits_a_small_screen(
    scheme: str, browser: Browser, shop: Server
) -> None:
    page = open_page(browser, shop, color_scheme=scheme, viewport={"width": 320, "height": 640})
    ask(page, USER)
    page.locator("#candidates button").first.click()
    expect(page.locator("#why tbody tr").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    # Targets that a finger hits: 44 pixels high.
    heights = [
        b.evaluate("e => e.getBoundingClientRect().height") for b in page.locator("button").all()
    ]
    assert min(heights) >= 44
    weak = [(ratio, text) for ratio, text in page.evaluate(_CONTRASTS) if ratio < CONTRAST]
    assert weak == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert dark == (scheme == "dark")
    assert page.complaints == []  # type: ignore[attr-defined]
    page.close()


def test_everything_has_a_name_and_a_place_for_screen_readers(page: Page) -> None:
    ask(page, USER)
    page.locator("#candidates button").first.click()
    expect(page.locator("#why tbody tr").first).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "en"
    for role in ("banner", "main", "contentinfo", "search"):
        assert page.get_by_role(role).count() == 1, role
    for name in ("History", "Candidates", "Why"):
        expect(page.get_by_role("region", name=name)).to_be_visible()
    headings = page.get_by_role("heading").all()
    levels = [int(h.evaluate("e => e.tagName")[1]) for h in headings]
    assert levels == [1, 2, 2, 2, 2]
    table = page.get_by_role("table", name="Past behaviours that share buckets with it")
    assert table.get_by_role("columnheader").count() == 5
    assert table.get_by_role("rowheader").count() == table.get_by_role("row").count() - 1
    assert page.get_by_role("status").get_attribute("aria-live") == "polite"
    for thing in page.locator("button, input").all():
        assert thing.evaluate("e => (e.labels?.[0] ?? e).textContent.trim()")


def test_the_pages_policy_lets_nothing_in_from_elsewhere(shop: Server, browser: Browser) -> None:
    page = browser.new_page()
    answer = page.goto(f"http://{shop.address}/")
    assert answer is not None
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    ask(page, USER)
    assert asked
    assert all(url.startswith((f"http://{shop.address}/", "data:")) for url in asked)
    with pytest.raises(Exception, match=r"Content Security Policy|CSP"):
        page.add_script_tag(content="window.broken = true")
    page.close()
