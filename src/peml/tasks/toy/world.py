"""A small invented world: its words, its grammar, and seeded generators of sentences about it."""

from __future__ import annotations

from random import Random
from typing import Final, NamedTuple


class Verb(NamedTuple):
    """The four written forms of a verb."""

    base: str
    third: str
    past: str
    participle: str


def _verb(forms: str) -> Verb:
    """Read a verb from its distinct forms; the participle may be left out when it equals the past."""
    words = forms.split()
    return Verb(words[0], words[1], words[2], words[-1])


SHE: Final = ("mara", "lena", "ines", "suri", "tova", "wilma")
HE: Final = ("odo", "bram", "pavel", "niko", "jory", "emil")
NAMES: Final = SHE + HE
PLACES: Final = ("mill", "harbor", "market", "barn", "cellar", "garden", "tower", "kitchen")

KINDS: Final[dict[str, tuple[str, ...]]] = {
    "bird": ("robin", "finch", "heron", "crow"),
    "fish": ("eel", "minnow", "perch", "shark"),
    "insect": ("moth", "beetle", "wasp", "ant"),
    "tree": ("oak", "elm", "birch", "willow"),
    "flower": ("rose", "tulip", "daisy", "lily"),
    "tool": ("hammer", "saw", "chisel", "rake"),
    "instrument": ("drum", "flute", "harp", "fiddle"),
    "garment": ("coat", "scarf", "hat", "glove"),
}
ANIMALS: Final = ("bird", "fish", "insect")
CARRIED: Final = tuple(noun for kind in ("tool", "instrument", "garment") for noun in KINDS[kind])
LIVING: Final = tuple(noun for kind in ANIMALS for noun in KINDS[kind])
TRAITS: Final = {
    "bird": ("can fly", "has wings"),
    "fish": ("can swim", "has fins"),
    "insect": ("can crawl", "has six legs"),
    "tree": ("can grow tall", "has bark"),
    "flower": ("can bloom", "has petals"),
    "tool": ("can help a worker", "has a handle"),
    "instrument": ("can play a song", "has a sound"),
    "garment": ("can keep you warm", "has a seam"),
}

# Neighbours in these pairs mean the same, so either may replace the other.
TWIN_VERBS: Final = tuple(
    (_verb(left), _verb(right))
    for left, right in (
        ("carry carries carried", "haul hauls hauled"),
        ("find finds found", "discover discovers discovered"),
        ("mend mends mended", "repair repairs repaired"),
        ("wash washes washed", "clean cleans cleaned"),
        ("hide hides hid hidden", "conceal conceals concealed"),
        ("buy buys bought", "purchase purchases purchased"),
        ("throw throws threw thrown", "toss tosses tossed"),
        ("break breaks broke broken", "smash smashes smashed"),
        ("draw draws drew drawn", "sketch sketches sketched"),
        ("see sees saw seen", "notice notices noticed"),
    )
)
VERBS: Final = tuple(verb for pair in TWIN_VERBS for verb in pair)
SOCIAL: Final = tuple(
    _verb(forms)
    for forms in (
        "thank thanks thanked",
        "follow follows followed",
        "help helps helped",
        "teach teaches taught",
        "warn warns warned",
        "choose chooses chose chosen",
        "greet greets greeted",
        "forgive forgives forgave forgiven",
    )
)
ACTS: Final = tuple(
    _verb(forms)
    for forms in (
        "sleep sleeps slept",
        "wait waits waited",
        "fall falls fell fallen",
        "hide hides hid hidden",
        "move moves moved",
        "rest rests rested",
        "drink drinks drank drunk",
        "eat eats ate eaten",
    )
)
TWIN_LOOKS: Final = (
    ("big", "large"),
    ("small", "tiny"),
    ("quick", "fast"),
    ("old", "ancient"),
    ("wet", "damp"),
)
OPPOSITE_LOOKS: Final = (
    ("big", "small"),
    ("large", "tiny"),
    ("old", "new"),
    ("wet", "dry"),
    ("fast", "slow"),
)
LOOKS: Final = tuple(dict.fromkeys(look for pair in TWIN_LOOKS + OPPOSITE_LOOKS for look in pair))

TOPICS: Final = ("soup", "bread", "song", "story", "room", "feast", "walk", "play", "tea", "picnic")
PRAISE: Final = (
    "lovely",
    "tasty",
    "cozy",
    "bright",
    "charming",
    "splendid",
    "fresh",
    "gentle",
    "superb",
    "sweet",
)
BLAME: Final = ("awful", "bitter", "gloomy", "dull", "dirty", "nasty", "rotten", "rude", "dreadful", "sour")
JOY: Final = ("smiled", "laughed", "danced", "cheered", "clapped")
GRIEF: Final = ("cried", "frowned", "sighed", "groaned", "sobbed")
GLAD: Final = ("glad", "happy", "proud", "merry", "pleased")
SAD: Final = ("sad", "angry", "upset", "bored", "unhappy")

_KIND_OF: Final = {noun: kind for kind, nouns in KINDS.items() for noun in nouns}


def kind_of(noun: str) -> str:
    """Return the kind a noun belongs to."""
    return _KIND_OF[noun]


def plural(noun: str) -> str:
    """Return the plural of a noun."""
    if noun.endswith(("ch", "sh", "s", "x")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


def a(word: str) -> str:
    """Return the word after its indefinite article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def they(name: str) -> str:
    """Return the subject pronoun of a person."""
    return "she" if name in SHE else "he"


def clause(rng: Random, flaw: bool = False) -> str:
    """Return one sentence of the grammar, or one that breaks it in exactly one place.

    Both come from the same six patterns with the same words, so only the grammar tells them apart.
    """
    pattern = rng.randrange(6)
    name, noun, verb, act = rng.choice(NAMES), rng.choice(LIVING), rng.choice(VERBS), rng.choice(ACTS)
    item, look, place = rng.choice(CARRIED), rng.choice(LOOKS), rng.choice(PLACES)
    many = rng.random() < 0.5
    subject = f"the {look} {plural(noun) if many else noun}"
    if pattern == 0:
        # The noun between subject and verb varies in number, so the nearest noun is no guide.
        near = rng.choice(LIVING)
        near = plural(near) if rng.random() < 0.5 else near
        return f"{subject} near the {near} {act.base if many != flaw else act.third} ."
    if pattern == 1:
        helper = rng.choice(("did not", "will", "can", "must"))
        form = rng.choice((verb.third, verb.past)) if flaw else verb.base
        return f"{name} {helper} {form} the {look} {item} ."
    if pattern == 2:
        own = "herself" if (name in SHE) != flaw else "himself"
        return f"{name} {rng.choice(SOCIAL).past} {own} in the {place} ."
    if pattern == 3:
        form = rng.choice((verb.base, verb.third)) if flaw else verb.participle
        return f"the {look} {item} was {form} by {name} ."
    if pattern == 4:
        count = rng.choice(("two", "three", "many")) if many else rng.choice(("one", "every", "each"))
        return f"{count} {plural(noun) if many != flaw else noun} {act.past} in the {place} ."
    words = f"{subject} {act.past} in the {place} .".split()
    if flaw:
        at = rng.choice((0, 1, 2, 4, 5))
        words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def restatement(rng: Random, same: bool = True) -> tuple[str, str]:
    """Return two sentences that mean the same, or two that look as if they did and do not."""
    pattern = rng.randrange(4)
    first, second = rng.sample(NAMES, 2)
    item, place, look = rng.choice(CARRIED), rng.choice(PLACES), rng.choice(LOOKS)
    giver, taker = (first, second) if same else (second, first)
    if pattern == 0:
        return f"{first} gave the {look} {item} to {second} .", f"{taker} got the {look} {item} from {giver} ."
    if pattern == 1:
        verb = rng.choice(SOCIAL)
        return f"{first} {verb.past} {second} .", f"{taker} was {verb.participle} by {giver} ."
    if pattern == 2:
        left, right = rng.sample(TWIN_VERBS, 2)
        other = left if same else right
        one, two = (left[0], other[1]) if rng.random() < 0.5 else (left[1], other[0])
        return f"{first} {one.past} the {look} {item} .", f"{first} {two.past} the {look} {item} ."
    pair = rng.choice(TWIN_LOOKS if same else OPPOSITE_LOOKS)
    one_look, two_look = pair if rng.random() < 0.5 else pair[::-1]
    return f"the {item} in the {place} was {one_look} .", f"in the {place} was {a(two_look)} {item} ."


def inference(rng: Random, label: str) -> tuple[str, str]:
    """Return a premise and a hypothesis whose relation is `label`: "yes", "no" or "maybe"."""
    noun = rng.choice(LIVING)
    kind, act, name = kind_of(noun), rng.choice(ACTS), rng.choice(NAMES)
    stranger = rng.choice([other for other in ANIMALS if other != kind])
    sibling = rng.choice([other for other in KINDS[kind] if other != noun])
    verb = rng.choice(VERBS)
    did, did_not = f"the {noun} {act.past} .", f"the {noun} did not {act.base} ."
    one, none = f"{name} {verb.past} {{}} .", f"{name} {verb.past} no {{}} ."
    options = {
        "yes": (
            (f"every {kind} {act.past} .", did),
            (f"no {kind} {act.past} .", did_not),
            (one.format(a(noun)), one.format(a(kind))),
            (none.format(kind), none.format(noun)),
        ),
        "no": (
            (f"every {kind} {act.past} .", did_not),
            (f"no {kind} {act.past} .", did),
            (none.format(kind), one.format(a(noun))),
            (one.format(a(noun)), none.format(kind)),
        ),
        "maybe": (
            (f"every {stranger} {act.past} .", rng.choice((did, did_not))),
            (f"no {stranger} {act.past} .", rng.choice((did, did_not))),
            (one.format(a(noun)), rng.choice((one.format(a(sibling)), one.format(a(stranger))))),
            (none.format(noun), rng.choice((none.format(kind), one.format(a(kind))))),
        ),
    }
    return rng.choice(options[label])


def opinion(rng: Random, good: bool) -> str:
    """Return a sentence that praises something, or one that blames it; a fifth of them through "not"."""
    negated = rng.random() < 0.2
    word = rng.choice(PRAISE if good != negated else BLAME)
    said = "was not" if negated else "was"
    topic = f"the {rng.choice(TOPICS)} in the {rng.choice(PLACES)}"
    return rng.choice((f"{topic} {said} {word} .", f"{rng.choice(NAMES)} found that {topic} {said} {word} ."))


def handover(rng: Random) -> tuple[str, list[str], str]:
    """Return a story in which a thing changes hands, its holders in order, and the thing."""
    people, item = rng.sample(NAMES, 3), rng.choice(CARRIED)
    one, two, three = people
    opening = rng.choice((f"{one} had the {item} .", f"{one} {rng.choice(('bought', 'found'))} the {item} ."))
    second = rng.choice((f"{one} gave it to {two} .", f"{two} got it from {one} ."))
    third = rng.choice((f"{two} gave it to {three} .", f"{three} got it from {two} ."))
    return f"{opening} {second} {third}", people, item


def journey(rng: Random) -> tuple[str, list[str], str]:
    """Return a story in which a person moves about, the places in order, and the person."""
    places, name = rng.sample(PLACES, 2), rng.choice(NAMES)
    way = rng.choice(("went", "walked", "ran", "hurried", "moved", "rode"))
    return f"{name} was in the {places[0]} . then {they(name)} {way} to the {places[1]} .", places, name
