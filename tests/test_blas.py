"""BLAS has one thread while anybody wants it so, and as many as before when nobody does."""

from __future__ import annotations

import pytest
import threadpoolctl

from wavg.blas import single_blas_thread


@pytest.fixture
def calls(monkeypatch):
    """What is asked of threadpoolctl."""
    calls = []

    class Limits:
        def __init__(self, limits, user_api):
            calls.append((limits, user_api))

        def restore_original_limits(self):
            calls.append("restored")

    monkeypatch.setattr(threadpoolctl, "threadpool_limits", Limits)
    return calls


def test_the_first_limits_and_the_last_restores(calls):
    with single_blas_thread():
        with single_blas_thread():
            assert calls == [(1, "blas")]
        assert calls == [(1, "blas")]
    assert calls == [(1, "blas"), "restored"]
    with single_blas_thread():
        assert calls[2:] == [(1, "blas")]


def test_a_failure_within_restores_too(calls):
    with pytest.raises(KeyError), single_blas_thread():
        raise KeyError
    assert calls == [(1, "blas"), "restored"]


def test_libraries_that_cannot_be_looked_into_are_left_alone(monkeypatch):
    def unreadable(*_, **__):
        raise OSError("no /proc")

    monkeypatch.setattr(threadpoolctl, "threadpool_limits", unreadable)
    for _ in range(2):
        with single_blas_thread():
            pass


def test_the_limit_is_real():
    def threads():
        found = threadpoolctl.threadpool_info()
        return [library["num_threads"] for library in found if library["user_api"] == "blas"]

    before = threads()
    with single_blas_thread():
        assert set(threads()) <= {1}
    assert threads() == before
