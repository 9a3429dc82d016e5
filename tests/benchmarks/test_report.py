"""What the benchmarks write: ratios, limits, JSON, Markdown, plots, the README's table, and whether two runs agree."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import agree, cases, models, plots, readme, report
from benchmarks.peers import IMPLEMENTATIONS
from benchmarks.published import Published
from benchmarks.report import Report, markdown
from benchmarks.rows import OTHERS, OURS, Entry, Row
from benchmarks.workload import NotAvailable
from cnnfast.timing import Timing

ROOT = Path(__file__).resolve().parents[2]


def entry(name, ms, **keywords):
    return Entry(name, "timed", timing=Timing((ms / 1e3,) * 3, 1), error=1e-7, **keywords)


def row(*entries, dtype="float32", case="case", batch=1, suite="layers", macs=10**9):
    mm = Timing((0.01,), 1)
    return Row(case, suite, "title", dtype, batch, macs, 1e-5, entries, 1000, mm, least_bytes=10**6, bandwidth=1e10)


def full(**keywords):
    """A row with every peer; ours is twice as fast as the best eager, with a spread."""
    ours = Entry("cnnfast", "timed", timing=Timing((1e-3, 2e-3, 4e-3), 1), peak=3_000_000, held=5_000_000)
    others = [("eager", 8), ("eager channels_last", 4), ("torch.compile", 5), ("onnxruntime", 3), ("OpenVINO", 2)]
    return row(*(entry(name, ms) for name, ms in others), ours, **keywords)


def test_rates_and_ratios():
    r = row(entry("eager", 8), entry("eager channels_last", 4), entry("cnnfast", 2))
    ours = r.entry("cnnfast")
    assert r.mm_tflops == pytest.approx(0.2)
    assert r.tflops(ours) == pytest.approx(1.0) and r.fraction(ours) == pytest.approx(5.0)
    assert r.speedup(ours).median == pytest.approx(2.0) and r.speedup(ours, ("eager",)).median == pytest.approx(4.0)
    assert r.speedup(ours, ("torch.compile",)) is None


def test_markdown_says_where_we_are_slower():
    eager = entry("eager", 8), entry("eager channels_last", 4)
    fast, slow = row(*eager, entry("cnnfast", 2, path="oneDNN")), row(*eager, entry("cnnfast", 5), dtype="bfloat16")
    nchw = row(*eager, entry("cnnfast NCHW", 5), dtype="float16")  # against eager NCHW it is faster
    text = markdown(Report({"date": "today"}, "cmd", (fast, slow, nchw), complete=True))
    assert "eager NCHW): case, bfloat16, batch 1: cnnfast 0.80x [0.80, 0.80]." in text
    assert "| case, float32, batch 1 | 2.000 | 2.00x [2.00, 2.00] |" in text and "- date: today" in text
    assert "nowhere." in markdown(Report({}, "cmd", (fast,)))
    assert "incomplete" not in text and "incomplete" in markdown(Report({}, "cmd"))


def test_unsteady_rows_are_named():
    shaky = Entry("eager", "timed", timing=Timing((1.0, 2.0, 3.0, 4.0), 1))
    assert "Unsteady" in markdown(Report({}, "cmd", (row(shaky),)))
    assert "Unsteady" not in markdown(Report({}, "cmd", (row(entry("eager", 1)),)))


def test_json_holds_the_figures_and_replaces_the_file(tmp_path):
    r = Report(report.environment(), "cmd", (row(entry("eager", 8), entry("cnnfast", 2)),), complete=True)
    (tmp_path / "bench.json").write_text("old")
    paths = r.write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench.json", "bench.md"] == sorted(p.name for p in paths)
    data = json.loads(paths[0].read_text())
    assert data["complete"] and {"date", "processor", "instruction set", "threads", "torch", "commit"} <= set(
        data["environment"]
    )
    ours = data["rows"][0]["entries"][1]
    assert data["schema"] == 2 and ours["speedup_over"] == {
        "best eager": {"median": pytest.approx(4.0), "low": pytest.approx(4.0), "high": pytest.approx(4.0), "turns": 3}
    }
    assert data["rows"][0]["limit"] == {"ms": pytest.approx(10.0), "by": "arithmetic"}
    assert ours["fraction_of_limit"] == pytest.approx(5.0)
    assert ours["timing"]["median_ms"] == pytest.approx(2.0) and ours["fraction_of_mm"] == pytest.approx(5.0)


def test_results_do_not_name_the_host():
    import platform

    text = json.dumps(report.environment()) + report.machine_name()
    node = platform.node()
    assert not node or node not in text
    assert str(ROOT) not in text and report.machine_name() == report.machine_name().lower()


def test_limit_is_beside_every_time():
    r = full()
    assert r.limit.by == "arithmetic" and r.limit.seconds == pytest.approx(2e9 / 0.2e12)
    assert r.of_limit(r.entry("onnxruntime")) == pytest.approx(10 / 3)
    memory_bound = full(macs=1)
    assert memory_bound.limit.by == "memory" and memory_bound.limit.seconds == pytest.approx(1e-4)
    text = markdown(Report({}, "cmd", (r, memory_bound), complete=True))
    lines = text[text.index("## Against the limit") :].splitlines()
    assert lines[4].startswith("|  | GFLOP | least MB |") and " arithmetic | " in lines[6] and " memory | " in lines[7]
    assert "| 5.0 + 3.0 |" in text, "memory held and peak, in MB"


def test_ratio_in_the_table_is_the_paired_one():
    text = markdown(Report({}, "cmd", (full(),), complete=True))
    assert "| case, float32, batch 1 | 2.000 | 2.00x [1.00, 4.00] | 2.50x [1.25, 5.00] | 1.50x [0.75, 3.00] |" in text


def test_every_time_and_every_reason_is_in_the_tables():
    absent = Entry("onnxruntime", "not available", "no such package")
    rows = tuple(row(entry("eager", 8), absent, case=f"c{i}") for i in range(5))
    text = markdown(Report({}, "cmd", rows, complete=True))
    assert "| c4, float32, batch 1 | title | 8.00 [8.00, 8.00] |" in text
    assert "- onnxruntime: not available: no such package (5 rows)" in text and "| eager | 1.0e-07 |" in text
    assert "## Memory" not in text


def test_labels_are_names_of_implementations():
    known = {i.name for i in IMPLEMENTATIONS}
    assert set(OURS) <= known and {n for names in OTHERS.values() for n in names} <= known
    assert set(readme.COLUMNS) <= known


# --- plots ------------------------------------------------------------------------------------------------------------


def results(*rows):
    rows = rows or tuple(
        full(dtype=dtype, case=case, batch=batch, suite=suite, macs=batch * 10**8)
        for case, suite in (("a", "generator"), ("b", "upsample"), ("c", "layers"))
        for dtype in ("float32", "bfloat16")
        for batch in (1, 16)
    )
    environment = {"processor": "a processor", "date": "today"}
    return json.loads(Report(environment, "cmd", rows, complete=True).to_json())


def test_plots_are_written_and_small(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    paths = plots.write(results(), tmp_path)
    assert [p.name for p in paths] == ["bench_speedup.png", "bench_roofline.png", "bench_batch.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths), "no temporary file stays"
    for path in paths:
        assert path.stat().st_size < 100_000
        with image.open(path) as drawn:
            assert drawn.width > 600 and len(drawn.getcolors(256)) > 5


def test_plots_leave_out_what_there_is_nothing_of(tmp_path):
    pytest.importorskip("matplotlib")
    assert plots.write(results(row(entry("eager", 1))), tmp_path) == ()
    one = full()
    assert [p.name for p in plots.write(results(one), tmp_path)] == ["bench_speedup.png", "bench_roofline.png"]


def test_another_peer_over_eager_is_derived():
    (only,) = results(full())["rows"]
    assert plots._over_eager(only, "onnxruntime") == pytest.approx(4 / 3)
    assert plots._over_eager(only, "best torch.compile") == pytest.approx(4 / 5)


def test_without_matplotlib_there_are_no_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert plots.write(results(), tmp_path) == () and "matplotlib is not installed" in capsys.readouterr().err


# --- two runs ---------------------------------------------------------------------------------------------------------


def changed(data, **ratio):
    """The same results with another ratio over eager in the first row."""
    data = copy.deepcopy(data)
    ours = next(e for e in data["rows"][0]["entries"] if e["name"] == "cnnfast")
    ours["speedup_over"]["best eager"] |= ratio
    return data


def run_agree(tmp_path, a, b, *options):
    for name, data in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(data))
    return agree.main([str(tmp_path / "a.json"), str(tmp_path / "b.json"), *options])


def test_runs_agree_where_their_spreads_overlap(tmp_path, capsys):
    a = results()
    assert run_agree(tmp_path, a, changed(a, median=4.5, low=3.9, high=5.0)) == 0
    assert "48 of 48 ratios agree" in capsys.readouterr().out
    apart = changed(a, median=4.5, low=4.1, high=5.0)
    assert run_agree(tmp_path, a, apart) == 1
    out = capsys.readouterr().out
    assert "47 of 48 ratios agree" in out and "125.0% at most" in out
    line = "| a, float32, batch 1: cnnfast over best eager | 2.00x [1.00, 4.00] | 4.50x [4.10, 5.00] | 125.0% |"
    assert line in out
    assert run_agree(tmp_path, a, apart, "--share", "0.9") == 0


def test_a_ratio_without_spread_is_not_judged(tmp_path, capsys):
    a = results()
    once = changed(a, median=9.0, low=9.0, high=9.0, turns=0)
    assert run_agree(tmp_path, a, once) == 0
    out = capsys.readouterr().out
    assert "47 of 47 ratios agree" in out and "timed once, not judged" in out


def test_results_that_cannot_be_compared_are_refused(tmp_path, capsys):
    a = results()
    assert run_agree(tmp_path, a, {"schema": 1, "rows": []}) == 2
    assert "schema 1 have no spread" in capsys.readouterr().err
    assert run_agree(tmp_path, a, results(full(case="other"))) == 2
    assert "no ratio in common" in capsys.readouterr().err


# --- the README's table -----------------------------------------------------------------------------------------------


def test_readme_shows_generators_and_blocks_with_every_peer():
    data = results(full(case="dcgan64", suite="generator"), full(case="rrdb.1"))
    data["environment"] |= {"instruction set": "AMX", "threads": "2", "torch": "2", "onnxruntime": "1", "openvino": "1"}
    text = readme.table(data)
    assert (
        "| | eager | eager channels_last | compile | onnxruntime | OpenVINO | **cnnfast** | over the best eager |"
        in text
    )
    line = "| DCGAN 64x64, float32, batch 1 | 8.00 | 4.00 | 5.00 | 3.00 | 2.00 | **2.00** | 2.00x [1.00, 4.00] |"
    assert line in text and "rrdb" not in text
    assert readme.render("a\n<!-- bench -->\nold\n<!-- /bench -->\nb\n", data).splitlines()[-3:] == [
        text.splitlines()[-1], "<!-- /bench -->", "b",
    ]  # fmt: skip


def test_readme_names_every_generator_and_block():
    assert set(readme.NAMES) == {c.name for c in cases.CASES if c.suite != "layers"}


# --- models of others -------------------------------------------------------------------------------------------------


def model_row(model, threads, ours, eager=2e-3, last=4e-3, dtype="float32"):
    entries = [
        models.Entry(name, timing=Timing((s,) * 5, 1), error=1e-7)
        for name, s in (("eager", eager), ("eager channels_last", last), (models.OURS, ours))
    ]
    return models.Row(model, f"title of {model}", threads, dtype, entries, fused=3, found=4, convolutions=5).as_json()


def test_models_are_compared_with_the_better_eager():
    found = {e["name"]: e for e in model_row("vae", 1, 1e-3)["entries"]}
    assert found[models.OURS]["over_best_eager"]["median"] == pytest.approx(2.0)
    assert found["eager channels_last"]["over_best_eager"]["median"] == pytest.approx(0.5)


def test_a_run_of_one_model_leaves_the_others():
    env = {"processor": "p", "instruction set": "i", "torch": "t", "date": "d", "threads": "1"}
    before = models.merged({}, [model_row("unet", 1, 1e-3), model_row("vae", 1, 1e-3)], env)
    after = models.merged(before, [model_row("vae", 1, 4e-3), model_row("vae", 2, 5e-4)], env)
    assert [(row["model"], row["threads"]) for row in after["rows"]] == [("vae", 1), ("unet", 1), ("vae", 2)]
    assert "threads" not in after["environment"]
    text = readme.models_table(after)
    assert "| | 1 thread | 2 threads | fused of found |" in text
    assert "| title of vae | 0.50x [0.50, 0.50] | 4.00x [4.00, 4.00] | 3 of 4 |" in text
    assert "| title of unet | 2.00x [2.00, 2.00] | - | 3 of 4 |" in text
    assert "## 2 threads" in models.markdown(after)


def test_another_dtype_has_rows_of_its_own():
    env = {"processor": "p", "instruction set": "i", "torch": "t", "date": "d"}
    old = model_row("vae", 1, 1e-3)
    del old["dtype"]  # as results of before have it
    found = models.merged({"rows": [old]}, [model_row("vae", 1, 5e-4, dtype="bfloat16")], env)
    found = models.merged(found, [model_row("vae", 1, 2e-3)], env)
    text = readme.models_table(found)
    assert "| | 1 thread | 1 thread, bfloat16 | fused of found |" in text
    assert "| title of vae | 1.00x [1.00, 1.00] | 4.00x [4.00, 4.00] | 3 of 4 |" in text
    assert "| geometric mean | 1.00x | 4.00x | |" in text
    assert models.markdown(found).index("## 1 thread\n") < models.markdown(found).index("## 1 thread, bfloat16\n")


def test_a_model_whose_package_is_missing_is_in_the_table():
    def missing():
        raise NotAvailable("monai is not installed")

    row = models.measured("segresnet", Published("SegResNet", missing, (1,)), models.NAMES, 1.0).as_json()
    assert {e["note"] for e in row["entries"]} == {"monai is not installed"}
    env = {"processor": "p", "instruction set": "i", "torch": "t", "date": "d"}
    assert "| SegResNet | monai is not installed | 0 of 0 |" in readme.models_table(models.merged({}, [row], env))


@pytest.mark.parametrize("dtype", models.DTYPES)
def test_a_model_is_measured_and_what_is_wrong_is_not(dtype):
    published = Published("tiny", lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), (1, 3, 16, 16))
    names = ("eager", "eager channels_last", models.OURS)
    row = models.measured("stack", published, names, 0.1, models.DTYPES[dtype])
    assert all(row.timing(name) is not None for name in names) and row.found == row.convolutions == 1
    assert row.dtype == dtype and all(e.error < (1e-5 if dtype == "float32" else 0.02) for e in row.entries)
    expected = [torch.ones(2)]
    given = models.Given(nn.Identity(), expected[0].to(models.DTYPES[dtype]), nn.Identity(), expected[0])
    entry = models._prepared("other", lambda given: lambda: torch.full((2,), 1.1), given, expected)
    assert entry.call is None and entry.note.startswith("off by 1.0e-01")
