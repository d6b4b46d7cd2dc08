"""The miniature world: its stories, its cloze items and its text tokenizer."""

import re
from collections import Counter, defaultdict
from statistics import mean

import pytest

from smoltolk.demo.world import CHOICES, CLOZE_KINDS, ENDINGS, ClozeItem, World, build_text_tokenizer

WORLD = World(seed=0)
STORIES = WORLD.stories(seed=0, count=3000)
TRAINING_TEXTS = frozenset(story.text for story in STORIES)


def _words(text: str) -> list[str]:
    return text.replace(".", " ").split()


def _couples(items: list[ClozeItem]) -> list[list[ClozeItem]]:
    couples = defaultdict(list)
    for item in items:
        couples[item.couple].append(item)
    return list(couples.values())


def test_equal_seeds_give_equal_stories_and_other_seeds_others():
    assert World(seed=0).stories(seed=0, count=50) == STORIES[:50]
    assert WORLD.stories(seed=1, count=50) != STORIES[:50]
    assert World(seed=1).stories(seed=0, count=50) != STORIES[:50]


def test_a_story_has_five_plain_sentences_of_about_forty_four_words():
    for story in STORIES:
        assert len(story.sentences) == 5
        assert all(re.fullmatch(r"[a-z]+( [a-z]+)*\.", sentence) for sentence in story.sentences)
    assert 42 <= mean(len(_words(story.text)) for story in STORIES) <= 45


def test_the_vocabulary_is_exactly_the_words_of_the_stories():
    vocabulary = WORLD.vocabulary()
    assert 215 <= len(vocabulary) <= 270
    assert vocabulary == sorted({word for text in TRAINING_TEXTS for word in _words(text)})


def test_every_fact_has_a_word_of_its_own():
    named = [word for slot in ("animal", "place") for entry in CHOICES[slot] for word in entry]
    assert len(named) == len(set(named))


def test_every_fact_ends_stories_equally_often():
    counts = Counter(story.ending_fact for story in STORIES)
    assert counts.keys() == ENDINGS.keys()
    assert min(counts.values()) > 0.2 * len(STORIES)


def test_the_ending_never_repeats_a_deciding_word_of_the_context():
    for story in STORIES:
        slot, field = story.ending_fact.split(".")
        answer = getattr(story.choices[slot], field)
        assert answer in _words(story.ending)
        assert answer not in _words(story.context)
        assert story.choices[slot].name in _words(story.context)


@pytest.mark.parametrize("seed", range(3))
def test_one_eighth_of_the_animal_place_pairs_never_occurs_in_training(seed):
    world = World(seed=seed)
    stories = world.stories(seed=0, count=6000)
    pairs = {(story.choices["animal"], story.choices["place"]) for story in stories}
    all_pairs = {(animal, place) for animal in CHOICES["animal"] for place in CHOICES["place"]}
    assert len(world.held_out_pairs) == len(all_pairs) // 8
    assert pairs == all_pairs - world.held_out_pairs
    for index, slot in enumerate(("animal", "place")):
        assert {pair[index] for pair in pairs} == set(CHOICES[slot])


def test_held_out_pairs_do_occur_in_cloze_items():
    contexts = [_words(item.context) for item in WORLD.cloze_items(seed=1, kind="story", couples=200)]
    assert any(
        animal.name in context and place.name in context
        for context in contexts
        for animal, place in WORLD.held_out_pairs
    )


@pytest.mark.parametrize("kind", CLOZE_KINDS)
def test_a_couple_shares_both_endings_crosswise(kind):
    items = WORLD.cloze_items(seed=1, kind=kind, couples=100)
    assert len(items) == 200
    assert len({item.id for item in items}) == 200
    for first, second in _couples(items):
        assert first.kind == second.kind == kind
        assert first.context != second.context
        assert first.true_ending == second.false_ending
        assert first.false_ending == second.true_ending
        assert first.true_ending != first.false_ending


@pytest.mark.parametrize("kind", CLOZE_KINDS)
@pytest.mark.parametrize("score", [hash, str, lambda ending: (len(ending), ending)])
def test_a_scorer_that_ignores_the_context_gets_exactly_half(kind, score):
    items = WORLD.cloze_items(seed=2, kind=kind, couples=100)
    assert sum(score(item.true_ending) > score(item.false_ending) for item in items) == 100


def test_the_endings_of_a_story_item_differ_in_one_word():
    for item in WORLD.cloze_items(seed=1, kind="story", couples=200):
        true_words, false_words = _words(item.true_ending), _words(item.false_ending)
        assert len(true_words) == len(false_words)
        assert sum(true != false for true, false in zip(true_words, false_words, strict=True)) == 1


def test_the_true_ending_follows_from_the_world_and_the_false_one_does_not():
    facts = {word: entry.name for slot in ("animal", "place") for entry in CHOICES[slot] for word in entry[1:]}
    for kind in CLOZE_KINDS:
        for item in WORLD.cloze_items(seed=3, kind=kind, couples=100):
            (true_cause,) = [facts[word] for word in _words(item.true_ending) if word in facts]
            (false_cause,) = [facts[word] for word in _words(item.false_ending) if word in facts]
            assert true_cause in _words(item.context)
            assert false_cause not in _words(item.context)


@pytest.mark.parametrize("kind", CLOZE_KINDS)
def test_development_fresh_and_training_stories_do_not_overlap(kind):
    development = WORLD.cloze_items(seed=1, kind=kind, couples=200, avoid=TRAINING_TEXTS)
    seen = TRAINING_TEXTS | {item.text for item in development}
    fresh = WORLD.cloze_items(seed=2, kind=kind, couples=200, avoid=seen)
    assert len({item.text for item in (*development, *fresh)}) == len(development) + len(fresh)
    assert TRAINING_TEXTS.isdisjoint(item.text for item in (*development, *fresh))


def test_a_story_to_avoid_is_left_out():
    first, second, *rest = WORLD.cloze_items(seed=1, kind="story", couples=5)
    redrawn = WORLD.cloze_items(seed=1, kind="story", couples=4, avoid={second.text})
    assert [item.text for item in redrawn] == [item.text for item in rest]
    assert first.text not in {item.text for item in redrawn}


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind is 'color'; use one of story, topic"):
        WORLD.cloze_items(seed=1, kind="color", couples=1)


def test_the_tokenizer_gives_every_story_back_exactly():
    tokenizer = build_text_tokenizer(WORLD.vocabulary())
    for story in STORIES:
        ids = tokenizer(story.text).input_ids
        assert len(ids) == len(_words(story.text)) + 5
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == story.text


def test_the_tokenizer_has_the_full_stop_and_the_end_as_tokens_of_their_own(tmp_path):
    build_text_tokenizer(["fox", "ran", "the", "fox"]).save_pretrained(tmp_path)
    tokenizer = build_text_tokenizer([]).from_pretrained(tmp_path)
    assert len(tokenizer) == 6
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<end>", 0)
    assert tokenizer.tokenize("the fox.") == ["the", "fox", "."]
    assert tokenizer("the cat ran.").input_ids == [5, tokenizer.unk_token_id, 4, 2]
    assert tokenizer.decode([5, 3, 2, 0], skip_special_tokens=True) == "the fox."
