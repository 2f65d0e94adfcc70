"""The shared parts of the benchmarks, by a fake clock, and the commands `stpath bench` and `stpath bench compare`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from stpath_runtime.backends import choice
from stpath_runtime.cli.app import main
from stpath_runtime.errors import BackendError, FileError, InputWarning, MemoryLimitError
from stpath_runtime.manifest import Manifest, ModelConfig
from stpath_runtime.measures.bench import alone, measure, roofline, timing
from stpath_runtime.measures.bench.comparison import Pair, pairs, warn_of_differences
from stpath_runtime.measures.bench.results import Results, Row
from stpath_runtime.measures.bench.tables import columns, markdown, notes, three_digits

A = Row("encode", backend="onnxruntime", attention="global", spots=500)
B = replace(A, backend="openvino", precision="bf16")


class Clock:
    """A clock that stands still but for what is said to take time."""

    def __init__(self, monkeypatch):
        self.now, self.order = 0.0, []
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def call(self, name, *seconds):
        turns = iter(seconds)

        def run():
            self.order.append(name)
            self.now += next(turns)

        return run


def results(*rows, **facts) -> Results:
    facts = {"machine": {"cpu": "one", "cores": 2}, "versions": {"numpy": "2"}, "commit": None} | facts
    return Results("of the tests", rows, hashes={"engine": "e"}, **facts)


def test_rounds_are_interleaved_and_ratios_are_pair_by_pair(monkeypatch):
    clock = Clock(monkeypatch)
    calls = {A: clock.call("A", 1.0, 2.0, 4.0), B: clock.call("B", 0.5, 4.0, 2.0)}
    a, b = timing.in_turn(calls, 3)
    assert clock.order == ["A", "B"] * 3
    assert (a.seconds, b.seconds) == ((1.0, 2.0, 4.0), (0.5, 4.0, 2.0))
    assert (a.ratios, b.ratios) == ((), (0.5, 2.0, 0.5))
    assert (a.median, a.spread) == (2.0, 1.5)
    assert timing.in_turn({}, 3) == []


def test_seconds_of_backends_are_compared_over_what_each_ran():
    openvino = replace(A, backend="openvino")
    rows = [
        replace(A, seconds=(1.0, 1.1, 1.2)),
        replace(A, spots=2000, seconds=(4.4,)),
        replace(A, spots=9000, seconds=(9.0,)),  # the other is too wide there
        replace(openvino, seconds=(2.2,)),
        replace(openvino, spots=2000, seconds=(1.1,)),
        replace(openvino, spots=9000, seconds=(1.0, 9.0)),
        replace(B, seconds=(1.0,)),  # alone in its precision
        replace(A, what="decode", seconds=(7.0,)),
    ]
    assert results(*rows).seconds_of_backends() == {
        ("cpu", "fp32"): {"onnxruntime": pytest.approx(2.2), "openvino": pytest.approx(2.42**0.5)}
    }


def test_a_spread_that_is_too_wide_says_so():
    narrow, wide = replace(A, seconds=(1.0, 1.2, 1.5)), replace(B, seconds=(1.0, 1.2, 1.61))
    assert (narrow.too_wide, wide.too_wide) == (False, True)
    assert replace(A, seconds=(1.0,)).spread is None
    names, cells = columns([narrow, wide])
    assert [line[names.index("spread")] for line in cells] == ["42%", "51%, too wide"]
    assert notes(results(narrow))[-1].startswith("Seconds")
    assert "in 1 of 2 rows" in notes(results(narrow, wide))[-1]


def test_a_peak_that_a_row_exceeds_tells_no_share():
    peaks = {"gflops": 100.0, "gbytes": 10.0, "by": "numpy"}
    below, at, above = (replace(A, spots=n, seconds=(1.0,), limit=limit) for n, limit in enumerate((0.74, 1.0, 1.1), 1))
    names, cells = columns([below, at, above])
    assert [line[names.index("of the roofline")] for line in cells] == ["74%", "100%", "peak too low"]
    assert "in 1 of 3 rows: they were faster" in notes(results(below, at, above, peaks=peaks))[-1]
    assert notes(results(below, at, peaks=peaks))[-1].startswith("Roofline")


def test_a_table_has_the_columns_that_it_needs_and_names_what_parity_is_against():
    one = replace(A, seconds=(0.01234,), relative_l2=2e-7, parity="float64")
    names, cells = columns([one, replace(B, failed="too little memory")])
    assert names == ["what", "on", "by", "seconds", "relative L2 to float64"]
    assert cells[0] == ["encode", "500 spots, global", "engine, onnxruntime, fp32", "0.0123", "2.0e-07"]
    assert cells[1][3] == "too little memory"
    names, cells = columns([one, replace(B, relative_l2=1e-3, parity="PyTorch fp32")])
    assert [line[-1] for line in cells] == ["2.0e-07 to float64", "1.0e-03 to PyTorch fp32"]
    assert "| encode | 500 spots, global | engine, onnxruntime, fp32 | 0.0123 |" in markdown(results(one))
    assert [three_digits(x) for x in (27.14, 1234.0, 1e-5, 32.8, None)] == ["27.1", "1230", "0.00001", "32.8", ""]


def test_results_come_back_from_their_file(tmp_path):
    rows = replace(A, seconds=(1.0, 3.0), peak_bytes=5, relative_l2=0.0, limit=0.5), replace(B, failed="why")
    written = results(*rows, peaks={"gflops": 1.0})
    written.write(tmp_path / "bench.json")
    assert Results.read(tmp_path / "bench.json") == written
    told = json.loads((tmp_path / "bench.json").read_text())["rows"][0]
    assert (told["median"], told["spread"]) == (2.0, 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: "not JSON", "not a result"),
        (lambda found: [], "not a result"),
        (lambda found: {**found, "schema": 2}, "newer"),
        (lambda found: {**found, "versions": {"numpy": 2}}, r"versions\['numpy'\] is 2, not text"),
        (lambda found: {**found, "more": 1}, "more"),
        (lambda found: {**found, "rows": [{**found["rows"][0], "seconds": [0]}]}, "above 0"),
        (
            lambda found: {**found, "rows": [{**found["rows"][0], "seconds": [float("nan")]}]},
            "is nan, not a finite number",
        ),
        (lambda found: {**found, "rows": [{**found["rows"][0], "spots": "many"}]}, "spots is 'many'"),
        (lambda found: {**found, "rows": found["rows"] * 2}, "appear twice"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, change, message):
    path = tmp_path / "bench.json"
    results(replace(A, seconds=(1.0,))).write(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(FileError, match=message):
        Results.read(path)


@pytest.mark.parametrize(
    ("old", "new", "regression"),
    [
        ({"seconds": (1.0, 1.1, 1.2)}, {"seconds": (1.3, 1.4, 1.5)}, "1.27 times as slow"),
        ({"seconds": (1.0, 1.1, 1.2)}, {"seconds": (1.15, 1.4, 1.5)}, None),  # within the spread
        ({"seconds": (1.0, 1.1, 1.2)}, {"seconds": (1.21, 1.22, 1.23)}, "1.11 times as slow"),
        ({"seconds": (1.0, 1.1, 1.2)}, {"seconds": (1.201, 1.205, 1.21)}, None),  # below the ratio
        ({"seconds": (2.0,)}, {"seconds": (1.0,)}, None),
        ({"seconds": (1.0,), "peak_bytes": 10}, {"seconds": (1.0,), "peak_bytes": 12}, "1.20 times as much memory"),
        ({"seconds": (1.0,)}, {"failed": "killed"}, "fails: killed"),
        ({"failed": "killed"}, {"failed": "killed"}, None),
    ],
)
def test_a_regression_is_beyond_the_ratio_and_beyond_the_spread(old, new, regression):
    found = Pair(replace(A, **old), replace(A, **new)).regressions(1.1)
    assert found == ([] if regression is None else [regression])


def test_rows_are_paired_by_what_they_are(recwarn):
    old = results(replace(A, seconds=(1.0,)), replace(B, seconds=(9.0,)))
    new = results(replace(B, seconds=(3.0,), note="another note"), replace(A, spots=7))
    with pytest.warns(InputWarning, match="1 rows of the old results are not in the new ones, the first: encode, 500"):
        (pair,) = pairs(old, new)
    assert pair.seconds == pytest.approx(1 / 3)


def test_other_machines_versions_and_engines_are_told(recwarn):
    old = results(A)
    warn_of_differences(old, results(A))
    assert len(recwarn) == 0
    new = replace(results(A, machine={"cpu": "two", "cores": 2}, versions={}), hashes={"engine": "f"})
    with pytest.warns(InputWarning) as told:
        warn_of_differences(old, new)
    assert [str(warning.message).partition(": ")[2] for warning in told] == [
        "cpu one then, two now",
        "numpy 2 then, none now",
        "engine e then, f now",
    ]


def test_operations_are_those_of_the_published_sizes():
    model = ModelConfig(512, 4, 4, 1024, 1536, 38_984, 25, 5)
    assert roofline.encoder_operations(model, 1, 0) == pytest.approx(18.4e6, rel=0.01)
    assert (
        roofline.encoder_operations(model, 10, 192) - roofline.encoder_operations(model, 10, 0)
        == 10 * 4 * 4 * 192 * 512
    )
    assert roofline.decoder_operations(model, 10, 50) == 10 * 2 * 512 * 50
    peaks = roofline.Peaks(100.0, 10.0, "nothing")
    assert (peaks.seconds(1000, 10), peaks.seconds(10, 1000)) == (10, 100)
    grid = np.stack(np.divmod(np.arange(640), 32), axis=1)
    assert roofline.keys_of_a_spot(grid, "global", 0) == 640
    assert 64 <= roofline.keys_of_a_spot(grid, "knn", 8) < 200


def test_the_way_of_the_proof_is_the_base(tiny_engine):
    assert measure.ways_here(tiny_engine)[0].backend == "onnxruntime"
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        measure.ways_here(tiny_engine, backend="tensorrt")
    with pytest.raises(BackendError, match="none is such"):
        measure.ways_here(tiny_engine, precision="fp8")


def test_a_process_that_ends_badly_says_why(tiny_engine, monkeypatch):
    with pytest.raises(BackendError, match="expects|attention"):
        alone.run_alone(alone.Task(str(tiny_engine), 9, attention="sideways"))
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(alone.sys, "executable", "/bin/sh")
    run = alone.subprocess.run
    monkeypatch.setattr(alone.subprocess, "run", lambda words, **how: run(["python3", "-c", kill], **how))
    with pytest.raises(MemoryLimitError, match="killed by signal 9"):
        alone.run_alone(alone.Task(str(tiny_engine), 9))


@pytest.fixture
def quick_peaks(monkeypatch):
    monkeypatch.setattr(roofline, "SIDES", (64,))
    monkeypatch.setattr(roofline, "COPIED", 1 << 20)


def test_bench_end_to_end(tiny_engine, quick_peaks, tmp_path, capsys):
    words = ["bench", str(tiny_engine), "--spots", "40", "--genes", "7", "--rounds", "2", "--neighbors", "8"]
    assert main([*words, "--backend", "onnxruntime", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "relative L2 to onnxruntime on cpu, fp32" in " ".join(printed.out.split())
    names = ["bench.json", "bench.md", "latency.png", "memory.png"]
    assert printed.out.split()[-4:] == [str(tmp_path / "out" / name) for name in names]
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in names[2:])
    found = Results.read(tmp_path / "out" / "bench.json")
    assert found.hashes["checkpoint"] == Manifest.read(tiny_engine).checkpoint["sha256"]
    assert found.machine["cores"] > 0
    assert found.peaks["gflops"] > 0
    rows = {(row.what, row.attention): row for row in found.rows}
    firsts, encodes = ([(what, kind) for kind in ("global", "knn")] for what in ("first call", "encode"))
    assert list(rows) == [("load", ""), *firsts, *encodes, ("decode", "")]
    assert len(rows["load", ""].seconds) == 2
    assert all(len(rows[name].seconds) == 1 and rows[name].peak_bytes > 1e6 for name in firsts)
    for name in (*encodes, ("decode", "")):
        assert (len(rows[name].seconds), rows[name].relative_l2) == (2, 0.0)
        assert rows[name].limit > 0


def test_bench_keeps_what_auto_then_takes(tiny_engine, quick_peaks, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = shutil.copytree(tiny_engine, tmp_path / "engine")  # OpenVINO keeps compiled graphs in it
    words = ["--spots", "40", "--attention", "global", "--genes", "7", "--rounds", "1", "--precision", "fp32"]
    assert main(["bench", str(own), *words]) == 0
    kept = choice.kept_seconds(own, "cpu", "fp32")
    assert set(kept) == {"onnxruntime", "openvino"}
    assert capsys.readouterr().out.endswith(choice.choose_backend(own, "cpu", "fp32")[1] + "\n")


def test_compare_by_the_command_line(tmp_path, capsys):
    old, same, slow = (tmp_path / name for name in ("old.json", "same.json", "slow.json"))
    results(replace(A, seconds=(1.0, 1.1))).write(old)
    results(replace(A, seconds=(1.05, 1.08)), machine={"cpu": "two"}).write(same)
    results(replace(A, seconds=(3.0, 3.1), note="[odd]")).write(slow)
    assert main(["bench", "compare", str(old), str(same)]) == 0
    printed = capsys.readouterr()
    assert "1 rows compared, 0 above 1.1 times" in printed.out
    assert "warning: the two results are of different machine: cpu one then, two now" in printed.err
    assert main(["bench", "compare", str(old), str(slow)]) == 4
    assert "regression: 2.90 times as slow" in " ".join(capsys.readouterr().out.split())
    assert main(["bench", "compare", str(old), str(slow), "--ratio", "3"]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{engine}", "--spots", "5,x"], "--spots 5,x: give whole numbers"),
        (["{engine}", "--attention", "global", "--neighbors", "8"], "--neighbors 8: global attention takes none"),
        (["{engine}", "--genes", "500", "--spots", "9"], "--genes 500: the engine has 200"),
        (["{engine}", "--out", "{engine}/engine.json"], "engine.json: a file; give a folder"),
        (["{engine}", "--backend", "tensorrt"], "no backend to measure"),
        (["{tmp}/none"], "not an engine"),
        (["compare", "{tmp}/a.json", "{tmp}/b.json"], "no such file"),
        (["compare", "{tmp}/a.json"], "Missing argument"),
        (["compare", "{engine}/engine.json", "{tmp}/b.json"], "not a result of stpath bench"),
    ],
)
def test_a_faulty_call_is_one_line(tiny_engine, tmp_path, capsys, words, message):
    assert main(["bench", *(word.format(engine=tiny_engine, tmp=tmp_path) for word in words)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1
