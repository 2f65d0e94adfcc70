"""A client of a running viewer, and statistics by brute force."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

import numpy as np

SPOTS = 300


@dataclass
class Client:
    """Asks a running viewer."""

    address: str  # with the token

    @property
    def base(self) -> str:
        parts = urlsplit(self.address)
        return f"{parts.scheme}://{parts.netloc}"

    @property
    def token(self) -> str:
        return parse_qs(urlsplit(self.address).query)["token"][0]

    def ask(self, path, method="GET", body=None, headers=None):
        """Status, headers and body."""
        given = {"Authorization": f"Bearer {self.token}"} if headers is None else headers
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def json(self, path, **how):
        status, _, body = self.ask(path, **how)
        return status, json.loads(body)

    def floats(self, path) -> np.ndarray:
        status, _, body = self.ask(path)
        assert status == 200, body
        return np.frombuffer(body, "<f4")


def brute_force(values, inside, against):
    """Means, difference and effect in float64."""
    a, b = values[inside].astype(np.float64), values[against].astype(np.float64)
    difference = a.mean(0) - b.mean(0)
    squares = ((a - a.mean(0)) ** 2).sum(0) + ((b - b.mean(0)) ** 2).sum(0)
    return a.mean(0), b.mean(0), difference, difference / np.sqrt(squares / (len(a) + len(b) - 2))
