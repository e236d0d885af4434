"""What can go wrong at the door, each with its remedy in the text."""

from __future__ import annotations


class EnvironmentFailureError(RuntimeError):
    """An environment raised, crashed or hung.

    Attributes:
        index: which environment, -1 where a vector environment does not say.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class EndlessEpisodeError(EnvironmentFailureError):
    """An episode that does not end, where whole episodes are wanted."""


class NonFiniteError(ValueError):
    """An observation, action, reward or log-prob is NaN or infinite."""


class ActionMaskError(ValueError):
    """A mask of valid actions that is missing, is none, or leaves nothing to do."""


class MissingActionMaskError(ActionMaskError):
    """There is no mask where the settings say that there is one."""


class UnsupportedAutoresetError(ValueError):
    """A vector environment that does not say, or says wrongly, how it resets."""


class UnsupportedSpaceError(ValueError):
    """A space that no policy of ours can read or act in."""


class UnknownEnvironmentError(ValueError):
    """No such environment, or one whose package is not installed."""
