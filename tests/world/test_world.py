"""The toy world: its grammar, its pictures, and a judge that is right where the truth is known."""

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from accel.runtime.models import TINY, read_defaults
from accel.training.tasks.base_model import build_tokenizer
from accel.world import texture_stats
from accel.world.judge import read, score
from accel.world.render import render
from accel.world.scene import (
    LIVING,
    PHRASES,
    REGULAR,
    Object,
    Scene,
    caption,
    held_out_prompts,
    is_held_out,
    read_caption,
    sample_scene,
    vocabulary,
    words_of,
)
from accel.world.texture_stats import measure_references, references, statistics_of, texture_distance

PINNED = [
    "a big cyan hoop moves right slowly over a plain gray background",
    "earth background with stripes: the rosy triangle is large and sinks fast",
    "on a grassy coal background, a small rosy circle moves right slowly",
]  # of the tables


@pytest.fixture(autouse=True)
def one_thread():
    """The judge makes many small tensors: a second thread only costs, and much where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def still(shape: str = "star", motion: str = "spins") -> Scene:
    item = Object("large", "red", shape, motion, "quickly", 0.5, 0.5, 0.1, 0.5, 1)
    return Scene((item,), "gray", "plain", (0.0, 0.0), texture_seed=0)


def textured(pattern: str, seed: int = 1) -> Scene:
    """A small spinning star over a living texture."""
    item = Object("small", "red", "star", "spins", "slowly", 0.5, 0.5, 0.1, 0.5, 1)
    return Scene((item,), "navy", pattern, (0.0, 0.0), texture_seed=seed)


def chance(attribute: str) -> float:
    """How often a random value of an attribute is right."""
    if attribute == "pattern":  # a living texture is drawn twice as often as a regular pattern
        weights = np.array([1] * len(REGULAR) + [2] * len(LIVING))
        return float(((weights / weights.sum()) ** 2).sum())
    return 1 / len(PHRASES[attribute])


def test_every_phrasing_is_read_back():
    rng = random.Random(1)
    for _ in range(500):
        scene = sample_scene(rng)
        assert read_caption(caption(scene, rng)) == scene.attributes


def test_one_fifth_of_the_combinations_is_held_out():
    combos = [(c, s, m) for c in PHRASES["colour"] for s in PHRASES["shape"] for m in PHRASES["motion"]]
    assert abs(sum(is_held_out(*c) for c in combos) / len(combos) - 0.2) < 0.01


def test_training_scenes_and_held_out_prompts_never_meet():
    rng = random.Random(2)
    combo = lambda a: (a["colour"], a["shape"], a["motion"])
    trained = {combo(sample_scene(rng).attributes) for _ in range(2000)}
    asked = {combo(read_caption(p)) for p in held_out_prompts(200, seed=0)}
    assert not trained & asked


def test_held_out_prompts_depend_on_the_seed_alone():
    assert held_out_prompts(5, 1) == held_out_prompts(5, 1) != held_out_prompts(5, 2)


def test_prompts_of_the_shipped_model_never_change():
    assert held_out_prompts(3, 2026) == PINNED


def test_vocabulary_covers_the_grammar_and_unknown_words_are_marked():
    rng, words = random.Random(3), set(vocabulary())
    assert all(set(words_of(caption(sample_scene(rng), rng))) <= words for _ in range(300))
    tokenizer = build_tokenizer()
    ids = tokenizer("a red dragon, spins")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["a", "red", "<unk>", "spins", "</s>"]


@pytest.mark.parametrize("shape", PHRASES["shape"])
def test_a_spin_is_visible_on_every_shape(shape):
    video = render(still(shape), 9, 64).float()
    assert (video[1:] - video[:-1]).abs().amax((1, 2, 3)).min() > 30


def test_edges_are_anti_aliased():
    reds = render(still("circle"), 1, 64)[0, ..., 0].unique()
    assert len(reds) > 40


def test_small_and_large_frames_show_the_same_scene():
    small, large = (render(still(), 3, size).float() for size in (48, 96))
    halved = torch.nn.functional.avg_pool2d(large.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert (small - halved).abs().mean() < 2


def test_a_texture_is_the_same_at_any_size():
    for pattern in LIVING:
        small, large = (render(textured(pattern), 3, size).float() for size in (48, 96))
        halved = torch.nn.functional.avg_pool2d(large.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        assert (small - halved).abs().mean() < 6


@pytest.mark.parametrize("pattern", LIVING)
def test_a_texture_has_frames_of_any_size(pattern):
    for size in (1, 2, 16, 33):
        assert render(textured(pattern), 3, size).shape == (3, size, size, 3)


@pytest.mark.parametrize("pattern", LIVING)
def test_living_textures_move_and_depend_on_their_seed(pattern):
    video, other = (render(textured(pattern, seed), 9, 64).float() for seed in (1, 2))
    corner = lambda x: x[:, :16, :16]  # which the star never reaches
    assert (corner(video)[1:] - corner(video)[:-1]).abs().mean((1, 2, 3)).min() > 0.5
    assert (corner(video) - corner(other)).abs().mean() > 2


@pytest.mark.slow
def test_a_second_object_has_another_colour_and_is_read():
    rng, scenes = random.Random(8), []
    while len(scenes) < 20:
        scene = sample_scene(rng)
        if len(scene.objects) == 2:
            scenes.append(scene)
    names = [{a: v for a, v in s.attributes.items() if a.startswith("second")} for s in scenes]
    assert all(s.objects[0].colour != n["second_colour"] for s, n in zip(scenes, names))
    seen = [read(render(s, 17, 96).numpy()) for s in scenes]
    assert np.mean([all(s[a] == v for a, v in n.items()) for s, n in zip(seen, names)]) > 0.95


def test_a_second_object_counts_only_where_the_caption_names_it():
    scene = textured("starry")
    text = "a small red star spins slowly over a starry navy background"
    frames = render(scene, 17, 96).numpy()
    assert score(frames, text)["mean"] == 1 and "second_shape" not in score(frames, text)
    assert score(frames, f"{text} while a small blue ring floats nearby")["mean"] == pytest.approx(0.7)


def read_back(count: int, frames: int, size: int) -> list[tuple[Scene, dict]]:
    """Scenes, half of them of the held-out kind, each with what the judge reads in its render."""
    rng = random.Random(4)
    scenes = [sample_scene(rng, held_out=i % 2 == 0) for i in range(count)]
    return [(scene, read(render(scene, frames, size).numpy())) for scene in scenes]


def wrong_attributes(found: list[tuple[Scene, dict]]) -> dict[str, float]:
    """The attributes that are right in less than 98 %, with their shares."""
    right, asked = Counter(), Counter()
    for scene, seen in found:
        asked.update(list(scene.attributes))
        right.update(a for a, value in scene.attributes.items() if seen[a] == value)
    return {a: right[a] / n for a, n in asked.items() if right[a] < 0.98 * n}


@pytest.fixture(scope="module")
def true_renders() -> list[tuple[Scene, dict]]:
    return read_back(70, 17, 64)


def test_judge_reads_true_renders(true_renders):
    assert wrong_attributes(true_renders) == {}


def test_shuffled_captions_score_near_chance(true_renders):
    rng = random.Random(5)
    asked = [read_caption(caption(scene, rng)) for scene, _ in true_renders]
    for attribute in PHRASES:
        right = [seen[attribute] == asked[j][attribute]
                 for i, (_, seen) in enumerate(true_renders) for j in range(70) if i != j]  # fmt: skip
        assert abs(np.mean(right) - chance(attribute)) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("frames, size, count", [(33, 64, 35), (17, 96, 70)])
def test_judge_reads_true_renders_of_other_sizes(frames, size, count):
    assert wrong_attributes(read_back(count, frames, size)) == {}


def test_the_stored_references_are_of_the_shipped_size_of_video_and_of_all_textures(monkeypatch):
    defaults = read_defaults(TINY)
    monkeypatch.setattr(texture_stats, "measure_references", None)  # not called
    found = references(defaults.frames, defaults.height)
    count = len(statistics_of(torch.zeros(17, 96, 96), torch.zeros(17, 96, 96, dtype=torch.bool)))
    assert list(found) == list(LIVING) and {row.shape for rows in found.values() for row in rows} == {(count,)}


@pytest.mark.slow
def test_the_stored_references_are_those_of_true_renders():
    for pattern, rows in measure_references(17, 96).items():
        torch.testing.assert_close(rows, references(17, 96)[pattern], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", LIVING)
def test_texture_distance_is_one_for_true_renders_and_more_for_others(pattern):
    video = render(textured(pattern), 17, 96)
    frozen = video[:1].repeat(17, 1, 1, 1)
    blurred = torch.nn.functional.avg_pool2d(video.permute(0, 3, 1, 2).float(), 5, 1, 2).permute(0, 2, 3, 1).byte()
    true = texture_distance(video.numpy(), pattern)
    assert true < 2
    for worse in (frozen, blurred, render(textured(LIVING[LIVING.index(pattern) - 1]), 17, 96)):
        assert texture_distance(worse.numpy(), pattern) > 1.3 * true


def test_texture_distance_refuses_what_is_no_living_texture():
    with pytest.raises(ValueError, match="striped"):
        texture_distance(render(still(), 9, 64).numpy(), "striped")


@pytest.mark.parametrize("pattern", LIVING)
def test_a_texture_is_read_at_any_contrast(pattern):
    """Guidance makes it higher than any true render has."""
    video = render(textured(pattern), 17, 96).float()
    mean = video.mean((0, 1, 2))
    strong = (mean + 1.7 * (video - mean)).clamp(0, 255).byte()
    assert read(video.byte().numpy())["pattern"] == read(strong.numpy())["pattern"] == pattern


@pytest.mark.parametrize("pattern", ["plain", "striped", "checked", "dotted"])
def test_flicker_behind_an_object_makes_no_living_texture(pattern):
    video = render(replace(still(), pattern=pattern), 17, 96).float()
    noise = torch.randn(17, 24, 24, 1, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 1)
    near = torch.zeros(96, 96, 1)
    near[12:84, 12:84] = 1  # the star is in the middle
    flickering = (video + 3 * near * noise.repeat_interleave(4, 2)).clamp(0, 255).byte().numpy()
    assert read(flickering)["pattern"] == pattern


def test_noise_black_and_frozen_video_score_low():
    rng = random.Random(6)
    prompts = [caption(sample_scene(rng), rng) for _ in range(30)]
    noise = np.random.default_rng(0).integers(0, 256, (17, 96, 96, 3), dtype=np.uint8)
    black = np.zeros((17, 96, 96, 3), dtype=np.uint8)
    assert np.mean([score(noise, p)["mean"] for p in prompts]) < 0.05
    assert np.mean([score(black, p)["mean"] for p in prompts]) < 0.15
    frozen = render(still(), 17, 96)[:1].repeat(17, 1, 1, 1).numpy()
    scores = score(frozen, "a large red star spins quickly over a plain gray background")
    assert scores["motion"] == scores["speed"] == 0 and scores["colour"] == scores["shape"] == 1


def test_a_prompt_outside_the_grammar_has_no_score():
    assert score(render(still(), 9, 64).numpy(), "two dragons play chess") == {}
