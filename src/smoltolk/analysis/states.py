"""The levels of a model's backbone over the same words, spoken and written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from smoltolk.analysis.pieces import Piece, WordEnds
from smoltolk.model.modeling_smoltolk import SmolTolkForCausalLM


@dataclass(frozen=True, eq=False)
class States:
    """The levels h⁰ … h^L in one modality, in float32.

    Args:
        pooled: mean over the tokens of each piece (levels, pieces, dim).
        at_words: at the last token of each of the chosen words (levels, words, dim).
    """

    pooled: np.ndarray
    at_words: np.ndarray


@torch.no_grad()
def read_states(
    model: SmolTolkForCausalLM,
    pieces: Sequence[Piece],
    words: WordEnds,
    *,
    is_speech: bool,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
) -> States:
    """Runs a model over pieces in one modality.

    As in training, a piece follows the end of another utterance: the modality's end token stands before it. It is
    not part of the mean, so what models do at the very first token plays no part.

    Args:
        model: the model.
        pieces: what it reads.
        words: the places to keep.
        is_speech: whether it reads the units, else the text tokens.
        batch_size: pieces in one forward.
        progress: called with the number of pieces done since the last call.

    Raises:
        ValueError: a piece is too long for the backbone, or a level is not finite.
    """
    model.eval()
    ids = model.ids
    rows = [_row(piece, ids.end_id(is_speech), ids.speech_offset, is_speech) for piece in pieces]
    longest = int(np.argmax([len(row) for row in rows]))
    if len(rows[longest]) > model.config.max_position_embeddings:
        raise ValueError(
            f"utterance {pieces[longest].utterance!r} has {len(rows[longest])} tokens as "
            f"{'speech' if is_speech else 'text'}, more than the backbone's max_position_embeddings of "
            f"{model.config.max_position_embeddings}: cut utterances with words_per_piece"
        )
    num_levels = model.config.lm_config.num_hidden_layers + 1
    pooled = np.zeros((num_levels, len(pieces), model.config.hidden_size), dtype=np.float32)
    at_words = np.zeros((num_levels, len(words.piece), model.config.hidden_size), dtype=np.float32)
    order = np.argsort([len(row) for row in rows], kind="stable")
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids = torch.zeros(len(chosen), max(len(rows[i]) for i in chosen), dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for place, i in enumerate(chosen):
            input_ids[place, : len(rows[i])] = torch.from_numpy(rows[i])
            mask[place, : len(rows[i])] = 1
        output = model(
            input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            output_hidden_states=True,
            return_logits=False,
        )
        is_inside = mask.bool()
        is_inside[:, 0] = False  # the end token before the piece
        inside = is_inside.to(model.device)[..., None]
        kept = np.flatnonzero(np.isin(words.piece, chosen))
        place_of = {int(i): place for place, i in enumerate(chosen)}
        place_of_word = torch.tensor([place_of[int(i)] for i in words.piece[kept]], dtype=torch.long)
        last = torch.tensor([_ends(pieces[words.piece[n]], is_speech)[words.word[n]] for n in kept], dtype=torch.long)
        for level, hidden in enumerate(output.hidden_states):
            means = hidden.float().masked_fill(~inside, 0).sum(1) / inside.sum(1)
            pooled[level, chosen] = means.cpu().numpy()
            at_words[level, kept] = hidden[place_of_word, last].float().cpu().numpy()
            _check_finite(pooled[level, chosen], [pieces[i].utterance for i in chosen], level)
        if progress is not None:
            progress(len(chosen))
    return States(pooled, at_words)


def _row(piece: Piece, end_id: int, speech_offset: int, is_speech: bool) -> np.ndarray:
    return np.append(end_id, piece.units + speech_offset if is_speech else piece.text_ids)


def _ends(piece: Piece, is_speech: bool) -> np.ndarray:
    """Place of the last token of each word in a row, whose first token is the end of another utterance."""
    return piece.unit_ends if is_speech else piece.text_ends


def _check_finite(pooled: np.ndarray, utterances: list[str], level: int) -> None:
    is_finite = np.isfinite(pooled).all(1)
    if not is_finite.all():
        raise ValueError(
            f"level {level} is not finite for utterance {utterances[int(np.argmin(is_finite))]!r}: the model has "
            f"diverged or is damaged; take an earlier checkpoint of it"
        )
