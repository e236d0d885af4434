"""A reward at an HTTP address: what it is asked, what it answers, and what its failures mean."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from upslope.collect.rewards.calling import CallError, IndivisibleError, describe, shorten
from upslope.errors import UsageError

ATTEMPTS: Final = 4
LARGEST_ANSWER: Final = 64 * 2**20
OUTAGE: Final = 30.0
"""Seconds for which an endpoint that does not serve is asked again: long enough for it to be started anew."""
LONGEST_PAUSE: Final = 5.0
_NOT_SERVING: Final = frozenset({429, 502, 503})
_FOR_NO_BATCH: Final = _NOT_SERVING | frozenset({401, 403, 404, 405, 407, 410, 501})


def is_address(given: str) -> bool:
    """Whether this is an endpoint's address, not a place in a file."""
    return given.startswith(("http://", "https://"))


def check_address(address: str) -> None:
    """Refuse what cannot be asked.

    Raises:
        UsageError: if it is not http or https, has no host or a bad port, or holds a user name or password.
    """
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UsageError(f"{address!r} is no address of a reward: {error}") from error
    if parts.scheme not in ("http", "https") or not host:
        raise UsageError(f"the address of a reward is http://host:port/path or https://host/path, got {address!r}")
    if parts.username is not None or parts.password is not None:
        raise UsageError("the address of a reward holds no user name or password: it is written into logs")


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpReward:
    """POSTs `{"prompts": [...], "completions": [...], "columns": {name: [...]}}`, gets `{"scores": [1.0, null, ...]}`.

    null is "not applicable". Where there is no connection, or the answer is 429, 502 or 503, it is asked again for
    `outage` seconds; a connection that breaks off and any other answer 5xx, up to four times; with growing pauses.
    Redirections are not followed and proxies not used. No column may hold what JSON cannot.

    Attributes:
        address: http or https.
        seconds: for an attempt; all that are not due to an outage have so long together.
        outage: seconds for which an endpoint that does not serve is asked again.
        pause: seconds before the second attempt; twice that before each further one, up to `LONGEST_PAUSE`.
    """

    address: str
    seconds: float
    outage: float
    pause: float = 0.25

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]
    ) -> list[float | None]:
        """The scores.

        Raises:
            IndivisibleError: if the server cannot be reached or would refuse any batch.
            CallError: if it did not score this batch.
        """
        try:
            body = json.dumps({"prompts": prompts, "completions": completions, "columns": columns}).encode()
        except (TypeError, ValueError) as error:
            raise IndivisibleError(f"a column cannot be written as JSON: {describe(error)}") from error
        begun = time.monotonic()
        attempt, pause = 1, self.pause
        while True:
            waited = time.monotonic() + pause - begun
            answer = self._ask(
                body,
                attempt=attempt,
                again=attempt < ATTEMPTS and waited < self.seconds,
                wait=waited < self.outage,
            )
            if answer is not None:
                return _scores(answer, self.address)
            time.sleep(pause)
            attempt, pause = attempt + 1, min(2.0 * pause, LONGEST_PAUSE)

    def _ask(self, body: bytes, *, attempt: int, again: bool, wait: bool) -> bytes | None:
        """The answer; None if it is worth another attempt: `again` after a failure, `wait` while nobody serves."""
        parts = urlsplit(self.address)
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=self.seconds)
        attempts = f"in {attempt} attempts" if attempt > 1 else "in one attempt"
        try:
            try:
                connection.connect()
            except OSError as error:
                if wait:
                    return None
                raise IndivisibleError(f"{self.address} cannot be reached {attempts}: {describe(error)}") from error
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read(LARGEST_ANSWER + 1)
        except TimeoutError as error:
            raise CallError(f"{self.address} did not answer within {self.seconds:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            if again:
                return None
            raise CallError(f"{self.address} broke off {attempts}: {describe(error)}") from error
        finally:
            connection.close()
        if response.status == http.client.OK:
            return answer
        if response.status in _NOT_SERVING:
            if wait:
                return None
        elif again and response.status >= 500 and response.status != 501:
            return None
        raise _refusal(self.address, response, answer, attempts)


def _refusal(address: str, response: http.client.HTTPResponse, answer: bytes, attempts: str) -> Exception:
    text = shorten(answer[:1000].decode(errors="replace"), 200)
    reason = f"{address} answered {response.status} {response.reason} {attempts}{': ' if text else ''}{text}"
    if 300 <= response.status < 400:
        return IndivisibleError(f"{reason}; redirections are not followed, give the address it names")
    return IndivisibleError(reason) if response.status in _FOR_NO_BATCH else CallError(reason)


def _scores(answer: bytes, address: str) -> list[float | None]:
    if len(answer) > LARGEST_ANSWER:
        raise CallError(f"{address} answered more than {LARGEST_ANSWER} bytes")
    try:
        document = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise CallError(f"{address} answered what is no JSON: {describe(error)}") from error
    scores = document["scores"] if isinstance(document, dict) and "scores" in document else None
    if not isinstance(scores, list):
        found = shorten(answer[:400].decode(errors="replace"), 100)
        raise CallError(f'{address} must answer {{"scores": [number or null, ...]}}, got {found}')
    return scores
