"""Streets that never were: seeded pictures with exact truth, to train on, to test with and to show.

    Scene(seed, SceneConfig(...)).frame(seconds)     a picture and what is in it, at any moment
    write_sequence(seed, directory, ...)             video.mp4, gt.txt and seqinfo.ini

Nobody's likeness and nobody's footage went into them.
"""

from tracker.deploy.scenes.scene import CAR, CLASSES, PERSON, Scene, SceneConfig, Truth
from tracker.deploy.scenes.sequence import write_sequence

__all__ = ["CAR", "CLASSES", "PERSON", "Scene", "SceneConfig", "Truth", "write_sequence"]
