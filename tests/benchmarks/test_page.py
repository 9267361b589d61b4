"""The page and the block for an issue: figures of rows, no speed without agreement, no path."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
SVG = "{http://www.w3.org/2000/svg}"
VERSIONS = {"torch": "2.13.0", "trl": "1.16.0"}


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules."""
    import page
    import submit
    from pages import svg_chart
    from rows import reading

    return SimpleNamespace(page=page, rows=reading, submit=submit, chart=svg_chart)


def side(name: str, setting: str = "best", speed: float = 2.0, **more: Any) -> dict[str, Any]:
    """A row of a DPO race."""
    row = {
        "benchmark": "race",
        "row": f"dpo {name} {setting}",
        "kind": "side",
        "task": "dpo",
        "side": name,
        "engine": "native" if name == "ours" else None,
        "setting": setting,
        "options": {"batch": 2},
        "status": "ok",
        "reason": None,
        "versions": VERSIONS,
        "pairs_per_second": speed,
        "tokens_per_second": 1000 * speed,
        "step_ms_p20": 900.0,
        "step_ms_p50": 1000.0,
        "step_ms_p80": 1100.0,
        "peak_allocated_gib": 10 * speed,
        "energy_joules": None,
        "gpu": "NVIDIA GeForce RTX 4090",
        "cpu": "AMD Ryzen 7 w/ Radeon Graphics",
        "geometry": "mistral-7b",
        "threads": 8,
        "commit": "abc1234",
        "date": "2026-11-21T10:00:00+00:00",
        "toy": False,
    }
    return row | more


def ratio(rival: str, **more: Any) -> dict[str, Any]:
    """The row of ours against one rival, at its best."""
    shared = ("benchmark", "task", "setting", "gpu", "cpu", "geometry", "threads", "date", "toy")
    row = {key: value for key, value in side("ratio").items() if key in shared}
    row |= {"row": f"dpo ratio {rival} best", "kind": "ratio", "rival": rival}
    row |= {"ours_row": "dpo ours best", "rival_row": f"dpo {rival} best"}
    return row | {"speed_ratio": 1.75, "memory_ratio": 0.5} | more


def kernel(metric: str, p50: float, date: str = "2026-11-21", **more: Any) -> dict[str, Any]:
    """A row of the GPU suite."""
    case = {"op": "norm", "tokens": 4096}
    percentiles = {"p20": p50, "p50": p50, "p80": p50}
    row = {"part": "kernels_speed", "case": case, "metric": metric, "unit": "ms", "status": "ok"}
    row |= {"date": date, "gpu": "NVIDIA L4", "toy": False, "commit": "abc1234"}
    return row | percentiles | {"derived": {"gb_per_s": 250.0, "percent_of_copy": 91.25}} | more


def lines_with(page: str, start: str) -> list[list[str]]:
    """Cells of the table lines whose first cell is this."""
    rows = [[c.strip() for c in x.strip("|").split("|")] for x in page.splitlines() if x[:1] == "|"]
    return [cells for cells in rows if cells[0] == start]


def figures_of(page: str, name: str) -> dict[str, str]:
    """Head -> cell of a side's line in the table of figures."""
    heads = lines_with(page, "side")[0]
    return dict(zip(heads, lines_with(page, name)[0], strict=True))


def bars_of(svg: str) -> tuple[list[float], list[str]]:
    """Widths of the bars, and all texts of a picture."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    widths = [float(bar.attrib["width"]) for bar in root.iter(f"{SVG}rect")]
    return widths, [text.text or "" for text in root.iter(f"{SVG}text")]


# ---------------------------------------------------------------- races


def test_a_race_has_its_figures_its_bars_and_its_provenance(bench):
    rows = [side("trl", "default", 0.5), side("trl", speed=1.25), side("ours", speed=2.5)]
    page, pictures = bench.page.make_page([*rows, ratio("trl")], "bench")
    found = figures_of(page, "zephyr-lite native, best")
    assert found["pairs/s"] == "2.50"
    assert found["useful tokens/s"] == "2,500"
    assert (found["step ms"], found["p20"], found["p80"]) == ("1,000", "900", "1,100")
    assert found["GiB allocated"] == "25.0"
    against = ["TRL, best", "1.75", "0.500", "dpo ours best / dpo trl best"]
    assert against in lines_with(page, "TRL, best")
    for fact in ("NVIDIA GeForce RTX 4090", "abc1234", "2026-11-21", "mistral-7b", "trl", "1.16.0"):
        assert fact in page
    assert set(pictures) == {"bench-1-speed.svg", "bench-1-memory.svg"}
    assert all(f"]({name})" in page for name in pictures)
    widths, texts = bars_of(pictures["bench-1-speed.svg"])
    assert widths == pytest.approx([widths[0], widths[0] * 0.2, widths[0] * 0.5], rel=0.01)
    assert {"2.50", "0.500", "1.25"} <= set(texts)


@pytest.mark.parametrize("status", ["disagrees", "unchecked", "out of memory", "absent"])
def test_a_side_that_did_not_do_the_work_has_no_figure(bench, status):
    """Even where its row has one: neither in the table, nor as a bar, nor as a ratio."""
    bad = side("trl", speed=98.765, status=status, reason="losses differ: 0.71 | 0.69")
    page, pictures = bench.page.make_page([side("ours"), bad, ratio("trl")], "bench")
    cells = figures_of(page, "TRL, best")
    del cells["side"]
    assert set(cells.values()) == {"not measured"}
    assert not re.search(r"98\.7|98,7|98\.8|987\.|1\.75", page)
    assert "losses differ: 0.71 \\| 0.69" in page
    widths, texts = bars_of(pictures["bench-1-speed.svg"])
    assert len(widths) == 1
    assert texts[-1] == status


def test_what_nobody_measured_is_said(bench):
    page, _ = bench.page.make_page([side("ours", energy_joules=None)], "bench")
    assert "SFT, kernels, export: not measured." in page
    assert re.search(r"On no side: .*joules.*: not measured\.", page)
    assert "rows/s" not in page, "a preference race has pairs"
    mixed = [side("ours", energy_joules=5.0), side("trl")]
    page, _ = bench.page.make_page(mixed, "bench")
    assert figures_of(page, "TRL, best")["joules"] == "not measured"
    page, pictures = bench.page.make_page([], "bench")
    assert page == "# Benchmarks\n\nDPO, SFT, kernels, export: not measured.\n"
    assert pictures == {}


def test_the_roofline_is_shown_where_a_row_has_it(bench):
    rows = [side("ours", percent_of_roofline=71.5), side("trl")]
    page, pictures = bench.page.make_page(rows, "bench")
    assert figures_of(page, "zephyr-lite native, best")["% of roofline"] == "71.5"
    _, texts = bars_of(pictures["bench-1-roofline.svg"])
    assert texts[-1] == "not measured"


def test_machines_runs_and_toys_are_not_mixed(bench):
    """Rivals stand beside ours of the same command: an older run's row is no part of it."""
    late = {"race": "2", "date": "2026-11-22T10:00:00+00:00", "commit": "fff"}
    card = {"race": "3", "gpu": "NVIDIA L4"}
    rows = [side("trl", race="1"), side("ours", race="1"), side("trl", **card)]
    rows += [side("plain", **late), side("ours", **late), side("ours", race="4", toy=True)]
    rows += [side("ours", race="5", dropout=0.05), ratio("trl", race="1"), ratio("trl", race="2")]
    hf = side("ours", engine="hf", race="6")
    (engines,) = bench.rows.races([hf, side("ours", "default", race="6"), side("ours", race="6")])
    assert [(r["engine"], r["setting"]) for r in engines.sides] == [
        ("native", "default"), ("native", "best"), ("hf", "best")
    ]  # fmt: skip
    for order in (rows, rows[::-1]):
        found = {tuple(row["side"] for row in race.sides): race for race in bench.rows.races(order)}
        assert set(found) == {("ours", "plain"), ("trl",), ("ours",)}
        assert len(bench.rows.races(order)) == 4, "dropout and toys are races of their own"
        assert [row["race"] for row in found["ours", "plain"].ratios] == ["2"]
    page, _ = bench.page.make_page([side("ours", toy=True)], "bench")
    assert "Toy size" in page
    page, _ = bench.page.make_page([side("ours", dropout=0.05)], "bench")
    assert "Toy size" not in page
    assert "dropout: 0.05" in page


def test_of_several_settings_the_fastest_is_drawn_and_all_are_listed(bench):
    rows = [side("ours", speed=4.0)]
    rows += [side("trl", speed=s, options={"batch": b}) for b, s in ((1, 1.0), (4, 2.0), (8, 1.5))]
    page, pictures = bench.page.make_page(rows, "bench")
    assert figures_of(page, "zephyr-lite native, best")["pairs/s"] == "4.00"
    for batch, speed in ((1, "1.00"), (4, "2.00"), (8, "1.50")):
        assert figures_of(page, f"TRL, best (batch={batch})")["pairs/s"] == speed
    widths, _ = bars_of(pictures["bench-1-speed.svg"])
    assert widths == pytest.approx([widths[0], widths[0] / 2], rel=0.01)


# ---------------------------------------------------------------- kernels, export


def test_kernels_show_time_and_share_and_a_wrong_case_no_speed(bench):
    old = kernel("rms_norm", 7.777, date="2026-11-20")
    rows = [old, kernel("rms_norm", 0.125), kernel("torch_rms_norm", 0.5)]
    page, pictures = bench.page.make_page(rows, "bench")
    cells = ["norm rms_norm", "0.125", "0.125", "0.125", "250 GB/s", "91.2"]
    assert lines_with(page, "norm rms_norm") == [cells]
    assert "7.78" not in page
    assert len(bars_of(pictures["bench-kernels.svg"])[0]) == 2
    wrong = kernel("error", 0.3, unit="1", status="wrong", note="0.3 above its bound")
    page, pictures = bench.page.make_page([*rows[1:], wrong], "bench")
    assert not lines_with(page, "norm rms_norm")
    assert "norm error: wrong: 0.3 above its bound" in page
    assert "Speed: not measured." in page
    assert pictures == {}


def test_rows_of_the_repository_make_a_page(bench):
    files = sorted((REPO / "benchmarks" / "results").glob("*.jsonl"))
    rows = bench.rows.read(files)
    page, pictures = bench.page.make_page(rows, "bench")
    assert "## Export beside the usual route" in page
    newest = {(r["quant"], r["route"]): r for r in rows if r.get("benchmark") == "export_cost"}
    for (quant, route), row in newest.items():
        found = [cells for cells in lines_with(page, quant) if cells[1] == route]
        assert [cells[2] for cells in found] == [bench.chart.three_digits(row["seconds"])]
    assert "first_run" in page, "other benchmarks are named"
    for svg in pictures.values():
        ElementTree.fromstring(svg)


def test_the_suite_adds_its_rows_to_a_file_of_other_benchmarks(bench, tmp_path):
    """`zephyr-lite bench kernels` appends to the file that `bench dpo` wrote."""
    from gpu.rows import Ledger, Part, figure, load_rows

    file = tmp_path / "bench.jsonl"
    file.write_text(json.dumps(side("ours")) + "\n")
    machine = {"device": "cpu", "gpu": "none", "torch": "2", "cuda": "none", "triton": "none"}
    machine |= {"bitsandbytes": "none", "commit": "abc1234", "toy": False}
    Ledger(file, machine).append(Part("nf4", 1, "?"), {"op": "x"}, [figure("m", "ms", 1.0)])
    assert Ledger(file, machine).has(Part("nf4", 1, "?"), {"op": "x"})
    assert len(load_rows(file)) == 1
    assert len(bench.rows.read([file])) == 2
    file.write_text('{"part": "nf4"}\n')
    with pytest.raises(ValueError, match="not a row of the GPU suite"):
        load_rows(file)


def test_the_readme_says_how_each_published_figure_is_made():
    text = (REPO / "benchmarks" / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Reproduce a published figure")[2].partition("\n## ")[0]
    files = {f.name for f in (REPO / "benchmarks" / "results").glob("*.jsonl")}
    assert files == set(re.findall(r"^\| `results/([\w.-]+)`", table, re.MULTILINE))


# ---------------------------------------------------------------- files, pictures


def test_the_command_writes_page_and_pictures(tmp_path):
    rows = [side("ours"), side("trl", "default", reason="<b>&", status="failed")]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "bench.jsonl").write_text(text + '{"torn": ')
    command = [sys.executable, str(REPO / "benchmarks" / "page.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = {file.name for file in tmp_path.iterdir()}
    assert written == {"bench.jsonl", "bench.md", "bench-1-speed.svg", "bench-1-memory.svg"}
    page = (tmp_path / "bench.md").read_text()
    assert "not installed" not in page
    assert "failed: &lt;b>&" in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"benchmark": "race", "task": "dpo"}\n', "bench.jsonl:1: the row lacks row, kind, date"),
        ('{"part": "nf4"}\n', "bench.jsonl:1: the row lacks case, metric"),
        ('{"benchmark": "x"}\nnonsense\n', "bench.jsonl:2: not a row"),
        ("[]\n", "bench.jsonl:1: not a row"),
        (None, "bench.jsonl: No such file"),
    ],
)
def test_a_file_that_is_no_rows_is_refused_with_its_line(bench, tmp_path, capsys, text, message):
    file = tmp_path / "bench.jsonl"
    if text is not None:
        file.write_text(text)
    assert bench.page.main([str(file), "--out", str(tmp_path / "bench.md")]) == 2
    assert message in capsys.readouterr().err
    assert bench.submit.main([str(file)]) == 2


def test_bars_are_well_formed_whatever_they_are_called(bench):
    bars = [bench.chart.Bar("<\"&'>", 0.0), bench.chart.Bar("b", None, instead="<failed>")]
    widths, texts = bars_of(bench.chart.bar_chart("<&>", bars))
    assert widths == [0.0]
    assert texts == ["<&>", "<\"&'>", "0", "b", "<failed>"]
    with pytest.raises(ValueError, match="below"):
        bench.chart.bar_chart("x", [bench.chart.Bar("a", -1.0)])


def test_figures_have_three_digits(bench):
    seen = [bench.chart.three_digits(x) for x in (0, 0.012345, 1.5, 12.34, 123.4, 12345.6)]
    assert seen == ["0", "0.0123", "1.50", "12.3", "123", "12,346"]


# ---------------------------------------------------------------- the block for an issue


def test_the_block_has_measured_sides_and_names_nobody(bench, tmp_path, capsys):
    options = {"model": "/home/anna/models/x", "cache": "~/x", "win": "C:\\Users\\anna", "batch": 2}
    private = {"user": "anna", "host": "annas-box", "folder": "/home/anna", "out": "rows/x.jsonl"}
    rows = [
        side("ours", options=options, geometry="models/anna", **private),
        side("trl", status="failed", reason="/home/anna/trl.py broke"),
        side("plain", race="2", toy=True),
        ratio("trl", folder="/home/anna"),
        kernel("rms_norm", 0.12345678, host="annas-box"),
    ]
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert bench.submit.main([str(file)]) == 0
    out, err = capsys.readouterr()
    assert "paste this into an issue" in err
    assert "anna" not in out
    first, *lines, last = out.splitlines()
    assert (first, last) == ("```json", "```")
    ours, norm = map(json.loads, lines)
    assert (ours["side"], ours["pairs_per_second"], norm["p50"]) == ("ours", 2.0, 0.1235)
    assert ours["versions"] == VERSIONS
    assert ours["cpu"] == "AMD Ryzen 7 w/ Radeon Graphics"
    assert ours["options"]["batch"] == 2
    assert ours["gpu"] == "NVIDIA GeForce RTX 4090"


def test_nothing_to_submit_is_said(bench, tmp_path, capsys):
    file = tmp_path / "bench.jsonl"
    file.write_text(json.dumps(side("ours", toy=True)) + "\n")
    assert bench.submit.main([str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "nothing to submit" in err
