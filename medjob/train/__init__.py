"""Models and trainers."""

from transformers.utils import logging as _logging

_logging.disable_default_handler()
_logging.enable_propagation()  # transformers' messages take the form of ours
