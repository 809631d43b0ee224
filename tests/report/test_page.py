"""The page in a real browser: it draws what the tables say, in every mode, without the network."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from altered import altered, pieces_of, rows_of
from reference import Raw, Tensors, narrow, weights, widen, write_checkpoint

import rv_distributed as rv
from rv_distributed.plan import PIECE_ALIGNMENT
from rv_distributed.report import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs Chromium and chromedriver (Debian: chromium, chromium-driver)"
)
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "hide-scrollbars"),
)
HOSTILE = "model.layers.1.</script><script>document.title='owned'</script><b>&amp;.weight"
NAMES = [f"model.layers.{n}.{m}.weight" for n in range(4) for m in ("mlp.up_proj", "self_attn.q_proj", "input_norm")]
NAMES += ["model.embed_tokens.weight", HOSTILE]


def models(folder: Path) -> tuple[str, str, str]:
    """Three models; the donor's weights are moved by little, as reinforcement learning does."""
    rng = np.random.default_rng(3)
    made: list[Tensors] = [{name: weights(rng, "BF16", (64, 100)) for name in NAMES} for _ in range(2)]
    donor = {}
    for name, raw in made[1].items():
        moved = np.where(rng.random(6400) < 0.2, widen(raw) * np.float32(1.006), widen(raw)).astype(np.float32)
        donor[name] = Raw("BF16", raw.shape, narrow(moved, "BF16"))
    tensors = [{**made[0], "ids": Raw("I64", (3,), bytes(24))}, donor, made[1]]
    names = ("t", "a?token=hunter2", "b")
    t, a, b = (write_checkpoint(folder / name, one) for name, one in zip(names, tensors, strict=True))
    return t, a, b


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    folder = tmp_path_factory.mktemp("outs")
    target, donor, reference = models(folder)
    found = {alpha: folder / f"out-{alpha}" for alpha in (0.3, 0.7, 1.0)}
    options = rv.PlanOptions(piece_bytes=PIECE_ALIGNMENT)
    for alpha, out in found.items():
        run_options = rv.RunOptions(runtime="local", workers=2)
        rv.transfer(target, donor, reference, str(out), alpha=alpha, plan_options=options, run_options=run_options)
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for flag in (*FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def show(browser: Any, path: Path, *, width: int = 1000, dark: bool = False) -> None:
    """Load a page in a window of some width, in light or dark mode, and forget what was logged before."""
    from selenium.webdriver.support.ui import WebDriverWait

    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    mode = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [mode]})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(path.as_uri())
    everything = "return Array.from(document.querySelectorAll('.plot')).every(plot => plot.querySelector('.main-svg'))"
    WebDriverWait(browser, 30).until(lambda _: browser.execute_script(everything))


def drawn(browser: Any, name: str) -> list[dict[str, Any]]:
    """The traces of a figure as plotly has them."""
    keys = "['x', 'y', 'z', 'name'].map(key => [key, trace[key] && JSON.parse(JSON.stringify(Array.from(trace[key])))])"
    script = f"return document.getElementById('{name}').data.map(trace => Object.fromEntries({keys}))"
    found: list[dict[str, Any]] = browser.execute_script(script)
    return found


@pytest.fixture
def page(outs: dict[float, Path], tmp_path: Path) -> Path:
    path = tmp_path / "out.html"
    path.write_text(report([str(outs[0.7])]), encoding="utf-8")
    return path


def test_the_figures_hold_what_the_tables_say(browser: Any, page: Path, outs: dict[float, Path]) -> None:
    show(browser, page)
    rows = {row["name"]: row for row in pq.read_table(outs[0.7] / "rv_tensors.parquet").to_pylist()}
    (heat,) = drawn(browser, "heat")
    assert heat["x"] == ["–", "0", "1", "2", "3"]
    seen = 0
    for module, values in zip(heat["y"], heat["z"], strict=True):
        for layer, value in zip(heat["x"], values, strict=True):
            name = f"model.{module}.weight" if layer == "–" else f"model.layers.{layer}.{module}.weight"
            if name in rows:
                assert value == pytest.approx(rows[name]["v_t_ratio"], rel=1e-12)
                seen += 1
    assert seen == len(NAMES) - 1, "the hostile name is shown escaped"
    measured = [row for row in rows.values() if row["v_norm"] is not None]
    (line,) = drawn(browser, "realised")
    for layer, value in zip(line["x"], line["y"], strict=True):
        own = [row for row in measured if f".layers.{layer}." in row["name"]]
        weight = sum(row["v_norm"] ** 2 for row in own)
        assert value == pytest.approx(
            sum(row["realised_alpha"] * row["v_norm"] ** 2 for row in own) / weight, rel=1e-12
        )
    (lost,) = drawn(browser, "absorbed")
    assert lost["y"][0] == pytest.approx(
        sum(row["absorbed"] for row in measured if ".layers.0." in row["name"])
        / sum(row["nonzero"] for row in measured if ".layers.0." in row["name"])
    )
    (ulps,) = drawn(browser, "ulps")
    assert ulps["y"] == [sum(row["ulps"][place] for row in measured) for place in range(8)]
    (largest,) = drawn(browser, "largest")
    assert largest["x"] == sorted((row["v_norm"] for row in measured), reverse=True)[:20]
    pieces = pq.read_table(outs[0.7] / "rv_pieces.parquet").to_pylist()
    speeds = drawn(browser, "speed")
    width = speeds[0]["x"][0]
    written = sum(sum(trace["y"]) * width for trace in speeds)
    assert written == pytest.approx(sum(piece["bytes_written"] for piece in pieces))


@pytest.mark.parametrize("width", [360, 1000])
def test_every_figure_is_drawn_without_errors_and_without_the_network(browser: Any, page: Path, width: int) -> None:
    show(browser, page, width=width)
    sizes = browser.execute_script(
        "return Array.from(document.querySelectorAll('.plot svg.main-svg')).map(s => s.getBoundingClientRect())"
        ".map(box => [box.width, box.height])"
    )
    assert len(sizes) >= 6
    assert all(wide > 200 and high > 200 for wide, high in sizes)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_names_from_files_are_shown_and_not_obeyed_and_secrets_are_not_shown(browser: Any, page: Path) -> None:
    show(browser, page)
    assert browser.title == "out-0.7"
    text = browser.execute_script("return document.body.innerText")
    assert "</script><script>document.title" in text
    assert "hunter2" not in page.read_text(encoding="utf-8")


def ink_and_ground(browser: Any) -> tuple[str, str, str]:
    found: tuple[str, str, str] = tuple(
        browser.execute_script(
            "return [getComputedStyle(document.querySelector('#ulps .xtick text')).fill,"
            "getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
    )
    return found


def luminance(colour: str) -> float:
    """WCAG's relative luminance of ``rgb(r, g, b)``."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_figures_follow_the_mode_and_stay_readable(browser: Any, page: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    seen = []
    for dark in (False, True):
        show(browser, page, dark=dark)
        seen.append(ink_and_ground(browser))
    # And while it is looked at.
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    WebDriverWait(browser, 30).until(lambda _: ink_and_ground(browser) == seen[0])
    seen.append(ink_and_ground(browser))
    assert seen[2] == seen[0] != seen[1]
    for tick, ground, text in seen:
        for ink in (tick, text):
            light, deep = sorted((luminance(ink), luminance(ground)), reverse=True)
            assert (light + 0.05) / (deep + 0.05) > 7, (ink, ground)


def test_it_prints_on_white_paper(browser: Any, page: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, page, dark=True)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    WebDriverWait(browser, 30).until(lambda _: luminance(ink_and_ground(browser)[0]) < 0.05)
    assert luminance(ink_and_ground(browser)[2]) < 0.05
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    printed = browser.execute_cdp_cmd("Page.printToPDF", {})["data"]
    assert len(printed) > 20_000


def test_a_sweep_is_compared(browser: Any, outs: dict[float, Path], tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    page.write_text(report([str(outs[alpha]) for alpha in (1.0, 0.3, 0.7)]), encoding="utf-8")
    show(browser, page)
    totals = {alpha: json.loads((out / "rv_manifest.json").read_bytes())["totals"] for alpha, out in outs.items()}
    dots, diagonal = drawn(browser, "realised")
    assert dots["x"] == [float(np.float32(alpha)) for alpha in (0.3, 0.7, 1.0)]
    assert dots["y"] == [totals[alpha]["realised_alpha"] for alpha in (0.3, 0.7, 1.0)]
    assert diagonal["x"] == diagonal["y"]
    (lost,) = drawn(browser, "absorbed")
    assert lost["y"] == [totals[a]["absorbed_elements"] / totals[a]["nonzero_elements"] for a in (0.3, 0.7, 1.0)]
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1000


@pytest.mark.parametrize("stats", ["basic", "none"])
def test_what_was_not_measured_is_said(browser: Any, tmp_path: Path, stats: Any) -> None:
    options = rv.PlanOptions(stats=stats)
    target, donor, reference = models(tmp_path)
    rv.transfer(target, donor, reference, str(tmp_path / "out"), plan_options=options)
    page = tmp_path / "out.html"
    page.write_text(report([str(tmp_path / "out")]), encoding="utf-8")
    show(browser, page)
    assert browser.get_log("browser") == []
    text = browser.execute_script("return document.body.innerText")
    assert ("it takes --stats full" if stats == "basic" else "made with --stats none") in text
    assert browser.execute_script("return document.getElementById('realised')") is None


def test_a_vector_and_one_with_nan_are_drawn_too(browser: Any, tmp_path: Path) -> None:
    _, donor, reference = models(tmp_path)
    rv.extract(donor, reference, str(tmp_path / "v"))
    broken = {"model.layers.0.x": Raw("F32", (4,), np.array([1, math.nan, 5, 2], np.float32).tobytes())}
    zeros = {"model.layers.0.x": Raw("F32", (4,), bytes(16))}
    target, vector = write_checkpoint(tmp_path / "zeros", zeros), write_checkpoint(tmp_path / "broken", broken)
    allowed = rv.RunOptions(allow_nonfinite=True)
    rv.apply(target, {vector: 1.0}, str(tmp_path / "nan"), run_options=allowed)
    for name in ("v", "nan"):
        page = tmp_path / f"{name}.html"
        page.write_text(report([str(tmp_path / name)]), encoding="utf-8")
        show(browser, page)
        assert browser.get_log("browser") == []
        assert drawn(browser, "speed")


def tooltip(browser: Any, name: str, at: dict[str, int]) -> list[str]:
    """The lines that a figure shows over a point, or over a cell of the heat map."""
    from selenium.webdriver.support.ui import WebDriverWait

    given = at if "xval" in at else [{"curveNumber": 0, **at}]
    clear = "document.querySelectorAll('.hoverlayer > *').forEach(shown => shown.remove());"
    browser.execute_script(f"{clear} Plotly.Fx.hover(arguments[0], arguments[1])", name, given)
    lines = f"return Array.from(document.querySelectorAll('#{name} .hovertext :is(.nums tspan.line, text.name)'))"
    lines += ".map(line => line.textContent)"
    # Plotly delays what follows too soon on another.
    found: list[str] = WebDriverWait(browser, 30).until(lambda _: browser.execute_script(lines))
    return found


def test_tooltips_tell_whole_names_and_exact_values(browser: Any, page: Path, outs: dict[float, Path]) -> None:
    show(browser, page)
    rows = {row["name"]: row for row in pq.read_table(outs[0.7] / "rv_tensors.parquet").to_pylist()}
    (heat,) = drawn(browser, "heat")
    module = heat["y"].index("mlp.up_proj")
    for layer in range(3):
        lines = tooltip(browser, "heat", {"xval": heat["x"].index(str(layer)), "yval": module})
        assert lines[:2] == ["mlp.up_proj", f"layer {layer}"]
        assert float(lines[2].split()[1]) == rows[f"model.layers.{layer}.mlp.up_proj.weight"]["v_t_ratio"]
    measured = [row for row in rows.values() if row["v_norm"] is not None]
    longest = max(measured, key=lambda row: row["v_norm"])
    name, value = tooltip(browser, "largest", {"pointNumber": 0})
    assert (name, float(value.split()[1])) == (longest["name"], longest["v_norm"])
    (line,) = drawn(browser, "realised")
    told = tooltip(browser, "realised", {"pointNumber": 2})
    assert (told[0], float(told[1])) == ("layer 2: realised alpha", line["y"][2])


EVIL = "</script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"


def test_hostile_names_workers_reasons_and_folders_are_text(
    browser: Any, outs: dict[float, Path], tmp_path: Path
) -> None:
    """In every place of the page that shows something from a file, and in the tooltips, which read HTML of a kind."""
    links = "<a href='https://example.com/'>x</a><b>%{y}</b> \u202e\u2028 </style> ]]> <!--"
    rows = [row._replace(name=f"model.layers.0.{n}{EVIL}{links}") for n, row in enumerate(rows_of(outs[0.7]))]
    rows = [row._replace(dtype=EVIL, why=EVIL if row.rule != "combine" else "") for row in rows]
    pieces = [row._replace(worker=f"{EVIL}{links}{row.piece % 2}") for row in pieces_of(outs[0.7])]
    manifest = rv.verify(str(outs[0.7]))
    entry = manifest.inputs[0]
    inputs = tuple(type(entry)(entry.role, f"s3://key:hunter2@x/{EVIL}{links}", entry.fingerprint, EVIL) for _ in "ab")
    texts: dict[str, Any] = {"formula": EVIL, "created": EVIL, "inputs": inputs}
    folder = tmp_path / "a<img src=x onerror=document.title='owned'>"
    out = altered(outs[0.7], folder, rows=rows, pieces=pieces, versions={EVIL: EVIL}, **texts)
    twin = altered(outs[0.3], tmp_path / "b" / out.name, rows=rows, **texts)
    for number, given in enumerate(([out], [out, twin])):
        page = tmp_path / f"page{number}.html"
        page.write_text(report([str(one) for one in given]), encoding="utf-8")
        assert "hunter2" not in page.read_text(encoding="utf-8")
        show(browser, page)
        foreign = "img, a[href], svg a, iframe, link, base, form"
        count = f"return document.querySelectorAll('{foreign}').length"
        for name in ("heat", "largest", "speed") if number == 0 else ("realised", "ratio"):
            told = tooltip(browser, name, {"xval": 0, "yval": 0} if name == "heat" else {"pointNumber": 0})
            assert "<" in "".join(told)
            assert browser.execute_script(count) == 0, name
        assert browser.get_log("browser") == []
        assert browser.title != "owned"
        assert browser.execute_script("return document.scripts.length") == 3
        assert EVIL in browser.execute_script("return document.body.innerText")


def test_the_page_may_not_use_the_network(browser: Any, page: Path) -> None:
    """Were some name to get through all escapes, it could not tell anybody."""
    show(browser, page)
    script = """const done = arguments[1], blocked = [];
    document.addEventListener("securitypolicyviolation", event => blocked.push(event.effectiveDirective));
    const image = new Image(); image.src = arguments[0] + "/i.png";
    const other = document.createElement("script"); other.src = arguments[0] + "/s.js"; document.head.append(other);
    fetch(arguments[0]).catch(() => setTimeout(() => done(blocked), 0));"""
    blocked = browser.execute_async_script(script, "https://example.invalid")
    assert {"img-src", "connect-src", "script-src-elem"} <= set(blocked)


def test_nothing_is_clipped_on_paper(browser: Any, page: Path) -> None:
    """At the width of A4 less its margins, where a reader cannot scroll."""
    from selenium.webdriver.support.ui import WebDriverWait

    show(browser, page, width=1000, dark=True)
    metrics = {"width": 718, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [dark]})
    right = "return Math.max(...Array.from(document.querySelectorAll('.main-svg, table, .plot text')).map("
    right += "part => part.getBoundingClientRect().right))"
    WebDriverWait(browser, 30).until(lambda _: browser.execute_script(right) <= 718)
    WebDriverWait(browser, 30).until(lambda _: luminance(ink_and_ground(browser)[0]) < 0.05)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_throughput_begins_with_the_run_and_fills_it(browser: Any, page: Path) -> None:
    show(browser, page)
    ends = drawn(browser, "speed")[0]["x"]
    assert browser.execute_script("return document.getElementById('speed')._fullLayout.xaxis.range") == [0, ends[-1]]
    box = "return ['.bglayer .bg, .plotbg, .bg', '.points path'].map(part => {const box = document.querySelector("
    box += "'#speed ' + part.split(', ').join(', #speed ')).getBoundingClientRect(); return box.left})"
    ground, first = browser.execute_script(box)
    assert abs(first - ground) < 2


def test_outputs_rounded_in_two_ways_are_two_lines(browser: Any, outs: dict[float, Path], tmp_path: Path) -> None:
    target, donor, reference = (str(outs[0.3].parent / name) for name in ("t", "a?token=hunter2", "b"))
    options = rv.PlanOptions(rounding="stochastic")
    rv.transfer(target, donor, reference, str(tmp_path / "out"), alpha=0.3, plan_options=options)
    page = tmp_path / "sweep.html"
    page.write_text(report([*(str(out) for out in outs.values()), str(tmp_path / "out")]), encoding="utf-8")
    show(browser, page)
    found = {"".join(trace["name"]): trace["x"] for trace in drawn(browser, "realised")}
    third = float(np.float32(0.3))
    assert found["nearest, auto"] == [third, float(np.float32(0.7)), 1.0]
    assert found["stochastic, auto"] == [third]
    (ratios, _) = drawn(browser, "ratio")
    totals = rv.verify(str(outs[0.3])).totals
    assert totals.v_norm is not None
    assert totals.t_norm is not None
    assert ratios["y"][0] == totals.v_norm / totals.t_norm
