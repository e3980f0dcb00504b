"""What an episode tells of its steps: where the hand is, what it does, and the objects around it.

1. axes: which numbers of the state are the hand's place, which tell of the gripper, and their words
2. a camera: where places show in the image
3. motion of an episode: places, gripper, waypoints, the primitive of each step, the object held

tools/robot_questions.py asks about it. T: steps of an episode, N: its recorded objects.
"""

import itertools
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.simulate import project
from fast_tokenizer import EpisodeFile

# ---- Axes ----------------------------------------------------------------------------------------

AXES = Path(__file__).parent / "axes"
WORLDS = ("tabletop", "libero", "metaworld", "calvin")  # each has a file there


class Gripper(NamedTuple):
    """Which numbers tell whether the gripper is closed."""

    of: str  # "state", or "action": what was commanded in the step before
    dimensions: list[int]
    closed: list[float]  # what these read when it is closed, or holds something
    open: list[float]


class Axes(NamedTuple):
    """What the numbers of a state mean."""

    position: list[int]  # dimensions of the state that are x, y and the height
    metres: float  # in one unit of them
    origin: list[float]  # from where places are counted, m
    origin_name: str
    words: list[list[str]]  # of x, y and the height: where it is less, where it is more
    gripper: Gripper


def read_axes(path: str | Path, state_dim: int, action_dim: int) -> Axes:
    """Axes from a file, for a robot of so many dimensions. ValueError naming what is wrong."""
    fields = read_object(path, Axes._fields)
    try:
        axes = Axes(**fields)._replace(gripper=Gripper(**fields["gripper"]))
        fault = axes_fault(axes)
    except (TypeError, ValueError) as e:
        fault = str(e)
    if fault:
        raise ValueError(f"{path}: {fault}; write it as {AXES / 'libero.json'}")
    gripper = axes.gripper
    dims = {"state": state_dim, "action": action_dim}
    for name, of, dimensions in (
        ("position", "state", axes.position),
        ("gripper", gripper.of, gripper.dimensions),
    ):
        for dimension in dimensions:
            if not isinstance(dimension, int) or not 0 <= dimension < dims[of]:
                raise ValueError(
                    f"{path}: {name} names dimension {dimension} of the {of}, which has 0 .. "
                    f"{dims[of] - 1}; correct the file, or give another one with --axes"
                )
    return axes


def axes_fault(axes: Axes) -> str:
    """What makes the values of a file no axes; "" when they are. TypeError, ValueError."""
    gripper = axes.gripper
    words = [word for pair in axes.words for word in pair]
    if not 0 < axes.metres < np.inf:
        return f'"metres" {axes.metres} is not above 0'
    if len(axes.position) != 3 or len(axes.origin) != 3 or not np.isfinite(axes.origin).all():
        return '"position" and "origin" are not 3 numbers each'
    if len(set(axes.position)) < 3 or len(set(gripper.dimensions)) < len(gripper.dimensions):
        return "a dimension is named twice"
    if not isinstance(axes.origin_name, str) or not all(isinstance(word, str) for word in words):
        return '"origin_name" or one of "words" is no text'
    if len(axes.words) != 3 or len(set(words)) != 6 or words[4:] != ["down", "up"]:
        return f'"words" {axes.words} are not 3 pairs of different words, the last of down and up'
    if gripper.of not in ("state", "action"):
        return f'"of" of the gripper is {gripper.of!r}, not state or action'
    lengths = {len(gripper.dimensions), len(gripper.closed), len(gripper.open)}
    if lengths == {0} or len(lengths) != 1 or list(gripper.closed) == list(gripper.open):
        return "a gripper needs as many dimensions as values when closed and, other ones, open"
    if not np.isfinite(np.array([gripper.closed, gripper.open], float)).all():
        return '"closed" and "open" of the gripper are not numbers'
    return ""


def read_object(path: str | Path, keys: tuple[str, ...]) -> dict:
    """A JSON object that has just these keys. ValueError, FileNotFoundError."""
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not JSON ({e.msg}); repair it") from e
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not JSON ({e}); repair it") from e
    except (FileNotFoundError, IsADirectoryError) as e:
        raise FileNotFoundError(f"{path}: no such file; see those in {AXES}") from e
    if not isinstance(fields, dict) or set(fields) != set(keys):
        raise ValueError(f"{path}: its keys are not {', '.join(keys)}; see those in {AXES}")
    return fields


def axes_path(given: str, files: list[EpisodeFile]) -> Path:
    """--axes, else the file of the world that all episodes name in their source. ValueError when
    one names none, or another one than the first."""
    if given:
        return Path(given)
    world = named_world(files[0])
    for file in files:
        other_world = named_world(file)
        if other_world != world:
            raise ValueError(
                f"{file}: of {other_world} by its source {file.source!r}, but {files[0]} is of "
                f"{world}; keep worlds in folders of their own, or say with --axes FILE which "
                "numbers are the hand's place in all of them"
            )
    return AXES / f"{world}.json"


def named_world(file: EpisodeFile) -> str:
    """That of WORLDS which an episode's source names. ValueError when it names none."""
    for world in WORLDS:
        if re.search(rf"(?<![a-z]){world}", file.source.lower()):
            return world
    if file.source.startswith(("spatial/", "object/", "goal/", "long/")):  # as benchmarks/libero.py
        return "libero"
    raise ValueError(
        f"{file}: axes of {file.source or 'an unnamed source'!r} are unknown; say with --axes FILE "
        f"which numbers of the state are the hand's place, as the files in {AXES} do"
    )


# ---- Camera -----------------------------------------------------------------------------------


class Camera(NamedTuple):
    """Where places show in the images."""

    matrix: np.ndarray  # (3, 4): (x, y, z, 1), m, as in the state -> (u w, v w, w), pixels
    size: list[float]  # height and width in those pixels

    def project(self, places: np.ndarray) -> np.ndarray:
        """Places (N, 3), m -> (N, 2) x, y as shares of width and height; NaN behind the camera."""
        return project(self.matrix, places) / self.size[::-1]


def read_camera(path: str | Path) -> Camera:
    """A camera from a file. ValueError naming what is wrong."""
    fields = read_object(path, Camera._fields)
    try:
        camera = Camera(np.array(fields["matrix"], float), np.array(fields["size"], float))
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: {e}; give numbers") from e
    fits = camera.matrix.shape == (3, 4) and camera.size.shape == (2,)
    if not fits or not np.isfinite(camera.matrix).all() or not (camera.size > 0).all():
        raise ValueError(f'{path}: "matrix" must be 3 x 4, and "size" height and width')
    return camera


# ---- Motion of an episode ------------------------------------------------------------------------

RESTING = 0.1  # of the fast tenth's speed: slower than this the hand rests
SLOW = 0.4  # of it: who closes the fingers in faster motion grasps nothing
MOVED = 0.02  # m from where the gripper changed: it has been grasped, or let go


class Motion(NamedTuple):
    """What a recorded episode tells of its steps."""

    file: EpisodeFile
    position: np.ndarray  # (T, 3) m, of the hand from the origin of the axes
    closed: np.ndarray  # (T,) whether the gripper is
    waypoint: np.ndarray  # (T,) the step of the next one; the last step has none and names itself
    primitive: list[str]  # T of reach, grasp, lift, carry, place, release, push
    ahead: int  # steps that "next" means
    hand_pixel: np.ndarray | None  # (T, 2) x, y as shares of width and height; NaN: not in sight
    object_position: np.ndarray  # (T, N, 3) m, from the origin; NaN: not there
    object_pixel: np.ndarray | None  # (T, N, 2)
    target: np.ndarray  # (T,) the object that the hand is going for; -1: none, or not known
    held: np.ndarray  # (T,) the object that the hand holds; -1: none, or not known

    @property
    def objects(self) -> list[str]:
        """N names."""
        return self.file.objects if self.object_position.shape[1] else []


def read_motion(file: EpisodeFile, axes: Axes, seconds: float, camera: Camera | None) -> Motion:
    """The motion of an episode; "next" means so many seconds. A camera is taken before pixels that
    are recorded. ValueError naming the episode."""
    # 1. the header
    steps = len(file)
    if steps < 2:
        raise ValueError(f"{file}: one frame, in which nothing moves; delete or record it again")
    if not file.fps:
        raise ValueError(f"{file}: its rate (fps) is not recorded; add it to the header")
    if not file.task.strip():
        raise ValueError(f"{file}: no instruction (task); add it to the header or delete it")
    # 2. places, in the frame of the state
    hand = file.state[:, axes.position].astype(np.float64) * axes.metres  # (T, 3)
    things = np.zeros((steps, 0, 3))  # (T, N, 3)
    if file.object_position is not None:
        things = file.object_position.astype(np.float64)
    hand_pixel = file.hand_pixel
    object_pixel = file.object_pixel
    if camera:
        hand_pixel = camera.project(hand)
        object_pixel = camera.project(things.reshape(-1, 3)).reshape(*things.shape[:2], 2)
    # 3. what moves how
    closed = gripper_closed(file, axes.gripper)
    ahead = max(1, round(seconds * file.fps))
    distance = np.linalg.norm(np.diff(hand, axis=0), axis=1)
    speed = np.append(distance, distance[-1])  # (T,) m a step
    fast = np.quantile(speed, 0.9)
    target = np.full(steps, -1)
    if file.targets is not None and things.shape[1]:
        target = np.array(file.targets)
    held = held_objects(hand, things, closed)
    return Motion(
        file=file,
        position=hand - axes.origin,
        closed=closed,
        waypoint=next_waypoints(closed, speed < RESTING * fast),
        primitive=primitives(hand, closed, speed < SLOW * fast, held, target, ahead),
        ahead=ahead,
        hand_pixel=hand_pixel,
        object_position=things - axes.origin,
        object_pixel=object_pixel,
        target=target,
        held=held,
    )


def gripper_closed(file: EpisodeFile, gripper: Gripper) -> np.ndarray:
    """Whether the gripper is closed at each step (T,): over halfway from open to closed."""
    values = file.state if gripper.of == "state" else file.action
    opened = np.array(gripper.open, float)
    span = np.array(gripper.closed, float) - opened
    closed = (values[:, gripper.dimensions] - opened) @ span > 0.5 * span @ span  # (T,)
    if gripper.of == "action":  # the action of a step shows in the frame of the next one
        closed = np.append(closed[:1], closed[:-1])
    return closed


def next_waypoints(closed: np.ndarray, resting: np.ndarray) -> np.ndarray:
    """For each step the next one at which the gripper has changed, the hand begins to rest or the
    episode ends (T,)."""
    is_waypoint = np.zeros(len(closed), bool)
    is_waypoint[1:] = (closed[1:] != closed[:-1]) | (resting[1:] & ~resting[:-1])
    is_waypoint[-1] = True
    waypoint = np.full(len(closed), len(closed) - 1)
    for t in range(len(closed) - 2, -1, -1):
        waypoint[t] = t + 1 if is_waypoint[t + 1] else waypoint[t + 1]
    return waypoint


def primitives(
    place: np.ndarray,
    closed: np.ndarray,
    slow: np.ndarray,
    held: np.ndarray,
    target: np.ndarray,
    ahead: int,
) -> list[str]:
    """The primitive of each step, of places (T, 3) m; held, target (T,): objects, -1 for none.

    open fingers        reach (or a push, which looks no different)
                        But after they have opened it is release until the hand leaves the place.
    closed, empty       push
                        They are empty when they are closed from the start or closed in fast motion.
                        But a hand that is known to hold an object is not empty.
    closed, holding     lift (it goes up), place (down) or carry (level)
                        But after they have closed it is grasp until the hand leaves the place. And
                        a hand that then stands does what it did in the step before; where there is
                        none, or the fingers were open in it, that is grasp.

    The hand leaves a place when it is over MOVED away, or has another target. It goes where the
    next `ahead` steps lead, up to the next change of the gripper."""
    changes = np.flatnonzero(closed[1:] != closed[:-1]) + 1
    names = []
    holds = False
    changed_at = None  # where the gripper changed, until the hand has left it
    for t, is_closed in enumerate(closed):
        if t and is_closed != closed[t - 1]:
            changed_at = place[t]
            holds = bool(is_closed and slow[t])
            old_target = target[t - 1]
        holds = holds or held[t] >= 0
        if changed_at is not None:
            has_new_target = target[t] >= 0 and target[t] != old_target
            if has_new_target or np.linalg.norm(place[t] - changed_at) > MOVED:
                changed_at = None
        end = min([t + ahead, len(place) - 1, *changes[changes > t][:1]])
        move = place[end] - place[t]  # (3,)
        level = np.linalg.norm(move[:2])
        if not is_closed:
            name = "reach" if changed_at is None else "release"
        elif not holds:
            name = "push"
        elif changed_at is not None:
            name = "grasp"
        elif np.linalg.norm(move) < 0.003:
            was_closed = t > 0 and closed[t - 1]
            name = names[-1] if was_closed else "grasp"
        elif abs(move[2]) > level:
            name = "lift" if move[2] > 0 else "place"
        else:
            name = "carry"
        names.append(name)
    return names


def held_objects(hand: np.ndarray, things: np.ndarray, closed: np.ndarray) -> np.ndarray:
    """The object that the hand holds at each step (T,); -1: none, or not known.

    hand (T, 3), things (T, N, 3), m. In each stretch of steps with closed fingers it is one object
    or none. The object must move, and stay beside the hand from the first of these steps to the
    last; if several do, it is the one whose place from the hand changes least. A pushed object does
    not stay: the fingers have closed before the hand comes to it."""
    held = np.full(len(closed), -1)
    changes = [0, *(np.flatnonzero(closed[1:] != closed[:-1]) + 1), len(closed)]
    for start, end in itertools.pairwise(changes):
        if not closed[start] or not things.shape[1]:
            continue
        path = things[start:end]  # (steps, N, 3)
        beside = path - hand[start:end, None]
        travel = np.linalg.norm(path - path[0], axis=2).max(0)  # (N,) of what is not there NaN
        slip = np.linalg.norm(beside - beside[-1], axis=2).max(0)
        stays = (travel > MOVED) & (slip < MOVED + 0.1 * travel)
        if stays.any():
            held[start:end] = np.where(stays, slip, np.inf).argmin()
    return held
