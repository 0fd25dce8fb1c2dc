"""The simulated player that measures underruns."""

import pytest

from light_tts.server.httpserver.listener import Listener


@pytest.mark.parametrize(
    ("pieces", "underruns", "silence"),
    [
        ([], 0, 0.0),
        ([(5.0, 1.0)], 0, 0.0),
        ([(5.0, 1.0), (5.9, 1.0), (6.9, 1.0)], 0, 0.0),
        ([(5.0, 1.0), (6.5, 1.0), (7.0, 1.0)], 1, 0.5),
        ([(5.0, 0.1), (5.3, 0.1), (5.6, 0.1)], 2, 0.4),
    ],
)
def test_a_player_that_starts_with_the_first_piece(pieces, underruns, silence):
    listener = Listener()
    for arrival, seconds in pieces:
        listener.hear(arrival, seconds)
    assert (listener.underruns, pytest.approx(listener.silence)) == (underruns, silence)
