"""The phase of a training after each sequence of events. No processes, no clock."""

import itertools
import math
from typing import Any

import pytest

from medjob.errors import DataError, Preempted, RetryError
from medjob.launch.failures import ProcessKilled, UnexpectedError, root_cause
from medjob.launch.state import GracePeriod, Phase, TrainingState

STEP = {"event": "step", "step": 7, "seconds": 2.0}
SAVED = {"event": "saved", "step": 7, "seconds": 3.0, "best_step": 5}
STOPPED = {"event": "error", "code": 143, "message": "", "hint": "", "traceback": ""}
LOST_PEER = {"event": "error", "code": 75, "message": "", "hint": "", "traceback": ""}
KILLED = {"event": "exit", "status": -9}


def state_after(*events: dict[str, Any], stop_requested: bool = False) -> TrainingState:
    """Apply events of different processes, one per second."""
    state = TrainingState(GracePeriod(30.0))
    if stop_requested:
        state.grace.start(now=0.0, limited=True)
    for second, event in enumerate(events):
        state.update(second, event, now=float(second))
    return state


@pytest.mark.parametrize(
    ("events", "stop_requested", "phase"),
    [
        ([], False, Phase.RUNNING),
        ([STEP, SAVED], False, Phase.RUNNING),  # a periodic checkpoint
        ([], True, Phase.STOPPING),
        ([STEP, SAVED], True, Phase.STOPPING),
        ([STEP, SAVED, STOPPED], True, Phase.SAVED),
        ([STEP, SAVED, STOPPED], False, Phase.SAVED),  # the signal went to a training process
        ([STEP, STOPPED], True, Phase.FAILED),
        ([LOST_PEER], False, Phase.FAILED),
        ([STEP, SAVED, KILLED], True, Phase.FAILED),  # no process has passed the barrier
    ],
)
def test_phase_after_events(
    events: list[dict[str, Any]], stop_requested: bool, phase: Phase
) -> None:
    assert state_after(*events, stop_requested=stop_requested).phase is phase


@pytest.mark.parametrize("events", itertools.permutations([STEP, SAVED, STOPPED, LOST_PEER]))
def test_phase_does_not_depend_on_the_order_of_events(
    events: tuple[dict[str, Any], ...],
) -> None:
    assert state_after(*events).phase is Phase.SAVED


def test_accepted_save_counts_until_a_newer_step() -> None:
    state = state_after(STEP, SAVED, STOPPED)
    save = state.accept_save()
    assert save
    assert (save.local_rank, save.step, save.best_step) == (1, 7, 5)
    assert state.accept_save() is None
    assert state.phase is Phase.SAVED
    state.update(0, {**STEP, "step": 8}, now=9.0)
    assert state.phase is Phase.FAILED
    state.update(0, {**SAVED, "step": 8}, now=9.0)
    assert state.phase is Phase.SAVED


def test_exit_after_a_report_is_not_a_second_error() -> None:
    state = state_after({"event": "done", "metrics": {"loss": 1.0}})
    state.update(0, {"event": "exit", "status": 0}, now=1.0)
    assert (state.metrics, state.ended, state.errors) == ({"loss": 1.0}, {0}, [])


def test_first_error_starts_the_wait_for_further_errors() -> None:
    state = state_after(STEP, KILLED, LOST_PEER)
    assert state.first_error_at == 1.0
    assert [type(error) for error in state.errors] == [ProcessKilled, RetryError]


@pytest.mark.parametrize(
    "errors",
    itertools.permutations(
        [DataError("rows"), ProcessKilled("killed"), UnexpectedError("bug"), RetryError("peer")], 2
    ),
)
def test_root_cause_does_not_depend_on_the_order_of_errors(
    errors: tuple[BaseException, BaseException],
) -> None:
    order = [DataError, ProcessKilled, UnexpectedError, RetryError]
    likeliest = min(errors, key=lambda error: order.index(type(error)))
    assert root_cause(errors) is likeliest
    assert root_cause([Preempted("stopped"), *errors]) is likeliest


def test_grace_period_reserves_a_second_for_the_record() -> None:
    grace = GracePeriod(30.0)
    assert (grace.started, grace.limited, grace.seconds_left(100.0)) == (False, False, None)
    assert not grace.expired(1e9)
    grace.start(now=100.0, limited=True)
    assert (grace.started, grace.limited, grace.seconds_left(110.0)) == (True, True, 19.0)
    assert [grace.expired(129.0), grace.expired(129.1)] == [False, True]
    assert [grace.fits(29.0), grace.fits(29.1)] == [True, False]


def test_grace_period_after_ctrl_c_has_no_end() -> None:
    grace = GracePeriod(30.0)
    grace.start(now=100.0, limited=False)
    assert (grace.started, grace.limited, grace.deadline) == (True, False, math.inf)
    assert grace.seconds_left(1e9) is None
    assert not grace.expired(1e9)
