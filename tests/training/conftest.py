"""Processes that the tests of training start."""

import multiprocessing

import pytest


@pytest.fixture(scope="session")
def processes():
    """Starts processes that have everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["smoltolk.cli", "smoltolk.training.trainer", "tests.conftest"])
    return context
