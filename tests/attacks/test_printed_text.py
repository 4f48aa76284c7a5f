"""Nothing that is printed acts on a terminal, forges a line, or runs on: the one place for messages, and the tables."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import hostile_files as hostile
import onnx
import pytest
from click.testing import CliRunner
from reports import candidate, make_report
from rich.table import Table
from rich.text import Text

from mm_edge.bench.transport import printable
from mm_edge.cli.main import main
from mm_edge.errors import LONGEST_MESSAGE, first_line, one_message, visible
from mm_edge.progress import Terminal
from mm_edge.report import print_report, write_report

HOSTILE = "a\x1b[31m\u202eb\nc\x00\udcff\x9b"
NAME = "a\x1b[31m\u202eb\nc"  # what UTF-8 can hold
SHOWN = "a\\x1b[31m\\u202eb\\nc\\x00\\udcff\\x9b"


def test_what_does_not_print_is_an_escape() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("Grüße 图 - plain") == "Grüße 图 - plain"
    assert printable(HOSTILE) == SHOWN


def test_a_message_is_one_line_of_500_characters_that_keeps_the_remedy() -> None:
    assert one_message("short") == "short"
    long = one_message("start " + "x" * 10**6 + "\n; do this")
    assert len(long) <= LONGEST_MESSAGE == 500
    assert long.startswith("start xx") and long.endswith("\\n; do this") and " ... " in long
    assert len(one_message("\x1b" * 10**6)) <= LONGEST_MESSAGE


def test_tables_and_lines_of_a_terminal_are_visible() -> None:
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(Text(HOSTILE))
    out = io.StringIO()
    console = Terminal(file=out, width=200)
    console.print(table)
    console.print(HOSTILE, markup=False)
    assert out.getvalue().replace("\n", "").isprintable()


@pytest.mark.parametrize("text", ["1", "a", "<", "a.", "[x]"])
def test_long_text_is_printed_in_a_time_that_grows_with_its_length(text: str) -> None:
    """Rich looks for numbers and paths to colour in the square of the length: 13 s for 8,000 digits."""
    out = io.StringIO()
    started = time.process_time()
    Terminal(file=out, width=80).print(text * (100_000 // len(text)), markup=False)
    assert time.process_time() - started < 20
    assert len(out.getvalue().replace("\n", "")) >= 99_000


def test_a_report_of_hostile_names_prints_and_is_written(tmp_path: Path) -> None:
    report = make_report(candidate(HOSTILE, 1.0), candidate("b", 0.5), warnings=(HOSTILE,))
    out = io.StringIO()
    print_report(report, Terminal(file=out, width=200))
    assert out.getvalue().replace("\n", "").isprintable()
    write_report(report, tmp_path)  # a name that is no UTF-8 lost report.md at the very end of a run
    assert "\\udcff" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["x" * 5000, "a\x1b[2Jb", "a\u202eb", "a\nmm-edge: all is well", os.fsdecode(b"a\xff")]
)
@pytest.mark.parametrize("command", ["inspect", "report", "bench"])
def test_a_name_cannot_act_in_an_error(tmp_path: Path, name: str, command: str) -> None:
    done = CliRunner().invoke(main, [command, str(tmp_path / name)])
    assert done.exit_code == 2
    line = done.stderr.removesuffix("\n")
    assert line.startswith("mm-edge: error: ") and line.isprintable()


def test_names_in_a_graph_cannot_act_in_inspect(tmp_path: Path) -> None:
    proto = hostile.make_onnx()
    for node in proto.graph.node:
        for index, item in enumerate(node.input):
            node.input[index] = item.replace("stem.weight", NAME)
    proto.graph.initializer[0].name = NAME
    onnx.save(proto, tmp_path / "net.onnx")
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "net.onnx")])
    assert done.exit_code == 0, done.output
    assert done.output.replace("\n", "").isprintable()


def test_onnx_runtime_speaks_without_its_codes() -> None:
    error = RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Load model failed")
    assert first_line(error) == "Load model failed"
    assert first_line(ValueError("other")) == "ValueError: other"
    told = "Non-zero status code returned while running Loop node. Name:'l' Status Message: Inconsistent shape"
    assert first_line(RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {told}")) == "Loop: Inconsistent shape"
