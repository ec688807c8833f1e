"""What is left when recording a graph fails, on any machine: the card's part of torch is played by a stand-in."""

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from diffusion.graphs import Batch, Graphs, one_records_or_loads
from diffusion.text_graphs import TextGraphs


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        assert other is not self


class Recorded:
    def pool(self) -> object:
        return self

    def replay(self) -> None:
        pass


class Card:
    """Streams and captures as torch has them: a capture that ends badly never leaves its stream."""

    def __init__(self) -> None:
        self.home = self.current = Stream()
        self.pools: list[object] = []
        self.capturing = False

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph(self, graph: Recorded, *, pool: object, capture_error_mode: str) -> "Capture":
        self.pools.append(pool)
        return Capture(self)


class Capture:
    def __init__(self, card: Card) -> None:
        self.card = card
        self.before = card.current

    def __enter__(self) -> None:
        self.card.current = Stream()
        self.card.capturing = True

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.card.capturing = False
        if kind is not None:
            # What began it is only its context.
            raise RuntimeError("operation failed due to a previous error during capture")
        self.card.current = self.before


class Pass:
    """A denoiser's, which fails inside a capture while it is told to."""

    def __init__(self, card: Card) -> None:
        self.card = card
        self.failure: Exception | None = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        result = batch["sample"] + 1
        if self.card.capturing and self.failure is not None:
            raise self.failure
        return result


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: card.current)
    monkeypatch.setattr(torch.cuda, "set_stream", card.set_stream)
    monkeypatch.setattr(torch.cuda, "stream", card.stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _=None: Stream())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", card.graph)
    return card


def batch(side: int = 4) -> dict[str, torch.Tensor]:
    return {"sample": torch.zeros(1, 4, side, side)}


def record(graphs: Graphs, predict: Pass, owner: object, side: int = 4) -> None:
    with graphs.recording():
        found = graphs.run(owner, predict, batch(side), kind="pass")
    assert torch.equal(found, batch(side)["sample"] + 1)


def test_graphs_read_inputs_of_one_shape_from_one_place(card):
    read: list[int] = []
    graphs, prompt = Graphs(torch.device("cuda")), torch.zeros(1, 77, 1000)

    def predict(batch: Batch) -> torch.Tensor:
        if card.capturing:
            read.append(batch["prompt"].data_ptr())
        return batch["sample"] + batch["prompt"].sum()

    with graphs.recording():
        for side in (4, 6, 8):
            graphs.run(card, predict, {**batch(side), "prompt": prompt}, kind="pass")

    assert len(graphs) == len(read) == 3
    assert len(set(read)) == 1
    assert read[0] != prompt.data_ptr()

    place = weakref.ref(next(iter(graphs._places.values())))
    graphs.forget()
    assert place() is None


@pytest.mark.parametrize(
    "failure", [RuntimeError("not permitted"), torch.OutOfMemoryError("full"), ValueError("no")]
)
def test_a_capture_that_fails_leaves_the_stream_as_it_was(card, failure):
    graphs, predict = Graphs(torch.device("cuda")), Pass(card)
    predict.failure = failure

    record(graphs, predict, owner=card)

    assert card.current is card.home
    assert len(graphs) == 0


def test_running_out_of_memory_inside_a_capture_leaves_other_sizes_theirs(card, caplog):
    graphs, predict = Graphs(torch.device("cuda")), Pass(card)
    predict.failure = torch.OutOfMemoryError("full")

    with caplog.at_level(logging.INFO, logger="diffusion"):
        record(graphs, predict, owner=card)
    predict.failure = None
    record(graphs, predict, owner=card, side=2)

    assert [record.getMessage() for record in caplog.records] == [
        "No memory for a CUDA graph of a step of 1x4x4x4: that size runs without."
    ]
    assert len(graphs) == 1


def test_any_other_failure_ends_graphs_with_one_line(card, caplog):
    graphs, predict = Graphs(torch.device("cuda")), Pass(card)
    record(graphs, predict, owner=card, side=2)
    predict.failure = ValueError("a scalar was asked for")

    record(graphs, predict, owner=card)
    record(graphs, predict, owner=card)

    (line,) = caplog.records
    assert "CUDA graphs are off" in line.getMessage()
    assert len(graphs) == 0


def test_a_recording_waits_for_compiled_code_that_is_being_loaded(card):
    graphs, predict = Graphs(torch.device("cuda")), Pass(card)
    recording = threading.Thread(target=record, args=(graphs, predict, card), daemon=True)

    with one_records_or_loads:
        recording.start()
        recording.join(0.1)
        assert recording.is_alive()
        assert len(graphs) == 0
    recording.join(60)

    assert len(graphs) == 1
    assert not one_records_or_loads.locked()


def test_a_prompt_does_not_wait_for_that_and_the_next_one_gets_its_graph(card):
    graphs, predict = Graphs(torch.device("cuda")), Pass(card)

    def encode() -> None:
        with graphs.recording(waits=False):
            graphs.run(card, predict, batch(), kind="prompt")

    with one_records_or_loads:
        encode()
        assert len(graphs) == 0
    encode()

    assert len(graphs) == 1


def test_what_a_failed_recording_held_is_gone_when_the_card_s_memory_is_given_back(
    card, monkeypatch
):
    graphs = Graphs(torch.device("cuda"))
    held: list[int] = []
    alive: set[object] = set()

    class Buffer:
        def __init__(self) -> None:
            alive.add(id(self))

        def __del__(self) -> None:
            alive.discard(id(self))

    def predict(inputs: Batch) -> torch.Tensor:
        buffer = Buffer()
        if card.capturing:
            raise torch.OutOfMemoryError("full")
        del buffer
        return inputs["sample"] + 1

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append(len(alive)))
    with graphs.recording():
        graphs.run(card, predict, batch(), kind="pass")

    assert held == [0]


@pytest.mark.parametrize("forget", [True, False])
def test_graphs_of_another_denoiser_get_memory_of_their_own(card, forget):
    graphs, predict = Graphs(torch.device("cuda")), Pass(card)
    old, new = object(), object()
    record(graphs, predict, owner=old)
    record(graphs, predict, owner=old, side=2)

    if forget:
        graphs.forget()
        assert len(graphs) == 0
    record(graphs, predict, owner=new)

    first, second, third = card.pools
    assert first is None
    assert isinstance(second, Recorded)
    assert third is None
    assert len(graphs) == 1


class Encoder(nn.Module):
    """A text encoder that says it lies on a card."""

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        yield SimpleNamespace(device=torch.device("cuda"))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids + 1


def test_an_encoder_is_stood_before_once_also_while_it_has_no_graph_and_as_long_as_it_is_there():
    graphs, encoder, other = TextGraphs(torch.device("cuda")), Encoder(), Encoder()
    graphs.cover([encoder])
    before = encoder.__dict__["forward"]

    graphs.cover([encoder, other])
    assert encoder.__dict__["forward"] is before
    # Ids that lie elsewhere are none of a card's.
    assert torch.equal(encoder(torch.zeros(1, 3)), torch.ones(1, 3))

    graphs.cover([other])
    assert "forward" not in encoder.__dict__
    assert "forward" in other.__dict__


def test_an_encoder_that_is_gone_is_not_kept_by_its_graphs():
    graphs, encoder = TextGraphs(torch.device("cuda")), Encoder()
    graphs.cover([encoder])
    gone = weakref.ref(encoder)

    graphs.cover([])
    del encoder

    assert gone() is None
