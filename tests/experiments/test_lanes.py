"""Lanes: processes side by side, their ends and their logs."""

import time

import pytest

from smoltolk.experiments.lanes import Lane, Lanes, lane_bars, run_lanes


def work(seconds, progress):
    print(f"worked {seconds}")
    progress(1)
    time.sleep(seconds)


def fail(progress):
    raise ValueError("no luck")


@pytest.mark.slow
def test_lanes_log_what_they_print_and_a_failed_one_names_its_log(tmp_path):
    lanes = {"good": Lane(work, (0.0,), 1), "bad": Lane(fail, (), 1)}
    with pytest.raises(ChildProcessError, match=rf"bad failed, see {tmp_path}/bad\.log"):
        run_lanes(lanes, tmp_path)
    assert (tmp_path / "good.log").read_text() == "worked 0.0\n"
    assert "no luck" in (tmp_path / "bad.log").read_text()


def stop_while_a_lane_runs(tmp_path, is_begun):
    started = time.monotonic()
    with lane_bars() as bar, Lanes(bar) as lanes:
        lanes.start("long", Lane(work, (600.0,), 1), tmp_path / "log")
        while is_begun and not ((tmp_path / "log").exists() and time.monotonic() - started > 4):
            time.sleep(0.1)
        raise KeyboardInterrupt


@pytest.mark.parametrize("is_begun", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ctrl_c_ends_lanes_also_while_they_start(tmp_path, is_begun):
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        stop_while_a_lane_runs(tmp_path, is_begun)
    assert time.monotonic() - started < 60
