"""What captions say of the processor, from the files that the system describes it in."""

import platform

import pytest

from baichuan.util import machine


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC  9654 \nprocessor\t: 1\nmodel name\t: other\n", "AMD EPYC 9654"),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", platform.machine()),  # ARM names no model
        ("model name\t: \n", platform.machine()),
        (None, platform.machine()),
    ],
)
def test_the_name_of_the_processor(tmp_path, monkeypatch, text, name):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.cpu_name() == name


def test_the_largest_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CACHES", tmp_path)
    assert machine.cpu_cache_bytes() == 0
    for index, size in enumerate(("48K", "32768K", "2M", "odd")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert machine.cpu_cache_bytes() == 32 << 20
