"""The closed grammar of captions and the scenes behind them.

A scene is one thing (room is left for more) that moves over a patterned background. Seven attributes are
said in the caption and can be read back from the pixels by `judge.py`; where the thing starts, how far
exactly it goes and where the pattern begins are continuous and unsaid.

    >>> scene = sample_scene(random.Random(0))
    >>> caption(scene, random.Random(0))
    'on a white background with dots, a little orange triangle moves up slowly'
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

# attribute -> value -> phrasings; the first phrasing is the value's plain name
PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")},
    "colour": {
        "red": ("red", "crimson"),
        "orange": ("orange",),
        "yellow": ("yellow", "golden"),
        "green": ("green",),
        "cyan": ("cyan", "turquoise"),
        "blue": ("blue",),
        "purple": ("purple", "violet"),
        "pink": ("pink", "rosy"),
    },
    "shape": {
        "circle": ("circle", "disc"),
        "square": ("square", "box"),
        "triangle": ("triangle",),
        "star": ("star",),
        "ring": ("ring", "hoop"),
        "cross": ("cross", "plus"),
    },
    "motion": {
        "left": ("moves left", "slides to the left", "drifts left"),
        "right": ("moves right", "slides to the right", "drifts right"),
        "up": ("moves up", "rises", "climbs"),
        "down": ("moves down", "sinks", "falls"),
        "orbits": ("orbits", "goes around"),
        "bounces": ("bounces", "hops"),
        "spins": ("spins", "rotates"),
        "grows": ("grows", "expands"),
        "shrinks": ("shrinks", "contracts"),
    },
    "speed": {"slowly": ("slowly", "gently"), "quickly": ("quickly", "fast")},
    "pattern": {
        "plain": ("plain", "empty"),
        "striped": ("striped", "with stripes"),
        "checked": ("checked", "with checks"),
        "dotted": ("dotted", "with dots"),
    },
    "background": {
        "black": ("black", "coal"),
        "gray": ("gray", "grey"),
        "white": ("white", "snow"),
        "navy": ("navy", "night"),
        "brown": ("brown", "earth"),
        "forest": ("forest", "jungle"),
    },
}
ATTRIBUTES = tuple(PHRASES)
TEMPLATES = (
    "a {size} {colour} {shape} {motion} {speed} over a {pattern} {background} background",
    "a {size} {colour} {shape} {speed} {motion} on a {pattern} {background} background",
    "on a {pattern} {background} background, a {size} {colour} {shape} {motion} {speed}",
    "{pattern} {background} background: the {colour} {shape} is {size} and {motion} {speed}",
)


@dataclass(frozen=True)
class Thing:
    """One moving thing. `amount` in [0, 1] places the motion inside its speed's range; x, y in [0, 1]."""

    size: str
    colour: str
    shape: str
    motion: str
    speed: str
    x: float
    y: float
    phase: float
    amount: float
    turn: int  # +1 counter-clockwise, -1 clockwise


@dataclass(frozen=True)
class Scene:
    """Things over a background; `shift` is where its pattern starts, in periods."""

    things: tuple[Thing, ...]
    background: str
    pattern: str
    shift: tuple[float, float]

    @property
    def attributes(self) -> dict[str, str]:
        """What the caption says of the first thing and of the background, by attribute."""
        thing = self.things[0]
        return {a: getattr(self if a in ("background", "pattern") else thing, a) for a in ATTRIBUTES}


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """True for the fixed fifth of the (colour, shape, motion) combinations that training never sees."""
    place = [list(PHRASES[a]).index(v) for a, v in zip(("colour", "shape", "motion"), (colour, shape, motion))]
    return (place[0] + 2 * place[1] + 3 * place[2]) % 5 == 0


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene, from the held-out fifth of the combinations or from the other four."""
    while True:
        pick = {a: rng.choice(list(PHRASES[a])) for a in ATTRIBUTES}
        if is_held_out(pick["colour"], pick["shape"], pick["motion"]) == held_out:
            break
    thing = Thing(
        **{a: pick[a] for a in ("size", "colour", "shape", "motion", "speed")},
        x=rng.random(),
        y=rng.random(),
        phase=rng.random(),
        amount=rng.random(),
        turn=rng.choice((-1, 1)),
    )
    return Scene((thing,), pick["background"], pick["pattern"], (rng.random(), rng.random()))


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the many sentences that describe the scene."""
    words = {a: rng.choice(PHRASES[a][v]) for a, v in scene.attributes.items()}
    template = rng.choice(TEMPLATES)
    if words["pattern"].startswith("with "):  # "over a striped navy background", but "... background with stripes"
        template = template.replace("{pattern} {background} background", "{background} background {pattern}")
    return template.format(**words)


def held_out_prompts(n: int, seed: int) -> list[str]:
    """n captions of held-out combinations; the same for the same seed."""
    rng = random.Random(f"held-out {seed}")
    return [caption(sample_scene(rng, held_out=True), rng) for _ in range(n)]


def read_caption(text: str) -> dict[str, str]:
    """The attributes that a caption names; those it does not name are absent."""
    text = " ".join(words_of(text))
    found = {}
    for attribute, values in PHRASES.items():
        for value, phrasings in values.items():
            if any(re.search(rf"\b{phrase}\b", text) for phrase in phrasings):
                found.setdefault(attribute, value)
    return found


def words_of(text: str) -> list[str]:
    """The lower-case words of a text, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted."""
    phrases = [p for values in PHRASES.values() for phrasings in values.values() for p in phrasings]
    return sorted({w for text in (*phrases, *TEMPLATES) for w in words_of(re.sub(r"{\w+}", "", text))})
