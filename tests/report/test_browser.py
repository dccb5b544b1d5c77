"""The pages in a real browser: nothing in its console, no request to anywhere, no wider than its window."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, sync_playwright

import petals_eval
from petals_eval.comparison.compare import compare
from petals_eval.report.comparison_page import comparison_page
from petals_eval.report.write import write_page
from petals_eval.runs.manifest import NoisyServer, ServerUsed
from petals_eval.two_modes.page import modes_page
from tests.report.pages import HOSTILE, METRICS, run_folder

SIZES = [(390, 844), (1280, 800)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        message = "no Chromium was found: install one (Debian, Ubuntu: apt install chromium)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=quiet)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root: Path = tmp_path_factory.mktemp("pages")
    folders = {kind: run_folder(root / kind, kind) for kind in METRICS}
    folders["interrupted"] = run_folder(root / "interrupted", finished=False, failed=20)
    wrong = NoisyServer("12D3KooWBeta", 3, 5, None, 0.25, True, "disputed")
    folders["disputed"] = run_folder(root / "disputed", noisy=(wrong,))
    folders["hostile"] = run_folder(
        root / "hostile",
        labels=(HOSTILE, "no"),
        adapters=(HOSTILE.replace("/", "|")[:90], "plain"),
        servers=(ServerUsed(HOSTILE, 0, 5, HOSTILE, HOSTILE, HOSTILE),),
        noisy=(NoisyServer(HOSTILE, 0, 5, HOSTILE, 0.5, True),),
    )
    found = {name: write_page(folder) for name, folder in folders.items()}
    found["comparison"] = root / "comparison.html"
    texts = {str(key): HOSTILE for key in range(120)}
    found["comparison"].write_text(comparison_page(compare(folders["hostile"]), texts=texts))
    found["modes"] = root / "modes.html"
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 3))
    modes = petals_eval.modes(model, torch.ones(1, 4), batches=[(torch.ones(3, 4), torch.ones(3))])
    found["modes"].write_text(modes_page(HOSTILE, {HOSTILE: modes, "plain": modes}, [HOSTILE] * 3))
    return found


NAMES = [*METRICS, "interrupted", "disputed", "hostile", "comparison", "modes"]


@pytest.mark.parametrize("name", NAMES)
def test_a_browser_finds_nothing_to_object_to(name: str, pages: dict[str, Path], browser: Browser) -> None:
    for scheme in ("light", "dark"):
        for width, height in SIZES:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, is_mobile=width < 500
            )
            page = context.new_page()
            asked: list[str] = []
            said: list[str] = []
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("dialog", lambda dialog, said=said: said.append(dialog.message))
            page.goto(pages[name].as_uri())
            title = page.title()
            too_wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            shown = page.evaluate("getComputedStyle(document.body).backgroundColor")
            context.close()
            assert asked == [pages[name].as_uri()]
            assert said == []
            assert title != "taken"
            assert too_wide <= 0, f"{name} at {width} px"
            assert shown == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
