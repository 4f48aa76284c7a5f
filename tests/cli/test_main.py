"""The command line: what is refused is one line and the exit code of the contract; what runs says where it went."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from tiny_job import save_checkpoint, write_images

from mm_edge.cli.main import SUBCOMMANDS, main
from mm_edge.formats.registry import FORMATS, Format
from mm_edge.records import Report, from_json
from mm_edge.run.options import Flags, list_options
from mm_edge.run.recoveries import RECOVERIES, Recovery
from mm_edge.run.request import SECTIONS, Request

ONE = ("--signals", "magnitude", "--strategies", "balanced", "--no-bench", "--input-size", "3,32,32")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(part) for part in arguments])


def refused(*arguments: object, code: int = 2) -> str:
    """Run, expect one line of error and nothing on standard output; return the message."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("mm-edge: error: ")]
    assert result.stderr.splitlines()[-1:] == errors
    return errors[0].removeprefix("mm-edge: error: ")


def prune(model: object, *arguments: object) -> str:
    """Expect prune-export to refuse before anything is written."""
    message = refused("prune-export", model, "--out", "run", *ONE, *arguments)
    assert not Path("run").exists()
    return message


# --- models ---------------------------------------------------------------------------------------------------------


def test_models_that_are_not_there_or_not_whole(files: Path, tmp_path: Path) -> None:
    assert prune("no.pt") == "model 'no.pt' does not exist; give a file, a folder or timm:NAME"
    assert prune("resnet18") == "model 'resnet18' does not exist; for timm's network of that name give timm:resnet18"
    Path("empty.pt").touch()
    assert prune("empty.pt") == "'empty.pt' is empty; save the model again"
    whole = (files / "net.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    assert prune("cut.pt") == "'cut.pt' is damaged or cut short; copy or save it again"
    Path("bad.onnx").write_text("no model")
    assert prune("bad.onnx").startswith("'bad.onnx' is not a valid ONNX model: ")
    Path("empty.onnx").touch()
    assert prune("empty.onnx") == "'empty.onnx' is empty; save the model again"


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch it_ran",)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_pickle_that_would_run_code_does_not(wrap: bool) -> None:
    if wrap:
        torch.save({"arch": "test_resnet", "state_dict": Payload()}, "evil.pt")
    else:
        Path("evil.pt").write_bytes(pickle.dumps(Payload()))
    message = prune("evil.pt")
    assert message == (
        "'evil.pt' is a pickle that would run code when read (it names posix.system); save its state_dict and give "
        "--arch, or pass --trust-pickle if you made the file"
    )
    assert not Path("it_ran").exists()


@pytest.mark.slow
def test_a_wrong_arch_names_tensors_and_what_fits(files: Path) -> None:
    message = prune(files / "net.pt", "--arch", "resnet18")
    assert message.startswith(
        f"'{files / 'net.pt'}' does not fit resnet18: conv1.weight (64, 3, 7, 7) is missing from the file; "
        "bn1.weight is (32,) in the file and (64,) in the model; "
    )
    assert message.endswith("it fits --arch test_resnet")
    assert prune(files / "net.pt", "--arch", "resnt18") == (
        "unknown timm model 'resnt18'; did you mean resnet18 or resnet18d or skresnet18?"
    )
    torch.save(torch.load(files / "net.pt")["state_dict"], "bare.pt")
    assert prune("bare.pt") == (
        "'bare.pt' does not name its architecture; add --arch NAME (a timm name) or --arch FILE.py:CALLABLE"
    )


def test_weights_that_are_not_numbers(files: Path) -> None:
    state = torch.load(files / "net.pt")["state_dict"]
    state["layer1.0.conv1.weight"][0, 0, 0, :2] = float("nan")
    save_checkpoint(Path("nan.pt"), state_dict=state)
    assert prune("nan.pt") == (
        "'nan.pt': 2 of 9216 values of layer1.0.conv1.weight are NaN or infinite; give weights from before training "
        "diverged"
    )


# --- names and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--target arm46", "unknown target 'arm46'; did you mean arm64 or android-arm64?"),
        ("--strategies balancd", "unknown strategy 'balancd'; did you mean balanced?"),
        ("--strategies ,", None),
        ("--signals magnitud", "unknown signal 'magnitud'; did you mean magnitude?"),
        ("--ranges rule", "unknown --ranges 'rule'; did you mean rules?"),
        ("--kinds structred", "unknown --kinds 'structred'; did you mean structured or unstructured?"),
        ("--recover bm", "unknown --recover 'bm'; did you mean bn?"),
        ("--recover bn", "--recover bn needs calibration images; give --data PATH"),
        ("--macs 0.5,half", "--macs '0.5,half' is not a list of numbers; write for example --macs 0.5,0.25"),
        ("--macs 1.5", "--macs 1.5 is not a fraction of the dense MACs; give values between 0 and 1"),
        ("--split 0.5,0.5", "--split '0.5,0.5' has 2 parts; write CAL,VAL,TEST such as 0.5,0.25,0.25"),
        ("--input-size 224", "--input-size '224' is not C,H,W; write for example --input-size 3,224,224"),
        ("--std 1,nan,1", "--std '1,nan,1' is not a list of numbers; write for example --std 0.229,0.224,0.225"),
        ("--speedup 0", "--speedup 0 can never be met or missed; give a number above 0"),
        ("--size -5", "--size -5 can never be met or missed; give a number above 0"),
        ("--max-drop nan", "--max-drop nan is not a number of points; write for example --max-drop 1"),
        ("--max-drop 1", "--max-drop needs accuracy, and there are no validation images; give --data PATH"),
        ("--accuracy-on phone", "unknown --accuracy-on 'phone'; did you mean host?"),
        (
            "--accuracy-on device",
            "--accuracy-on device needs a device, and nothing is measured here; give --host USER@HOST",
        ),
        ("--keep nothing.*", "--keep 'nothing.*' matches no parameter; see the names with: mm-edge inspect MODEL"),
        ("--host pi", "--host names a device to measure on and --no-bench measures nothing; leave one out"),
        ("--seed -1", None),
        ("--no-such", None),
    ],
)
def test_names_and_numbers_that_are_wrong(files: Path, arguments: str, message: str | None) -> None:
    option = arguments.split()[0]
    out = () if option == "--keep" else ("--out", "run")
    said = refused("prune-export", files / "net.pt", *ONE, *out, *arguments.split())
    assert message is None or said == message
    assert not Path("run").exists()


def test_what_click_refuses_is_one_line_too() -> None:
    assert refused("prune-export") == "missing argument 'MODEL'; see: mm-edge prune-export --help"
    assert (
        refused("prune-exprot") == "no such command 'prune-exprot'. Did you mean 'prune-export'?; see: mm-edge --help"
    )
    assert refused("prune-export", "x", "--seed", "one") == (
        "invalid value for '--seed': 'one' is not a valid integer range; see: mm-edge prune-export --help"
    )


@pytest.mark.parametrize(
    "arguments",
    ["--dynamic-batch"],
)
def test_what_has_not_landed_is_refused_by_name(files: Path, arguments: str) -> None:
    assert prune(files / "net.pt", *arguments.split()).startswith(f"{arguments} is not available yet; ")


def test_what_a_target_gains_nothing_from_is_refused_with_the_alternative(files: Path) -> None:
    assert prune(files / "net.pt", "--target", "x86_64-avx2", "--kinds", "n:m") == (
        "2:4 gains nothing on x86_64-avx2: ONNX Runtime has no n:m kernel for CPUs; "
        "use --kinds structured, which removes whole channels"
    )
    assert prune(files / "net.pt", "--precision", "int8") == (
        "--precision int8 needs calibration images; give --data PATH"
    )
    refused = prune(files / "net.pt", "--target", "x86_64-avx2", "--precision", "fp16")
    assert refused.startswith("--precision fp16 is not for x86_64-avx2: ")
    assert refused.endswith("; use fp32 or int8")


# --- images ---------------------------------------------------------------------------------------------------------


def test_images_that_cannot_be_used(files: Path) -> None:
    def data(path: object) -> str:
        return prune(files / "net.pt", "--data", path)

    Path("none/a").mkdir(parents=True)
    Path("none/a/notes.txt").write_text("x")
    assert data("none") == "'none' holds no images (.png, .jpg, .jpeg)"
    write_images(Path("four"), 2, classes=4)
    assert data("four") == (
        "'four' has 4 classes (class0, class1, class2, ...) and the model 3; give the images the model was trained "
        "for, one folder per class"
    )
    assert data("absent").startswith("data 'absent' does not exist; give a folder or tar of photos or ")


@pytest.mark.slow
def test_an_unreadable_image_is_named_counted_and_skipped() -> None:
    save_checkpoint(Path("net.pt"))
    folder = write_images(Path("images"), 8)
    (folder / "class1" / "3.png").write_text("no image")
    result = run("prune-export", "net.pt", "--data", folder, "--out", "run", *ONE)
    assert result.exit_code == 0, result.output
    report = json.loads(Path("run/report.json").read_text())
    assert "1 of 24 images cannot be read and are left out: class1/3.png" in report["warnings"]
    data = report["data"]
    assert (data["calibration"] + data["validation"] + data["test"], data["unreadable"]) == (23, 1)
    result = run("evaluate", "run/dense.onnx", "--data", folder, "--json")
    assert json.loads(result.stdout)["images"] == 23
    assert result.stderr.splitlines() == ["warning: 1 of 24 images cannot be read and are left out: class1/3.png"]


# --- the run directory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["file/below", "/proc/mm-edge"])
def test_a_run_directory_that_cannot_be_written(files: Path, out: str) -> None:
    Path("file").write_text("x")
    message = refused("prune-export", files / "net.pt", *ONE, "--out", out)
    assert message.startswith(f"cannot write to '{out}': ")
    assert message.endswith("; give a folder you can write to with --out")


def test_a_run_directory_that_is_a_file(files: Path) -> None:
    Path("file").write_text("x")
    assert refused("prune-export", files / "net.pt", *ONE, "--out", "file") == (
        "invalid value for '--out': Directory 'file' is a file; see: mm-edge prune-export --help"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can be mounted here only as root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line(files: Path, small_disk: Path) -> None:
    out = small_disk / "run"
    message = refused("prune-export", files / "net.pt", *ONE, "--out", out, code=1)
    assert message == f"the disk is full: '{out / 'dense.onnx'}' was not written; free space and run the same again"
    assert sorted(path.name for path in out.iterdir()) == [".mm-edge"]


def test_a_file_the_system_cuts_short_leaves_nothing_behind(files: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
    try:
        message = refused("prune-export", files / "net.pt", *ONE, "--out", "run", code=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message == "cannot write 'run/dense.onnx': File too large"
    assert sorted(path.name for path in Path("run").iterdir()) == [".mm-edge"]


def test_what_the_system_refuses_elsewhere_is_one_line(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device", "/tmp/x")

    monkeypatch.setattr("mm_edge.api.start", refuse)
    message = refused("prune-export", files / "net.pt", *ONE, "--out", "run", code=1)
    assert message == "the system refused '/tmp/x': No space left on device"


# --- runs -----------------------------------------------------------------------------------------------------------


def test_a_run_without_images_says_what_it_lacks(files: Path) -> None:
    result = run("prune-export", files / "net.pt", "--strategies", "balanced", "--no-bench", "--input-size", "3,32,32")
    assert result.exit_code == 0, result.output
    out = Path("mm-edge-net")
    report = from_json(Report, json.loads((out / "report.json").read_text()))
    assert [(c.signal, c.accuracy_top1, c.parity.inputs.kind) for c in report.candidates if c.parity] == [
        ("magnitude", None, "noise")
    ]
    assert report.data == {}
    assert report.warnings == (
        "no calibration images: signal magnitude only; give --data PATH for the other signals",
        "nothing was compared with the dense network, so these candidates may be unusable and none is recommended; to "
        "find out give --data PATH with photos",
        "latency is not measured: --no-bench was given; run the same command without it to measure",
    )
    made = out / "candidates" / "magnitude-balanced-structured-fp32.onnx"
    assert onnx.load(made).graph.node
    assert report.chosen is None
    assert result.stdout.startswith("Nothing was compared with the dense network")
    shown = run("report", out)
    assert shown.exit_code == 0
    assert shown.stdout == result.stdout
    assert shown.stdout.endswith(f"full report:  {out}/report.md\npage:         {out}/report.html\n")


def test_no_candidate_that_meets_the_constraints_is_exit_1_with_the_report_kept(files: Path) -> None:
    message = refused("prune-export", files / "net.pt", *ONE, "--out", "run", "--size", "1000", code=1)
    assert message.startswith("no candidate meets --size 1000; the nearest is magnitude/size_1000/structured/fp32: ")
    report = json.loads(Path("run/report.json").read_text())
    assert report["chosen"] is None
    assert message in report["warnings"]
    assert (Path("run") / report["candidates"][0]["artifact"]).is_file()


def save_colour_model(path: Path) -> None:
    """Save a network whose classes are the image's brightest channel."""
    shapes = [
        onnx.helper.make_tensor_value_info("x", 1, [1, 3, 32, 32]),
        onnx.helper.make_tensor_value_info("y", 1, [1, 3]),
    ]
    nodes = [onnx.helper.make_node("GlobalAveragePool", ["x"], ["p"]), onnx.helper.make_node("Flatten", ["p"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "colour", shapes[:1], shapes[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)


def test_evaluate_runs_photos_without_labels_and_inputs_that_are_ready(files: Path) -> None:
    save_colour_model(Path("colour.onnx"))
    np.savez("x.npz", x=np.eye(3, dtype=np.float32)[[0, 1, 2, 2]][:, :, None, None].repeat(32, 2).repeat(32, 3))
    unlabelled = "its inputs count as unlabelled, so no accuracy is measured"
    for data, count, text in (
        (files / "images" / "class0", 16, "has no class folders: its images count"),
        ("x.npz", 4, f"has no labels: {unlabelled}"),
    ):
        result = run("evaluate", "colour.onnx", "--data", data, "--preprocess", "zero-to-one")
        assert result.exit_code == 0
        assert result.stdout == f"no accuracy: the images have no labels; the model ran on {count} of them\n"
        assert f"warning: '{data}' {text}" in result.stderr
    labels = np.array([0, 1, 2, 1])
    np.savez("x.npz", x=np.load("x.npz")["x"], labels=labels)
    result = run("evaluate", "colour.onnx", "--data", "x.npz", "--preprocess", "zero-to-one", "--json")
    assert json.loads(result.stdout) == {"model": "colour.onnx", "accuracy_top1": 0.75, "images": 4}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "evaluate"])
def test_json_is_all_there_is_on_standard_output(files: Path, tmp_path: Path, command: str) -> None:
    model = files / "net.pt"
    arguments: tuple[object, ...] = (model, "--input-size", "3,32,32")
    if command == "evaluate":
        save_colour_model(Path("colour.onnx"))
        arguments = ("colour.onnx", "--data", files / "images")
    code = f"import sys; from mm_edge.cli.main import main; main({[command, *map(str, arguments), '--json']!r})"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    document = json.loads(finished.stdout)
    assert "Traceback" not in finished.stderr
    if command == "evaluate":
        assert document == {"model": "colour.onnx", "accuracy_top1": 1.0, "images": 48}
        assert finished.stderr.splitlines() == [
            "warning: preprocessing not stated, assumed: mean 0.485,0.456,0.406, std 0.229,0.224,0.225, scale 1/255, "
            "colours RGB, resize crop; give --preprocess NAME, or --mean, --std, --scale, --colours, --resize"
        ]
    else:
        assert len(document["layers"]) == 16
        assert {item["reason"] for item in document["pinned"]} == {"input of the model", "output of the model"}


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_made_and_the_next_run_goes_on(files: Path) -> None:
    arguments = ["prune-export", str(files / "net.pt"), "--data", str(files / "images"), "--no-bench", "--out", "run"]
    # A shell starts what runs in its background with SIGINT ignored, and the tests may run there.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from mm_edge.cli.main import main\n"
    code += f"main({[*arguments, '--input-size', '3,32,32']!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    kept = Path("run/.mm-edge/candidates")
    deadline = time.monotonic() + 60
    while len(list(kept.glob("*.json"))) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == (
        "mm-edge: interrupted; what was made is kept, the same command goes on from there"
    )
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*") if path.is_file()}
    assert not [path for path in before if path.suffix == ".tmp"]
    made = [path for path in before if path.parent == kept]
    assert 2 <= len(made) < 9
    result = run(*arguments, "--input-size", "3,32,32")
    assert result.exit_code == 0, result.output
    assert len(list(kept.glob("*.json"))) == 9
    finished = [kept.parent / "sensitivities.safetensors", *made]
    finished += [
        Path("run/candidates") / f"{path.stem}{suffix}" for path in made for suffix in (".onnx", ".safetensors")
    ]
    assert [path for path in finished if path.stat().st_mtime_ns != before[path]] == []


def test_two_runs_in_one_directory_are_refused(files: Path) -> None:
    from mm_edge.store import RunStore

    with RunStore(Path("run")).lock():
        message = refused("prune-export", files / "net.pt", *ONE, "--out", "run")
    assert message == (f"another run (process {os.getpid()}) is writing to 'run'; wait for it, or give another --out")


def test_every_command_has_help() -> None:
    for command in ("", *main.commands):
        result = run(*filter(None, [command]), "--help")
        assert result.exit_code == 0
        assert result.stdout.startswith("Usage: ")


# --- start-up, help and completion ----------------------------------------------------------------------------------


HEAVY = ("torch", "torchvision", "timm", "onnxruntime", "onnx", "numpy", "rich")


def in_subprocess(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "arguments", [("--version",), ("--help",), ("prune-export", "--help"), ("inspect", "--help"), ("demo", "--help")]
)
def test_nothing_heavy_is_imported_to_say_what_there_is(arguments: tuple[str, ...]) -> None:
    code = f"import sys; from mm_edge.cli.main import main; main({list(arguments)}, standalone_mode=False)\n"
    said = in_subprocess(f"{code}print([name for name in {HEAVY} if name in sys.modules])")
    assert said.splitlines()[-1] == "[]"


def test_nothing_heavy_is_imported_to_refuse_an_option_or_to_complete_a_name() -> None:
    code = "import sys\nfrom mm_edge.cli.main import main\n"
    code += "try: main(['prune-export', 'net.pt', '--recover', 'bm'])\nexcept SystemExit as error: print(error.code)\n"
    code += "from mm_edge.run.request import _list_targets; _list_targets()\n"
    said = in_subprocess(f"{code}print([name for name in {HEAVY} if name in sys.modules])")
    assert said.splitlines() == ["2", "[]"]


def test_the_module_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "mm_edge.cli", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mm-edge, version ")


def test_the_list_of_commands_says_what_each_command_says_of_itself() -> None:
    shown = run("--help").stdout
    for name, entry in SUBCOMMANDS.items():
        assert f"  {name} " in shown
        if name != "bench":  # its own help goes on about the models
            assert (main.commands[name].help or "").startswith(entry.help), name


def test_help_shows_every_option_in_its_group_with_its_default() -> None:
    shown = CliRunner().invoke(main, ["prune-export", "--help"], terminal_width=110).stdout
    titles = [line[:-1] for line in shown.splitlines() if line[:1] not in ("", " ") and line.endswith(":")]
    assert titles == [*SECTIONS, "Other options"]
    plain = " ".join(shown.split())
    for name, item in list_options(Request).items():
        if isinstance(item.kind, Flags):
            assert all(f" --{choice} " in plain for choice in item.kind.choices)
        else:
            assert f" {item.flag.split('/')[0]} " in plain, name
            assert f"[default: {item.shown_default}]" in plain.replace("- ", "-"), name
    assert shown.count("\n    mm-edge prune-export ") == 3


def test_help_shows_a_name_that_was_added_to_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECOVERIES, "my-own", Recovery("does what I want"))
    monkeypatch.setitem(FORMATS, "my-runtime", Format("Also write it for my runtime.", lambda *_: []))
    plain = " ".join(run("prune-export", "--help").stdout.split())
    assert "my-own (does what I want)" in plain
    assert "--my-runtime Also write it for my runtime." in plain


def complete(*words: str) -> list[str]:
    """Return what the shell is offered for the last of the words."""
    completion = ShellComplete(main, {}, "mm-edge", "_MM_EDGE_COMPLETE")
    return [item.value for item in completion.get_completions(list(words[:-1]), words[-1])]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("prune-",), ["prune-export"]),
        (("prune-export", "net.pt", "--target", "rasp"), ["raspberry-pi-4", "raspberry-pi-5"]),
        (("prune-export", "net.pt", "--strategies", "ba"), ["balanced"]),
        (("prune-export", "net.pt", "--strategies", "balanced,upper_7"), ["balanced,upper_70th"]),
        (("prune-export", "net.pt", "--signals", "product,"), ["product,magnitude", "product,gradient"]),
        (("prune-export", "net.pt", "--kinds", "structured,n"), ["structured,n:m"]),
        (("prune-export", "net.pt", "--recover", ""), list(RECOVERIES)),
        (("prune-export", "net.pt", "--precision", "fp32,i"), ["fp32,int8"]),
        (("prune-export", "net.pt", "--input-sizes", "a"), ["auto"]),
        (("prune-export", "net.pt", "--prec"), ["--precision"]),
        (("prune-export", "net.pt", "--preprocess", "yolo"), ["yolo", "yolox"]),
        (("prune-export", "net.pt", "--colours", ""), ["RGB", "BGR"]),
        (("prune-export", "net.pt", "--bake"), ["--bake-preprocess"]),
    ],
)
def test_the_shell_completes_names(words: tuple[str, ...], offered: list[str]) -> None:
    assert complete(*words) == offered
