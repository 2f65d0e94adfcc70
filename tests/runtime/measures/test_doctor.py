"""`stpath doctor`: what is there, what is not, and that a backend that errs is called out."""

from __future__ import annotations

import ctypes
import re
import shutil

import pytest

from stpath_runtime import machine
from stpath_runtime.backends import onnxruntime as onnxruntime_backend
from stpath_runtime.cli.app import main
from stpath_runtime.measures import doctor


@pytest.fixture
def own(tiny_engine, tmp_path):
    return shutil.copytree(tiny_engine, tmp_path / "engine")


def words(capsys):
    out, err = capsys.readouterr()
    return re.sub(r"[\s│]+", " ", out), err


def test_doctor_names_every_backend_and_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_gpus", list)
    monkeypatch.setattr(
        doctor, "installed", lambda package: None if package in ("tensorrt", "onnxruntime-gpu") else "9.9"
    )
    assert main(["doctor"]) == 0
    out, _ = words(capsys)
    for way in doctor.WAYS:
        assert way.backend in out
    for word in ("stpath-engine[gpu]", "stpath-engine[tensorrt]", "no NVIDIA GPU (its driver", "9.9", "works"):
        assert word in out
    assert "Differs by" not in out


def test_doctor_compares_the_backends_on_an_engine(own, capsys):
    assert main(["doctor", str(own)]) == 0
    out, _ = words(capsys)
    assert "against ONNX Runtime on the CPU, on a random slide of 300 spots from a seed" in out
    assert re.search(r"openvino cpu fp32 any CPU \S+ \d\.\de-07 works", out)


def test_doctor_calls_out_a_backend_that_errs(own, capsys, monkeypatch):
    monkeypatch.setitem(doctor.BARS, "fp32", 1e-9)
    assert main(["doctor", str(own)]) == 3
    out, err = words(capsys)
    assert "WRONG" in out
    assert "openvino fp32 differs from ONNX Runtime on the CPU by more than rounding" in err


def test_doctor_fails_where_the_default_backend_does(capsys, monkeypatch):
    monkeypatch.setattr(onnxruntime_backend, "installed", lambda package: "1.31.1")
    assert main(["doctor"]) == 2
    out, err = words(capsys)
    assert "both onnxruntime and onnxruntime-gpu" in out
    assert "the default backend does not work: both onnxruntime" in err


def test_doctor_of_no_engine(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "not an engine" in words(capsys)[1]


class Driver:
    """CUDA's driver with two GPUs, as ctypes shows it."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails

    def __getattr__(self, function: str):
        def call(*arguments) -> int:
            if function == self.fails:
                return 100  # CUDA_ERROR_NO_DEVICE
            if function == "cuDeviceGetCount":
                arguments[0]._obj.value = 2
            if function == "cuDeviceGet":
                arguments[0]._obj.value = arguments[1]
            if function == "cuDeviceGetName":
                arguments[0].value = f"NVIDIA Made Up {arguments[2].value}".encode()
            if function == "cuDeviceTotalMem_v2":
                arguments[0]._obj.value = 80 << 30
            return 0

        return call


def test_gpus_are_what_the_driver_says(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert machine.nvidia_gpus() == ["NVIDIA Made Up 0, 81920 MiB", "NVIDIA Made Up 1, 81920 MiB"]
    for fails in ("cuInit", "cuDeviceGetCount"):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, fails=fails: Driver(fails))
        assert machine.nvidia_gpus() == []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError("no libcuda.so.1")))
    assert machine.nvidia_gpus() == []
