"""Load the states in checkpoints without running code that they hold.

A pickle can call any function when it is loaded, and DeepSpeed loads its states with
`weights_only=False`. A checkpoint may come from a bucket that other people can write to. With the
environment variables in `WEIGHTS_ONLY`, torch restores tensors, plain values and the classes of an
allow-list.
"""

from __future__ import annotations

import copyreg


def allow_deepspeed_states() -> None:
    """Allow the classes that DeepSpeed 0.19.8 saves in its states. None of them runs other code.

    The stage of ZeRO is saved by its value. Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickle
    the members of an enumeration as a call of `getattr`, which can reach any code and is refused.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    )
    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


def convert() -> None:
    """Convert a checkpoint to DeepSpeed's universal format, with its arguments in `sys.argv`."""
    from deepspeed.checkpoint import ds_to_universal

    allow_deepspeed_states()
    ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    convert()
