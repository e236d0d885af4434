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
_OVERLOADED: Final = 429
_FOR_NO_BATCH: Final = frozenset({401, 403, 404, 405, 407, 410, 501})


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

    null is "not applicable". What is no connection, an answer 429 or 5xx is asked again, up to four times with
    growing pauses; redirections are not followed and proxies not used. No column may hold what JSON cannot.

    Attributes:
        address: http or https.
        seconds: for all attempts together.
        pause: seconds before the second attempt; twice that before each further one.
    """

    address: str
    seconds: float
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
        end = time.monotonic() + self.seconds
        for attempt in range(1, ATTEMPTS + 1):
            pause = self.pause * 2 ** (attempt - 1)
            last = attempt == ATTEMPTS or time.monotonic() + pause >= end
            answer = self._ask(body, end, last=last, attempt=attempt)
            if answer is not None:
                return _scores(answer, self.address)
            time.sleep(pause)
        raise AssertionError("the last attempt answers or raises")

    def _ask(self, body: bytes, end: float, *, last: bool, attempt: int) -> bytes | None:
        """The answer; None if it is worth another attempt."""
        parts = urlsplit(self.address)
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=max(0.01, end - time.monotonic()))
        attempts = f"in {attempt} attempts" if attempt > 1 else "in one attempt"
        try:
            try:
                connection.connect()
            except OSError as error:
                if not last:
                    return None
                raise IndivisibleError(f"{self.address} cannot be reached {attempts}: {describe(error)}") from error
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = response.read(LARGEST_ANSWER + 1)
        except TimeoutError as error:
            raise CallError(f"{self.address} did not answer within {self.seconds:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            if not last:
                return None
            raise CallError(f"{self.address} broke off {attempts}: {describe(error)}") from error
        finally:
            connection.close()
        if response.status == http.client.OK:
            return answer
        if not last and (response.status == _OVERLOADED or response.status >= 500) and response.status != 501:
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
