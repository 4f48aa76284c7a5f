"""Several runs side by side: what is compared, what is refused, and which regressions are found."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from browser import open_page
from click.testing import CliRunner
from reports import FAST, candidate, make_report
from rich.console import Console

from mm_edge.cli.main import main
from mm_edge.errors import UsageError
from mm_edge.records import Candidate, Report
from mm_edge.report import write_report
from mm_edge.report.compare import compare_runs, find_regressions
from mm_edge.report.page.comparison import write_comparison_page
from mm_edge.report.terminal import print_comparison

DATA = {"source": "/here/photos.tar", "validation": 500, "split": "s", "seed": 0}
DEVICE = {"cpu_model": "A76", "fingerprint": "f"}
BETTER = dataclasses.replace(FAST, speedup=2.2, accuracy_top1=0.896, file_bytes=1_000_000)
WORSE = dataclasses.replace(FAST, speedup=1.8, accuracy_top1=0.88)


def report_of(chosen: Candidate, **changes: object) -> Report:
    return dataclasses.replace(
        make_report(chosen, candidate("uniform", 1.5, pareto=True), data=DATA, environment=DEVICE),
        **changes,  # type: ignore[arg-type]
    )


def compare(*reports: Report) -> list[list[tuple[str, float | None, str]]]:
    comparison = compare_runs([(Path(f"run{index}"), report) for index, report in enumerate(reports)])
    return [
        [(c.what, None if c.value is None else round(c.value, 3), c.why_not) for c in changes]
        for changes in comparison.changes
    ]


def test_later_runs_are_compared_with_the_first() -> None:
    assert compare(report_of(FAST), report_of(BETTER), report_of(WORSE)) == [
        [("quality", 0.1, ""), ("speed", 0.1, ""), ("size", -0.5, "")],
        [("quality", -1.5, ""), ("speed", -0.1, ""), ("size", 0.0, "")],
    ]


def test_quality_on_other_data_is_not_compared_but_the_same_file_elsewhere_is() -> None:
    moved = report_of(FAST, data={**DATA, "source": "/there/photos.tar"})
    assert compare(report_of(FAST), moved)[0][0] == ("quality", 0.0, "")
    fewer = report_of(FAST, data={**DATA, "validation": 250})
    assert compare(report_of(FAST), fewer)[0][0] == ("quality", None, "the data differ in validation: 500 and 250")


def test_speed_on_another_device_is_not_compared() -> None:
    other = report_of(FAST, environment={"cpu_model": "N100", "fingerprint": "g"})
    why = "they were measured on different devices: host (f) and host (g)"
    assert compare(report_of(FAST), other)[0][1] == ("speed", None, why)


def test_other_networks_on_one_device_are_compared_by_their_times() -> None:
    other = report_of(FAST)
    other = dataclasses.replace(other, model=dataclasses.replace(other.model, sha256="cd" * 32))
    slower = dataclasses.replace(FAST, latency_ms=dataclasses.replace(FAST.latency_ms, p50=2.0))
    other = dataclasses.replace(other, candidates=(slower, *other.candidates[1:]))
    assert compare(report_of(FAST), other)[0][1] == ("speed", -0.5, "")


def test_runs_without_a_common_figure_and_the_same_run_twice_are_refused(tmp_path: Path) -> None:
    bare = dataclasses.replace(FAST, file_bytes=None)
    other = report_of(bare, environment={"fingerprint": "g"}, data={})
    with pytest.raises(
        UsageError, match=r"^'a' and 'b' cannot be compared: the data differ in source: photos.tar and "
    ):
        compare_runs([(Path("a"), report_of(FAST)), (Path("b"), other)])
    with pytest.raises(UsageError, match=r"^'a' is given twice; give different runs to compare$"):
        compare_runs([(Path("a"), other), (Path("a"), other)])


def test_names_are_as_long_as_needed_to_tell_runs_apart() -> None:
    runs = compare_runs([(Path("/x/one/run"), report_of(FAST)), (Path("/x/two/run"), report_of(FAST))]).runs
    assert [run.name for run in runs] == ["one/run", "two/run"]


def test_regressions_are_named_beyond_their_limits_only() -> None:
    comparison = compare_runs([(Path("old"), report_of(FAST)), (Path("new"), report_of(WORSE))])
    assert find_regressions(comparison, 5, 1) == [
        "new is 10.0 % slower than old (allowed: 5 %)",
        "new is 1.50 points worse than old (allowed: 1)",
    ]
    assert find_regressions(comparison, 11, 2) == find_regressions(comparison, None, None) == []


def test_a_limit_on_what_cannot_be_compared_is_refused() -> None:
    other = report_of(FAST, environment={"fingerprint": "g"})
    comparison = compare_runs([(Path("old"), report_of(FAST)), (Path("new"), other)])
    with pytest.raises(UsageError, match=r"^--fail-if-slower cannot be judged for 'old' and 'new': they were measured"):
        find_regressions(comparison, 5, None)


def test_the_command_ends_with_one_where_a_run_got_slower(tmp_path: Path) -> None:
    for name, chosen in (("old", FAST), ("new", WORSE)):
        write_report(report_of(chosen), tmp_path / name)
    folders = [str(tmp_path / "old"), str(tmp_path / "new")]
    page = tmp_path / "page.html"
    done = CliRunner().invoke(main, ["report", *folders, "--html", str(page)])
    assert done.exit_code == 0 and "speed: -10.0 %" in done.stdout and page.is_file()
    done = CliRunner().invoke(main, ["report", *folders, "--fail-if-slower", "5"])
    assert done.exit_code == 1 and "new is 10.0 % slower than old (allowed: 5 %)" in done.stderr
    done = CliRunner().invoke(main, ["report", folders[0], "--fail-if-slower", "5"])
    assert done.exit_code == 2 and "give at least two run directories" in done.stderr


def test_one_report_can_be_written_as_a_page_elsewhere(tmp_path: Path) -> None:
    write_report(report_of(FAST), tmp_path / "run")
    page = tmp_path / "elsewhere.html"
    done = CliRunner().invoke(main, ["report", str(tmp_path / "run"), "--html", str(page)])
    assert done.exit_code == 0 and "Ship product/" in page.read_text()
    assert f"page:         {tmp_path / 'run' / 'report.html'}\n" in done.stdout


def test_the_terminal_shows_runs_within_eighty_columns() -> None:
    comparison = compare_runs([(Path("old"), report_of(FAST)), (Path("new"), report_of(WORSE))])
    console = Console(width=80, file=io.StringIO(), record=True)
    print_comparison(comparison, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "new: against old\n  quality: -1.50 points\n  speed: -10.0 %\n  size: +0.0 %\n" in text


@pytest.mark.slow
def test_a_browser_draws_the_comparison(tmp_path: Path) -> None:
    hostile = report_of(dataclasses.replace(WORSE, id="<img src=x onerror=alert(1)>"))
    hostile = dataclasses.replace(hostile, chosen=None)
    comparison = compare_runs([(tmp_path / "old", report_of(FAST)), (tmp_path / "<script>", hostile)])
    file = tmp_path / "page.html"
    file.write_text(write_comparison_page(comparison))
    with open_page(file, width=360) as opened:
        assert opened.page.locator(".plot svg").count() == 1
        assert opened.said == [] and opened.asked == [file.as_uri()]
        assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360
