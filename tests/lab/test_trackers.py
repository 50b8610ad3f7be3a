"""Energy counters: readings by pencil, a counter that starts anew, and machines that show nothing."""

import pytest

from avalab.lab import trackers


@pytest.fixture
def powercap(tmp_path):
    """Two packages, one with a sub-zone, as Linux shows them."""
    for zone, name, value in (("intel-rapl:0", "package-0", 9_000_000), ("intel-rapl:1", "package-1", 1_000_000)):
        folder = tmp_path / zone
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{value}\n")
        (folder / "max_energy_range_uj").write_text("10000000\n")
    sub = tmp_path / "intel-rapl:0:0"
    sub.mkdir()
    (sub / "energy_uj").write_text("5\n")
    return tmp_path


def test_two_packages_are_summed_and_their_parts_are_not_counted_twice(powercap):
    """From 9 J to 9.5 J and from 1 J to 3 J: 2.5 J."""
    found = trackers.energy_counters(root=powercap)
    assert [counter.name for counter in found] == ["package-0", "package-1"]
    before = trackers.read_counters(found)
    (powercap / "intel-rapl:0" / "energy_uj").write_text("9500000\n")
    (powercap / "intel-rapl:1" / "energy_uj").write_text("3000000\n")
    assert trackers.joules_between(found, before, trackers.read_counters(found)) == pytest.approx(2.5)
    assert trackers.why_no_energy(root=powercap) == ""


def test_a_counter_that_starts_anew_goes_on_from_its_range():
    """From 9 J of 10 to 1 J: 2 J."""
    counter = trackers.Counter("package-0", lambda: 0, 1e-6, 10_000_000)
    assert trackers.joules_between([counter], [9_000_000], [1_000_000]) == pytest.approx(2.0)


def test_what_others_compute_is_counted_and_ones_own_work_is_not():
    """By pencil: two processors busy for 2 of 4 seconds each are 4, of which 1 was ours: 3 / 4 of one for others."""
    assert trackers.processors_of_others((10.0, 100.0, 5.0), (14.0, 104.0, 6.0)) == pytest.approx(0.75)
    assert trackers.processors_of_others((10.0, 100.0, 5.0), (14.0, 100.0, 6.0)) == 0.0
    before = trackers.processor_seconds()
    while trackers.processor_seconds()[2] - before[2] < 0.2:
        pass
    after = trackers.processor_seconds()
    assert after[1] - before[1] >= 0.15  # what this process did is among what the machine did


def test_nothing_used_is_no_energy():
    counter = trackers.Counter("package-0", lambda: 7, 1e-6, 10)
    assert trackers.joules_between([counter], trackers.read_counters([counter]), trackers.read_counters([counter])) == 0


def test_a_machine_without_counters_says_so(tmp_path):
    assert trackers.energy_counters(root=tmp_path) == []
    assert trackers.why_no_energy(root=tmp_path) == f"not measured: no RAPL counter in {tmp_path}"


def test_a_counter_that_may_not_be_read_is_said_to_be_forbidden(powercap, monkeypatch):
    monkeypatch.setattr(trackers, "_readable", lambda file: False)
    assert trackers.why_no_energy(root=powercap) == f"not measured: no right to read energy_uj below {powercap}"


def test_a_gpu_without_a_driver_is_named(monkeypatch):
    monkeypatch.setattr(trackers.ctypes, "CDLL", _no_library)
    assert trackers.why_no_energy("cuda") == "not measured: the GPU's driver shows no energy counter"


def _no_library(name: str):
    raise OSError(name)
