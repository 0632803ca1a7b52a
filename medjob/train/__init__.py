"""Loading models, and training them."""

from transformers.utils import logging as _logging

_logging.disable_default_handler()
_logging.enable_propagation()  # so that all messages have one format
