"""States of a checkpoint that hold code: it never runs, and the training says why it does not resume."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from medjob.errors import InputError, translate
from medjob.runtime.link import WEIGHTS_ONLY
from medjob.train.deepspeed import STATE, make_universal, read_layout
from medjob.train.states import allow_deepspeed_states


class Payload:
    """An object whose unpickling creates a file."""

    def __init__(self, sign: Path) -> None:
        self._sign = sign

    def __reduce__(self) -> Any:
        return Path.touch, (self._sign,)


@pytest.mark.parametrize("explicit", [False, None])
def test_code_in_a_state_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, explicit: bool | None
) -> None:
    sign, state = tmp_path / "ran", tmp_path / "state.pt"
    torch.save({"step": Payload(sign)}, state)
    torch.load(state, weights_only=False)
    assert sign.exists()  # the attack works on a process without the protection
    sign.unlink()
    monkeypatch.setenv(*next(iter(WEIGHTS_ONLY.items())))
    allow_deepspeed_states()
    with pytest.raises(pickle.UnpicklingError) as raised:
        torch.load(state, weights_only=explicit)
    assert not sign.exists()
    error = translate(raised.value)
    assert isinstance(error, InputError)
    assert "could run code" in error.message


def test_the_stage_of_zero_is_restored_on_every_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    def reduce_as_in_3_11_2(stage: ZeroStageEnum, _: int) -> Any:
        return getattr, (type(stage), stage.name)

    monkeypatch.setattr(ZeroStageEnum, "__reduce_ex__", reduce_as_in_3_11_2)
    allow_deepspeed_states()
    torch.save({"zero_stage": ZeroStageEnum.gradients}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["zero_stage"] is ZeroStageEnum.gradients


def test_code_in_a_state_does_not_run_in_the_converter(tmp_path: Path) -> None:
    sign = tmp_path / "ran"
    states = tmp_path / "checkpoint-2/global_step2"
    states.mkdir(parents=True)
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (states / name).write_bytes(pickle.dumps(Payload(sign), protocol=2))
    with pytest.raises(InputError, match="checkpoint-2: cannot be converted"):
        make_universal(tmp_path / "checkpoint-2")
    assert not sign.exists()


@pytest.mark.parametrize(
    "layout",
    [
        None,
        "[]",
        "not JSON",
        '{"deepspeed": "zero2"}',
        '{"deepspeed": "zero9", "world_size": 2}',
        '{"deepspeed": "zero2", "world_size": "2"}',
        '{"deepspeed": "zero2", "world_size": 0}',
        '{"deepspeed": ["zero2"], "world_size": 1}',
    ],
)
def test_unusable_layout_of_a_checkpoint_is_refused(tmp_path: Path, layout: str | None) -> None:
    if layout is not None:
        (tmp_path / STATE).write_text(layout)
    with pytest.raises(InputError, match="does not describe the layout"):
        read_layout(tmp_path)
    (tmp_path / STATE).write_text(json.dumps({"deepspeed": "zero2", "world_size": 2}))
    assert read_layout(tmp_path) == ("zero2", 2)


def test_converter_needs_states(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no DeepSpeed states"):
        make_universal(tmp_path)
