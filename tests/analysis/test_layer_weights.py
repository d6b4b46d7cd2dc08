"""Layer weights, averaged."""

import numpy as np
import torch
from tests.conftest import mixed_ids, tiny_model

from smoltolk.analysis.layer_weights import layer_weights, since_switch


def test_the_distance_counts_from_the_last_switch():
    assert since_switch(np.array([[1, 9, 1, 1, 9, 9, 1]]), 9).tolist() == [[-1, 0, 1, 2, 0, 0, 1]]


def test_weights_are_means_over_positions_that_predict_speech(model):
    ids = mixed_ids(ids=model.ids, batch=4)
    found = layer_weights(model, [ids[:2], ids[2:]])
    with torch.no_grad():
        weights = model(ids).layer_weights[:, :-1]
    is_speech = ids[:, 1:] >= model.ids.speech_offset
    np.testing.assert_allclose(found.speech, weights[is_speech].mean(0), atol=1e-5)
    assert found.num_positions == int(is_speech.sum())
    unit = int(ids[0, 1:][is_speech[0]][0]) - model.ids.speech_offset
    chosen = ids[:, 1:] == unit + model.ids.speech_offset
    np.testing.assert_allclose(found.by_unit[unit], weights[chosen].mean(0), atol=1e-5)
    np.testing.assert_allclose(np.nansum(found.after_switch, 1)[0], 1, atol=1e-5)


def test_early_fusion_reads_the_last_level_alone():
    model = tiny_model(layer_mixing="last")
    assert layer_weights(model, [mixed_ids(ids=model.ids)]).speech.tolist() == [0, 0, 1]
