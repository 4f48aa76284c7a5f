# ruff: noqa: B905 (zip's strict= came with Python 3.10)
"""The program that runs on the device: measures ONNX models and answers in JSON.

This file is copied to a device and runs alone there. It needs Python 3.8, numpy and onnxruntime, and imports nothing
from mm_edge. A request is one JSON object on standard input,

    {"schema_version": 1, "command": "measure", "options": {...}}

and the answer is one line on standard output, `MM-EDGE-RESULT ` followed by a JSON object that holds either
`result` or `error` ({"kind", "message"}). Lines without that mark, from a library or a login script, are ignored.

Commands (mm-edge checks the options before it sends them; paths are those of the device):
    info      cores, ISA flags, governor, frequency, temperature, memory, versions
    measure   dense and candidate interleaved in one process, every sample in nanoseconds
    sustain   the two without pause for minutes: their times, the clock and the temperature along the way
    memory    peak resident memory of one model in this fresh process, beyond the harness's own
    null      the harness's own cost: a model that does nothing
    profile   time of each node, and the graph as ONNX Runtime optimised it, without its weights
    evaluate  the outputs for a .npy of inputs, as base64 of little-endian float32
    products  matrix products on the device's GPU, dense and 2:4, every sample in nanoseconds

How runs are interleaved. The models alternate in blocks (dense dense dense | candidate candidate candidate | ...), and
the order of the two swaps every time. The first run of a block is not timed: the other model has just used the caches,
which cost 7 to 15 % of EfficientNet-Lite0's latency and would not happen to a model deployed alone.

The threads of one session must not spin while the other session runs: with ONNX Runtime's defaults the same model took
between 8 and 23 ms instead of 3.4 ms. `session.force_spinning_stop` stops the spinning at the end of each run and keeps
it during the run (3.7 ms); `session.intra_op.allow_spinning=0` forbids it during the run too (4.7 ms). The former is
set unless the request says otherwise.

Both models are loaded again for every quarter of the samples (a sitting), because the addresses of their memory change
the ratio by about 3 % from one loading to the next. Only the first sitting waits until the times have settled.

What disturbs is watched. A run is disturbed if the kernel took a core from this process during it (an involuntary
context switch), a turn (a block of each model, one after the other) if the hypervisor took time from a core during it.
A pair is disturbed if either of its runs or its turn is. Disturbed pairs are measured again, until there are as many
undisturbed ones as were asked for or twice as many pairs in all. They are marked and sent too.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from types import ModuleType
from typing import Any, Callable, Dict, List, Optional, Tuple

resource: Optional[ModuleType]
try:
    import resource
except ImportError:  # not a Unix system
    resource = None

PROTOCOL_VERSION = 1
RESULT_MARK = "MM-EDGE-RESULT "
BLOCK = 4  # timed runs of one model before the other model runs
SITTINGS = 4  # how often a measurement loads both models
MOST_PAIRS = 2  # times as many pairs as were asked for are taken at most, where some are disturbed
SUSTAIN_POINTS = 60  # points of the curve of a sustained run
WARM_UP_WINDOW = 5  # warm-up is stable when the medians of two successive windows agree ...
WARM_UP_TOLERANCE = 0.05  # ... to this fraction
PRODUCT_WARM_UP = 20  # samples of a GPU product that are thrown away
PRODUCT_REPEATS = 10  # launches between two events: one alone is shorter than an event's resolution
WARM_UP_SECONDS = 3.0  # the longest warm-up, stable or not

# An ONNX model of one Identity on one float: its run takes as long as the harness itself.
NULL_MODEL = bytes.fromhex(
    "08073a3a0a100a017812017922084964656e7469747912046e756c6c5a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a00100d"
)

_DARWIN_FLAGS = {"FEAT_DotProd": "asimddp", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16", "FEAT_SME": "sme"}
# Bounds of the shapes that a model states for its open sizes: characters, and numbers in one input.
LONGEST_SHAPES = 10_000
MOST_ELEMENTS = 1 << 28
_NUMPY_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
}


class WorkerError(Exception):
    """A request that cannot be answered; `kind` and the message are sent back."""

    def __init__(self, kind: str, message: str) -> None:
        """Keep `kind` beside the `message`."""
        super().__init__(message)
        self.kind = kind


# --- what this machine is -------------------------------------------------------------------------------------------


def isa() -> str:
    """Return the instruction set this Python runs on: "x86_64", "aarch64", or else as platform.machine() has it."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def read_cpu() -> Dict[str, Any]:
    """Return {"model", "flags", "parts"}: name, sorted ISA flags, and ARM "implementer/part" of each kind of core."""
    if sys.platform == "darwin":
        return _read_darwin_cpu()
    text = _read_text("/proc/cpuinfo") or ""
    fields: Dict[str, List[str]] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), []).append(value.strip())
    flags = (fields.get("flags") or fields.get("features") or [""])[0].split()
    parts = zip(fields.get("cpu implementer", []), fields.get("cpu part", []))
    names = fields.get("model name") or fields.get("model") or fields.get("hardware") or [platform.processor()]
    return {"model": names[0], "flags": sorted(flags), "parts": sorted({i + "/" + p for i, p in parts})}


def _read_darwin_cpu() -> Dict[str, Any]:
    apple = isa() == "aarch64"  # macOS reports no part numbers; Apple makes every ARM Mac
    flags = {"asimd"} if apple else set()
    flags.update(flag for feature, flag in _DARWIN_FLAGS.items() if _sysctl("hw.optional.arm." + feature) == "1")
    for name in ("machdep.cpu.features", "machdep.cpu.leaf7_features"):
        flags.update(_sysctl(name).lower().split())
    return {"model": _sysctl("machdep.cpu.brand_string"), "flags": sorted(flags), "parts": ["apple"] if apple else []}


def _sysctl(name: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", name], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    except OSError:
        return ""
    return done.stdout.decode("utf-8", "replace").strip()


def usable_cores() -> List[int]:
    """Return the numbers of the cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """Return how many physical cores this process may use; the hyper-threads of one core count once."""
    cores = usable_cores()
    siblings = {_read_text("/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list" % c) or str(c) for c in cores}
    return max(1, len(siblings))


def default_threads() -> int:
    """Return the thread count meant by "auto": one fewer than the physical cores, at least one and at most four.

    One core is left to the system, because threads wait for each other and one busy core slows them all:
    EfficientNet-Lite0 with two threads on two cores took 3.3 ms alone and 42 ms beside other programs. More than four
    threads rarely help a batch of one, and on big.LITTLE they use the slow cores (8 were 12 times slower than 4).
    """
    return max(1, min(4, physical_cores() - 1))


def describe_machine() -> Dict[str, Any]:
    """Return the record of the `info` command; what this machine does not report is None."""
    cpu = read_cpu()
    return {
        "isa": isa(),
        "cpu_model": cpu["model"],
        "flags": cpu["flags"],
        "cpu_parts": cpu["parts"],
        "cores": os.cpu_count() or 1,
        "physical_cores": physical_cores(),
        "threads_auto": default_threads(),
        "governors": _governors(),
        "frequency_khz": read_frequency_khz(),
        "temperature_c": read_temperature_c(),
        "memory_bytes": _meminfo("MemTotal"),
        "memory_available_bytes": _meminfo("MemAvailable"),
        "os": platform.system() + " " + platform.release(),
        "host": platform.node(),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "onnxruntime": _version("onnxruntime"),
        "onnxruntime_error": _import_failure("onnxruntime"),
        "providers": _providers(),
        "emulated": os.environ.get("MM_EDGE_EMULATED") == "1",
    }


def read_frequency_khz() -> Optional[int]:
    """Return the highest current core frequency in kHz, or None where the kernel does not say."""
    found = []
    for core in usable_cores():
        text = _read_text("/sys/devices/system/cpu/cpu%d/cpufreq/scaling_cur_freq" % core)
        if text and text.isdigit():
            found.append(int(text))
    if not found:
        lines = (_read_text("/proc/cpuinfo") or "").splitlines()
        found = [int(float(line.split(":")[1]) * 1000) for line in lines if line.lower().startswith("cpu mhz")]
    return max(found) if found else None


def read_temperature_c() -> Optional[float]:
    """Return the hottest thermal zone in degrees Celsius, or None where there is none."""
    base = "/sys/class/thermal"
    zones = os.listdir(base) if os.path.isdir(base) else []
    texts = [_read_text(os.path.join(base, zone, "temp")) for zone in zones if zone.startswith("thermal_zone")]
    found = [int(text) / 1000.0 for text in texts if text and text.lstrip("-").isdigit()]
    return max(found) if found else None


def _governors() -> List[str]:
    names = {_read_text("/sys/devices/system/cpu/cpu%d/cpufreq/scaling_governor" % c) for c in usable_cores()}
    return sorted(name for name in names if name)


def _meminfo(key: str) -> Optional[int]:
    return _kilobytes(_read_text("/proc/meminfo"), key)


def _kilobytes(text: Optional[str], key: str) -> Optional[int]:
    for line in (text or "").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def _read_text(path: str) -> Optional[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def _version(module: str) -> Optional[str]:
    try:
        return str(__import__(module).__version__)
    except Exception:
        return None


def _import_failure(module: str) -> Optional[str]:
    try:
        __import__(module)
    except Exception as error:
        return _one_line(error)
    return None


def _providers() -> List[str]:
    try:
        import onnxruntime

        return list(onnxruntime.get_available_providers())
    except Exception:
        return []


# --- sessions and inputs --------------------------------------------------------------------------------------------


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except Exception as error:
        raise WorkerError("onnxruntime", "onnxruntime cannot be imported: %s" % _one_line(error)) from error
    onnxruntime.set_default_logger_severity(3)
    if hasattr(onnxruntime, "disable_telemetry_events"):
        onnxruntime.disable_telemetry_events()
    return onnxruntime


def make_session(model: Any, options: Dict[str, Any]) -> Any:
    """Return an onnxruntime session for `model` (path or bytes) as `options` ask.

    `options`: threads (0 is auto), provider, provider_options {key: value}, session_options {key: value}, arena
    (default on); profile_prefix and save_to ask for the profiler and for the optimised graph, its weights in a file
    beside it.
    """
    ort = _import_onnxruntime()
    provider = options.get("provider", "CPUExecutionProvider")
    if provider not in ort.get_available_providers():
        have = ", ".join(ort.get_available_providers())
        raise WorkerError("provider", "onnxruntime has no %s here; it has %s" % (provider, have))
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = thread_count(options)
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = bool(options.get("arena", True))
    entries = {"session.force_spinning_stop": "1"}
    entries.update(options.get("session_options") or {})
    if options.get("save_to"):
        settings.enable_profiling = True
        settings.profile_file_prefix = options["profile_prefix"]
        settings.optimized_model_filepath = options["save_to"]
        entries["session.optimized_model_external_initializers_file_name"] = "weights.bin"
        entries["session.optimized_model_external_initializers_min_size_in_bytes"] = "64"
    for key, value in entries.items():
        settings.add_session_config_entry(key, str(value))
    try:
        providers = [(provider, options.get("provider_options") or {})]
        return ort.InferenceSession(model, settings, providers=providers)
    except Exception as error:
        raise WorkerError("model", "onnxruntime cannot load the model: %s" % _one_line(error)) from error


def thread_count(options: Dict[str, Any]) -> int:
    """Return the number of threads a request asks for; 0 asks for this machine's default."""
    return int(options.get("threads") or 0) or default_threads()


def make_inputs(session: Any, options: Dict[str, Any]) -> Dict[str, Any]:
    """Return {input name: array}: the request's .npy file for a one-input model, else seeded noise of its shapes.

    A size that the model leaves open is what mm-edge wrote into the model; an open batch is 1 without that, and another
    open size is refused, because the time of an input of one pixel would mean nothing.
    """
    import numpy as np

    generator = np.random.RandomState(int(options.get("seed", 0)))
    if options.get("input"):
        return {session.get_inputs()[0].name: np.load(options["input"], allow_pickle=False)}
    feeds = {}
    stated = _stated_shapes(session)
    for value in session.get_inputs():
        dtype = _NUMPY_TYPES.get(value.type)
        if dtype is None:
            raise WorkerError("model", "input %r has type %s, which the worker cannot make" % (value.name, value.type))
        own = stated.get(value.name) or []
        if len(own) != len(value.shape):
            if any(not isinstance(size, int) for size in value.shape[1:]):
                reason = "input %r leaves sizes open, %s; fix them, or give a file that mm-edge prune-export wrote"
                raise WorkerError("model", reason % (value.name, list(value.shape)))
            own = [1] * len(value.shape)
        shape = [size if isinstance(size, int) else other for size, other in zip(value.shape, own)]
        feeds[value.name] = generator.standard_normal(shape).astype(dtype)
    return feeds


def _stated_shapes(session: Any) -> Dict[str, List[int]]:
    """Return the shapes that mm-edge wrote into a model that leaves sizes open; what is not written so is ignored."""
    text = session.get_modelmeta().custom_metadata_map.get("mm_edge.measured", "")
    if not text or len(text) > LONGEST_SHAPES:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    shapes = found.items() if isinstance(found, dict) else []
    return {name: shape for name, shape in shapes if isinstance(shape, list) and _is_shape(shape)}


def _is_shape(sizes: List[Any]) -> bool:
    """Return whether these are sizes of an array of at most MOST_ELEMENTS."""
    total = 1
    for size in sizes:
        if type(size) is not int or not 0 < size <= MOST_ELEMENTS:
            return False
        total *= size
    return total <= MOST_ELEMENTS


def _one_line(error: BaseException) -> str:
    return " ".join(("%s: %s" % (type(error).__name__, error)).split())[:600]


# --- commands -------------------------------------------------------------------------------------------------------


def measure(options: Dict[str, Any]) -> Dict[str, Any]:
    """Time `dense` and `candidate` in alternating blocks, in SITTINGS with fresh sessions.

    Options: dense, candidate (paths), pairs, and those of make_session and make_inputs.
    Returns dense_ns and candidate_ns, lists of equal length whose items form pairs; disturbed, a 1 for each pair that
    other programs disturbed and a 0 for the others; sittings, the number of pairs of each; clocks_khz, the clock after
    each (empty where it is not known); load, what others took of the cores; and how they were measured.
    """
    pairs = int(options["pairs"])
    before, load = _clock_state(), _LoadWatch()
    samples: Tuple[List[int], List[int]] = ([], [])
    disturbed: List[int] = []
    sittings: List[int] = []
    clocks: List[int] = []
    warm_up, stable = 0, True
    for sitting in range(1, SITTINGS + 1):
        until = pairs * sitting // SITTINGS
        if not _want_more(disturbed, until):
            continue
        runs = [_open(options, key) for key in ("dense", "candidate")]
        gc.collect()
        gc.disable()
        if sitting == 1:
            warm_up, stable = _warm_up(runs)
        else:
            for run in runs:
                _time_block(run, [])
        start = len(disturbed)
        _alternate(runs, samples, disturbed, until)
        sittings.append(len(disturbed) - start)
        clocks.extend(clock for clock in [read_frequency_khz()] if clock is not None)
        gc.enable()
        del runs  # frees the memory before the models are loaded again
    return {
        "dense_ns": samples[0],
        "candidate_ns": samples[1],
        "disturbed": disturbed,
        "sittings": sittings,
        "block": BLOCK,
        "threads": thread_count(options),
        "warm_up_runs": warm_up,
        "warm_up_stable": stable,
        "clocks_khz": clocks,
        "before": before,
        "after": _clock_state(),
        "load": load.read(),
    }


def _open(options: Dict[str, Any], key: str) -> Callable[[], Any]:
    session = make_session(options[key], options)
    return _bind(session, make_inputs(session, options))


def _alternate(
    runs: List[Callable[[], Any]], samples: Tuple[List[int], List[int]], disturbed: List[int], until: int
) -> None:
    """Time the two in alternating blocks until `until` pairs are undisturbed, or there are MOST_PAIRS times as many."""
    turn = 0
    while _want_more(disturbed, until):
        stolen = _stolen_ticks()
        preempted: Tuple[List[bool], List[bool]] = ([], [])
        for index in ((0, 1), (1, 0))[turn % 2]:
            _time_block(runs[index], samples[index], preempted[index])
        taken = _stolen_ticks() != stolen
        disturbed.extend(int(taken or one or other) for one, other in zip(*preempted))
        turn += 1


def _want_more(disturbed: List[int], until: int) -> bool:
    return len(disturbed) - sum(disturbed) < until and len(disturbed) < MOST_PAIRS * until


def sustain(options: Dict[str, Any]) -> Dict[str, Any]:
    """Run `dense` and `candidate` in alternating blocks without pause for `seconds`, at most SUSTAIN_POINTS points.

    Options: dense, candidate (paths), seconds, and those of make_session. Returns points, each with seconds (since the
    start), dense_ns and candidate_ns (medians of its runs), frequency_khz and temperature_c (None where not known).
    """
    seconds = float(options["seconds"])
    runs = [_open(options, key) for key in ("dense", "candidate")]
    points: List[Dict[str, Any]] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        until = start + seconds * (len(points) + 1) / SUSTAIN_POINTS
        samples: Tuple[List[int], List[int]] = ([], [])
        while not samples[0] or time.perf_counter() < until:
            for run, taken in zip(runs, samples):
                _time_block(run, taken)
        state = _clock_state()
        points.append(
            {
                "seconds": time.perf_counter() - start,
                "dense_ns": sorted(samples[0])[len(samples[0]) // 2],
                "candidate_ns": sorted(samples[1])[len(samples[1]) // 2],
                "frequency_khz": state["frequency_khz"],
                "temperature_c": state["temperature_c"],
            }
        )
    return {"points": points, "threads": thread_count(options)}


def _bind(session: Any, feeds: Dict[str, Any]) -> Callable[[], Any]:
    names = [value.name for value in session.get_outputs()]
    return lambda: session.run(names, feeds)


def _time_block(run: Callable[[], Any], samples: List[int], preempted: Optional[List[bool]] = None) -> None:
    """Run once untimed and BLOCK times timed; `preempted` is told for each whether a core was taken away during it."""
    clock = time.perf_counter_ns
    run()
    for _ in range(BLOCK):
        switches = _involuntary_switches()
        start = clock()
        run()
        samples.append(clock() - start)
        if preempted is not None:
            preempted.append(_involuntary_switches() != switches)


def _warm_up(runs: List[Callable[[], Any]]) -> Tuple[int, bool]:
    """Run until the window medians of every model are stable; return the runs of each and whether they were stable."""
    deadline = time.perf_counter() + WARM_UP_SECONDS
    medians: List[List[float]] = []
    while True:
        window = []
        for run in runs:
            spent: List[int] = []
            while len(spent) < WARM_UP_WINDOW:
                _time_block(run, spent)
            window.append(float(sorted(spent)[len(spent) // 2]))
        medians.append(window)
        count = len(medians) * (2 * (BLOCK + 1))
        if len(medians) > 1:
            pairs = zip(medians[-2], medians[-1])
            if all(abs(now - was) <= WARM_UP_TOLERANCE * now for was, now in pairs):
                return count, True
        if time.perf_counter() > deadline:
            return count, False


def _clock_state() -> Dict[str, Any]:
    return {
        "frequency_khz": read_frequency_khz(),
        "temperature_c": read_temperature_c(),
        "throttled": _throttle_count(),
    }


def _throttle_count() -> Optional[int]:
    """Return how often cores were slowed down because of heat, or None where the kernel does not say."""
    base = "/sys/devices/system/cpu/cpu%d/thermal_throttle/core_throttle_count"
    texts = [_read_text(base % core) for core in usable_cores()]
    found = [int(text) for text in texts if text and text.isdigit()]
    return sum(found) if found else None


def _involuntary_switches() -> int:
    """Return how often the kernel took a core from a thread of this process; 0 where it does not say."""
    return 0 if resource is None else int(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)


def _core_ticks() -> List[List[int]]:
    """Return the ticks of each usable core from /proc/stat (user, nice, system, idle, iowait, irq, softirq, steal)."""
    wanted = {"cpu%d" % core for core in usable_cores()}
    lines = [line.split() for line in (_read_text("/proc/stat") or "").splitlines()]
    return [[int(part) for part in line[1:9]] for line in lines if line and line[0] in wanted and len(line) > 8]


def _stolen_ticks() -> int:
    """Return the ticks that the hypervisor took from the usable cores; 0 where the kernel does not say."""
    return sum(ticks[7] for ticks in _core_ticks())


class _LoadWatch:
    """What other programs and the hypervisor took of the usable cores since it was made."""

    def __init__(self) -> None:
        """Take the first reading."""
        self._at, self._own, self._ticks = time.perf_counter(), time.process_time(), _core_ticks()

    def read(self) -> Dict[str, Any]:
        """Return cores, and how many of them others kept busy and were stolen (None where the kernel does not say)."""
        spent, own = time.perf_counter() - self._at, time.process_time() - self._own
        cores = len(usable_cores())
        gone = [[now - was for was, now in zip(*pair)] for pair in zip(self._ticks, _core_ticks())]
        if not gone or spent <= 0:
            return {"cores": cores, "others": None, "stolen": None}
        tick = 1.0 / os.sysconf("SC_CLK_TCK")
        busy = sum(sum(ticks[:3]) + ticks[5] + ticks[6] for ticks in gone) * tick
        stolen = sum(ticks[7] for ticks in gone) * tick
        return {"cores": cores, "others": max(0.0, busy - own) / spent, "stolen": stolen / spent}


def memory(options: Dict[str, Any]) -> Dict[str, Any]:
    """Measure one model's memory in this process, which must be fresh.

    Options: model (path), runs, and those of make_session. Returns peak_rss_bytes beyond the harness's own
    (interpreter, libraries, a null session), cold-start times in nanoseconds and the file's size.
    """
    null = make_session(NULL_MODEL, options)
    _bind(null, make_inputs(null, {}))()
    feeds_seed = dict(options, input=None)
    harness = _reset_peak()
    start = time.perf_counter_ns()
    session = make_session(options["model"], options)
    loaded = time.perf_counter_ns()
    run = _bind(session, make_inputs(session, feeds_seed))
    made = time.perf_counter_ns()
    run()
    first = time.perf_counter_ns()
    for _ in range(int(options.get("runs", 3))):
        run()
    return {
        "peak_rss_bytes": max(0, _peak_rss() - harness),
        "harness_rss_bytes": harness,
        "session_ns": loaded - start,
        "first_run_ns": first - made,
        "file_bytes": os.path.getsize(options["model"]),
        "arena": bool(options.get("arena", True)),
        "threads": thread_count(options),
    }


def _reset_peak() -> int:
    """Reset the kernel's record of the peak and return the memory that is resident now, in bytes.

    Where the peak cannot be reset, return the peak so far: the difference is then a lower bound.
    """
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return _peak_rss()
    return _kilobytes(_read_text("/proc/self/status"), "VmRSS") or _peak_rss()


def _peak_rss() -> int:
    peak = _kilobytes(_read_text("/proc/self/status"), "VmHWM")
    if peak is not None:
        return peak
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


def null(options: Dict[str, Any]) -> Dict[str, Any]:
    """Time a model that does nothing: the harness's own cost per run. Options: pairs, threads."""
    session = make_session(NULL_MODEL, options)
    run = _bind(session, make_inputs(session, options))
    gc.disable()
    samples: List[int] = []
    while len(samples) < int(options.get("pairs", 200)):
        _time_block(run, samples)
    return {"null_ns": samples, "threads": thread_count(options)}


def evaluate(options: Dict[str, Any]) -> Dict[str, Any]:
    """Run `model` on every row of the .npy file `images`, one at a time; return its first output as float32.

    Options: model, images (paths), and those of make_session. The result has base64 `data` and `shape`.
    """
    import numpy as np

    session = make_session(options["model"], options)
    # Mapped rather than read, because a board has little memory.
    images = np.load(options["images"], mmap_mode="r", allow_pickle=False)
    name, output = session.get_inputs()[0].name, session.get_outputs()[0].name
    rows = [np.asarray(session.run([output], {name: images[i : i + 1]})[0]) for i in range(len(images))]
    outputs = np.ascontiguousarray(np.concatenate(rows), dtype="<f4")
    return {"data": base64.b64encode(outputs.tobytes()).decode("ascii"), "shape": list(outputs.shape)}


def profile(options: Dict[str, Any]) -> Dict[str, Any]:
    """Run `model` under ONNX Runtime's profiler; return each node's time and the optimised graph without weights.

    Options: model (path), runs, and those of make_session. The result has `runs`, `nodes` (name, op_type, dur_us summed
    over the runs, input_shapes, output_shapes) and `graph` (base64 of the optimised ONNX file).
    """
    folder = tempfile.mkdtemp(prefix="mm-edge-profile-")
    try:
        saved = os.path.join(folder, "optimised.onnx")
        session = make_session(options["model"], dict(options, profile_prefix=os.path.join(folder, "p"), save_to=saved))
        run = _bind(session, make_inputs(session, options))
        for _ in range(int(options.get("runs", 10))):
            run()
        with open(session.end_profiling(), encoding="utf-8") as file:
            events = json.load(file)
        with open(saved, "rb") as file:
            graph = base64.b64encode(file.read()).decode("ascii")
        return {"runs": int(options.get("runs", 10)), "nodes": _sum_events(events), "graph": graph}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sum_events(events: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    nodes: Dict[str, Dict[str, Any]] = {}
    for event in events:
        suffix = "_kernel_time"
        if event.get("cat") != "Node" or not event["name"].endswith(suffix):
            continue
        name, details = event["name"][: -len(suffix)], event["args"]
        shapes = [
            [next(iter(s.values())) for s in details.get(key, [])] for key in ("input_type_shape", "output_type_shape")
        ]
        fresh = {"name": name, "op_type": details["op_name"], "dur_us": 0}
        fresh.update(input_shapes=shapes[0], output_shapes=shapes[1])
        nodes.setdefault(name, fresh)["dur_us"] += int(event["dur"])
    return list(nodes.values())


def products(options: Dict[str, Any]) -> Dict[str, Any]:
    """Time matrix products dense and 2:4 on this machine's GPU, fp16, through PyTorch.

    Options: products, a list of [rows, inputs, outputs]; runs, the number of samples of each. The values are random,
    since the time does not depend on them. A sample is the mean of PRODUCT_REPEATS launches between two events; dense
    and sparse alternate. The result has `gpu` and, in the order of the products, `dense_ns` and `sparse_ns`, lists of
    samples.
    """
    torch = _import_torch()
    dense: List[List[int]] = []
    sparse: List[List[int]] = []
    for rows, inputs, outputs in options["products"]:
        data = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.float16)
        weight = weight * torch.tensor([1, 1, 0, 0], device="cuda", dtype=torch.float16).repeat(inputs // 4)
        kinds = (weight, torch.sparse.to_sparse_semi_structured(weight))
        samples: Tuple[List[int], List[int]] = ([], [])
        for number in range(PRODUCT_WARM_UP + int(options["runs"])):
            for kind, taken in zip(kinds, samples):
                spent = _time_product(torch, data, kind)
                if number >= PRODUCT_WARM_UP:
                    taken.append(spent)
        dense.append(samples[0])
        sparse.append(samples[1])
    return {"gpu": torch.cuda.get_device_name(), "dense_ns": dense, "sparse_ns": sparse}


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise WorkerError("torch", "layer times need PyTorch there, and it does not import (%s)" % error) from error
    if not torch.cuda.is_available():
        raise WorkerError("gpu", "layer times need a CUDA GPU that PyTorch can use, and there is none")
    if torch.cuda.get_device_capability() < (8, 0):
        raise WorkerError("gpu", "%s has no 2:4 kernels: Ampere or later is needed" % torch.cuda.get_device_name())
    return torch


def _time_product(torch: Any, data: Any, weight: Any) -> int:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(PRODUCT_REPEATS):
        torch.nn.functional.linear(data, weight)
    end.record()
    torch.cuda.synchronize()
    microseconds: float = start.elapsed_time(end) * 1e3 / PRODUCT_REPEATS
    return max(1, round(microseconds * 1e3))


COMMANDS: Dict[str, Callable[[Dict[str, Any]], Dict[str, Any]]] = {
    "info": lambda options: describe_machine(),
    "measure": measure,
    "sustain": sustain,
    "memory": memory,
    "null": null,
    "evaluate": evaluate,
    "profile": profile,
    "products": products,
}


def answer(text: str) -> Dict[str, Any]:
    """Return the reply to the JSON request `text`."""
    try:
        request = json.loads(text)
        command = COMMANDS.get(request.get("command"))
        if request.get("schema_version") != PROTOCOL_VERSION or command is None:
            raise WorkerError("request", "unknown request; this worker speaks schema %d" % PROTOCOL_VERSION)
        options = request.get("options") or {}
        if options.get("affinity") and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, options["affinity"])
        return {"schema_version": PROTOCOL_VERSION, "result": command(options)}
    except WorkerError as error:
        return _failure(error.kind, str(error))
    except MemoryError:
        return _failure("memory", "the device ran out of memory")
    except Exception as error:
        return _failure("worker", _one_line(error))


def _failure(kind: str, message: str) -> Dict[str, Any]:
    return {"schema_version": PROTOCOL_VERSION, "error": {"kind": kind, "message": message}}


def main() -> None:
    """Answer one request from standard input."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # numpy's own threads would disturb the times
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to standard error
    reply = answer(sys.stdin.read())
    out.write(RESULT_MARK + json.dumps(reply) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
