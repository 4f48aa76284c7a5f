"""The report in its three forms, from records made by hand."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from reports import FAST, UNMEASURED, candidate, make_report
from rich.console import Console

from mm_edge.errors import JobError, UsageError
from mm_edge.records import (
    BudgetOutcome,
    Candidate,
    Fidelity,
    Latency,
    MetricValue,
    OutputFidelity,
    Report,
    to_json,
)
from mm_edge.report import print_paths, print_report, read_report, write_report
from mm_edge.report.markdown import write_markdown
from mm_edge.report.summary import control_sentence, write_headline
from mm_edge.report.values import (
    show_bytes,
    show_count,
    show_drop,
    show_latency,
    show_ms,
    show_percent,
    show_speedup,
)


def render(report: Report, width: int = 120) -> str:
    console = Console(width=width, color_system=None, file=io.StringIO(), record=True)
    print_report(report, console)
    return console.export_text()


def test_values_in_print() -> None:
    assert show_percent(0.87654) == "87.65 %"
    assert (show_drop(1.5), show_drop(-0.2), show_drop(0.0)) == ("-1.50", "+0.20", "+0.00")
    assert (show_ms(0.8214), show_ms(14.26), show_ms(2345.6)) == ("0.821 ms", "14.3 ms", "2346 ms")
    assert (show_count(999), show_count(64_200_000)) == ("999", "64.2 M")
    assert (show_bytes(999), show_bytes(1_510_000)) == ("999 B", "1.51 MB")
    assert show_speedup(FAST) == "2.00x [1.95, 2.05]"
    latency = Latency(0.5, 0.6, 0.7, 200, 2, "host")
    assert show_latency(latency) == "p50 0.5 ms, p90 0.6 ms, p99 0.7 ms (200 samples, 2 threads, host)"


def test_what_was_not_measured_says_so() -> None:
    shown = [show_percent(None), show_drop(None), show_ms(None), show_count(None), show_bytes(None)]
    assert {*shown, show_speedup(UNMEASURED), show_latency(Latency())} == {"not measured"}


def test_the_report_comes_back_as_written(tmp_path: Path) -> None:
    report = make_report(FAST, UNMEASURED)
    write_report(report, tmp_path / "run")
    assert read_report(tmp_path / "run") == report
    assert read_report(tmp_path / "run" / "report.json") == report
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "report.html",
        "report.json",
        "report.md",
    ]


CONTRACT = {
    "": (
        "schema_version model target environment data dense candidates chosen constraints skipped_groups warnings "
        "seconds budgets sustained layers command"
    ),
    "model": "name source sha256 params macs input_shape num_classes licence",
    "dense": (
        "accuracy_top1 latency_ms peak_memory_bytes file_bytes params macs fidelity metric accuracy_ci accuracy_images"
    ),
    "dense.latency_ms": "p50 p90 p99 samples threads source verdict",
    "candidates.0": (
        "id signal strategy kind precision sparsity params macs accuracy_top1 accuracy_drop agreement_top1 kl_to_dense "
        "latency_ms speedup speedup_ci peak_memory_bytes file_bytes parity recovered_by epochs stopped pareto artifact "
        "masked_state_dict stored_file input_shape also_named also_ids removed_blocks planned_by "
        "fidelity metric accuracy_ci drop_ci dense_latency_ms"
    ),
    "candidates.0.fidelity": "outputs map50_to_dense map_to_dense miou_to_dense boxes",
    "candidates.0.fidelity.outputs.boxes": "nmse cosine",
    "candidates.0.metric": "name value higher_is_better is_fraction others",
    "candidates.0.parity": "max_abs_err max_rel_err top1_agreement inputs",
    "chosen": "id reason accuracy_top1_test dense_accuracy_top1_test fidelity_test",
    "skipped_groups.0": "group layers reason",
}


def test_report_json_has_the_fields_of_the_contract(tmp_path: Path) -> None:
    fidelity = Fidelity({"boxes": OutputFidelity(0.01, 0.99)}, map50_to_dense=0.98)
    write_report(make_report(dataclasses.replace(FAST, fidelity=fidelity, metric=MetricValue("mAP", 0.5))), tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    for place, fields in CONTRACT.items():
        value = data
        for step in filter(None, place.split(".")):
            value = value[int(step) if step.isdigit() else step]
        assert set(value) == set(fields.split()), place
    assert data["schema_version"] == 7
    assert data["candidates"][0]["parity"]["inputs"] == {"count": 8, "kind": "images"}
    assert data["candidates"][0]["kl_to_dense"] is None


def test_fields_that_an_older_report_lacks_are_unknown(tmp_path: Path) -> None:
    write_report(make_report(FAST), tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    for record in (data["dense"], data["candidates"][0]):
        del record["fidelity"], record["metric"]
    (tmp_path / "report.json").write_text(json.dumps(data))
    assert read_report(tmp_path) == make_report(FAST)


def test_a_drop_of_a_metric_is_in_points_or_in_its_own_unit() -> None:
    accuracy = MetricValue("mAP", 0.5, is_fraction=True)
    assert accuracy.drop(dataclasses.replace(accuracy, value=0.25)) == 25.0
    error = MetricValue("error", 3.0, higher_is_better=False)
    assert error.drop(dataclasses.replace(error, value=5.0)) == 2.0


def test_a_figure_that_is_no_number_is_a_defect_and_writes_nothing(tmp_path: Path) -> None:
    broken = make_report(dataclasses.replace(FAST, kl_to_dense=float("nan")))
    with pytest.raises(ValueError, match=r"^Report\.candidates\[0\]\.kl_to_dense is not a finite number"):
        write_report(broken, tmp_path)
    not_whole: Any = 1.5
    with pytest.raises(ValueError, match=r"^Report\.model\.macs: expected int"):
        write_report(make_report(FAST, model=dataclasses.replace(broken.model, macs=not_whole)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_reading_refuses_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "report.json"

    def message() -> str:
        with pytest.raises(UsageError) as caught:
            read_report(tmp_path)
        return str(caught.value)

    assert message() == (
        f"no report.json in '{tmp_path}'; give a folder that mm-edge prune-export or mm-edge demo wrote"
    )
    file.write_text("{")
    assert message() == f"'{file}' is not JSON; run mm-edge prune-export again to write it"
    file.write_bytes(b"\xff\xfe\xff")
    assert message() == f"'{file}' is not JSON; run mm-edge prune-export again to write it"
    file.write_text("[]")
    assert message() == f"'{file}' is not a report of mm-edge: Report: expected an object"
    data = to_json(make_report(FAST))
    file.write_text(json.dumps({**data, "schema_version": 8}))
    assert message() == f"'{file}' has schema_version 8 and this mm-edge reads up to 7; update mm-edge"
    file.write_text(json.dumps({**data, "dense": {**data["dense"], "macs": "many"}}))
    assert message() == f"'{file}' is not a report of mm-edge: Report.dense.macs: expected int"
    file.write_text(json.dumps({**data, "seconds": {"score": float("inf")}}))
    assert message() == f"'{file}' is not a report of mm-edge: Report.seconds.score is not a finite number"


def test_writing_where_a_file_stands_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(JobError, match=r"^cannot write '.*report\.json': "):
        write_report(make_report(FAST), tmp_path / "file")


def test_headlines() -> None:
    assert write_headline(make_report(FAST)) == (
        "product/balanced/structured/fp32 is 2.00x faster than dense (2 ms -> 1 ms). It costs 0.50 points of top-1 on "
        "validation images (90.00 % -> 89.50 %), and reads 88.50 % of the test images right."
    )
    assert write_headline(make_report(UNMEASURED, FAST)) == (
        "product/uniform/structured/fp32 needs 50 % of the dense MACs; its speed on the target was not measured. "
        "Its accuracy was not measured."
    )
    assert write_headline(make_report(FAST, chosen=None)) == "No candidate was chosen; the dense model stands."


def test_where_nothing_was_compared_that_comes_first() -> None:
    first = (
        "Nothing was compared with the dense network, so these candidates may be unusable and none is recommended; to "
        "find out give --data PATH with photos. "
    )
    assert write_headline(make_report(UNMEASURED, chosen=None)) == (
        f"{first}No candidate was chosen; the dense model stands."
    )
    # A constraint chose it.
    text = write_headline(make_report(UNMEASURED))
    assert text.startswith(f"{first}product/uniform/structured/fp32 needs 50 % of the dense MACs; ")
    assert write_markdown(make_report(UNMEASURED, chosen=None)).splitlines()[2].startswith("Nothing was compared")
    assert render(make_report(UNMEASURED, chosen=None)).startswith("Nothing was compared with the dense network")


def test_unusable_times_come_first_and_no_speed_is_stated() -> None:
    unusable = dataclasses.replace(
        FAST,
        latency_ms=dataclasses.replace(FAST.latency_ms, verdict="unusable"),
        speedup=None,
        speedup_ci=None,
        pareto=False,
    )
    text = write_headline(make_report(unusable, UNMEASURED))
    assert text.startswith(
        "The times of 1 of 2 candidates are unusable, and no speed-up is stated for them: stop other programs and run "
        "again. product/balanced/structured/fp32 needs 50 % of the dense MACs; its speed on the target could not be "
        "told."
    )
    assert "not measured (unusable)" in write_markdown(make_report(unusable))
    noisy = dataclasses.replace(FAST, latency_ms=dataclasses.replace(FAST.latency_ms, verdict="noisy"))
    assert "2.00x [1.95, 2.05] (noisy)" in write_markdown(make_report(noisy)).replace("\\", "")
    assert "2.00x faster than dense (2 ms -> 1 ms; noisy, 95 % interval 1.95x to 2.05x). It costs" in write_headline(
        make_report(noisy)
    )


def test_times_side_by_side_are_of_the_same_moments() -> None:
    """The dense network took 2 ms in the median of all measurements, and 3 ms beside this candidate."""
    beside = dataclasses.replace(FAST, dense_latency_ms=dataclasses.replace(FAST.latency_ms, p50=3.0))
    assert "2.00x faster than dense (3 ms -> 1 ms)" in write_headline(make_report(beside))


def test_accuracy_is_shown_with_its_interval_and_dense_beside_it() -> None:
    judged = dataclasses.replace(FAST, accuracy_ci=(0.87, 0.915), drop_ci=(-0.4, 1.4))
    report = make_report(judged)
    dense = dataclasses.replace(report.dense, accuracy_ci=(0.88, 0.92), accuracy_images=500)
    assert report.chosen is not None
    report = dataclasses.replace(
        report, dense=dense, chosen=dataclasses.replace(report.chosen, dense_accuracy_top1_test=0.91)
    )
    assert write_headline(report).endswith(
        "It costs 0.50 points of top-1 on validation images (90.00 % -> 89.50 %; 95 % interval of the loss -0.40 to "
        "1.40), and reads 88.50 % of the test images right (dense 91.00 %)."
    )
    text = write_markdown(report)
    assert "| 90.00 % [88.00, 92.00] |" in text and "| 89.50 % [87.00, 91.50] | -0.50 [-1.40, +0.40] |" in text
    assert "- dense top-1 on test images: 91.00 %" in text


@pytest.mark.parametrize("p50", [2.0, 1.97])
def test_an_interval_around_one_is_no_verdict(p50: float) -> None:
    report = make_report(candidate("balanced", p50))
    lo, hi = 2 / p50 - 0.05, 2 / p50 + 0.05
    assert write_headline(report).startswith(
        f"The measurement is too noisy to tell a speed-up: product/balanced/structured/fp32 runs between {lo:.2f}x "
        f"and {hi:.2f}x the dense speed (95 % interval; 2 ms -> {p50:g} ms). It costs 0.50 points"
    )
    assert "faster" not in write_headline(report)


@pytest.mark.parametrize("p50", [2.5, 2.2])
def test_no_speed_up_is_said_first(p50: float) -> None:
    report = make_report(candidate("balanced", p50))
    assert write_headline(report).startswith("Pruning brought no speed-up: product/balanced/structured/fp32 runs at ")
    assert render(report).startswith("Pruning brought no speed-up")
    assert write_markdown(report).splitlines()[2].startswith("Pruning brought no speed-up")


def test_markdown_has_every_candidate_dense_first() -> None:
    text = write_markdown(make_report(FAST, UNMEASURED))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ("|  | dense | 90.00 % |  | 2 ms | 2.5 ms |  | 100 M | 1 M |  | 4 MB | not measured |  |")
    assert rows[3] == (
        "| \\>\\* | product/balanced/structured/fp32 | 89.50 % | -0.50 | 1 ms | 1 ms | 2.00x [1.95, 2.05] | 50 M "
        "| 500 k | 50.00 % | 2 MB | not measured | 2.5e-07 |"
    )
    assert rows[4].startswith(
        "|  | product/uniform/structured/fp32 | not measured | not measured | not measured | not measured "
    )
    assert "- an axis of the input: 2 groups, 2 layers" in text
    assert "- two images were skipped" in text
    assert "- why: the fastest" in text
    assert "- top-1 on test images: 88.50 %" in text
    assert '- data: splits {"calibration": 4, "validation": 2, "test": 2}' in text


def test_markdown_says_how_candidates_were_fine_tuned() -> None:
    tuned = dataclasses.replace(
        FAST, recovered_by="finetune", epochs=2, stopped="all 2 epochs done; epoch 1 is the best"
    )
    line = "- product/balanced/structured/fp32: 2 epochs; all 2 epochs done; epoch 1 is the best (kept: finetune)"
    assert f"## Fine-tuning\n\n{line}\n" in write_markdown(make_report(tuned, UNMEASURED))
    assert "Fine-tuning" not in write_markdown(make_report(FAST))


def test_markdown_cannot_be_broken_by_a_name() -> None:
    model = dataclasses.replace(make_report(FAST).model, name="net|<b>`x`\nnext")
    assert write_markdown(make_report(FAST, model=model)).splitlines()[0] == "# net\\|\\<b\\>\\`x\\` next on host"


def test_the_terminal_shows_all_of_a_few_rows() -> None:
    text = render(make_report(FAST, UNMEASURED))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[3] == "candidate top-1 points p50 speed-up interval MACs file"
    assert lines[4] == "dense 90.00 % 2 ms 100 M 4 MB"
    assert lines[5] == ">* product/balanced 89.50 % -0.50 1 ms 2.00x 1.95-2.05 50 M 2 MB"
    assert lines[6].startswith("product/uniform not measured not measured")
    assert "not measured: memory" in lines
    assert "chosen: product/balanced/structured/fp32: the fastest" in text
    assert "full width: 2 coupled groups: an axis of the input" in text
    assert "warning: two images were skipped" in text
    assert "more candidates" not in text


def test_a_narrow_terminal_keeps_each_row_on_one_line() -> None:
    long = candidate("parameter_proportional", 1.0)
    lines = [" ".join(line.split()) for line in render(make_report(long), 80).splitlines()]
    assert "candidate top-1 points p50 speed-up interval MACs" in lines
    assert "> product/parameter_proportional 89.50 % -0.50 1 ms 2.00x 1.95-2.05 50 M" in lines
    # What does not fit leaves the milliseconds out.
    longer = candidate("parameter_proportional_of_two", 1.0)
    lines = [" ".join(line.split()) for line in render(make_report(longer), 80).splitlines()]
    assert "> product/parameter_proportional_of_two 89.50 % -0.50 2.00x 1.95-2.05 50 M" in lines


def test_rows_whose_speed_cannot_be_told_from_the_chosen_are_marked() -> None:
    text = render(make_report(candidate("first", 1.0), candidate("alike", 1.02), candidate("slower", 1.5)), 80)
    marked = [line for line in text.splitlines() if "89.50 %" in line and "=" in line]
    assert len(marked) == 1 and "product/alike" in marked[0] and "1.91-2.01=" in marked[0]
    assert "= as fast as the chosen one as far as can be told: their intervals overlap" in " ".join(text.split())
    alone = render(make_report(candidate("first", 1.0)), 80)
    assert "interval: 95 % of the speed-up" in alone and "=" not in alone


def test_other_names_of_a_network_are_shown_everywhere() -> None:
    ids = ("product/middle_50th/structured/fp32", "gradient/balanced/structured/fp32")
    report = make_report(dataclasses.replace(FAST, also_named=("middle_50th",), also_ids=ids))
    assert "product/balanced: also middle_50th" in render(report)
    assert f"- {FAST.id}: {ids[0]}, {ids[1]}".replace("_", "\\_") in write_markdown(report)
    assert "Other names" not in write_markdown(make_report(FAST))


def test_the_terminal_shows_the_front_and_the_chosen_of_many_rows() -> None:
    candidates = [candidate(f"s{i:02d}", 1.0 + i / 100, pareto=i < 3) for i in range(30)]
    text = render(make_report(*candidates, chosen=29))
    assert [name for name in (f"s{i:02d}" for i in range(30)) if f"/{name} " in text] == ["s00", "s01", "s02", "s29"]
    assert "26 more candidates in report.md and report.json" in text


def test_the_terminal_shows_some_candidates_where_none_is_marked() -> None:
    candidates = [candidate(f"s{i:02d}", 1.0, None) for i in range(30)]
    assert "10 more candidates in report.md and report.json" in render(make_report(*candidates))


def test_kind_and_precision_are_shown_where_they_differ() -> None:
    other = dataclasses.replace(
        FAST, id="product/balanced/structured/int8", precision="int8", artifact="candidates/other.onnx"
    )
    text = render(make_report(FAST, other), width=140)
    assert "product/balanced/structured/fp32" in text
    assert "product/balanced/structured/int8" in text


def test_a_name_cannot_command_the_terminal() -> None:
    evil = make_report(FAST, warnings=("\x1b[2J[bold]x[/bold]\x07",))
    assert "warning: \\x1b[2J[bold]x[/bold]\\x07" in render(evil)


def control(side: int, speedup: float, accuracy: float) -> Candidate:
    dense = candidate("dense", 2.0 / speedup, 100 * (0.9 - accuracy))
    shape = (1, 3, side, side)
    named = dataclasses.replace(dense, id=f"dense@{side}", signal="none", kind="dense", input_shape=shape)
    return dataclasses.replace(named, speedup=speedup, speedup_ci=None)


def test_a_pruned_candidate_that_a_smaller_picture_beats_is_said_first() -> None:
    beaten = candidate("balanced", 1.0, 5.0)  # 2.0x at 85 %
    report = make_report(control(24, 2.5, 0.84), control(28, 1.25, 0.89), beaten)
    # At 2.0x, halfway (in time 0.5 of 0.4 to 0.8) 84 + 5 / 4 = 85.25 %.
    assert control_sentence(report) == (
        "Nothing pruned beats the dense network on pictures of another size at the same measured latency: "
        "the nearest, product/balanced/structured/fp32, is 0.25 points behind."
    )
    assert write_headline(report).startswith("Nothing pruned beats the dense network")
    better = candidate("balanced", 1.0, 4.7)
    assert control_sentence(make_report(control(24, 2.5, 0.84), control(28, 1.25, 0.89), better)) is None


def test_a_whole_network_that_was_tuned_is_not_called_pruned() -> None:
    tuned = dataclasses.replace(candidate("macs_0.5", 1.0, 1.0), sparsity=0.0, recovered_by="tune")
    sentence = "Nothing pruned beats the dense network on pictures of another size at the same measured latency"
    report = make_report(control(24, 2.5, 0.84), candidate("balanced", 1.0, 8.0), tuned)
    assert (control_sentence(report) or "").startswith(f"{sentence}: the nearest, product/balanced/structured/fp32,")
    without_a_block = dataclasses.replace(tuned, removed_blocks=("blocks.1",))
    assert control_sentence(make_report(control(24, 2.5, 0.84), without_a_block)) is None


def test_a_candidate_faster_than_every_control_has_to_be_as_accurate_as_the_fastest() -> None:
    far = candidate("balanced", 0.5, 20.0)  # 4x at 70 %
    assert control_sentence(make_report(control(24, 2.5, 0.84), far)) == (
        "Nothing pruned beats the dense network on pictures of another size at the same measured latency."
    )
    assert control_sentence(make_report(control(24, 2.5, 0.84), candidate("balanced", 0.5, 6.0))) is None


def test_nothing_is_said_of_controls_where_there_is_nothing_to_compare() -> None:
    assert control_sentence(make_report(FAST)) is None
    assert control_sentence(make_report(control(24, 2.5, 0.84), UNMEASURED)) is None
    unmeasured = dataclasses.replace(control(24, 2.5, 0.84), speedup=None)
    assert control_sentence(make_report(unmeasured, FAST)) is None


def test_controls_are_marked_and_stay_in_every_table() -> None:
    candidates = [candidate(f"s{index}", 1.0 + index / 100, 5.0) for index in range(30)]
    report = make_report(control(24, 2.5, 0.6), *candidates, chosen=1)
    shown = render(report)
    assert "dense@24 (control)" in shown and "s0" in shown and "s29" not in shown
    text = write_markdown(report)
    assert "| dense@24 (control) |" in text
    assert "a control is the dense network on pictures of another size" in text
    assert "control" not in write_markdown(make_report(FAST))


def test_a_chosen_control_is_named_as_such() -> None:
    report = make_report(control(24, 2.5, 0.895), candidate("balanced", 1.0, 5.0))
    assert "dense@24 is 2.50x faster than dense" in write_headline(report)


def test_who_won_under_a_budget_stands_in_the_report() -> None:
    outcome = BudgetOutcome("--speedup 1.5", FAST.id, f"{FAST.id} won under --speedup 1.5 (top-1 89.50 %)")
    planned = dataclasses.replace(FAST, planned_by="multiply-adds in place of time, measured at 1.52x")
    text = write_markdown(make_report(planned, budgets=(outcome,)))
    assert "## Budgets" in text and "won under --speedup 1.5 (top-1 89.50 %)" in text
    assert "multiply-adds in place of time, measured at 1.52x" in text
    assert "## Budgets" not in write_markdown(make_report(FAST))
    console = Console(file=io.StringIO(), width=200)
    print_report(make_report(planned, budgets=(outcome,)), console)
    assert isinstance(console.file, io.StringIO)
    assert f"budget: {outcome.reason}" in console.file.getvalue()


def test_rows_that_chance_explains_are_marked_and_the_table_fits_eighty_columns() -> None:
    unsure = dataclasses.replace(FAST, drop_ci=(-1.0, 2.0))
    sure = dataclasses.replace(candidate("uniform", 1.5, drop=2.0), drop_ci=(1.0, 3.0))
    text = render(make_report(unsure, sure), width=80)
    assert "-0.50~" in text and "-2.00~" not in text
    assert "~ the validation images cannot tell it from dense: the 95 % interval of the loss holds 0" in " ".join(
        text.split()
    )
    assert max(map(len, text.splitlines())) <= 80
    assert "~" not in render(make_report(FAST))


def test_paths_come_last_as_far_as_they_are_there(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    write_report(make_report(FAST), folder)
    (folder / "bundle").mkdir()
    console = Console(width=80, file=io.StringIO(), record=True)
    print_paths(make_report(FAST), folder, console)
    assert console.export_text().splitlines() == [
        f"full report:  {folder / 'report.md'}",
        f"page:         {folder / 'report.html'}",
        f"bundle:       {folder / 'bundle'}",
    ]
