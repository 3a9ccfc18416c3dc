"""`fluxrun report` and `fluxrun board`, opened in a real Chromium."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.report.page import render, write_report
from runner.report.sample_grid import MAX_THUMBNAILS
from runner.runs.short_names import short_labels
from tests.support.browser import browser, complaints, needs_browser, resize
from tests.support.house import House
from tests.support.paths import PROJECT
from tests.support.run_folders import write_run
from tests.support.tensorboard import with_events

EVIL = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>{{7*7}}'
LINE = "<b onclick=alert(3)>Traceback</b> & more"


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A sweep of four and a failed run."""
    runs = tmp_path / "runs"
    for rank, loss in ((4, 0.5), (8, 0.3), (16, 0.4), (32, 0.35)):
        write_run(runs, f"cat/lora.rank={rank}", rank=rank, loss=loss)
    write_run(runs, "dog", state="failed", error=f"OSError: {LINE}", steps=20, look_every=50, loss=0.9)
    return runs


def opened(driver: Any, runs: Path) -> Any:
    resize(driver, 1280, 900)
    driver.get_log("browser")
    driver.get(write_report(runs).resolve().as_uri())
    assert complaints(driver) == []
    return driver


def shown(driver: Any) -> list[str]:
    names: list[str] = driver.execute_script(
        "return [...document.querySelectorAll('#table tbody tr')].filter(r => !r.hidden).map(r => r.cells[1].innerText)"
    )
    return names


def click(driver: Any, selector: str) -> None:
    driver.execute_script("document.querySelector(arguments[0]).click()", selector)


def head(driver: Any, title: str) -> None:
    [button] = [b for b in driver.find_elements("css selector", "#table thead button") if b.text.split(" ")[0] == title]
    button.click()


# ---- what it says, without a browser -------------------------------------------------------------------------------


def test_the_page_is_one_file_that_asks_nobody(runs: Path) -> None:
    html = render(runs)
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", html.replace("data:", ""))
    linked = set(re.findall(r'href="([^"#]+)"', html)) - {"data:,"}
    assert "./cat/lora.rank%3D8/export/lora.safetensors" in linked
    assert all(link.startswith("./") for link in linked)
    assert all((runs / urllib.request.url2pathname(link)).is_file() for link in linked)


def test_words_of_specs_captions_and_logs_are_no_html(runs: Path) -> None:
    (runs / "secret").touch()
    write_run(runs, "evil", prompts=[EVIL], state="failed", error=EVIL, exports=["../secret", "javascript:1"])
    html = render(runs)
    assert "<img src=x" not in html
    assert "<b onclick" not in html
    assert html.count("<script") == 3  # the data and the two scripts that the policy names by their digests
    assert "secret" not in html
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])  # type: ignore[index]
    assert EVIL in [shot["prompt"] for shot in data["shots"]]


def test_sweeps_are_labelled_by_what_they_vary() -> None:
    assert short_labels(["a/lora.rank=4,train.lr=0.1", "b"]) == ["rank=4, lr=0.1", "b"]
    assert short_labels(["a/lora.rank=4", "b/lora.rank=4"]) == ["a: rank=4", "b: rank=4"]
    assert short_labels(["a/lora.lr=1", "a/train.lr=1"]) == ["lora.lr=1", "train.lr=1"]


def test_commands_name_the_run_as_the_shell_reads_it(runs: Path) -> None:
    write_run(runs, "odd", prompts=["it's a $TOK"])
    html = render(runs)
    assert "fluxrun sample odd --prompt &#39;it&#39;&#34;&#39;&#34;&#39;s a $TOK&#39; --count 4" in html
    assert f"fluxrun queue {runs}/dog/spec.toml --runs {runs}" in html


def test_a_runs_own_spec_goes_on(done: House) -> None:
    said = done.fluxrun("queue", "runs/a/spec.toml")
    assert said.code == 0, said.err
    assert "a: skipped, done" in said.err


def test_thumbnails_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tmp_path / "runs"
    write_run(runs, "a", steps=60, look_every=2)
    write_run(runs, "b", steps=60, look_every=2)
    monkeypatch.setattr("runner.report.sample_grid.MAX_THUMBNAILS", 12)
    cells = [cell for shot in page_data(runs)["shots"] for cell in shot["cells"]]
    assert len(cells) == 12
    assert {cell[1] for cell in cells} == {2, 30, 60}
    monkeypatch.setattr("runner.report.sample_grid.MAX_BYTES", 1)
    cells = [cell for shot in page_data(runs)["shots"] for cell in shot["cells"]]
    assert sum(cell[2] is not None for cell in cells) == 1  # the others are links
    assert all((runs / urllib.request.url2pathname(cell[3])).is_file() for cell in cells)
    assert MAX_THUMBNAILS == 1500


def page_data(runs: Path) -> Any:
    return json.loads(re.search(r'id="data">(.*?)</script>', render(runs), re.S)[1])  # type: ignore[index]


def test_a_page_that_cannot_be_written_fails_no_queue(done: House, monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.report.publish import publish

    def broken(runs: Path) -> Path:
        raise ValueError("no")

    told: list[str] = []
    monkeypatch.setattr("runner.report.page.write_report", broken)
    publish(done.folder / "runs", told.append)
    assert told == ["the results page was not written: ValueError: no; the runs are not affected"]


# ---- what it does --------------------------------------------------------------------------------------------------


@needs_browser
def test_sorting_filtering_and_states(driver: Any, runs: Path) -> None:
    opened(driver, runs)
    assert shown(driver) == ["rank=8", "rank=32", "rank=16", "rank=4", "dog"]  # by eval loss
    head(driver, "lora.rank")
    assert shown(driver) == ["rank=4", "rank=8", "dog", "rank=16", "rank=32"]  # as numbers
    head(driver, "lora.rank")
    assert shown(driver) == ["rank=32", "rank=16", "rank=8", "dog", "rank=4"]
    head(driver, "run")
    field = driver.find_element("id", "filter")
    field.send_keys("rank=8 done")
    assert shown(driver) == ["rank=8"]
    assert driver.find_element("id", "count").text == "1 of 5"
    field.clear()
    field.send_keys("lora.rank=3")  # a whole value, not its beginning
    assert shown(driver) == []
    assert driver.find_element("id", "nothing").is_displayed()
    field.clear()
    field.send_keys(" ")
    click(driver, ".toggle[data-state=done]")
    assert shown(driver) == ["dog"]
    assert complaints(driver) == []


@needs_browser
def test_curves_and_pictures_are_of_the_chosen_runs(driver: Any, runs: Path) -> None:
    opened(driver, runs)

    def drawn() -> tuple[int, int, int]:
        return (
            len(driver.find_elements("css selector", "#chosen button")),
            len(driver.find_elements("css selector", "#grid tbody tr")),
            driver.execute_script("return document.querySelectorAll('#plot-eval canvas').length"),
        )

    assert drawn() == (5, 4, 1)  # the failed one has curves and no pictures
    row = driver.find_element("css selector", "#grid tbody tr")
    assert row.find_element("css selector", "th").text.split("\n") == ["rank=8", "eval 0.3000"]
    sizes = driver.execute_script("return [...document.querySelectorAll('#grid img')].map(i => i.naturalWidth)")
    assert sizes == [32] * 16
    assert driver.find_element("css selector", "#grid a").get_attribute("href").endswith("/samples/step-000025-0.png")
    ink = """const c = document.querySelector('#plot-train canvas'), pen = c.getContext('2d');
             return new Set(pen.getImageData(0, 0, c.width, c.height).data).size"""
    assert driver.execute_script(ink) > 50  # lines, not an empty axis
    click(driver, "#table tbody input")
    assert drawn() == (4, 3, 1)
    click(driver, "#show-none")
    assert drawn() == (0, 0, 0)
    assert driver.find_element("id", "no-curves").is_displayed()
    click(driver, "#show-best")
    assert drawn() == (5, 4, 1)
    driver.execute_script(
        "const s = document.getElementById('shot'); s.value = 1; s.dispatchEvent(new Event('change'))"
    )
    assert "a TOK & a <cup>" in driver.find_element("css selector", "#grid img").get_attribute("alt")
    assert complaints(driver) == []


@needs_browser
def test_the_grid_has_the_steps_of_the_chosen_runs_alone(driver: Any, runs: Path) -> None:
    write_run(runs, "often", look_every=10, loss=0.95)

    def columns() -> list[str]:
        return [head.text for head in driver.find_elements("css selector", "#grid thead th")][1:]

    opened(driver, runs)
    assert columns()[:3] == ["step 10", "step 20", "step 25"]
    driver.execute_script("[...document.querySelectorAll('#table tbody input')].at(-1).click()")
    assert columns() == ["step 25", "step 50", "step 75", "step 100"]


@needs_browser
def test_hovering_a_curve_names_the_run(driver: Any, runs: Path) -> None:
    from selenium.webdriver import ActionChains

    opened(driver, runs)
    over = driver.find_element("css selector", "#plot-eval .u-over")
    driver.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", over)
    ActionChains(driver).move_to_element_with_offset(
        over, over.size["width"] // 2 - 2, over.size["height"] // 2 - 4
    ).perform()
    assert driver.find_element("css selector", "#plot-eval .tip").text.strip() == "0.3092 step 100 · rank=8"


@needs_browser
def test_failures_come_first_with_their_log(driver: Any, runs: Path) -> None:
    opened(driver, runs)
    failures = driver.find_element("id", "failures")
    assert f"OSError: {LINE}" in failures.find_element("css selector", "summary").text
    click(driver, "#failures summary")
    assert failures.find_element("css selector", "h2").text == "1 failed"
    assert f"OSError: {LINE}" in failures.find_element("css selector", "pre").text
    assert "queue" in failures.find_element("css selector", "code").text
    assert driver.execute_script("return document.querySelector('main').firstElementChild.id") == "failures"


@needs_browser
def test_an_empty_folder_and_runs_without_anything(driver: Any, tmp_path: Path) -> None:
    opened(driver, tmp_path / "runs")
    assert "No runs yet" in driver.find_element("css selector", "main").text
    write_run(tmp_path / "runs", "new", state="waiting", steps=0, look_every=1, eval_loss=None, train_loss=None)
    opened(driver, tmp_path / "runs")
    assert shown(driver) == ["new"]
    assert not driver.find_element("id", "pictures").is_displayed()
    assert driver.find_element("id", "no-curves").is_displayed()


@needs_browser
def test_nothing_of_a_spec_runs(driver: Any, runs: Path) -> None:
    write_run(runs, "evil", prompts=[EVIL], state="failed", error=EVIL, loss=0.1)
    opened(driver, runs)
    options = driver.execute_script("return [...document.querySelectorAll('#shot option')].map(o => o.textContent)")
    assert f"{EVIL} · seed 3" in options
    assert driver.execute_script("return document.querySelectorAll('img[src=x], [onclick], [onerror]').length") == 0
    driver.execute_script(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    assert driver.execute_script("return window.ran") is None  # and would be stopped if it were there


@needs_browser
def test_a_phone_scrolls_down_only_and_dark_is_dark(runs: Path) -> None:
    with browser(390, 844, dark=True) as phone:
        phone.get(write_report(runs).resolve().as_uri())
        assert phone.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [390, 390]
        assert phone.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(14, 17, 22)"
        assert phone.execute_script("return document.querySelector('#plot-eval canvas').clientWidth") > 300


@needs_browser
def test_two_hundred_runs_open_in_two_seconds(driver: Any, tmp_path: Path) -> None:
    """Of processor time, which other work on the machine does not change."""
    for number in range(200):
        write_run(tmp_path / "runs", f"r/lora.rank={number}", rank=number + 1, loss=0.3 + number / 1000, look_every=50)
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    opened(driver, tmp_path / "runs")
    driver.execute_script("return document.body.offsetHeight")
    spent = {entry["name"]: entry["value"] for entry in driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    assert len(shown(driver)) == 200
    assert 0.0 < spent["TaskDuration"] < 2.0, spent["TaskDuration"]


# ---- TensorBoard ---------------------------------------------------------------------------------------------------


@needs_browser
def test_the_board_lists_the_runs_with_their_hparams(driver: Any, runs: Path) -> None:
    for folder in (*sorted((runs / "cat").iterdir()), runs / "dog"):
        with_events(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "runner", "board", "--runs", str(runs), "--port", str(port)]
    board = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(PROJECT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(port, board)
        driver.get(f"http://127.0.0.1:{port}/#hparams")
        text = patiently(lambda: deep_text(driver), lambda text: "rank=32" in text)
        for word in ("rank=4", "rank=8", "rank=16", "dog", "lora.rank", "eval loss", "peak memory, GiB"):
            assert word in text, word
        assert "lora.alpha" not in text
    finally:
        os.killpg(board.pid, 15)
        board.wait()


def wait_for(port: int, board: subprocess.Popen[bytes]) -> None:
    """Until TensorBoard has read the runs."""
    for _ in range(240):
        assert board.poll() is None, "TensorBoard has ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs") as answer:
                if len(json.load(answer)) == 5:
                    return
        except OSError:
            pass
        time.sleep(0.25)
    raise AssertionError("TensorBoard did not show five runs")


def patiently(look: Any, enough: Any) -> Any:
    for _ in range(120):
        if enough(found := look()):
            return found
        time.sleep(0.25)
    return look()


def deep_text(driver: Any) -> str:
    """All text, in TensorBoard's shadow roots too."""
    text: str = driver.execute_script(
        """const walk = node => [...node.childNodes].map(child =>
             child.nodeType === 3 ? child.data : ['STYLE', 'SCRIPT'].includes(child.nodeName) ? ''
             : (child.shadowRoot ? walk(child.shadowRoot) : '') + walk(child)).join(' ');
           return walk(document.body)"""
    )
    return text
