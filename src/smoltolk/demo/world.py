"""A miniature world: seeded five-sentence stories, cloze items about them, and their word tokenizer.

In every story a person brings an object to a place and meets an animal. Two sentences tell what is so in this world:
what the animal says, what it eats, what is seen at the place. The last sentence tells the third such fact without
naming what it is about, so it can be predicted only by binding the earlier sentences to knowledge learnt from other
stories.
"""

import random
from collections import namedtuple
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from string import Formatter

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

Person = namedtuple("Person", "name they them their")  # the pronouns that continue the name
Animal = namedtuple("Animal", "name sound food")  # what its voice does, what it eats
Place = namedtuple("Place", "name seen")  # what is seen there
Filler = Person | Animal | Place | str

WOMEN = "anna emma lucy maria sarah julia nina clara alice helen rosa ruth lisa paula vera diana irene gloria"
MEN = "tom peter david george oliver simon jack henry martin paul victor felix adam oscar hugo leo bruno walter"
ANIMALS = (
    "dog barked bones, cat purred cream, cow mooed grass, horse neighed carrots, sheep bleated clover, "
    "pig grunted potatoes, duck quacked bread, lion roared meat, snake hissed eggs, owl hooted moths, "
    "mouse squeaked cheese, frog croaked flies"
)
PLACES = (
    "harbor boats, farm tractors, forest mushrooms, beach shells, library books, castle knights, "
    "school children, station trains, desert dunes, garden flowers"
)
PLAIN = {  # words that decide nothing
    "color": "red blue green black white brown gray pink yellow purple orange golden silver",
    "day": "monday tuesday wednesday thursday friday saturday sunday",
    "size": "small big young thin tall tiny gentle funny lazy clever quiet happy",
    "state": "new old heavy strong good cheap broken dusty",
    "object": "shovel knife pencil broom hammer spoon ladder phone basket lamp rope bucket pillow camera blanket jar",
    "time": "morning afternoon evening night",
    "weather": "sunny rainy windy cloudy cold stormy foggy warm",
}
# What fills each slot of the forms below.
CHOICES: dict[str, tuple[Filler, ...]] = {
    "person": (
        *(Person(name, "she", "her", "her") for name in WOMEN.split()),
        *(Person(name, "he", "him", "his") for name in MEN.split()),
    ),
    "animal": tuple(Animal(*entry.split()) for entry in ANIMALS.split(", ")),
    "place": tuple(Place(*entry.split()) for entry in PLACES.split(", ")),
    **{slot: tuple(words.split()) for slot, words in PLAIN.items()},
}
# The forms of the first two sentences.
BEGINNINGS = (
    (
        "one {time} {person.name} took {person.their} {state} {object} to the {place.name}.",
        "on {day} {person.name} went to the {place.name} with {person.their} {state} {object}.",
        "on a {weather} day {person.name} brought a {object} to the {place.name}.",
    ),
    (
        "at the {place.name} {person.they} met a {size} {color} {animal.name}.",
        "near the {place.name} a {color} {animal.name} looked at the {object}.",
        "{person.they} showed the {object} to a {size} {animal.name} there.",
    ),
)
# The forms of the next two sentences, by the fact they tell; they name what the fact is about.
TELLINGS = {
    "animal.sound": (
        "the {animal.name} {animal.sound} loudly at {person.name}.",
        "when {person.they} came near the {animal.name} {animal.sound} twice.",
    ),
    "animal.food": (
        "{person.they} gave the {animal.name} some {animal.food} to eat.",
        "the {animal.name} was hungry and ate some {animal.food}.",
    ),
    "place.seen": (
        "the {animal.name} ran to the {place.seen} at the {place.name}.",
        "at the {place.name} there were many {place.seen}.",
    ),
}
# The forms of the last sentence, by the fact it tells; they don't, so that the context must be understood.
ENDINGS = {
    "animal.sound": (
        "then it turned to {person.name} and {animal.sound} loudly.",
        "all at once it {animal.sound} and made {person.them} laugh.",
    ),
    "animal.food": (
        "soon it got hungry and ate some {animal.food}.",
        "later {person.they} gave it some {animal.food} for dinner.",
    ),
    "place.seen": (
        "from here {person.they} could see many different {place.seen}.",
        "everywhere around were {place.seen} to look at.",
    ),
}
HELD_OUT_DIVISOR = 8  # one (animal, place) pair in so many never occurs in training
CLOZE_KINDS = ("story", "topic")
END_TOKEN, UNKNOWN_TOKEN = "<end>", "<unk>"


@dataclass(frozen=True)
class Story:
    """One story: what fills the slots, and the five forms that tell it."""

    choices: dict[str, Filler]
    forms: tuple[str, ...]
    ending_fact: str  # the key of ENDINGS that the last sentence tells

    @property
    def sentences(self) -> tuple[str, ...]:
        """The five sentences, lowercase, each closed by a full stop."""
        return tuple(form.format(**self.choices) for form in self.forms)

    @property
    def context(self) -> str:
        """All sentences but the last."""
        return " ".join(self.sentences[:-1])

    @property
    def ending(self) -> str:
        """The last sentence."""
        return self.sentences[-1]

    @property
    def text(self) -> str:
        """The whole story."""
        return " ".join(self.sentences)


@dataclass(frozen=True)
class ClozeItem:
    """A context with its true and a false ending; the other item of the couple has the two exchanged."""

    id: str
    couple: str
    kind: str
    context: str
    true_ending: str
    false_ending: str

    @property
    def text(self) -> str:
        """The true story, as `Story.text`."""
        return f"{self.context} {self.true_ending}"


class World:
    """The world's stories and questions, each list a pure function of the world's seed and its own.

    Args:
        seed: decides which (animal, place) pairs are held out of training.
        share: of the options for each slot: a smaller world has fewer words and facts.

    Raises:
        ValueError: the share is not in (0, 1].
    """

    def __init__(self, seed: int = 0, *, share: float = 1.0):
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}: give more than 0 and at most 1")
        self.seed = seed
        sizes = {slot: max(2, int(share * len(options))) for slot, options in CHOICES.items()}
        self.choices = {
            slot: tuple(options[i * len(options) // sizes[slot]] for i in range(sizes[slot]))
            for slot, options in CHOICES.items()
        }
        pairs = [(animal, place) for animal in self.choices["animal"] for place in self.choices["place"]]
        rng = random.Random(f"{seed} held out")
        self.held_out_pairs = frozenset(rng.sample(pairs, len(pairs) // HELD_OUT_DIVISOR))

    def story(self, rng: random.Random) -> Story:
        """Draws one story from the whole world, held-out pairs included."""
        first_fact, second_fact, ending_fact = rng.sample(sorted(ENDINGS), 3)
        form_sets = (*BEGINNINGS, TELLINGS[first_fact], TELLINGS[second_fact], ENDINGS[ending_fact])
        return Story(
            choices={slot: rng.choice(options) for slot, options in self.choices.items()},
            forms=tuple(rng.choice(forms) for forms in form_sets),
            ending_fact=ending_fact,
        )

    def stories(self, seed: int, count: int) -> list[Story]:
        """Draws `count` training stories, without the held-out pairs."""
        rng = random.Random(f"{self.seed} stories {seed}")
        drawn: list[Story] = []
        while len(drawn) < count:
            story = self.story(rng)
            if (story.choices["animal"], story.choices["place"]) not in self.held_out_pairs:
                drawn.append(story)
        return drawn

    def cloze_items(self, seed: int, kind: str, couples: int, avoid: Collection[str] = frozenset()) -> list[ClozeItem]:
        """Draws mirrored couples of cloze items: two contexts that share two endings crosswise.

        Whoever ignores the context prefers the same ending in both items and is right in exactly one of them.
        In a "story" couple the two stories differ in the animal or place that the ending follows from,
        and the endings in one word. In a "topic" couple they share none of person, animal, place, object.

        Args:
            seed: Seed of the set.
            kind: "story" or "topic".
            couples: Number of couples; the list holds twice as many items.
            avoid: Texts of whole stories (of training, or of another set) that must not occur; best a set.

        Returns:
            Items in the order of their couples. No true story occurs twice.

        Raises:
            ValueError: If `kind` is neither "story" nor "topic".
        """
        if kind not in CLOZE_KINDS:
            raise ValueError(f"kind is {kind!r}; use one of {', '.join(CLOZE_KINDS)}")
        rng = random.Random(f"{self.seed} {kind} {seed}")
        items: list[ClozeItem] = []
        taken: set[str] = set()
        while len(items) < 2 * couples:
            first = self.story(rng)
            second = self._changed(first, rng) if kind == "story" else self._unrelated(first, rng)
            texts = {first.text, second.text}
            if not texts.isdisjoint(taken) or any(text in avoid for text in texts):
                continue
            taken |= texts
            couple = f"{kind}-{seed}-{len(items) // 2:04d}"
            for side, true, false in (("a", first, second), ("b", second, first)):
                items.append(ClozeItem(f"{couple}-{side}", couple, kind, true.context, true.ending, false.ending))
        return items

    def _changed(self, story: Story, rng: random.Random) -> Story:
        """Returns the same story with another animal or place: the one its ending follows from."""
        slot = story.ending_fact.split(".")[0]
        others = [option for option in self.choices[slot] if option != story.choices[slot]]
        return replace(story, choices={**story.choices, slot: rng.choice(others)})

    def _unrelated(self, story: Story, rng: random.Random) -> Story:
        """Returns a story with another person, animal, place and object."""
        deciding = ("person", "animal", "place", "object")
        other = self.story(rng)
        while any(other.choices[slot] == story.choices[slot] for slot in deciding):
            other = self.story(rng)
        return other

    def vocabulary(self) -> list[str]:
        """Returns every word that a story can hold, sorted, without the full stop."""
        forms = [form for forms in (*BEGINNINGS, *TELLINGS.values(), *ENDINGS.values()) for form in forms]
        literals = [text.replace(".", " ") for form in forms for text, *_ in Formatter().parse(form)]
        options = [option for options in self.choices.values() for option in options]
        chosen = [word for option in options for word in ((option,) if isinstance(option, str) else option)]
        return sorted({word for text in (*literals, *chosen) for word in text.split()})


def build_text_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with one token a word and one for the full stop.

    Ids: `<end>` (end of text) 0, `<unk>` 1, "." 2, then the words in their order. No special token is added
    to an encoded text. Decoding parts words by single spaces and attaches the full stop.

    Args:
        words: Words without spaces and punctuation; a repeated word counts once.
    """
    tokens = dict.fromkeys((END_TOKEN, UNKNOWN_TOKEN, ".", *words))
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # parts at spaces and around punctuation
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # joins with spaces, none before a full stop
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_TOKEN, unk_token=UNKNOWN_TOKEN)
