"""Ordinary English sentences for measurements on synthetic speech, drawn by seed."""

import random
from collections.abc import Iterator

FORMS = (
    "The {size} {thing} on the {furniture} belongs to my {relative}.",
    "When the {weather} came, we {moved} back to the {building} and waited.",
    "I have never {seen} such a {quality} {thing} before, said the {worker}.",
    "Please bring the {thing}, the {food} and some {drink} to the {building}.",
    "Her {relative} {liked} to read {number} pages of the {document} every {time}.",
    "There were {number} {animals} in the {landscape}, but nobody {heard} them.",
    "Although the {worker} was {feeling}, he {finished} the {document} before the {time}.",
    "Could you tell me where the {building} is, and how long it takes to get there?",
    "In the {time} the {animals} of the {landscape} are usually {feeling}.",
    "What would happen if the {worker} {lost} the only {thing} we had?",
    "They {moved} slowly through the {landscape} because the {weather} was so {quality}.",
    "She thought that {number} of the {animals} looked {feeling} and {quality}.",
    "My {relative} asked the {worker} for a {size} piece of {food}.",
    "Nothing in this {document} explains why the {thing} was {lost} so early.",
    "It was {number} minutes past {number} when the {relative} finally {finished}.",
    "After the {time} we {heard} a {quality} noise from behind the {furniture}.",
    "Do not leave your {thing} near the {furniture} if the {animals} are around.",
    "Every {worker} in the {building} knows that the {weather} will be {quality}.",
    "He gave us {food} with {drink}, and then we {moved} over to the {landscape}.",
    "Because of the {weather}, the {document} about the {landscape} was never {seen} again.",
)
WORDS = {
    "size": "small large tiny heavy narrow enormous wide short",
    "thing": "lamp hammer suitcase bicycle umbrella camera blanket mirror violin telephone engine basket",
    "furniture": "table shelf kitchen cupboard sofa desk staircase window",
    "relative": "brother grandmother cousin uncle daughter neighbor father sister",
    "weather": "thunder snow rain fog storm sunshine winter wind",
    "moved": "walked hurried drove returned wandered climbed",
    "building": "station hospital museum library theater church factory harbor",
    "seen": "noticed found imagined described bought considered",
    "quality": "strange beautiful terrible useful dangerous cheap ordinary wonderful",
    "worker": "teacher carpenter doctor captain farmer lawyer engineer gardener",
    "food": "bread cheese chicken soup chocolate honey potatoes pepper",
    "drink": "water coffee lemonade milk tea juice",
    "liked": "wanted preferred loved used hoped decided",
    "number": "two three seven eleven twenty forty eight thirteen",
    "document": "letter newspaper contract chapter report recipe journal",
    "time": "morning evening weekend summer holiday afternoon night",
    "animals": "horses rabbits pigeons squirrels cows spiders foxes wolves",
    "landscape": "valley forest desert meadow island mountains village",
    "heard": "noticed followed feared touched watched counted",
    "feeling": "tired hungry nervous quiet angry cheerful sleepy",
    "finished": "closed copied opened forgot changed arranged",
    "lost": "broken sold stolen painted hidden dropped",
}


def sentences(count: int, seed: int = 0) -> Iterator[str]:
    """Sentences of some 9 to 17 words, with commas; the same for the same seed."""
    rng = random.Random(seed)
    choices = {slot: words.split() for slot, words in WORDS.items()}
    for _ in range(count):
        form = rng.choice(FORMS)
        while "{" in form:
            slot = form[form.index("{") + 1 : form.index("}")]
            form = form.replace("{" + slot + "}", rng.choice(choices[slot]), 1)
        yield form
