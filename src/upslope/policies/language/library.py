"""The door to transformers, tokenizers and peft: are they there, and may they please be quiet."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def require_language() -> None:
    """A language model was asked for, so its absence is told before anything is made.

    Raises:
        ModuleNotFoundError: a package of the extra `language` is not installed.
    """
    missing = [name for name in ("transformers", "tokenizers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"language models need {', '.join(missing)}, which is not installed: pip install 'upslope[language]'"
        )


@contextmanager
def quietly() -> Iterator[None]:
    """Progress bars, log lines below errors and warnings of transformers are off in here, and as before afterwards.

    Raises:
        ModuleNotFoundError: a package of the extra `language` is not installed.
    """
    require_language()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        level, hub_level, bars = logging.get_verbosity(), hub_logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        hub_logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(level)
            hub_logging.set_verbosity(hub_level)
            if bars:
                logging.enable_progress_bar()
