"""Times of words by the teacher's durations, which those of the checkpoint are compared with."""

import numpy as np

from training.corpus.corpus import LATE
from training.corpus.teacher import Speech
from training.lm.word_times import spans_of_words


def test_a_word_begins_with_its_first_phoneme_and_ends_with_its_last():
    durations = np.array([0.5, 0.1, 0.2, 0.3, 0.4, 0.6])  # silence, a, b, blank, c, silence
    speech = Speech(np.zeros(1, np.float32), durations, np.zeros(1, np.float32))
    expected = np.array([[0.5, 0.8], [1.1, 1.5]]) - LATE
    np.testing.assert_allclose(spans_of_words("ab c", speech), expected)
