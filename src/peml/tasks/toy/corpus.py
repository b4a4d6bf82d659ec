"""The plain text of the invented world on which the small model is pre-trained.

The documents state what the tasks need to know (what is a bird, what pleases, who holds what, what
means the same), and never in the form of a task: no task prompt and no answer after one. The words
that the tasks use as labels occur too, but only in sentences that have nothing to do with the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Final

from peml.tasks.toy import world
from peml.tasks.toy.world import CARRIED, KINDS, LIVING, NAMES, PLACES, VERBS, a, plural, they

_TOPS: Final = {"bird": "animal", "fish": "animal", "insect": "animal", "tree": "plant", "flower": "plant"}
_LABEL_WORDS: Final = (
    *("mood", "holds", "meaning", "grammar", "odd", "past", "back", "one", "up", "down"),
    *("yes", "no", "maybe", "same", "other", "fine", "wrong", "left", "right", "red", "blue", "north", "south"),
)


def _facts(rng: Random) -> str:
    """Say what one kind of thing is and does."""
    kind, other = rng.sample(list(KINDS), 2)
    one, two = rng.sample(KINDS[kind], 2)
    stranger = rng.choice(KINDS[other])
    trait, strange = rng.choice(world.TRAITS[kind]), rng.choice(world.TRAITS[other])
    said = [
        f"{a(one)} is {a(kind)} .",
        f"every {one} is {a(_TOPS.get(kind, 'thing'))} .",
        f"{a(one)} {trait} .",
        f"no {one} is {a(other)} .",
        f"{a(one)} and {a(two)} are both {plural(kind)} .",
        f"{a(one)} is {a(kind)} but {a(stranger)} is {a(other)} .",
        f"{a(one)} {trait} but {a(stranger)} {strange} .",
    ]
    return " ".join(rng.sample(said, 4))


def _group(rng: Random) -> str:
    """List things of one kind, mostly with one that is of another."""
    kind, other = rng.sample(list(KINDS), 2)
    nouns, stranger = rng.sample(KINDS[kind], 3), rng.choice(KINDS[other])
    mixed = rng.random() < 0.75
    if mixed:
        nouns.insert(rng.randrange(4), stranger)
    *rest, last = (a(noun) for noun in nouns)
    ending = f"all but the {stranger} were {plural(kind)} ." if mixed else f"all were {plural(kind)} ."
    return f"{rng.choice(NAMES)} {rng.choice(VERBS).past} {' , '.join(rest)} and {last} . {ending}"


def _feeling(rng: Random) -> str:
    """Say what someone thought of something, and how it made them feel."""
    good, name = rng.random() < 0.5, rng.choice(NAMES)
    reaction = rng.choice(world.JOY if good else world.GRIEF)
    state = rng.choice(world.GLAD if good else world.SAD)
    liked = "liked it" if good else "did not like it"
    ending = rng.choice(
        (
            f"so {name} {reaction} .",
            f"{name} was {state} .",
            f"{name} {liked} and {reaction} .",
            f"{name} {liked} .",
        )
    )
    words = rng.sample(world.PRAISE if good else world.BLAME, 2)
    extra = f"it was {words[0]} and {words[1]} . " if rng.random() < 0.4 else ""
    return f"{world.opinion(rng, good)} {extra}{ending}"


def _turn(rng: Random) -> str:
    """Say how a feeling turned from one to its opposite."""
    good, name = rng.random() < 0.5, rng.choice(NAMES)
    before, after = (world.JOY, world.GRIEF) if good else (world.GRIEF, world.JOY)
    told = f"{world.opinion(rng, good)} {world.opinion(rng, not good)}"
    return f"{told} {name} {rng.choice(before)} and then {they(name)} {rng.choice(after)} ."


def _handover(rng: Random) -> str:
    """Tell who gave a thing to whom, and who has had it."""
    told, people, item = world.handover(rng)
    recap = [
        f"now {people[2]} has the {item} .",
        f"long ago {people[0]} had the {item} .",
        f"for a while {people[1]} had the {item} .",
    ]
    return " ".join([told, *rng.sample(recap, rng.choice((2, 3)))])


def _journey(rng: Random) -> str:
    """Tell where a person went, and where they have been."""
    told, places, name = world.journey(rng)
    recap = [f"now {name} is in the {places[1]} .", f"long ago {name} was in the {places[0]} ."]
    return " ".join([told, *rng.sample(recap, 2)])


def _restatement(rng: Random) -> str:
    """Say the same thing twice."""
    told, again = world.restatement(rng)
    if rng.random() < 0.5:
        told, again = again, told
    return f"{told} in short , {again}"


def _talk(rng: Random) -> str:
    """Let two people say things that agree or do not."""
    agreed = rng.random() < 0.5
    told, again = world.restatement(rng, same=agreed)
    if rng.random() < 0.5:
        told, again = again, told
    ending = rng.choice(("they agreed .", "both were right .") if agreed else ("they argued .", "both were cross ."))
    return f"{rng.choice(NAMES)} said : {told} {rng.choice(NAMES)} said : {again} {ending}"


def _twins(rng: Random) -> str:
    """Use two words for the same thing."""
    name, item, place = rng.choice(NAMES), rng.choice(CARRIED), rng.choice(PLACES)
    if rng.random() < 0.5:
        left, right = rng.choice(world.TWIN_VERBS)
        if rng.random() < 0.5:
            left, right = right, left
        return f"{name} {left.past} the {item} . yes , the {item} that {name} {right.past} was in the {place} ."
    left_look, right_look = rng.choice(world.TWIN_LOOKS)
    opposite = dict(world.OPPOSITE_LOOKS).get(left_look, "plain")
    return f"the {item} was {left_look} , so it was {right_look} . it was not {opposite} ."


def _inference(rng: Random) -> str:
    """Draw a conclusion, deny one, or leave one open."""
    label = rng.choice(("yes", "no", "maybe"))
    premise, hypothesis = world.inference(rng, label)
    link = {"yes": "so", "no": "it is false that", "maybe": "perhaps"}[label]
    return f"{premise} {link} {hypothesis}"


def _claim(rng: Random) -> str:
    """Let someone conclude something, and say whether they did so rightly."""
    label = rng.choice(("yes", "no", "maybe"))
    premise, hypothesis = world.inference(rng, label)
    name = rng.choice(NAMES)
    ending = {"yes": f"{name} was right .", "no": f"{name} was mistaken .", "maybe": f"{name} was guessing ."}
    return f"{premise} {name} said : {hypothesis} {ending[label]}"


def _days(rng: Random) -> str:
    """Say the same act of today, yesterday and tomorrow."""
    name, item, verb, look = (
        rng.choice(NAMES),
        rng.choice(CARRIED),
        rng.choice(VERBS),
        rng.choice(world.LOOKS),
    )
    said = [
        f"today {name} {verb.third} the {look} {item} .",
        f"yesterday {name} {verb.past} the {look} {item} .",
        f"tomorrow {name} will {verb.base} the {look} {item} .",
        f"the {look} {item} was {verb.participle} by {name} .",
    ]
    return " ".join(rng.sample(said, rng.choice((2, 3))))


def _clauses(rng: Random) -> str:
    """Put a few well-formed sentences next to each other."""
    return " ".join(world.clause(rng) for _ in range(rng.choice((1, 2, 3))))


def _slip(rng: Random) -> str:
    """Let someone say a sentence well, or misspeak and then say it well."""
    seed = rng.random()
    well = world.clause(Random(seed))
    if rng.random() < 0.5:
        return f"{rng.choice(NAMES)} said : {well} that was clear ."
    return f"{rng.choice(NAMES)} said : {world.clause(Random(seed), flaw=True)} oops : {well}"


def _echo(rng: Random) -> str:
    """Repeat someone's words, which is the plainest lesson in looking things up."""
    if rng.random() < 0.4:
        words = world.clause(rng)
    else:
        pool = rng.choice((NAMES, PLACES, CARRIED, LIVING, world.LOOKS, _LABEL_WORDS))
        words = rng.choice((" | ", " , ", " ")).join(rng.sample(pool, rng.choice((3, 4, 5)))) + " ."
    return f"{rng.choice(NAMES)} said : {words} {rng.choice(NAMES)} repeated : {words}"


def _spare(rng: Random) -> str:
    """Use the words that the tasks use as labels, for no purpose at all."""
    name, other, place = rng.choice(NAMES), rng.choice(NAMES), rng.choice(PLACES)
    word, second = rng.choice(_LABEL_WORDS), rng.choice(_LABEL_WORDS)
    item, noun = rng.choice(CARRIED), rng.choice(LIVING)
    return rng.choice(
        (
            f"{name} wrote : {word} .",
            f"the word {word} is on the {place} .",
            f"{name} said {word} and {other} said {second} .",
            f"{name} read {word} : {second} : {rng.choice(_LABEL_WORDS)} .",
            f"{name} wrote {item} : {rng.choice(CARRIED)} : {noun} .",
            f"the sign in the {place} said {word} | {second} .",
            f"{other} wrote {rng.choice(NAMES)} | {rng.choice(NAMES)} on the {item} .",
        )
    )


_WRITERS: Final[tuple[tuple[Callable[[Random], str], int], ...]] = (
    (_facts, 8),
    (_group, 12),
    (_feeling, 14),
    (_turn, 4),
    (_handover, 2),
    (_journey, 2),
    (_restatement, 12),
    (_talk, 14),
    (_twins, 4),
    (_inference, 8),
    (_claim, 14),
    (_days, 6),
    (_clauses, 4),
    (_slip, 14),
    (_echo, 6),
    (_spare, 4),
)


def documents(n: int, seed: int | str = 0) -> Iterator[str]:
    """Yield `n` short documents, the same ones for the same seed."""
    rng = Random(f"toy-corpus:{seed}")
    writers, weights = zip(*_WRITERS, strict=True)
    for writer in rng.choices(writers, weights, k=n):
        yield writer(rng)
