"""Which request is struck by which fault: as scripted, by a seed, or as a function decides."""

from __future__ import annotations

import http.client
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.conftest import Proxied
from tests.support.fault_proxy import ProxyRequest, scripted, seeded
from tests.support.faults import Fault, FaultKind
from tests.support.object_server import ObjectServer
from tests.support.plain_client import (
    CONFIG_PATH,
    MODEL,
    RANGE,
    ask,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def test_a_script_is_followed_in_its_order(proxied: Proxied) -> None:
    busy, slow = Fault(FaultKind.STATUS), Fault(FaultKind.SLOW_DOWN)
    expired = Fault(FaultKind.EXPIRED)
    rules = [("*.json", busy, 2, 1), ("*.json", slow, 1, 0), ("HEAD /models/*", expired, None, 0)]
    proxy = proxied(scripted(rules))

    answers = [ask(proxy, CONFIG_PATH).status for _ in range(5)]
    assert ask(proxy).status == 200
    assert [ask(proxy, method="HEAD").status for _ in range(2)] == [403, 403]
    assert answers == [200, 503, 503, 503, 200]
    assert [record.fault for record in proxy.requests] == [
        *(None, busy, busy, slow, None, None),
        *(expired, expired),
    ]


def test_a_decision_sees_the_request_and_its_numbers(proxied: Proxied) -> None:
    seen: list[ProxyRequest] = []
    proxy = proxied(seen.append)
    ask(proxy, headers=RANGE)
    ask(proxy, f"{CONFIG_PATH}?versionId=3")
    ask(proxy, headers={"range": "bytes=-7"})

    assert [(request.number, request.number_of_path) for request in seen] == [
        (1, 1),
        (2, 1),
        (3, 2),
    ]
    assert [(request.range, request.range_length) for request in seen] == [
        ("bytes=1000-1999", 1000),
        (None, None),
        ("bytes=-7", 7),
    ]
    assert (seen[1].path, seen[1].query) == (CONFIG_PATH, "versionId=3")
    assert seen[0].headers["host"] == f"127.0.0.1:{proxy.port}"


def request_of(part: int, bucket: str = "models") -> ProxyRequest:
    headers = {"range": f"bytes={part * 1000}-{part * 1000 + 999}"}
    return ProxyRequest("GET", f"/{bucket}/unet", "", headers, 0, 0)


def test_seeded_faults_do_not_depend_on_the_order_of_requests() -> None:
    def faults(seed: int, parts: list[int], bucket: str) -> dict[int, Fault | None]:
        decide = seeded(seed, 0.3, list(FaultKind))
        return {part: decide(request_of(part, bucket)) for part in parts}

    parts = list(range(400))
    expected = faults(1, parts, "models")
    struck = [fault for fault in expected.values() if fault]
    assert faults(1, parts[::-1], "other-bucket") == expected
    assert faults(2, parts, "models") != expected
    assert 60 < len(struck) < 180
    assert all(0 <= fault.at < 1000 for fault in struck)
    assert len({fault.kind for fault in struck}) > 10


def test_seeded_faults_can_be_bounded_so_that_asking_again_helps() -> None:
    decide = seeded(1, 1.0, [FaultKind.FLIP], at_most=2, pattern="GET *")

    with ThreadPoolExecutor(8) as threads:
        faults = list(threads.map(decide, [request_of(3)] * 50))
    assert sum(fault is not None for fault in faults) == 2
    assert decide(ProxyRequest("PUT", "/models/unet", "", {}, 1, 1)) is None


def test_a_mix_of_faults_leaves_every_other_answer_whole(
    server: ObjectServer, proxied: Proxied
) -> None:
    kinds = [FaultKind.FLIP, FaultKind.STATUS, FaultKind.RESET, FaultKind.TRUNCATE, FaultKind.STALE]
    proxy = proxied(seeded(5, 0.4, kinds))

    def read(part: int) -> bool:
        headers = {"Range": f"bytes={part * 1000}-{part * 1000 + 999}"}
        try:
            answer = ask(proxy, headers=headers)
        except (OSError, http.client.HTTPException):
            return False
        return answer.body == MODEL[part * 1000 : part * 1000 + 1000]

    with ThreadPoolExecutor(8) as threads:
        whole = list(threads.map(read, range(200)))
    assert sum(whole) == sum(record.fault is None for record in proxy.requests)
    assert 0 < sum(whole) < 200
