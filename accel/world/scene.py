"""The closed grammar of captions and the scenes behind them.

A scene is an object with a soft shadow that moves over a background: a regular pattern, or a living texture, which
moves by itself. Sometimes a second object floats in a part of the frame that the first one leaves free. The caption
says seven attributes, and three of a second object, which `judge.py` reads back from the pixels; where an object
starts, how far exactly it goes and where the pattern begins are continuous and unsaid.

    >>> scene = sample_scene(random.Random(0))
    >>> caption(scene, random.Random(0))
    'snow background with ripples: the violet circle is big and goes around fast'
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        "cloudy": ("cloudy", "with clouds"),
        "starry": ("starry", "with stars"),
        "rippling": ("rippling", "with ripples"),
        "grassy": ("grassy", "with grass"),
        "marbled": ("marbled", "with veins"),
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
SECOND_ATTRIBUTES = ("second_size", "second_colour", "second_shape")
REGULAR = ("plain", "striped", "checked", "dotted")
LIVING = ("cloudy", "starry", "rippling", "grassy", "marbled")  # drawn twice as often
TEMPLATES = (
    "a {size} {colour} {shape} {motion} {speed} over a {pattern} {background} background",
    "a {size} {colour} {shape} {speed} {motion} on a {pattern} {background} background",
    "on a {pattern} {background} background, a {size} {colour} {shape} {motion} {speed}",
    "{pattern} {background} background: the {colour} {shape} is {size} and {motion} {speed}",
)
SECOND_TEMPLATES = (
    "{text} while a {second_size} {second_colour} {second_shape} floats nearby",
    "{text}, while a {second_size} {second_colour} {second_shape} hovers",
)
# motions of a small object that leave half of the frame free, and the axis across which that half lies
FREE_AXIS = {"left": "y", "right": "y", "spins": "y", "up": "x", "down": "x", "bounces": "x"}
SECOND_SHARE = 0.6  # of the scenes with room for a second object that get one


@dataclass(frozen=True)
class Object:
    """One moving object. `speed_fraction` in [0, 1] places the motion inside its speed's range; x, y in [0, 1]."""

    size: str
    colour: str
    shape: str
    motion: str  # of `PHRASES`, or "floats" for a second object
    speed: str
    x: float
    y: float
    phase: float
    speed_fraction: float
    direction: int  # +1 counter-clockwise, -1 clockwise


@dataclass(frozen=True)
class Scene:
    """Objects over a background.

    `pattern_phase` is where a regular pattern starts, in periods; `texture_seed` seeds a living texture.
    """

    objects: tuple[Object, ...]
    background: str
    pattern: str
    pattern_phase: tuple[float, float]
    texture_seed: int

    @property
    def attributes(self) -> dict[str, str]:
        """What the caption says, by attribute: of the first object, the background, and a second object if any."""
        first, *others = self.objects
        said = {a: getattr(self if a in ("background", "pattern") else first, a) for a in ATTRIBUTES}
        return said | {a: getattr(o, a.removeprefix("second_")) for o in others for a in SECOND_ATTRIBUTES}


def is_held_out(colour: str, shape: str, motion: str) -> bool:
    """True for the fixed fifth of the (colour, shape, motion) combinations that training never sees."""
    index = [list(PHRASES[a]).index(v) for a, v in zip(("colour", "shape", "motion"), (colour, shape, motion))]
    return (index[0] + 2 * index[1] + 3 * index[2]) % 5 == 0


def sample_scene(rng: random.Random, held_out: bool = False) -> Scene:
    """A random scene, from the held-out fifth of the combinations or from the other four."""
    patterns = (*REGULAR, *LIVING, *LIVING)
    while True:
        pick = {a: rng.choice(patterns if a == "pattern" else list(PHRASES[a])) for a in ATTRIBUTES}
        if is_held_out(pick["colour"], pick["shape"], pick["motion"]) == held_out:
            break
    first = Object(
        **{a: pick[a] for a in ("size", "colour", "shape", "motion", "speed")},
        x=rng.random(),
        y=rng.random(),
        phase=rng.random(),
        speed_fraction=rng.random(),
        direction=rng.choice((-1, 1)),
    )
    phase = (rng.random(), rng.random())
    scene = Scene((first,), pick["background"], pick["pattern"], phase, rng.getrandbits(31))
    room = first.size == "small" and first.motion in FREE_AXIS
    return replace(scene, objects=_with_second(first, rng)) if room and rng.random() < SECOND_SHARE else scene


def _with_second(first: Object, rng: random.Random) -> tuple[Object, Object]:
    """The first object moved to one side of the frame, and a second one of another colour on the other side."""
    axis = FREE_AXIS[first.motion]
    side = rng.choice((0, 1))
    first = replace(first, **{axis: side + (0.08 if side == 0 else -0.08) * rng.random()})
    away = 0.74 + 0.06 * rng.random()  # centre of the second object in frame widths, from the first one's side
    place = {axis: away if side == 0 else 1 - away, "xy".replace(axis, ""): 0.28 + 0.44 * rng.random()}
    colours = list(PHRASES["colour"])
    hues = [c for i, c in enumerate(colours) if (i - colours.index(first.colour)) % len(colours) not in (0, 1, 7)]
    second = Object(
        size=rng.choice(list(PHRASES["size"])),
        colour=rng.choice(hues),  # not a neighbour in the palette, which could be taken for the first one's
        shape=rng.choice(list(PHRASES["shape"])),
        motion="floats",
        speed="slowly",
        **place,
        phase=rng.random(),
        speed_fraction=rng.random(),
        direction=rng.choice((-1, 1)),
    )
    return first, second


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the many sentences that describe the scene."""
    words = {a: rng.choice(PHRASES[a.removeprefix("second_")][v]) for a, v in scene.attributes.items()}
    template = rng.choice(TEMPLATES)
    if words["pattern"].startswith("with "):  # "over a striped navy background", but "... background with stripes"
        template = template.replace("{pattern} {background} background", "{background} background {pattern}")
    text = template.format(**words)
    return rng.choice(SECOND_TEMPLATES).format(text=text, **words) if len(scene.objects) > 1 else text


def held_out_prompts(n: int, seed: int) -> list[str]:
    """n captions of held-out combinations; the same for the same seed."""
    rng = random.Random(f"held-out {seed}")
    return [caption(sample_scene(rng, held_out=True), rng) for _ in range(n)]


def read_caption(text: str) -> dict[str, str]:
    """The attributes that a caption names; those it does not name are absent."""
    first, _, second = " ".join(words_of(text)).partition(" while ")
    found = _read_phrases(first, ATTRIBUTES)
    of_second = _read_phrases(second, [a.removeprefix("second_") for a in SECOND_ATTRIBUTES])
    return found | {f"second_{a}": value for a, value in of_second.items()}


def _read_phrases(text: str, attributes: Sequence[str]) -> dict[str, str]:
    """Those of some attributes whose phrases a text of lower-case words holds."""
    found: dict[str, str] = {}
    for attribute in attributes:
        for value, phrasings in PHRASES[attribute].items():
            if any(re.search(rf"\b{phrase}\b", text) for phrase in phrasings):
                found.setdefault(attribute, value)
    return found


def words_of(text: str) -> list[str]:
    """The lower-case words of a text, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted."""
    phrases = [p for values in PHRASES.values() for phrasings in values.values() for p in phrasings]
    return sorted(
        {w for text in (*phrases, *TEMPLATES, *SECOND_TEMPLATES) for w in words_of(re.sub(r"{\w+}", "", text))}
    )
