"""pyproject.toml's ranges, and requirements.txt, which locks them for every Python of the range."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from baichuan.executors.tensorrt import api

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def environment(python: str) -> dict[str, str]:
    """What the markers of requirements ask for."""
    machine = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    return machine | {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}


def locked(python: str) -> dict[str, str]:
    """Package -> version that requirements.txt installs."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line.split("  #")[0]) for line in lines if not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment(python))]
    assert all(re.fullmatch(r"==[^*]+", str(pin.specifier)) for pin in pins)
    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    assert len(versions) == len(pins), "a package with two versions"
    return versions


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_has_a_version_in_the_range_of_every_dependency(python):
    versions = locked(python)
    for text in [*PROJECT["dependencies"], *EXTRAS["dev"]]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(versions[canonicalize_name(wanted.name)]), f"{text}: run make lock"


def test_the_range_of_pythons_is_the_one_that_is_locked():
    range_ = SpecifierSet(PROJECT["requires-python"])
    assert [python for python in ("3.9", *PYTHONS, "3.14") if range_.contains(python)] == list(PYTHONS)


def test_pytorchs_own_cuda_packages_are_left_to_it():
    assert not [name for name in locked("3.11") if name.startswith(("nvidia", "cuda"))]
    assert "triton" in locked("3.11")  # which PyTorch for the CPU does not bring


def test_every_range_ends():
    for text in [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["tensorrt"]]:
        assert {each.operator for each in Requirement(text).specifier} == {">=", "<"}, text


def test_the_remedy_for_a_missing_tensorrt_names_the_same_ranges():
    ranges = {canonicalize_name(each.name): each.specifier for each in map(Requirement, PROJECT["dependencies"])}
    ranges["tensorrt"] = Requirement(*EXTRAS["tensorrt"]).specifier
    for name, remedy in api.INSTALL.items():
        wanted = Requirement(re.search(r"'(.*)'", remedy)[1])
        assert wanted.specifier == ranges[canonicalize_name(wanted.name)], name
